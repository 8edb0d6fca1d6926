"""`fedclip serve` as a process of its own: many clients at once, hostile ones, a browser."""

from __future__ import annotations

import asyncio
import http.client
import io
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedclip.adapters import inspect as inspection

pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

CLIENTS = 100
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def address(finished_run: Path) -> Iterator[str]:
    """Where a server of the run listens; it must end well on Ctrl-C."""
    command = [
        sys.executable,
        "-m",
        "fedclip",
        "serve",
        finished_run,
        "--port",
        "0",
        "--max-mb",
        "1",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        try:
            line = process.stderr.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            assert found, line
            yield found[0]
        finally:
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_hundred_clients_at_once(address: str, finished_run: Path, tmp_path: Path) -> None:
    """Each has a connection and an image of its own, and gets what `predict` says of it."""
    paths = [tmp_path / f"{number}.png" for number in range(CLIENTS)]
    for number, path in enumerate(paths):
        path.write_bytes(picture(number))
    expected = inspection.predict(finished_run, paths)

    async def ask(path: Path) -> Any:
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            return await client.post(f"{address}/predict", content=path.read_bytes())

    async def go() -> list[Any]:
        return await asyncio.gather(*map(ask, paths))

    answers = asyncio.run(go())
    assert [answer.status_code for answer in answers] == [200] * CLIENTS
    for answer, prediction in zip(answers, expected, strict=True):
        assert answer.json()["scores"] == pytest.approx(prediction["scores"], rel=1e-4)


def test_an_endless_upload_is_cut_off(address: str) -> None:
    """A chunked body without an end: the answer comes although the client never stops."""
    host = address.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=30)
    connection.putrequest("POST", "/predict")
    connection.putheader("Content-Type", "image/png")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    piece = b"%x\r\n%s\r\n" % (65536, bytes(65536))
    sent = 0
    try:
        for _ in range(10_000):
            connection.send(piece)
            sent += 65536
    except OSError:  # the server has closed the connection
        pass
    answer = connection.getresponse()
    assert answer.status == 413
    assert "1 MB" in json.load(answer)["error"]
    assert sent < 100_000_000
    with urllib.request.urlopen(f"{address}/health", timeout=30) as reply:
        assert json.load(reply)["status"] == "ok"


def test_clients_that_go_away_do_no_harm(address: str) -> None:
    for _ in range(5):
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
        connection.putrequest("POST", "/predict")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b"x" * 10)
        connection.close()
    with urllib.request.urlopen(f"{address}/health", timeout=30) as reply:
        assert json.load(reply)["status"] == "ok"


class Browser:
    """A page of Chromium, spoken to by its DevTools protocol."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.requests: list[str] = []
        self.complaints: list[str] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=30))
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            if message.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.complaints.append(json.dumps(message["params"]))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def value(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        until = time.monotonic() + 30
        while not (found := self.value(expression)):
            assert time.monotonic() < until, f"{expression}; {self.complaints}"
            time.sleep(0.05)
        return found


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    client = pytest.importorskip("websockets.sync.client")
    profile = tmp_path / "profile"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-dev-shm-usage", "--remote-debugging-port=0", f"--user-data-dir={profile}",
        "about:blank",
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            until = time.monotonic() + 60
            told = profile / "DevToolsActivePort"
            while not told.exists() or "\n" not in told.read_text():
                assert time.monotonic() < until
                time.sleep(0.05)
            port = told.read_text().split("\n")[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=30) as reply:
                pages = [page for page in json.load(reply) if page["type"] == "page"]
            with client.connect(
                pages[0]["webSocketDebuggerUrl"], proxy=None, max_size=None
            ) as socket:
                yield Browser(socket)
        finally:
            process.terminate()
            process.wait(timeout=30)


ROWS = "[...document.querySelectorAll('.row span:first-child')].map(x => x.textContent)"


def test_the_page_in_a_browser(address: str, browser: Browser, tmp_path: Path) -> None:
    """Choose an image, see bars; type labels, see theirs; choose no image, see why not."""
    (tmp_path / "picture.png").write_bytes(picture(0))
    (tmp_path / "note.png").write_text("no image")
    for domain in ("Network", "Runtime", "Log", "Page", "DOM"):
        browser.call(f"{domain}.enable")
    browser.call("Page.navigate", url=address)
    browser.wait_for("document.readyState === 'complete' && !!document.getElementById('labels')")
    assert "seven" in browser.wait_for("document.getElementById('labels').placeholder")

    def choose(name: str) -> None:
        root = browser.call("DOM.getDocument")["root"]["nodeId"]
        node = browser.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        browser.call("DOM.setFileInputFiles", nodeId=node, files=[str(tmp_path / name)])

    choose("picture.png")
    browser.wait_for("document.querySelectorAll('.row').length === 10")
    widths = browser.value("[...document.querySelectorAll('.bar')].map(x => x.offsetWidth)")
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 0
    message = browser.value("document.getElementById('message').textContent")
    assert message.startswith(browser.value(ROWS)[0])
    browser.call(
        "Runtime.evaluate",
        expression="const box = document.getElementById('labels'); box.value = '<b>cat</b>, a dog';"
        "box.dispatchEvent(new Event('change'))",
    )
    browser.wait_for("document.querySelectorAll('.row').length === 2")
    assert set(browser.value(ROWS)) == {"<b>cat</b>", "a dog"}
    assert browser.complaints == []
    choose("note.png")
    browser.wait_for("document.getElementById('message').className === 'error'")
    assert "not an image" in browser.value("document.getElementById('message').textContent")
    browser.call("Page.navigate", url=f"{address}/docs")
    browser.wait_for("document.querySelectorAll('h2').length === 7")
    outside = [u for u in browser.requests if not u.startswith((address, "blob:", "data:"))]
    assert outside == []
