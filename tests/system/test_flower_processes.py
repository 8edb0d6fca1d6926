"""Flower's real processes on loopback, with TLS and node keys: who may take part, and who not."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedclip.deploy.addresses import Address, answers, check, free_port
from fedclip.deploy.coordinator import registry
from fedclip.deploy.flower.commands import superlink, supernode
from fedclip.deploy.flower.supervisor import ProcessFailed, Supervised, joined, listening
from fedclip.deploy.keys import folder as keys
from fedclip.errors import UsageError
from tests.deploy.test_keys import rewrite_certificate
from tests.support.flower import PATIENCE, Federation, small_app, until

pytestmark = pytest.mark.federation
pytest.importorskip("flwr")

LARGEST = 1_000_000


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A coordinator that runs; north is registered, south has a key, west is revoked."""
    made = Federation.create(
        tmp_path_factory.mktemp("federation"), ("north", "south", "west"), LARGEST
    )
    with made.coordinator() as coordinator:
        assert coordinator.wait(PATIENCE)
        with made.control() as control:
            for name in ("north", "west"):
                assert registry.register(control, made.keys, name)["registered"] == "now"
            assert registry.revoke(control, made.keys, "west")["revoked"] == 1
        yield made


def test_a_registered_site_joins_works_and_leaves(federation: Federation, tmp_path: Path) -> None:
    app, result = small_app(tmp_path / "app"), tmp_path / "result"
    with federation.site("north") as north:
        assert north.wait(PATIENCE)
        assert federation.statuses()["north"] == "online"
        ending = federation.run(app, numbers=100, result=str(result))
        assert ending[:2] == ("finished", "completed"), ending
        found = json.loads(result.read_text())
        assert (found["replies"], found["sum"], found["sites"]) == (1, 4950.0, ["north"])
    assert federation.statuses()["north"] == "offline"


def test_a_message_that_is_too_large_does_not_arrive(
    federation: Federation, tmp_path: Path
) -> None:
    app, result = small_app(tmp_path / "app"), tmp_path / "result"
    with federation.site("north") as north:
        assert north.wait(PATIENCE)
        # Four bytes each. Flower alone would wait three minutes for the rest of the message.
        ending = federation.run(app, numbers=LARGEST, wait=20, result=str(result))
        assert ending[1] == "completed", ending
    found = json.loads(result.read_text())
    assert found["replies"] == 0
    assert found["slowest"] < 5
    row = keys.check_site(keys.site_folder(federation.keys, "north"))
    log = (federation.folder / "link.log").read_text()
    assert f"the site with key {row['fingerprint']} sends more than {LARGEST} bytes" in log


@pytest.mark.parametrize("name", ["south", "west"], ids=["unregistered", "revoked"])
def test_a_site_that_is_not_registered_is_refused(federation: Federation, name: str) -> None:
    place = keys.site_folder(federation.keys, name)
    with federation.site(name, place if place.exists() else place.with_name("west.old-1")) as site:
        until(lambda: site.last_ending)
        assert not site.is_ready
    assert site.last_ending is not None
    assert site.last_ending.code == 305
    (said,) = [text for text in federation.said if text.startswith(f"site {name} ")]
    assert f"site {name} was not admitted: its key is not registered" in said
    assert f"`fedclip keys register {name}`" in said
    assert said.endswith("starts again in 62 s")
    assert federation.statuses()[name] != "online"


def test_a_revoked_key_stays_revoked(federation: Federation) -> None:
    west = keys.site_folder(federation.keys, "west")
    assert not west.exists()
    shutil.copytree(west.with_name("west.old-1"), west)
    with federation.control() as control, pytest.raises(UsageError, match=r"west has been revoked"):
        registry.register(control, federation.keys, "west")
    shutil.rmtree(west)
    assert federation.statuses()["west"] == "unregistered"


def test_registering_again_changes_nothing(federation: Federation) -> None:
    with federation.control() as control:
        facts = registry.register(control, federation.keys, "north")
        assert facts["registered"] == "already"
        assert len([node for node in control.nodes() if node.name == "north"]) == 1


