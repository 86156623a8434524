"""The routes: OpenAI's embeddings and a few more for programs, and what the page asks for.

Nothing that a client sends is opened as a path or fetched as an address: an image comes as a data URL, or is one of the
index by its number.
"""

from __future__ import annotations

import base64
import binascii
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import mlx.core as mx
import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from numpy.typing import NDArray
from pydantic import Field
from starlette.exceptions import HTTPException

from mlx_aimv2 import __version__
from mlx_aimv2.embed.encode import Embedder
from mlx_aimv2.files import atomic_file
from mlx_aimv2.learn import fit
from mlx_aimv2.serve.access import error_response
from mlx_aimv2.serve.engine import BATCH, BusyError, Engine
from mlx_aimv2.serve.gallery import UNTRUSTED, Gallery, View, enlarged, grouped, levels_of, shown
from mlx_aimv2.serve.requests import (
    MAX_INPUTS,
    ClassifyRequest,
    EmbeddingsRequest,
    Identity,
    ImageAddress,
    Input,
    MarkRequest,
    SearchRequest,
    SimilarityRequest,
)
from mlx_aimv2.serve.teach import Lessons, beside
from mlx_aimv2.zero_shot_classifier import ZeroShotClassifier

Array = NDArray[Any]

PAGE = Path(__file__).parent / "page"

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

VIEWS = 32
"""Images whose tokens are kept for the next click."""


