"""Two hosts on one machine, as network namespaces, and a bad line between them.

The line is a pair of tun devices with a thread that carries packets from one to the other: late,
and some never. It needs no kernel module, as netem does, and loses the same share everywhere.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
MTU = 1500


@dataclass(frozen=True)
class Host:
    """A network namespace with one address on the line."""

    name: str
    address: str

    def inside(self, arguments: Sequence[str | Path]) -> tuple[str, ...]:
        """The command line that runs a program on this host."""
        return ("ip", "netns", "exec", self.name, *map(str, arguments))

    def run(self, *arguments: str | Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a program on this host to its end."""
        return subprocess.run(
            self.inside(arguments), capture_output=True, text=True, timeout=timeout, check=False
        )

    def python(self, program: str) -> subprocess.CompletedProcess[str]:
        """Run a Python program on this host to its end."""
        return self.run(sys.executable, "-c", program)


class Line(threading.Thread):
    """Carries packets both ways, each after `delay` seconds, and loses a share of them."""

    def __init__(self, ends: tuple[int, int], loss: float, delay: float) -> None:
        super().__init__(daemon=True)
        self.carried = self.lost = 0
        self._other = {ends[0]: ends[1], ends[1]: ends[0]}
        self._loss, self._delay = loss, delay
        self._random = random.Random(0)
        self._under_way: deque[tuple[float, int, bytes]] = deque()
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.is_set():
            due = self._under_way[0][0] - time.monotonic() if self._under_way else 0.1
            for end in select.select(list(self._other), [], [], min(max(due, 0.0), 0.1))[0]:
                self._take(end)
            while self._under_way and self._under_way[0][0] <= time.monotonic():
                _, end, packet = self._under_way.popleft()
                with suppress(OSError):
                    os.write(end, packet)

    def _take(self, end: int) -> None:
        packet = os.read(end, MTU + 100)
        if self._random.random() < self._loss:
            self.lost += 1
        else:
            self.carried += 1
            self._under_way.append((time.monotonic() + self._delay, self._other[end], packet))

    def stop(self) -> None:
        self._over.set()
        self.join(5)


def why_not() -> str | None:
    """The reason why this machine cannot have two hosts, if it cannot."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if shutil.which("ip") is None:
        return "the program ip (iproute2) is missing"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun is missing or not allowed"
    name = f"fedclip-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces are not allowed: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=False)
    return None


@contextmanager
def two_hosts(loss: float, delay: float) -> Iterator[tuple[Host, Host, Line]]:
    """Lend two hosts and the line between them; `delay` is in seconds and each way."""
    hosts = (
        Host(f"fedclip-a-{os.getpid()}", "10.77.0.1"),
        Host(f"fedclip-b-{os.getpid()}", "10.77.0.2"),
    )
    with ExitStack() as stack:
        ends = []
        for host, other in (hosts, hosts[::-1]):
            _ip("netns", "add", host.name)
            stack.callback(subprocess.run, ["ip", "netns", "del", host.name], check=False)
            ends.append(_tun(host))
            stack.callback(os.close, ends[-1])
            inside = ("-n", host.name)
            _ip(*inside, "addr", "add", host.address, "peer", other.address, "dev", "line")
            _ip(*inside, "link", "set", "line", "mtu", str(MTU), "up")
            _ip(*inside, "link", "set", "lo", "up")
        line = Line((ends[0], ends[1]), loss, delay)
        line.start()
        stack.callback(line.stop)
        yield (*hosts, line)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _tun(host: Host) -> int:
    """A tun device called `line` on a host; what is sent there can be read here."""
    ends: list[int] = []

    def make() -> None:  # a thread of its own, because it moves to the host
        libc = ctypes.CDLL(None, use_errno=True)
        place = os.open(f"/var/run/netns/{host.name}", os.O_RDONLY)
        try:
            if libc.setns(place, CLONE_NEWNET):
                return
        finally:
            os.close(place)
        end = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", b"line", IFF_TUN | IFF_NO_PI))
        ends.append(end)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert ends, f"no tun device on {host.name}"
    return ends[0]
