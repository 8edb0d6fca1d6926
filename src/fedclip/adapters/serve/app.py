"""The HTTP interface of `fedclip serve`: a web page, predictions and embeddings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.resources import files
from itertools import islice
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect

from fedclip.adapters.load import public_name
from fedclip.adapters.predict import Predictor, best
from fedclip.adapters.serve.guard import KnownHosts
from fedclip.adapters.serve.uploads import decode_upload, read_upload
from fedclip.errors import UsageError

MAX_LABELS = 256
MAX_LABEL = 200
MAX_TOP = 1_000_000
_DECODERS = 2  # an image of the largest size takes hundreds of megabytes while it is decoded

T = TypeVar("T")


class Prediction(BaseModel):
    """The likeliest label, its probability, and the probabilities of all, highest first."""

    label: str
    confidence: float
    scores: dict[str, float]


class Embedding(BaseModel):
    """The image's features, of length one."""

    embedding: list[float]


class Health(BaseModel):
    """What is being served. `labels_allowed`: whether requests may name other classes."""

    status: str
    model: str
    head: str
    classes: list[str]
    labels_allowed: bool
    max_mb: float


class Problem(BaseModel):
    """Why a request was refused."""

    error: str


_IMAGE = {"content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}}
_BODY: dict[str, Any] = {"requestBody": {"required": True, **_IMAGE}}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": text}
    for code, text in {
        408: "The image did not arrive in time",
        413: "Too many bytes or pixels",
        415: "Not an image, by its content type",
        422: "Not an image that can be read, or labels that do not fit",
    }.items()
}
# Pages load nothing from elsewhere, and browsers see to it.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


class Worker:
    """Keeps slow work out of the event loop: a few images are decoded at once, one is computed."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._decoding = ThreadPoolExecutor(_DECODERS, "decode")
        self._computing = ThreadPoolExecutor(1, "model")  # a predictor serves one thread at a time

    async def classify(self, data: bytes, labels: list[str] | None) -> dict[str, float]:
        """Probabilities of an encoded image, highest first."""
        pixels = await self._pixels(data)
        return (await _in(self._computing, lambda: self._predictor.classify(pixels, labels)))[0]

    async def embed(self, data: bytes) -> list[float]:
        """Features of an encoded image."""
        pixels = await self._pixels(data)
        return (await _in(self._computing, lambda: self._predictor.embed(pixels)))[0].tolist()

    async def _pixels(self, data: bytes) -> Any:
        def make() -> Any:
            return self._predictor.to_pixels(decode_upload(data))[None]  # [1, 3, size, size]

        return await _in(self._decoding, make)


async def _in(pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, work)


def create_app(
    predictor: Predictor, *, max_bytes: int, hosts: Iterable[str] | None = None
) -> FastAPI:
    """The application; an upload may have `max_bytes` at most.

    `hosts` are the names that it answers to, beside addresses in numbers; None: to all.
    """
    app = FastAPI(
        title="fedclip",
        version=version("fedclip"),
        description="A CLIP that was fine-tuned in a federation.",
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere
        redoc_url=None,
    )
    if hosts is not None:
        app.add_middleware(KnownHosts, hosts=hosts)
    worker = Worker(predictor)
    text_head = predictor.model.head == "text"
    _explain_errors(app)

    @app.post("/predict", responses=_PROBLEMS, openapi_extra=_BODY)
    async def predict(
        request: Request,
        labels: Annotated[
            list[str] | None,
            Query(description="Other class names, comma-separated or repeated (text head only)"),
        ] = None,
        top: Annotated[
            int | None, Query(ge=1, le=MAX_TOP, description="Only so many scores")
        ] = None,
    ) -> Prediction:
        """Classify the image in the body."""
        names = label_list(labels)
        if names and not text_head:
            raise HTTPException(
                422, "labels: this run has a trained linear head, which knows its own classes only"
            )
        scores = await worker.classify(await read_upload(request, max_bytes), names)
        return Prediction(**best(scores), scores=dict(islice(scores.items(), top)))

    @app.post("/embed", responses=_PROBLEMS, openapi_extra=_BODY)
    async def embed(request: Request) -> Embedding:
        """Turn the image in the body into features of length one."""
        return Embedding(embedding=await worker.embed(await read_upload(request, max_bytes)))

    @app.get("/health")
    async def health() -> Health:
        """Say that the server is up, and what it serves."""
        return Health(
            status="ok",
            model=public_name(predictor.model.base_name),
            head=str(predictor.model.head),
            classes=list(predictor.class_names),
            labels_allowed=text_head,
            max_mb=max_bytes / 1e6,
        )

    _add_pages(app)
    return app


def _add_pages(app: FastAPI) -> None:
    """The page for people, and that of the interface."""
    for path, name in (("/", "page.html"), ("/docs", "docs.html")):
        text = files("fedclip.adapters.serve").joinpath(name).read_text("utf-8")
        page = HTMLResponse(text, headers={"Content-Security-Policy": _POLICY})
        app.add_api_route(path, _always(page), include_in_schema=False)


def label_list(labels: list[str] | None) -> list[str] | None:
    """Class names of a query; HTTPException 422 where they are no classes."""
    if not labels:
        return None
    names = [name.strip() for text in labels for name in text.split(",")]
    if not all(names):
        raise HTTPException(422, "labels must be names separated by commas; one of them is empty")
    if len(set(names)) < len(names):
        raise HTTPException(422, "labels names a class twice")
    if len(names) > MAX_LABELS or max(map(len, names)) > MAX_LABEL:
        raise HTTPException(
            422, f"labels: {MAX_LABELS} names at most, of {MAX_LABEL} characters each"
        )
    return names


def _always(page: Response) -> Callable[[], Any]:
    async def answer() -> Response:
        return page

    return answer


def _explain_errors(app: FastAPI) -> None:
    """Every error is JSON: `{"error": "what was wrong"}`."""

    @app.exception_handler(AnyHTTPException)
    async def refused(request: Request, error: AnyHTTPException) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        told = "; ".join(f"{problem['loc'][-1]}: {problem['msg']}" for problem in error.errors())
        return JSONResponse({"error": told}, 422)

    @app.exception_handler(UsageError)
    async def usage(request: Request, error: UsageError) -> Response:
        return JSONResponse({"error": str(error)}, 422)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # nobody is there to read it

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        return JSONResponse(
            {"error": "something unforeseen happened; the server's log says what"}, 500
        )