class Service:
    """What each route does, for a model and, with it, the images of an index."""

    def __init__(self, embedder: Embedder, gallery: Gallery | None = None) -> None:
        """Starts the thread that runs the model."""
        self.engine = Engine(embedder.loaded, embedder.pooling)
        origin = embedder.loaded.origin
        self.name, self.commit = str(origin["checkpoint"]), origin["commit"]
        self._gallery = gallery
        self._lessons = Lessons(gallery) if gallery is not None else None
        self._views: OrderedDict[int, View] = OrderedDict()
        self._viewing = threading.Lock()
        self._decoding = threading.BoundedSemaphore(os.cpu_count() or 1)

    @property
    def gallery(self) -> Gallery:
        """The index's images. Raises LookupError where a model is served alone."""
        if self._gallery is None:
            raise LookupError("there is no index to search: start the server with mlx-aimv2 serve INDEX")
        return self._gallery

    @property
    def lessons(self) -> Lessons:
        """The examples. Raises LookupError where a model is served alone."""
        if self._lessons is None:
            raise LookupError("there is no index to teach with: start the server with mlx-aimv2 serve INDEX")
        return self._lessons

    def models(self) -> dict[str, Any]:
        """Lists the model, as OpenAI's API does."""
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "local"}
        return {"object": "list", "data": [model | {"dimensions": self.engine.width, "text": self.engine.has_text}]}

    def embeddings(self, body: EmbeddingsRequest) -> dict[str, Any]:
        """Embeds texts and images, as vectors of unit length in their order."""
        inputs = body.input if isinstance(body.input, list) else [body.input]
        if not 0 < len(inputs) <= MAX_INPUTS:
            raise ValueError(f"input must have from 1 to {MAX_INPUTS:,} texts or images, got {len(inputs):,}")
        if body.model not in (None, self.name):
            raise ValueError(f"the model here is {self.name}: leave model out or give that name")
        if body.dimensions not in (None, self.engine.width):
            raise ValueError(f"vectors of this model have {self.engine.width:,} dimensions: leave dimensions out")
        with ThreadPoolExecutor(BATCH) as pool:  # so that they wait together, and are batches
            vectors = list(pool.map(lambda one: self._vector(*_text_or_image(one)), inputs))
        data = [
            {"object": "embedding", "index": number, "embedding": _encoded(vector, body.encoding_format)}
            for number, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": 0, "total_tokens": 0}
        return {"object": "list", "data": data, "model": self.name, "usage": usage}

    def search(self, body: SearchRequest) -> dict[str, Any]:
        """Finds the images of the index that are nearest to a query, which may have several parts."""
        parts = []
        for part in body.query:
            if [part.text, part.id, part.image].count(None) != 2:
                raise ValueError("each part of the query must be one of text, id and image")
            vector = self._known(part.id) if part.id is not None else self._vector(part.text, part.image)
            parts.append((part.weight, vector))
        limits: dict[str, Any] = body.model_dump(include={"min_score", "folder", "after", "before"})
        return {"matches": self.gallery.search(parts, body.k, **limits), "images": len(self.gallery.paths)}

    def classify(self, body: ClassifyRequest) -> dict[str, Any]:
        """Says which of the labels fits an image best, without training (LiT alone)."""
        if (body.id is None) == (body.image is None):
            raise ValueError("give either the id of an image of the index or an image as a data URL")
        image = self._image(body.image) if body.image is not None else self._levels(body.id or 0)
        model, processor = self.engine.model, self.engine.processor

        def ranked() -> list[tuple[str, float]]:
            return ZeroShotClassifier(model, processor, body.labels)(image)[0].top()

        pairs = self.engine.call(ranked)
        return {"labels": [{"label": label, "probability": probability} for label, probability in pairs]}

    def about(self) -> dict[str, Any]:
        """What is served, for the page."""
        text = {
            "reveal": sys.platform == "darwin",
            "model": self.name,
            "text": self.engine.has_text,
            "version": __version__,
            "index": None,
            "images": 0,
        }
        if self._gallery is None:
            return text
        folders = sorted(self._gallery.folders.items())[:500]
        return text | {
            "index": self._gallery.index.path.name,
            "images": len(self._gallery.paths),
            "folders": [{"path": shown(path), "images": count} for path, count in folders],
        }

    def images(self, start: Identity = 0, count: Annotated[int, Field(ge=1, le=500)] = 60) -> dict[str, Any]:
        """Lists images of the index in the order of their paths, for a page that nothing was asked on yet."""
        numbers = range(start, min(start + count, len(self.gallery.paths)))
        return {"images": [self.gallery.described(number) for number in numbers], "of": len(self.gallery.paths)}

    def thumbnail(self, number: Identity, request: Request) -> Response:
        """A small JPEG of an image of the index, whole."""
        stamp = self.gallery.index.stamp(self.gallery.path(number))
        tag = f'"{stamp.sha256.hex()[:32]}"' if stamp is not None else '""'
        headers = {"etag": tag, "cache-control": "private, no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        with self._decoding:
            content = self.gallery.thumbnail(number)
        if content is None:
            raise HTTPException(404, "the image is missing or unreadable")
        return Response(content, media_type="image/jpeg", headers=headers)

    def reveal(self, number: Identity) -> dict[str, str]:
        """Shows the file of an image in Finder (macOS alone)."""
        if sys.platform != "darwin":
            raise ValueError("files can be shown in Finder only on macOS")
        path = self.gallery.path(number)
        subprocess.run(["open", "-R", path], check=False)  # an absolute path, so it is no option
        return {"path": shown(path)}

    def view(self, number: Identity) -> Response:
        """An image as the model sees it, cropped alike, with more pixels."""
        with self._decoding:
            content = enlarged(self.engine.processor, self.gallery.path(number))
        return Response(content, media_type="image/jpeg", headers={"cache-control": "private, no-cache"})

    def patches(self, number: Identity) -> dict[str, Any]:
        """The grid of an image's patches, and their three principal components as colours."""
        view = self._view(number)
        rows, columns = view.grid
        return {"rows": rows, "columns": columns, "colours": _base64(view.colours())}

    def similarity(self, body: SimilarityRequest) -> dict[str, Any]:
        """How like one patch of an image the patches of this image and of others are, cosines from -1 to 1."""
        view = self._view(body.id)
        (row, column), (rows, columns) = body.patch, view.grid
        if row >= rows or column >= columns:
            raise ValueError(f"the image has {rows} rows and {columns} columns of patches, no patch {row},{column}")
        token = view.tokens[row * columns + column]
        maps = {}
        for number in dict.fromkeys([body.id, *body.others]):
            grid = self._view(number).similar(token)
            maps[number] = {"rows": grid.shape[0], "columns": grid.shape[1], "cosines": _base64(grid.astype("<f4"))}
        return {"maps": maps}

    def atlas(self, kind: Literal["principal", "neighbours"] = "principal") -> dict[str, Any]:
        """Where each image lies in the plane, x and y as uint16, little endian; null while it is computed."""
        job = None if kind == "principal" else self.gallery.neighbours()
        places = self.gallery.principal if job is None else job.result
        if job is not None and job.error:
            raise ValueError(job.error)
        done = None if places is not None or job is None else [job.done, job.total]
        scaled = None if places is None else _base64(np.rint(places * 65535).astype("<u2"))
        return {"places": scaled, "progress": done}

    def duplicates(self) -> dict[str, Any]:
        """Groups of images that are the same, the one to keep first; null while they are looked for."""
        job = self.gallery.duplicates()
        if job.error:
            raise ValueError(job.error)
        found = None if job.result is None else grouped(self.gallery, job.result)
        return {"groups": found, "progress": [job.done, job.total]}

    def list_duplicates(self) -> dict[str, str]:
        """Writes beside the index the paths of all but the first of each group; nothing is deleted."""
        if (groups := self.gallery.duplicates().result) is None:
            raise ValueError("the images are still being compared: try again when the groups are ready")
        target = beside(self.gallery.index.path, "duplicates.txt")
        with atomic_file(target) as stream:
            for group in groups:
                stream.writelines(os.fsencode(one.path) + b"\n" for one in group.members[1:])
        return {"file": str(target)}

    def examples(self, count: Annotated[int, Field(ge=1, le=500)] = 60) -> dict[str, Any]:
        """The examples that were marked, and what a linear probe on them says of the other images."""
        return self.lessons.state(count)

    def mark(self, body: MarkRequest) -> dict[str, Any]:
        """Gives images a label, or takes it away, and answers as `examples` does."""
        self.lessons.mark(body.ids, body.label)
        return self.lessons.state(60)

    def undo(self) -> dict[str, Any]:
        """Takes back the last change of the examples."""
        self.lessons.undo()
        return self.lessons.state(60)

    def save(self) -> dict[str, str]:
        """Writes beside the index the examples as a folder for `fit`, and the head that it makes of them."""

        def fitted(data: Path, head: Path) -> str:
            how: dict[str, Any] = {"revision": self.commit, "refit": True}
            line: str = self.engine.call(lambda: fit(data, self.name, head, **how).line, patience=600.0)
            return line

        return self.lessons.save(fitted)

    def _vector(self, text: str | None, image: str | None) -> Array:
        return self.engine.text(text or "") if image is None else self.engine.image(self._image(image))

    def _known(self, number: int) -> Array:
        return self.gallery.index.vector(self.gallery.path(number))

    def _image(self, address: str) -> Any:
        try:
            with self._decoding:
                return levels_of(self.engine.processor, decoded(address), policy=UNTRUSTED)
        except OSError as error:  # the client's image is at fault, no file of ours
            raise ValueError(str(error)) from None

    def _levels(self, number: int) -> Any:
        with self._decoding:
            return levels_of(self.engine.processor, self.gallery.path(number))

    def _view(self, number: int) -> View:
        with self._viewing:
            if (known := self._views.get(number)) is not None:
                return known
        levels = self._levels(number)

        def tokens() -> View:
            pixels = self.engine.processor.normalised(mx.array(levels[None]))
            grid = self.engine.model.vision.grid(pixels)
            found = np.array(self.engine.model.vision(pixels).last_hidden_state[0].astype(mx.float32))
            return View(found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12), grid)

        view: View = self.engine.call(tokens)
        with self._viewing:
            self._views[number] = view
            while len(self._views) > VIEWS:
                self._views.popitem(last=False)
        return view


ROUTES: Sequence[tuple[str, str, str, str]] = (
    ("for programs", "POST", "/v1/embeddings", "embeddings"),
    ("for programs", "GET", "/v1/models", "models"),
    ("for programs", "POST", "/search", "search"),
    ("for programs", "POST", "/classify", "classify"),
    ("of the index", "GET", "/about", "about"),
    ("of the index", "GET", "/images", "images"),
    ("of the index", "GET", "/thumbnail/{number}", "thumbnail"),
    ("of the index", "POST", "/reveal/{number}", "reveal"),
    ("of the index", "GET", "/view/{number}", "view"),
    ("of the index", "GET", "/patches/{number}", "patches"),
    ("of the index", "POST", "/similarity", "similarity"),
    ("of the index", "GET", "/atlas", "atlas"),
    ("of the index", "GET", "/duplicates", "duplicates"),
    ("of the index", "POST", "/duplicates/list", "list_duplicates"),
    ("of the index", "GET", "/examples", "examples"),
    ("of the index", "POST", "/examples", "mark"),
    ("of the index", "POST", "/examples/undo", "undo"),
    ("of the index", "POST", "/examples/save", "save"),
)
"""Its group in /docs, method, path, and the method of `Service` that answers."""


STATUS = {ValueError: 400, LookupError: 404, OSError: 404, BusyError: 503, MemoryError: 503}
"""Kind of an error -> what the client hears."""


def create_app(service: Service) -> FastAPI:
    """The ASGI application, still without its guard (`access.Guard`)."""
    app = FastAPI(title="mlx-aimv2", version=__version__, docs_url=None, redoc_url=None)
    for tag, method, path, name in ROUTES:
        function = getattr(service, name)
        summary = (function.__doc__ or "").strip().splitlines()[0]
        app.add_api_route(path, function, methods=[method], tags=[tag], summary=summary, name=name)
    app.add_api_route("/", lambda: _file("index.html"), include_in_schema=False)
    app.add_api_route("/docs", lambda: _file("docs.html"), include_in_schema=False)
    app.add_api_route("/page/{name}", _file, include_in_schema=False)
    for kind, status in STATUS.items():
        app.add_exception_handler(kind, _answering(status))
    app.add_exception_handler(HTTPException, lambda _, error: error_response(error.status_code, str(error.detail)))
    app.add_exception_handler(RequestValidationError, lambda _, error: error_response(400, _misfits(error)))
    return app


def decoded(address: str) -> bytes:
    """The bytes of an image in a data URL. Raises ValueError for anything else: nothing is fetched or opened."""
    head, _, data = address.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64")):
        raise ValueError("send an image as a data URL, data:image/…;base64,…: paths and web addresses are not opened")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error:
        raise ValueError("the data URL of the image is not base64") from None


def _text_or_image(given: str | Input) -> tuple[str | None, str | None]:
    """An input as a text or as the data URL of an image."""
    if isinstance(given, str):
        return (None, given) if given.startswith("data:") else (given, None)
    image = given.image_url.url if isinstance(given.image_url, ImageAddress) else given.image_url
    if (given.text is None) == (image is None):
        raise ValueError("an input must be a text or an image_url")
    return given.text, image


def _encoded(vector: Array, encoding: str) -> list[float] | str:
    return _base64(vector.astype("<f4")) if encoding == "base64" else [round(value, 8) for value in vector.tolist()]


def _base64(values: Array) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _file(name: str) -> Response:
    """A file of the page; there are no others."""
    file = PAGE / name
    if name not in {one.name for one in PAGE.iterdir()} or file.suffix not in TYPES:
        return error_response(404, "there is nothing here")
    return FileResponse(file, media_type=TYPES[file.suffix], headers={"cache-control": "no-cache"})


def _answering(status: int) -> Callable[..., JSONResponse]:
    return lambda _, error: error_response(status, str(error.args[0] if error.args else error)[:1000])


def _misfits(error: RequestValidationError) -> str:
    """What is wrong with a body, field by field, without the values: they may be long."""
    lines = [f"{'.'.join(map(str, one['loc'][1:])) or 'the body'}: {one['msg']}" for one in error.errors()[:3]]
    return "; ".join(lines)[:1000]
