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

from fedclip.deploy import keys
from fedclip.deploy.addresses import Address
from fedclip.deploy.processes import superlink, supernode
from fedclip.deploy.supervised import FOR_NODES, Supervised, joined
from tests.flower_help import PATIENCE, small_app, until
from tests.network_help import Host, Line, two_hosts, why_not

pytestmark = pytest.mark.federation
pytest.importorskip("flwr")

LOSS, DELAY = 0.05, 0.2
PORT = 8000

START = """
import time
from pathlib import Path
from fedclip.deploy.addresses import Address
from fedclip.deploy.control import Control

with Control(Address("127.0.0.1", {port}), Path({authority!r})) as control:
    run = control.start_run(Path({app!r}), {settings!r})
    while control.run_status(run)[0] != "finished":
        time.sleep(0.5)
    print(control.run_status(run)[1])
"""


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


def test_a_federation_over_a_bad_line(line: tuple[Host, Host, Line], tmp_path: Path) -> None:
    coordinator, site, wire = line
    folder = tmp_path / "keys"
    keys.init(folder, [coordinator.address])
    keys.site(folder, "north")
    north = keys.site_folder(folder, "north")
    there = Address(coordinator.address, PORT)
    link = superlink(Address("0.0.0.0", PORT), tmp_path / "home", tmp_path / "s.db", folder)
    node = supernode("north", there, 9000, tmp_path / "north", north, {"site": "north"})
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

            app, result = small_app(tmp_path / "app"), tmp_path / "result"
            program = START.format(
                port=PORT,
                authority=str(folder / "ca.crt"),
                app=str(app),
                settings={"numbers": 300_000, "result": str(result)},
            )
            done = coordinator.run(sys.executable, "-c", program, timeout=300)
            assert done.stdout.strip() == "completed", done.stderr
            found = json.loads(result.read_text())
            assert found["sites"] == ["north"]
            assert found["sum"] == pytest.approx(300_000 * 299_999 / 2, rel=1e-6)
            code, said = fedclip(coordinator, "keys", "list", "--keys", folder, "--json")
            assert [row["status"] for row in json.loads(said)] == ["online"]
    until(lambda: client.pid is None)
    assert wire.lost > 10
