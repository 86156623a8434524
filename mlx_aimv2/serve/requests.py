"""What the API takes, field by field: pydantic checks it, and /docs shows it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_INPUTS, MAX_TEXT, MAX_PARTS, MAX_RESULTS = 256, 10_000, 16, 2000
"""Inputs of one request for embeddings, characters of a text, parts of a query, results."""

Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Number = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
Identity = Annotated[int, Field(ge=0, lt=1 << 31)]
DataUrl = Annotated[str, Field(max_length=1 << 25, description="data:image/…;base64,…")]


class Body(BaseModel):
    """What a client sends has these fields and no others."""

    model_config = ConfigDict(extra="forbid")


class ImageAddress(Body):
    url: DataUrl
    detail: str | None = None


class Input(Body):
    """One input as OpenAI's messages have it."""

    type: Literal["text", "image_url", "input_image"]
    text: Text | None = None
    image_url: ImageAddress | DataUrl | None = None


class EmbeddingsRequest(BaseModel):
    """OpenAI's request; fields of theirs that mean nothing here are left unread."""

    input: DataUrl | Input | list[DataUrl | Input]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


class Part(Body):
    """A part of a query: a text, an image of the index, or an image as a data URL; below 0 `weight` takes it away."""

    text: Text | None = None
    id: Identity | None = None
    image: DataUrl | None = None
    weight: Number = 1.0


class SearchRequest(Body):
    query: list[Part] = Field(min_length=1, max_length=MAX_PARTS)
    k: int = Field(default=60, ge=1, le=MAX_RESULTS)
    min_score: float | None = Field(default=None, ge=-1, le=1)
    folder: str | None = None
    after: str | None = Field(default=None, max_length=10)
    before: str | None = Field(default=None, max_length=10)


class ClassifyRequest(Body):
    labels: list[Text] = Field(min_length=2, max_length=1000)
    id: Identity | None = None
    image: DataUrl | None = None


class SimilarityRequest(Body):
    id: Identity
    patch: tuple[Identity, Identity]
    others: list[Identity] = Field(default=[], max_length=24)


class MarkRequest(Body):
    ids: list[Identity] = Field(min_length=1, max_length=MAX_RESULTS)
    label: str | None = Field(max_length=200)
