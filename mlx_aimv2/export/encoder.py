"""What is exported from a model, whatever the format: a function of one array, and what its caller must know."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from mlx_aimv2 import __version__
from mlx_aimv2.backend import plain_blocks
from mlx_aimv2.config import LIT_CHECKPOINT, Aimv2Config, dtype_name
from mlx_aimv2.conversion.model_card import LICENCE_KEYS, source_card
from mlx_aimv2.embed.cache import fingerprint
from mlx_aimv2.files import expand_user, is_file
from mlx_aimv2.images.preprocessing import RESAMPLE
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.learn.head_folder import INFO_FILE, load_head
from mlx_aimv2.loading import LARGEST, Loaded, at_size, read_source
from mlx_aimv2.model import Aimv2Model, Aimv2VisionModel

OUTPUTS = {"image": ("image",), "tokens": ("tokens",), "both": ("image", "tokens"), "text": ("text",)}
"""Choice of output -> the resulting arrays, in this order."""

ANSWERS: dict[str, tuple[str, Callable[[mx.array], mx.array]]] = {
    "classify": ("probabilities", partial(mx.softmax, axis=-1)),
    "multilabel": ("probabilities", mx.sigmoid),
    "regression": ("number", lambda logits: logits),
}
"""Task of a head -> its output, and the function of the logits that gives it."""

INPUTS = {"float": "float32", "uint8": "uint8"}
"""Form of the input images -> the dtype: the processor's pixels, or levels, normalised inside."""


@dataclass(frozen=True)
class Exported:
    """A function to export, made of MLX's plain operations on any machine, and what its caller must know.

    Called with images `(B, H, W, 3)`, or with ids `(B, L)` if the output is text, it returns an array for each of
    `outputs`: image `(B, E)`, tokens `(B, N, D)`, text `(B, E)`, or with a head probabilities `(B, classes)`, which
    are independent for multilabel, or a number `(B, 1)`.
    """

    loaded: Loaded
    vision: Aimv2VisionModel
    processor: Aimv2Processor
    outputs: tuple[str, ...]
    dtype: str
    """The input's dtype: float32, uint8 or int32."""
    head: Any = None
    labels: tuple[str, ...] = ()
    task: str = ""
    """That of the head."""

    @property
    def text(self) -> Any:
        """The text encoder if the input is text, None for images."""
        model: Any = self.loaded.model
        return model.text_model if self.outputs == OUTPUTS["text"] else None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image, (H, W, 3), or of one text, (L,)."""
        return (*self.processor.canvas, 3) if self.text is None else (self.text.config.max_position_embeddings,)

    def __call__(self, x: mx.array) -> list[mx.array]:
        model: Any = self.loaded.model
        if (text := self.text) is not None:  # without the model's checks, which read values
            return [model.text_projection(text.unchecked(x, run=plain_blocks).pooler_output)]
        pixels = self.processor.normalised(x) if self.dtype == "uint8" else x
        *_, last = plain_blocks(self.vision.blocks, self.vision.embed(pixels))  # the x86 version cannot be exported
        tokens = self.vision.norm(last)
        if self.head is not None:
            logits = self.head(tokens, self.processor.grid)["logits"].astype(mx.float32)
            return [ANSWERS[self.task][1](logits)]
        if isinstance(model, Aimv2Model):
            image = model.visual_projection(self.vision.head(tokens))
        else:
            image = tokens.astype(mx.float32).mean(axis=1).astype(tokens.dtype)
        return [{"image": image, "tokens": tokens}[name] for name in self.outputs]

    def describe(self, batches: Sequence[int], outputs: Mapping[str, mx.array], *, device: str) -> dict[str, Any]:
        """What a caller must know, for JSON; `outputs` are the results of a call on `device`, by name."""
        source, steps = self.loaded.source, self.processor.preprocessing
        card, names = source_card(source), {number: name for name, number in RESAMPLE.items()}
        about = {
            "exported_by": f"mlx-aimv2 {__version__}, MLX {version('mlx')}",
            "device": device,
            **self.loaded.origin,
            "checkpoint": source.origin.repo or source.origin.folder.absolute().name,
            "fingerprint": fingerprint(self.loaded.model),
            "license": {key: card[key] for key in LICENCE_KEYS if key in card},
            "input": {"dtype": self.dtype, "batches": list(batches), "shape": self.shape},
            "outputs": [
                {"name": name, "dtype": dtype_name(x.dtype), "shape": x.shape[1:]} for name, x in outputs.items()
            ],
        }
        if self.text is not None:  # shorter texts are padded with EOS
            return about | {"eos": self.text.config.eos_token_id}
        preprocessing = asdict(steps) | {"resample": names[steps.resample]}
        if self.task == "multilabel":
            about["thresholds"] = self.head.options()["thresholds"]
        return about | {"labels": self.labels, "preprocessing": preprocessing}


def prepare(
    model: str | os.PathLike[str],
    output: str | None,
    input: str,
    size: int | tuple[int, ...] | None,
    *,
    dtype: str | mx.Dtype | None,
    revision: str | None,
    keep_quantized: bool,
) -> Exported:
    """Loads what is to be exported, a checkpoint or a head folder; `size` is `export`'s `image_size` or `grid`."""
    if is_file(expand_user(model) / INFO_FILE):
        if output is not None or size is not None or revision is not None:
            raise ValueError(f"{model} was written by fit: leave --output, --image-size, --grid and --revision out")
        head = load_head(model, dtype=dtype)
        if (task := head.task.name) not in ANSWERS:
            raise ValueError(f"{model} is a head to {task}: only one to {', '.join(ANSWERS)} can be exported")
        outputs = (ANSWERS[task][0],)
        parts: dict[str, Any] = {"head": head.learner.head, "labels": head.classes, "task": task}
        return Exported(head.loaded, head.learner.encoder, head.processor, outputs, INPUTS[input], **parts)
    grid, pixels = (size, None) if isinstance(size, tuple) else (None, size)
    source = read_source(model, revision=revision, image_size=pixels)
    own_size = source.config.vision.image_size
    if grid and own_size:
        raise ValueError(f"--grid is for native checkpoints; {source.origin} takes {own_size} pixels: leave it out")
    if output == "text" and not isinstance(source.config, Aimv2Config):
        raise ValueError(f"--output text: {source.origin} has no text encoder; {LIT_CHECKPOINT} has one")
    loaded = source.load(dtype=dtype, keep_quantized=keep_quantized)
    vision, processor = at_size(loaded.model.vision, loaded.processor, pixels)  # native ones: 224 by default
    processor = _for_grid(processor, grid) if grid else processor
    dtype_in = "int32" if output == "text" else INPUTS[input]
    return Exported(loaded, vision, processor, OUTPUTS[output or "image"], dtype_in)


def _for_grid(processor: Aimv2Processor, grid: tuple[int, ...]) -> Aimv2Processor:
    """The processor of a native checkpoint that stretches each image to one grid of patches."""
    patch = processor.patch_size
    if len(grid) != 2 or not all(1 <= length <= LARGEST // patch for length in grid):
        asked = ",".join(map(str, grid))
        raise ValueError(f"--grid must be rows,columns of patches, each from 1 to {LARGEST // patch}; got {asked}")
    changed = copy.copy(processor)
    size = (patch * grid[0], patch * grid[1])
    changed.preprocessing = replace(processor.preprocessing, resize=size, crop=size)
    return changed
