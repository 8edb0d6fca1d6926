"""Control of a running SuperLink: its sites and its runs.

Only the SuperLink's own machine can do this (`guard`).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedclip.deploy.addresses import Address, check
from fedclip.deploy.flower import private
from fedclip.errors import FedclipError


class ControlRefused(FedclipError):
    """The SuperLink did not do what it was asked for."""


@dataclass(frozen=True)
class Node:
    """A site as the SuperLink knows it; status is registered, online, offline or unregistered.

    `public_key` is in PEM; `node_id` is Flower's, new with each registration.
    """

    node_id: int
    name: str
    status: str
    public_key: bytes


class Control:
    """A connection to a SuperLink; a context manager.

    `authority` is the ca.crt that its certificate is signed by, None for an insecure one.
    Raises UsageError or Unreachable, in plain words, if it is not there or not the right one.
    """

    def __init__(self, address: Address, authority: Path | None) -> None:
        check(address, authority)
        version = private.load("RuntimeVersionHttpInterceptor")(component_name="flwr CLI")
        self._client = private.load("ControlHttpClient").from_server_address(
            server_address=str(address),
            insecure=authority is None,
            root_certificates=None if authority is None else authority.read_bytes(),
            interceptors=[version],
        )

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def nodes(self) -> list[Node]:
        """All registered sites, current and former."""
        answer = _ask(self._client.ListNodes, private.load("ListNodesRequest")())
        return [
            Node(node.node_id, node.name, node.status, node.public_key)
            for node in answer.nodes_info
        ]

    def register(self, public_key: bytes, name: str) -> int:
        """Admit a site by its public key in PEM; gives its node id."""
        request = private.load("RegisterNodeRequest")(public_key=public_key, name=name)
        return int(_ask(self._client.RegisterNode, request).node_id)

    def unregister(self, node_id: int) -> None:
        """Take a site's admission away, also while it is online."""
        request = private.load("UnregisterNodeRequest")(node_id=node_id)
        _ask(self._client.UnregisterNode, request)

    def start_run(
        self, app: Path, settings: Mapping[str, bool | int | float | str] | None = None
    ) -> int:
        """Send an app's folder to the SuperLink and start it; gives the run's number.

        `settings` replace values of the app's own configuration.
        """
        with warnings.catch_warnings():  # of libraries that Flower uses in an older way
            warnings.simplefilter("ignore", DeprecationWarning)
            content = private.load("build_fab_from_disk")(app)
        bundle = private.load("Fab")(hashlib.sha256(content).hexdigest(), content, {})
        request = private.load("StartRunRequest")(
            fab=private.load("fab_to_proto")(bundle),
            override_config=private.load("user_config_to_proto")(dict(settings or {})),
        )
        answer = _ask(self._client.StartRun, request)
        if not answer.HasField("run_id"):
            raise ControlRefused("Flower did not start the run; the coordinator's log says why")
        return int(answer.run_id)

    def run_status(self, run: int) -> tuple[str, str, str]:
        """A run's status and, once it is finished, how it ended, and details."""
        answer = _ask(self._client.ListRuns, private.load("ListRunsRequest")(run_id=run))
        status = answer.run_dict[run].status
        return status.status, status.sub_status, status.details


def _ask(method: Callable[[Any], Any], request: Any) -> Any:
    import httpx

    try:
        return method(request)
    except httpx.HTTPStatusError as error:
        raise ControlRefused(_reason(error.response)) from None
    except httpx.HTTPError as error:
        raise ControlRefused(f"the coordinator does not answer: {error}") from None


def _reason(response: Any) -> str:
    error = private.load("FlowerError").from_json(response.text)
    if error is None:
        return f"the coordinator refused: {response.text.strip() or response.status_code}"
    details = f" ({error.public_details})" if error.public_details else ""
    return f"the coordinator refused: {error.message}{details}"
