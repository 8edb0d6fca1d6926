"""Which sites are admitted: one key for each name, and none that was revoked."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fedclip.deploy.coordinator import registry
from fedclip.deploy.coordinator.control import ControlRefused, Node
from fedclip.deploy.keys import certificates
from fedclip.deploy.keys import folder as keys
from fedclip.errors import UsageError


class FakeControl:
    """A SuperLink's memory: a key is taken once, and stays taken."""

    def __init__(self) -> None:
        self.known: dict[int, Node] = {}

    def nodes(self) -> list[Node]:
        return list(self.known.values())

    def register(self, public_key: bytes, name: str) -> int:
        if any(node.public_key == public_key for node in self.nodes()):
            raise ControlRefused("Public key already in use.")
        number = len(self.known) + 1
        self.known[number] = Node(number, name, "registered", public_key)
        return number

    def unregister(self, node_id: int) -> None:
        old = self.known[node_id]
        self.known[node_id] = Node(node_id, old.name, "unregistered", old.public_key)


@pytest.fixture
def control() -> Any:
    return FakeControl()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    keys.init(tmp_path / "keys", ["localhost"])
    for name in ("north", "south"):
        keys.site(tmp_path / "keys", name)
    return tmp_path / "keys"


def statuses(control: FakeControl) -> list[tuple[str, str]]:
    return [(node.name, node.status) for node in control.nodes()]


def test_a_site_is_registered_once(control: Any, folder: Path) -> None:
    assert registry.register(control, folder, "north") == {
        "site": "north", "registered": "now", "node_id": "1",
    }  # fmt: skip
    assert registry.register(control, folder, "north")["registered"] == "already"
    (node,) = control.nodes()
    path = folder / "sites/north/site.key.pub"
    assert node.public_key == certificates.public_pem(certificates.read_public(path))


def test_a_new_key_takes_the_place_of_the_old(control: Any, folder: Path) -> None:
    registry.register_all(control, folder)
    keys.site(folder, "north", force=True)
    assert registry.register(control, folder, "north")["registered"] == "now"
    assert statuses(control) == [
        ("north", "unregistered"),
        ("south", "registered"),
        ("north", "registered"),
    ]


def test_a_revoked_site_is_never_admitted_again(control: Any, folder: Path) -> None:
    assert registry.register_all(control, folder) == []
    facts = registry.revoke(control, folder, "north")
    assert facts["revoked"] == 1
    assert statuses(control) == [("north", "unregistered"), ("south", "registered")]
    assert registry.register_all(control, folder) == []
    # Nor by a coordinator that has forgotten everything.
    fresh = FakeControl()
    registry.register_all(fresh, folder)  # type: ignore[arg-type]
    assert statuses(fresh) == [("south", "registered")]
    # If its folder is put back, it is named, and the others are admitted all the same.
    shutil.copytree(facts["moved_aside"], folder / "sites/north")
    (said,) = registry.register_all(control, folder)
    command = f"fedclip keys site north --keys {folder} --force"
    assert f"the key of site north has been revoked; `{command}`" in said


def test_revoking_goes_by_name_and_by_key(control: Any, folder: Path) -> None:
    registry.register(control, folder, "north")
    keys.site(folder, "north", force=True)  # another key, not registered
    assert registry.revoke(control, folder, "north")["revoked"] == 1
    with pytest.raises(UsageError, match="north is not registered"):
        registry.revoke(control, folder, "north")


def test_a_folder_that_cannot_be_moved_is_named(
    control: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Path, target: Path) -> None:
        raise OSError(30, "Read-only file system")

    registry.register(control, folder, "north")
    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(UsageError, match=r"north is sent away, but .*Read-only file system"):
        registry.revoke(control, folder, "north")
    assert statuses(control) == [("north", "unregistered")]


def test_the_list_has_registered_and_unknown_sites(control: Any, folder: Path) -> None:
    registry.register(control, folder, "south")
    north, south = registry.sites(control, folder)
    assert (north["site"], north["status"]) == ("north", "unknown to the coordinator")
    assert (south["site"], south["status"], south["node_id"]) == ("south", "registered", "1")
    assert south["fingerprint"] == keys.check_site(folder / "sites/south")["fingerprint"]


def test_a_site_without_a_key(control: Any, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"site west has no key in .* \(there are: north, south\)"):
        registry.register(control, folder, "west")