def test_a_foreign_authority_is_refused(federation: Federation, tmp_path: Path) -> None:
    """The site has the certificate of another coordinator."""
    other = Federation.create(tmp_path, ("north",))
    with (
        federation.site("north", keys.site_folder(other.keys, "north")) as north,
        pytest.raises(
            ProcessFailed, match=r"site north: the certificate is not signed by the authority"
        ),
    ):
        north.wait(PATIENCE)


def test_an_expired_certificate_is_refused(tmp_path: Path) -> None:
    """By Flower's own client, too."""
    late = Federation.create(tmp_path, ("north",))
    process = late.coordinator()
    rewrite_certificate(late.keys, ["localhost", "127.0.0.1"], 1, datetime.now(UTC) - timedelta(2))
    with process as coordinator:
        until(lambda: "Uvicorn running" in coordinator.written())
        assert not coordinator.is_ready
        with (
            late.site("north") as north,
            pytest.raises(
                ProcessFailed, match=r"site north: the coordinator's certificate has expired"
            ),
        ):
            north.wait(PATIENCE)


def test_a_plain_connection_to_the_tls_port_is_refused(
    federation: Federation, tmp_path: Path
) -> None:
    before = federation.statuses()
    with pytest.raises(UsageError, match=rf"{federation.address} .* speaks TLS"):
        check(federation.address, None)
    plain = supernode("east", federation.address, free_port(), tmp_path)
    with Supervised(plain, tmp_path / "log", joined) as east:
        assert not east.wait(15)
    assert federation.statuses() == before


def test_insecure_on_loopback_works_and_says_so(tmp_path: Path) -> None:
    address, said = Address("127.0.0.1", free_port()), []  # type: tuple[Address, list[str]]
    link = superlink(address, tmp_path / "home", tmp_path / "s.db")
    node = supernode("east", address, free_port(), tmp_path / "east")
    ready = listening(address, None)
    with (
        Supervised(link, tmp_path / "link.log", ready, say=said.append) as coordinator,
        Supervised(node, tmp_path / "east.log", joined, say=said.append) as east,
    ):
        assert coordinator.wait(PATIENCE)
        assert east.wait(PATIENCE)
    assert [text.split(":")[0] for text in said] == ["coordinator", "site east"]
    assert all("insecure" in text for text in said)


def test_a_revoked_site_is_sent_away_while_it_is_online(tmp_path: Path) -> None:
    made = Federation.create(tmp_path, ("north",))
    with made.coordinator() as coordinator:
        assert coordinator.wait(PATIENCE)
        with made.control() as control:
            registry.register_all(control, made.keys)
            with made.site("north") as north:
                assert north.wait(PATIENCE)
                registry.revoke(control, made.keys, "north")
                until(lambda: made.said)
                assert not north.is_ready
    assert "site north" in made.said[0]
    assert "revoked" in made.said[0]


def test_kill_9_of_a_site_and_of_the_coordinators_server(tmp_path: Path) -> None:
    """Both come back by themselves, and know each other still."""
    made = Federation.create(tmp_path, ("north",))
    with made.coordinator() as coordinator:
        assert coordinator.wait(PATIENCE)
        with made.control() as control:
            registry.register_all(control, made.keys)
        with made.site("north") as north:
            assert north.wait(PATIENCE)
            assert north.pid is not None
            os.kill(north.pid, signal.SIGKILL)
            until(lambda: made.said)
            assert made.said == ["site north was killed by signal 9; starts again in 62 s"]
            until(lambda: north.starts == 2, 80)
            assert north.wait(PATIENCE), north.written()
            assert north.starts == 2
            assert made.statuses() == {"north": "online"}

            assert coordinator.pid is not None
            os.kill(coordinator.pid, signal.SIGKILL)
            until(lambda: coordinator.starts == 2 and coordinator.is_ready)
            assert answers(made.address, made.keys / "ca.crt")
            until(lambda: made.statuses() == {"north": "online"})
            app, result = small_app(tmp_path / "app"), tmp_path / "result"
            assert made.run(app, numbers=3, result=str(result))[1] == "completed"
            assert json.loads(result.read_text())["sites"] == ["north"]
            assert north.starts == 2
