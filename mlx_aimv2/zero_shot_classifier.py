"""Classifies images by labels alone, without training (LiT only).

labels x templates -> texts -> one unit vector per label; image -> unit vector; scaled cosines -> probabilities
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

from mlx_aimv2.config import LIT_CHECKPOINT, dtype_name
from mlx_aimv2.embed.loader import images_at_once, run_ahead, split_into_chunks
from mlx_aimv2.images.open import POLICY, ImageInput, Levels, Policy, open_image, warn_of
from mlx_aimv2.images.processor import Aimv2Processor, are_apart, as_list
from mlx_aimv2.model import Aimv2Model, Aimv2VisionModel, unit_length

TEMPLATES = ("a photo of a {}",)
"""The default sentences, with {} for the label."""

Floats: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"


@dataclass(frozen=True, eq=False)
class Prediction:
    """How well each of T labels fits one image: `logits` (T,) and `probabilities` (T,), which sum to 1.

    Both are float32 and in the order of `labels`. The probabilities rank the labels against each other; they do not
    say whether any of them is right.
    """

    labels: tuple[str, ...]
    logits: Floats
    probabilities: Floats

    @property
    def label(self) -> str:
        """The label that fits best."""
        return self.top(1)[0][0]

    def top(self, count: int | None = None) -> list[tuple[str, float]]:
        """The `count` best labels (None: all) with their probabilities, best first."""
        order = np.argsort(-self.logits, kind="stable")[:count]
        return [(self.labels[i], float(self.probabilities[i])) for i in order]


class ZeroShotClassifier:
    """A classifier made of words: the labels are encoded once and then compared with any number of images."""

    def __init__(
        self,
        model: Aimv2Model | Aimv2VisionModel,
        processor: Aimv2Processor,
        labels: Sequence[str],
        *,
        templates: str | Sequence[str] = TEMPLATES,
    ) -> None:
        """Encodes the labels in every template; the templates of one label are averaged.

        Raises ValueError for a checkpoint without a text encoder and for unusable labels and templates,
        FileNotFoundError for missing tokenizer files, all before any image is read.
        """
        self.labels = check_labels(labels)
        self.templates = check_templates(templates)
        if not isinstance(model, Aimv2Model):
            raise ValueError(f"this checkpoint has no text encoder to encode labels with; {LIT_CHECKPOINT} has one")
        self._model = model
        self._processor = processor
        self.text_embeds = self._read()
        """One vector per label, (T, E) float32 of unit length."""

    def __call__(self, images: ImageInput | Iterable[ImageInput], *, policy: Policy = POLICY) -> list[Prediction]:
        """One image or several -> a prediction for each. Raises the error of the first unreadable image."""
        predictions = []
        for result in self.each(as_list(images), policy=policy):
            if isinstance(result, Exception):
                raise result
            predictions.append(result)
        return predictions

    def each(
        self, images: Sequence[ImageInput], *, policy: Policy = POLICY
    ) -> Iterator[Prediction | OSError | ValueError]:
        """Predictions in the images' order; an unreadable image gives its error instead.

        `policy` says what is accepted, and whether a JPEG is decoded exactly or fast. Images are decoded in other
        threads while the model works on earlier ones.
        """
        config, processor = self._model.vision.config, self._processor

        def prepare(image: ImageInput) -> _Read:
            try:
                opened = open_image(image, policy=policy)
                warn_of(opened)
                return _Read(processor.levels(opened))
            except (OSError, ValueError) as error:
                return _Read(error=error)

        for chunk in run_ahead(
            split_into_chunks(images),
            prepare,
            self._compare,
            patch=config.patch_size,
            tokens=config.num_patches,
            threads=None if are_apart(images) else 1,
        ):
            for image, outputs in chunk:
                if outputs is not None:
                    _check_finite(outputs["logits"], self._model)
                    yield Prediction(self.labels, **outputs)
                elif image.error is not None:
                    yield image.error

    def _compare(self, levels: mx.array) -> dict[str, mx.array]:
        """Logits and probabilities, `(B, H, W, 3) uint8 -> (B, T)` each."""
        images = unit_length(self._model.encode_image(self._processor.normalised(levels)))
        logits = self._model.logits(images, self.text_embeds)
        return {"logits": logits, "probabilities": mx.softmax(logits, axis=-1)}

    def _read(self) -> mx.array:
        """Every label in every template -> (T, E): each text's unit vector, their mean per label, at unit length."""
        texts = [template.replace("{}", label) for label in self.labels for template in self.templates]
        ids = np.array(self._processor.tokenize(texts))
        _check_distinct(ids, self.labels)
        vectors = encode_ids(self._model, ids).reshape(len(self.labels), len(self.templates), -1)
        text_embeds = unit_length(mx.array(vectors.mean(axis=1)))
        _check_finite(np.array(text_embeds), self._model)
        return text_embeds


