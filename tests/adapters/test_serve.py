"""`fedclip serve`, in this process: answers, limits and errors."""

from __future__ import annotations

import asyncio
import contextlib
import io
import struct
import sys
import tracemalloc
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedclip import create_clip_model
from tests.conftest import Command

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

from starlette.requests import Request  # noqa: E402

from fedclip.adapters.predict import Predictor  # noqa: E402
from fedclip.adapters.serve import guard, uploads  # noqa: E402
from fedclip.adapters.serve.app import MAX_LABELS, create_app  # noqa: E402
from fedclip.adapters.serve.guard import known_hosts  # noqa: E402

MEGABYTE = 1_000_000


def predictor(**keys: Any) -> Predictor:
    import torch

    model = create_clip_model({"model_name": "tiny", **keys}, class_names=["one", "two", "three"])
    return Predictor(model, torch.device("cpu"), "fp32")


@pytest.fixture(scope="module")
def served() -> Predictor:
    return predictor()


def encoded(kind: str = "PNG", size: tuple[int, int] = (30, 20), seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def claiming(width: int, height: int) -> bytes:
    """A PNG of few bytes that says it has so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def ask(who: Predictor, *requests: dict[str, Any], max_bytes: int = MEGABYTE) -> list[Any]:
    """Answers of a fresh application to requests, one after another."""

    async def go() -> list[Any]:
        transport = httpx.ASGITransport(
            app=create_app(who, max_bytes=max_bytes), raise_app_exceptions=False
        )
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return [await client.request(**request) for request in requests]

    return asyncio.run(go())


def post(path: str, body: Any, kind: str | None = "image/png") -> dict[str, Any]:
    headers = {"Content-Type": kind} if kind else {}
    return {"method": "POST", "url": path, "content": body, "headers": headers}


def get(path: str) -> dict[str, Any]:
    return {"method": "GET", "url": path}


def test_predict_and_embed_give_what_the_model_gives(served: Predictor) -> None:
    data = encoded()
    answer, features = ask(served, post("/predict", data), post("/embed", data))
    pixels = served.to_pixels(uploads.decode_upload(data))[None]
    (scores,) = served.classify(pixels)
    assert answer.status_code == features.status_code == 200
    assert list(answer.json()["scores"].items()) == list(scores.items())
    assert answer.json()["label"] == next(iter(scores))
    assert answer.json()["confidence"] == max(scores.values())
    vector = np.array(features.json()["embedding"])
    np.testing.assert_allclose(vector, served.embed(pixels)[0], rtol=1e-6)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_usual_formats_are_taken(served: Predictor, kind: str) -> None:
    (answer,) = ask(served, post("/predict", encoded(kind), f"image/{kind.lower()}"))
    assert answer.status_code == 200


def test_labels_are_for_one_request_only(served: Predictor) -> None:
    data = encoded()
    plain, other, repeated, again, first = ask(
        served,
        post("/predict", data),
        post("/predict?labels=a+cat,%20a%20dog", data),
        post("/predict?labels=a+cat&labels=a+dog", data),
        post("/predict", data),
        post("/predict?top=1", data),
    )
    assert set(other.json()["scores"]) == {"a cat", "a dog"}
    assert other.json() == repeated.json()
    assert plain.json() == again.json()
    assert first.json()["scores"] == {plain.json()["label"]: plain.json()["confidence"]}


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/predict?labels=a,,b", "one of them is empty"),
        ("/predict?labels=a,a", "names a class twice"),
        ("/predict?labels=" + ",".join(map(str, range(MAX_LABELS + 1))), "names at most"),
        ("/predict?labels=" + 201 * "a", "names at most"),
        ("/predict?top=0", "top: "),
        ("/predict?top=x", "top: "),
    ],
)
def test_bad_queries_are_explained(served: Predictor, path: str, words: str) -> None:
    (answer,) = ask(served, post(path, encoded()))
    assert answer.status_code == 422
    assert words in answer.json()["error"]


def test_a_linear_head_refuses_labels() -> None:
    linear = predictor(head="linear")
    refused, health, good = ask(
        linear,
        post("/predict?labels=a,b", encoded()),
        get("/health"),
        post("/predict", encoded()),
    )
    assert refused.status_code == 422
    assert "linear head" in refused.json()["error"]
    assert health.json()["labels_allowed"] is False
    assert set(good.json()["scores"]) == {"one", "two", "three"}


@pytest.mark.parametrize(
    ("body", "kind", "code", "words"),
    [
        (b"no image", "text/plain", 415, "its content type is text/plain"),
        (b"no image", "image/png", 422, "not an image in one of the formats"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", None, 422, "not an image"),
        (b"", "image/png", 422, "the body is empty"),
        (encoded()[:200], "image/png", 422, "cannot be read"),
        (claiming(60_000, 60_000), "image/png", 413, "far too many pixels"),
        (claiming(12_000, 12_000), "image/png", 413, "far too many pixels"),
        (claiming(9_000, 9_000), "image/png", 413, "9000 x 9000 pixels"),
        (claiming(40_000, 100), "image/png", 422, "cannot be read"),
    ],
)
def test_what_is_no_image_is_refused_and_the_server_stays_up(
    served: Predictor, body: bytes, kind: str | None, code: int, words: str
) -> None:
    refused, good = ask(served, post("/embed", body, kind), post("/embed", encoded(), None))
    assert refused.status_code == code
    assert words in refused.json()["error"]
    assert good.status_code == 200


def test_a_declared_size_over_the_limit_is_refused_unread(served: Predictor) -> None:
    read: list[int] = []

    async def body() -> AsyncIterator[bytes]:
        read.append(1)
        yield b"x"

    request = post("/predict", body())
    request["headers"]["Content-Length"] = "1001"
    (answer,) = ask(served, request, max_bytes=1000)
    assert answer.status_code == 413
    assert "0.001 MB" in answer.json()["error"]
    assert answer.headers["connection"] == "close"
    assert read == []


def test_a_chunked_body_is_refused_while_it_comes(served: Predictor) -> None:
    sent: list[int] = []

    async def body() -> AsyncIterator[bytes]:
        for number in range(1000):
            sent.append(number)
            yield bytes(100)

    (answer,) = ask(served, post("/predict", body()), max_bytes=1000)
    assert answer.status_code == 413
    assert len(sent) == 11  # the first chunk past the limit is the last one that is asked for


def test_a_body_of_exactly_the_limit_is_taken(served: Predictor) -> None:
    data = encoded()
    (good,) = ask(served, post("/embed", data), max_bytes=len(data))
    (refused,) = ask(served, post("/embed", data), max_bytes=len(data) - 1)
    assert (good.status_code, refused.status_code) == (200, 413)


def test_a_body_that_does_not_come_is_given_up(
    served: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_SECONDS", 0.05)

    async def body() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.sleep(30)

    (answer,) = ask(served, post("/predict", body()))
    assert answer.status_code == 408


def test_the_unforeseen_is_json_too(served: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(pixels: Any) -> Any:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(served, "embed", fail)
    answer, unknown, wrong = ask(served, post("/embed", encoded()), get("/none"), get("/embed"))
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert (unknown.status_code, wrong.status_code) == (404, 405)
    assert all("error" in reply.json() for reply in (answer, unknown, wrong))


def test_health_and_the_description_for_programs(served: Predictor) -> None:
    health, described = ask(served, get("/health"), get("/openapi.json"))
    assert health.json() == {
        "status": "ok",
        "model": "tiny",
        "head": "text",
        "classes": ["one", "two", "three"],
        "labels_allowed": True,
        "max_mb": 1.0,
    }
    paths = described.json()["paths"]
    assert {path: list(methods) for path, methods in paths.items()} == {
        "/predict": ["post"],
        "/embed": ["post"],
        "/health": ["get"],
    }
    body = paths["/predict"]["post"]["requestBody"]["content"]
    assert body == {"image/*": {"schema": {"type": "string", "format": "binary"}}}
    assert {"200", "413", "415", "422"} <= set(paths["/predict"]["post"]["responses"])


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_ask_nobody_else(served: Predictor, path: str) -> None:
    (page,) = ask(served, get(path))
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_requests_at_once_share_one_model(served: Predictor) -> None:
    """Each answer is its own image's, with its own labels, however they overlap."""
    images = [encoded(seed=number) for number in range(20)]
    names = [["one", "two", "three"], ["cat", "dog"]]

    async def go() -> list[Any]:
        transport = httpx.ASGITransport(app=create_app(served, max_bytes=MEGABYTE))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            asked = (
                client.request(**post(f"/predict?labels={','.join(names[i % 2])}", image))
                for i, image in enumerate(images)
            )
            return await asyncio.gather(*asked)

    for number, answer in enumerate(asyncio.run(go())):
        pixels = served.to_pixels(uploads.decode_upload(images[number]))[None]
        (scores,) = served.classify(pixels, names[number % 2])
        assert answer.json()["scores"] == pytest.approx(scores, rel=1e-4)


def test_a_missing_extra_is_explained(
    fedclip: Command, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = fedclip("serve", finished_run)
    assert code == 2
    assert "pip install -e '.[serve]'" in " ".join(err.split())


def test_a_taken_port_is_explained(fedclip: Command, finished_run: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = fedclip("serve", finished_run, "--port", port)
    assert code == 2
    assert f"--port {port}: Address already in use" in err


def test_labels_of_the_command_are_checked_first(fedclip: Command) -> None:
    assert fedclip("serve", "nowhere", "--labels", "a,,b")[0] == 2
    code, _, err = fedclip("serve", "nowhere", "--port", "0")
    assert code == 2
    assert "nowhere is no run, adapter or exported model: it does not exist" in err


@pytest.mark.parametrize("top", ["9223372036854775808", "0", "-1", "1e3", "9" * 400])
def test_top_is_a_number_that_makes_sense(served: Predictor, top: str) -> None:
    (reply,) = ask(served, post(f"/predict?top={top}", encoded()))
    assert reply.status_code == 422


def form(*parts: tuple[str, bytes], boundary: str = "xyz") -> dict[str, Any]:
    lines = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"{name}\r\n\r\n'.encode() + data
        for name, data in parts
    ]
    body = b"\r\n".join([*lines, f"--{boundary}--\r\n".encode()])
    return post("/predict", body, f"multipart/form-data; boundary={boundary}")


def test_a_form_with_one_file_is_taken(served: Predictor) -> None:
    data = encoded()
    named = '; filename="x.png"\r\nContent-Type: image/png'
    plain, sent, both = ask(
        served,
        post("/predict", data),
        form((named, data)),
        form(("", b"a note"), (named, data), boundary="'a+b'"),
    )
    assert plain.json() == sent.json() == both.json()
    for wrong, code in (
        (form((named, data), (named, data)), 422),
        (form(("", data)), 422),
        (post("/predict", b"x", "multipart/form-data"), 422),
        (post("/predict", data, "multipart/form-data; boundary=xyz"), 422),
        (form((named, bytes(MEGABYTE + 1))), 413),
    ):
        (reply,) = ask(served, wrong)
        assert reply.status_code == code
        assert reply.json()["error"]


@pytest.mark.parametrize("in_a_form", [False, True])
def test_an_upload_costs_its_bytes(in_a_form: bool) -> None:
    """As the page says, up to `--max-mb` for each client; a form's one copy more lasts no wait."""
    size, chunk = 16 * MEGABYTE, b"x" * 64_000
    head, tail = (b"--b\r\nfilename\r\n\r\n", b"\r\n--b--\r\n") if in_a_form else (b"", b"")
    kind = b"multipart/form-data; boundary=b" if in_a_form else b"image/png"
    messages = [{"type": "http.request", "body": head, "more_body": True}]
    messages += [{"type": "http.request", "body": chunk, "more_body": True}] * (size // len(chunk))
    messages += [{"type": "http.request", "body": tail, "more_body": False}]
    stream = iter(messages)

    async def receive() -> Any:
        return next(stream)

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", kind)]}

    async def measured() -> tuple[int, int]:  # inside: asyncio.run makes a copy of its own
        assert len(await uploads.read_upload(Request(scope, receive), size)) == size
        return tracemalloc.get_traced_memory()

    tracemalloc.start()
    try:
        _, peak = asyncio.run(measured())
    finally:
        tracemalloc.stop()
    assert peak < (2.3 if in_a_form else 1.2) * size


@pytest.mark.parametrize(
    ("host", "code"),
    [
        *[("localhost:8000", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("lab", 200)],
        *[("LAB.:80", 200), ("10.0.0.7", 200), ("evil.example", 421), ("localhost.evil:8000", 421)],
        *[("127.0.0.1.evil.example", 421), ("", 421)],
    ],
)
def test_only_known_hosts_are_answered(served: Predictor, host: str, code: int) -> None:
    async def go() -> int:
        app = create_app(served, max_bytes=MEGABYTE, hosts=known_hosts("127.0.0.1", ["lab"]))
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return (await client.get("/health", headers={"Host": host})).status_code

    assert asyncio.run(go()) == code


def test_headers_that_do_not_come_end_the_connection(
    served: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import uvicorn

    monkeypatch.setattr(guard, "HEADER_SECONDS", 0.2)
    app = create_app(served, max_bytes=MEGABYTE)

    async def go() -> list[bytes]:
        config = uvicorn.Config(
            app,
            http=guard.PromptRequests,
            ws="none",
            port=0,
            log_level="error",
            lifespan="off",
        )
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve())
        while not server.started:
            assert not task.done()
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        answers = []
        for begun in (b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: x\r\nA: b\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(begun)
            with contextlib.suppress(ConnectionError):
                answers.append(await reader.read())
            writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answers.append((await reader.read())[:15])
        writer.close()
        server.should_exit = True
        await task
        return answers

    assert asyncio.run(go())[-1] == b"HTTP/1.1 200 OK"


def test_webp_of_many_pixels_is_refused_unread(
    served: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_WEBP_PIXELS", 100)
    webp, png = ask(served, post("/predict", encoded("WEBP")), post("/predict", encoded("PNG")))
    assert (webp.status_code, png.status_code) == (413, 200)


def test_the_largest_size_must_be_a_number(fedclip: Command, finished_run: Path) -> None:
    code, _, err = fedclip("serve", finished_run, "--max-mb", "nan")
    assert code == 2
    assert "--max-mb must be a number" in err
