"""Two hosts with a bad line between them: 5 % of packets are lost, the others take 200 ms."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from fedclip.deploy.addresses import Address
from fedclip.deploy.flower.commands import superlink, supernode
from fedclip.deploy.flower.supervisor import FOR_NODES, Supervised, joined
from fedclip.deploy.keys import folder as keys
from tests.support.flower import PATIENCE
from tests.support.machines import SIZES, tree, write_images
from tests.support.network import Host, Line, two_hosts, why_not

pytestmark = pytest.mark.federation
pytest.importorskip("flwr")

LOSS, DELAY = 0.05, 0.2
PORT = 8000

SITES = ("north", "south")


@pytest.fixture(scope="module")
def line() -> Iterator[tuple[Host, Host, Line]]:
    if reason := why_not():
        pytest.skip(reason)
    with two_hosts(LOSS, DELAY) as hosts:
        yield hosts


def fedclip(host: Host, *arguments: str | Path) -> tuple[int, str]:
    done = host.run(sys.executable, "-m", "fedclip", *arguments)
    return done.returncode, done.stdout + done.stderr


def test_the_line_is_as_bad_as_it_should_be(line: tuple[Host, Host, Line]) -> None:
    """Without this the other tests would show nothing."""
    coordinator, site, wire = line
    echo = (
        "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('', 7)); "
        "[s.sendto(*s.recvfrom(99)) for _ in range(10_000)]"
    )
    ask = (
        "import socket, time; s = socket.socket(type=socket.SOCK_DGRAM); s.settimeout(2)\n"
        f"start = time.monotonic(); [(s.sendto(b'x', ('{coordinator.address}', 7)), "
        "time.sleep(0.003)) for _ in range(400)]\ncount = 0\n"
        "try:\n    while True:\n        s.recv(9); count += 1\n"
        "except TimeoutError: print(count)"
    )
    with subprocess.Popen(coordinator.inside((sys.executable, "-c", echo))) as process:
        time.sleep(1)
        done = site.python(ask)
        process.kill()
    # Both ways: 0.95 squared of 400, four standard deviations of 5.9 around it.
    assert abs(int(done.stdout) - 361) < 4 * 5.9, done.stderr
    assert wire.lost > 0


def test_a_packet_takes_its_time(line: tuple[Host, Host, Line]) -> None:
    """A refused connection is one packet there and one back; if one is lost it takes longer."""
    coordinator, site, _ = line
    ask = (
        "import socket, time; start = time.monotonic(); "
        f"socket.socket().connect_ex(('{coordinator.address}', 9)); print(time.monotonic() - start)"
    )
    assert 2 * DELAY <= float(site.python(ask).stdout) < 2 * DELAY + 4


def test_who_may_do_what_over_a_bad_line(line: tuple[Host, Host, Line], tmp_path: Path) -> None:
    coordinator, site, wire = line
    folder = tmp_path / "keys"
    keys.init(folder, [coordinator.address])
    keys.site(folder, "north")
    north = keys.site_folder(folder, "north")
    there = Address(coordinator.address, PORT)
    link = superlink(Address("0.0.0.0", PORT), tmp_path / "home", tmp_path / "s.db", folder)
    node = supernode("north", there, 9000, tmp_path / "north", north, {"SITE": "north"})
    link = replace(link, arguments=coordinator.inside(link.arguments), listens=None)
    node = replace(node, arguments=site.inside(node.arguments), listens=None)

    def running(log: str) -> bool:
        return "Uvicorn running" in log

    with Supervised(link, tmp_path / "link.log", running) as server:
        assert server.wait(PATIENCE), server.written()
        code, said = fedclip(coordinator, "keys", "register", "north", "--keys", folder)
        assert code == 0, said
        before = wire.carried
        with Supervised(node, tmp_path / "node.log", joined, FOR_NODES) as client:
            assert client.wait(PATIENCE), client.written()
            assert wire.carried > before

            # From the site's machine, by the same port, nothing can be controlled.
            for command in (["list"], ["register", "north"], ["revoke", "north"]):
                code, said = fedclip(
                    site, "keys", *command, "--keys", folder, "--coordinator", str(there)
                )
                assert code == 1
                assert "only the coordinator's own machine may ask for this" in said

            code, said = fedclip(coordinator, "keys", "list", "--keys", folder, "--json")
            assert [row["status"] for row in json.loads(said)] == ["online"]


def test_a_whole_federation_over_a_bad_line(line: tuple[Host, Host, Line], tmp_path: Path) -> None:
    coordinator, site, wire = line
    write_images(tmp_path, SIZES)
    keys.init(tmp_path / "keys", [coordinator.address])
    deploy = {
        "address": f"0.0.0.0:{PORT}",
        "keys": str(tmp_path / "keys"),
        "sites": list(SITES),
        "round_deadline": 120,
        "quorum": len(SITES),
    }
    values = tree(tmp_path, deploy=deploy, federation={"num_clients": len(SITES)})
    (tmp_path / "coordinator.yaml").write_text(yaml.safe_dump(values))
    commands = [
        site.inside([sys.executable, "-m", "fedclip", "site", "--config", f"{n}.yaml"])
        for n in (str(tmp_path / name) for name in SITES)
    ]
    for name in SITES:
        keys.site(tmp_path / "keys", name)
        own = {
            "name": name,
            "coordinator": f"{coordinator.address}:{PORT}",
            "keys": f"keys/sites/{name}",
            "state": f"state-{name}",
            "device": "cpu",
            "data": {"path": f"sites/{name}"},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(own))
    before, processes = wire.lost, [subprocess.Popen(command) for command in commands]
    try:
        done = coordinator.run(
            *(sys.executable, "-m", "fedclip", "coordinate", tmp_path / "coordinator.yaml"),
            *("-o", tmp_path / "run"),
            timeout=500,
        )
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(60)
    assert done.returncode == 0, done.stderr
    assert "left out" not in done.stderr
    rounds = list(map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()))
    trained = [row for row in rounds if row["server_round"]]
    assert len(trained) == 2, rounds
    assert wire.lost > before