def zero_shot(
    model: Aimv2Model | Aimv2VisionModel,
    processor: Aimv2Processor,
    images: ImageInput | Iterable[ImageInput],
    labels: Sequence[str],
    *,
    templates: str | Sequence[str] = TEMPLATES,
) -> list[Prediction]:
    """Which label fits each image: one image or several, T labels `-> a Prediction for each image`.

    For more than one call with the same labels, make a `ZeroShotClassifier` once.
    """
    return ZeroShotClassifier(model, processor, labels, templates=templates)(images)


def encode_ids(model: Aimv2Model, ids: np.ndarray[Any, Any]) -> Floats:
    """Unit vectors of many texts, `(T, L) -> (T, E)` float32, in batches of similar length.

    Tokens after a text's end have no effect, so each batch is cut to its longest text.
    """
    lengths = (ids == model.config.text_config.eos_token_id).argmax(axis=1) + 1
    order = np.argsort(-lengths, kind="stable")
    vectors = np.empty((len(ids), model.config.projection_dim), np.float32)
    start = 0
    while start < len(ids):
        length = int(lengths[order[start]])
        rows = order[start : start + images_at_once(length)]
        vectors[rows] = np.array(unit_length(model.encode_text(mx.array(ids[rows, :length]))))
        start += len(rows)
    return vectors


def check_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """The labels, if they are usable as classes; otherwise ValueError says which one is wrong."""
    if isinstance(labels, str):
        raise ValueError(f"labels must be a list of strings, got one string: {labels!r:.60}")
    labels = tuple(labels)
    for number, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip():
            raise ValueError(f"label {number} must be a non-empty string, got {label!r:.60}")
    if len(labels) < 2:
        raise ValueError(f"give at least two labels, got {len(labels)}: one alone fits every image with probability 1")
    if twice := [label for label, count in Counter(labels).items() if count > 1]:
        raise ValueError(f"labels given more than once: {', '.join(twice)}")
    return labels


def check_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """The templates, if every one has the placeholder; otherwise ValueError says which does not."""
    templates = (templates,) if isinstance(templates, str) else tuple(templates)
    if not templates:
        raise ValueError(f"no templates: give at least one, such as {TEMPLATES[0]!r}")
    for template in templates:
        if not isinstance(template, str) or "{}" not in template:
            raise ValueError(f"template {template!r} has no {{}} where the label goes, as in {TEMPLATES[0]!r}")
    return templates


def _check_distinct(ids: np.ndarray[Any, Any], labels: Sequence[str]) -> None:
    """Raises ValueError for labels that are one text to the model: equal but for capitals or beyond the context."""
    first: dict[bytes, str] = {}
    for label, rows in zip(labels, ids.reshape(len(labels), -1), strict=True):
        if (other := first.setdefault(rows.tobytes(), label)) != label:
            raise ValueError(
                f"{other!r:.60} and {label!r:.60} are the same text to the model: capitals do not count, nor does "
                "anything beyond the context"
            )


def _check_finite(numbers: Floats, model: Aimv2Model) -> None:
    if not np.isfinite(numbers).all():
        raise ValueError(f"the model's outputs are not finite in {dtype_name(model.dtype)}: load it with dtype float32")


@dataclass
class _Read:
    """An image's levels (H, W, 3), or why it has none."""

    levels: Levels | None = None
    error: OSError | ValueError | None = None
