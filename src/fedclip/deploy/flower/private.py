"""Every name of Flower's private modules that fedclip uses, loaded here and nowhere else.

`flwr.app`, `flwr.clientapp` and `flwr.serverapp` are Flower's public API; all else may change with
any version, so that the exact version is pinned and a test says what of it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

PRIVATE = {
    "ControlHttpClient": "flwr.supercore.control",
    "RuntimeVersionHttpInterceptor": "flwr.supercore.interceptors.http.runtime_version",
    "ListNodesRequest": "flwr.proto.control_pb2",
    "RegisterNodeRequest": "flwr.proto.control_pb2",
    "UnregisterNodeRequest": "flwr.proto.control_pb2",
    "StartRunRequest": "flwr.proto.control_pb2",
    "ListRunsRequest": "flwr.proto.control_pb2",
    "build_fab_from_disk": "flwr.cli.build",
    "fab_to_proto": "flwr.common.serde",
    "user_config_to_proto": "flwr.common.serde",
    "Fab": "flwr.supercore.fab",
    "FlowerError": "flwr.supercore.error",
    "flower_superlink": "flwr.superlink.cli",
    "flower_supernode": "flwr.supernode.cli",
}
"""What is called, by name, and its module."""

REPLACED = {
    "get_middleware": "flwr.superlink.extensions",
    "_pull_and_store_message": "flwr.supernode.start_client_internal",
    "_verify_fab": "flwr.supernode.start_client_internal",
}
"""What is replaced in a process of Flower's, by name, and the module that looks it up there."""


def load(name: str) -> Any:
    """The object of this name; one that is not in the tables is none of ours."""
    return getattr(import_module((PRIVATE | REPLACED)[name]), name)


def replace(name: str, value: Any) -> None:
    """Put another function in the place of one of Flower's, for this process."""
    module = import_module(REPLACED[name])
    getattr(module, name)  # is there
    setattr(module, name, value)
