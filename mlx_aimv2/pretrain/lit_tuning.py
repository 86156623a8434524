"""LiT tuning (Zhai et al. 2022, arXiv 2111.07991): a frozen image trunk learns to be searched by words.

    trunk (frozen) -> features on disk -> pooling head, projection  \\
                                caption -> text encoder, projection   > contrastive loss over the global batch
"""

from __future__ import annotations

import hashlib
import math
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_aimv2.backend import WIDE_SIGHT, by_images, prepared
from mlx_aimv2.config import Aimv2Config, Aimv2TextConfig
from mlx_aimv2.embed.cache import KINDS, Array, FeatureCache, Features, cache_key, fingerprint, open_features
from mlx_aimv2.embed.distributed import Ranks
from mlx_aimv2.embed.loader import CHUNK, Decoded, Decoder, run_ahead, split_into_chunks
from mlx_aimv2.images.open import Levels, OpenImage, open_image
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.loading import AnyModel
from mlx_aimv2.model import Aimv2Model, Aimv2VisionModel, unit_length
from mlx_aimv2.pretrain.data import Data, Example, content_of
from mlx_aimv2.pretrain.objective import initialise
from mlx_aimv2.pretrain.pretraining import (
    Captioned,
    begin,
    check_enough,
    log_to,
    tokenizer_for,
    write_checkpoint,
)
from mlx_aimv2.tokenizer import Tokenizer
from mlx_aimv2.train.augment import Augmentation  # noqa: F401 - the type of a field that LitSettings inherits
from mlx_aimv2.train.batches import Batches, Shuffled
from mlx_aimv2.train.loop import Plan, Watch, is_due, train
from mlx_aimv2.train.optimizer import FROZEN, flat, freeze
from mlx_aimv2.train.settings import setting
from mlx_aimv2.train.state import StateFile, training_run

REPORT_EVERY = 1024
"""Images between two lines that say how far it is."""

FROZEN_TRUNK = [(r"vision_model\.(?!head\.).*", FROZEN)]


@dataclass(frozen=True, kw_only=True)
class LitSettings(Captioned):
    """Sizes of the text side and how it is trained; the text encoder's defaults are aimv2-large-patch14-224-lit's."""

    text: Aimv2TextConfig = field(default_factory=Aimv2TextConfig)
    projection_dim: int = 768
    iters: int = setting(1000, "optimisation", "steps", "at least 0")
    batch_size: int = setting(256, "optimisation", "images per batch, across all ranks", "at least 2")
    learning_rate: float = setting(1e-3, "optimisation", "peak learning rate", "above 0")
    views: int = setting(1, "augmentation", "crops kept of each image, including the whole image", "at least 1")
    steps_per_report: int = setting(50, "run", "steps between loss reports", "at least 0")
    steps_per_eval: int = setting(100, "run", "steps between evaluations", "at least 1")

    def plan(self) -> Plan:
        """How the loop trains."""
        return replace(self._plan(self.learning_rate), keep="average")


@prepared(WIDE_SIGHT)
def lit(
    data: Data,
    encoder: AnyModel,
    processor: Aimv2Processor,
    output: str | Path,
    *,
    settings: LitSettings,
    validation: Data | None = None,
    resume: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Aimv2Model:
    """Trains text encoder, pooling head, projections and scale beside a frozen encoder; writes and returns the pair.

    Of a pair its own are trained on; beside an encoder alone they start at random, in the sizes of `settings`. The
    processor's tokenizer reads the captions; where it has none, one is trained on them. The pair has the running
    average of the weights, or with `validation` those of the best recall on these images and their first captions.
    Of the ranks of `mlx.launch` each keeps the features of its own, and the loss is over the batch of all. `resume`
    continues a run that was stopped. `report` gets the entries of the log.

    Raises ValueError where all captions are equal, and FileExistsError as `pretrain`.
    """
    output, ranks, trunk = Path(output), Ranks(), encoder.vision
    with training_run(output, resume=resume, rank=ranks.rank) as folder:
        text = encoder.config.text_config if isinstance(encoder, Aimv2Model) else settings.text
        tokenizer = tokenizer_for(data, text, processor.tokenizer, folder if resume else None)
        about = {"encoder": fingerprint(encoder)["digest"][:16], "preprocessing": asdict(processor.preprocessing)}
        about |= {} if validation is None else {"validation": content_of(validation)}
        state = begin(folder, data, tokenizer, settings.identity | about)
        model, kept = pair_with(encoder, settings, tokenizer), folder / f"features-{ranks.rank}"
        try:
            features = cache_features(trunk, processor, data, kept, settings=settings, report=report)
            check_enough(len(features.texts), settings.batch_size)
            as_is, held_out = replace(settings, views=1), None
            if validation is not None:
                held_out = cache_features(trunk, processor, validation, kept, settings=as_is, report=report)
            _train(model, features, held_out, tokenizer, settings, state, report)
        finally:
            shutil.rmtree(kept, ignore_errors=True)
        if ranks.rank == 0:
            write_checkpoint(model, output, tokenizer=tokenizer, processor=processor)
            state.path.unlink(missing_ok=True)
        return model


def pair_with(encoder: AnyModel, settings: LitSettings, tokenizer: Tokenizer) -> Aimv2Model:
    """A pair as it is, its trunk frozen; or a LiT model around an encoder's trunk, all else of which is random."""
    if isinstance(encoder, Aimv2Model):
        model = Aimv2Model(encoder.config)
        model.load_weights(list(flat(encoder.parameters()).items()))
    else:
        text = replace(settings.text, vocab_size=tokenizer.size, eos_token_id=tokenizer.eos)
        model = Aimv2Model(Aimv2Config(replace(encoder.config, use_head=True), text, settings.projection_dim))
        initialise(model, text.num_hidden_layers, seed=settings.seed)
        trunk = [(name, array) for name, array in flat(encoder.parameters()).items() if not name.startswith("head.")]
        model.vision_model.load_weights(trunk, strict=False)
    freeze(model, FROZEN_TRUNK)
    return model


def _train(
    model: Aimv2Model,
    features: CaptionedFeatures,
    held_out: CaptionedFeatures | None,
    tokenizer: Tokenizer,
    settings: LitSettings,
    state: StateFile,
    report: Callable[[str], None],
) -> None:
    """Trains what is not frozen; at the end the model holds the running average of its weights, or the best ones."""
    ranks, log = Ranks(), log_to(state.folder / "log.jsonl", report)
    keys = {texts[0]: number for number, texts in enumerate(dict.fromkeys(features.texts))}
    if len(keys) < 2:
        raise ValueError(f"all images have the same caption, {features.texts[0][0]!r:.80}: give each its own")

    def make(item: tuple[int, np.random.Generator]) -> tuple[Array, str, int]:
        """A view of an image, one of its captions, and the number of its first caption."""
        image, rng = item
        view, texts = int(rng.integers(settings.views)), features.texts[image]
        chosen = 0 if rng.random() < settings.first_caption else int(rng.integers(len(texts)))
        return features.view(image, view), texts[chosen], keys[texts[0]]

    def collate(pairs: Sequence[tuple[Array, str, int]]) -> tuple[mx.array, mx.array, mx.array]:
        views, captions, own_keys = zip(*pairs, strict=True)
        return mx.array(np.stack(views)).astype(model.dtype), mx.array(tokenizer(captions)), mx.array(own_keys)

    def loss(model: Any, batch: tuple[mx.array, mx.array, mx.array], key: mx.array) -> dict[str, mx.array]:
        x, ids, own_keys = batch
        images, texts = by_images(lambda *both: both_sides(model, *both), x, ids)
        logits = model.logits(of_all_ranks(images, ranks), of_all_ranks(texts, ranks))
        return {"loss": contrastive_loss(logits, ranks.rows(own_keys)), "scale": mx.exp(model.logit_scale)}

    def after_step(step: int, losses: dict[str, float]) -> None:
        if is_due(step, settings.steps_per_report) or step == settings.iters:
            log(step, losses)

    def score(model: Any, held_out: CaptionedFeatures) -> float:
        first, of_five = recall_on(model, held_out, tokenizer)
        report(f"recall on the held-out images: at 1 {first:.1%}, at 5 {of_five:.1%}")
        return (first + of_five) / 2

    order = Shuffled(
        range(len(features.texts)),
        batch_size=settings.batch_size,
        seed=settings.seed,
        rank=ranks.rank,
        ranks=ranks.size,
    )
    with closing(Batches(order, make, collate=collate)) as batches:
        watch, plan = Watch(after_step=after_step, say=report), settings.plan()
        if held_out is not None:
            watch, plan = (
                replace(watch, evaluate=partial(score, held_out=held_out)),
                replace(plan, keep="best", eval_every=settings.steps_per_eval),
            )
        train(model, loss, batches, plan, state=state, ranks=ranks, watch=watch)


def recall_on(model: Aimv2Model, held_out: CaptionedFeatures, tokenizer: Tokenizer) -> tuple[float, float]:
    """The shares of images whose own first caption is first among all, and among the first five."""

    def vectors(chunk: Sequence[int]) -> list[Array]:
        views, ids = np.stack([held_out.view(i, 0) for i in chunk]), tokenizer([held_out.texts[i][0] for i in chunk])
        return [np.array(x) for x in both_sides(model, mx.array(views).astype(model.dtype), mx.array(ids))]

    both = [vectors(chunk) for chunk in split_into_chunks(range(len(held_out.texts)), CHUNK)]
    images, texts = (np.concatenate(side) for side in zip(*both, strict=True))
    return recall(images @ texts.T)


def recall(scores: Array) -> tuple[float, float]:
    """The shares of rows whose own column, on the diagonal, is first, and among the first five: `(n, n) -> two`."""
    before = (scores > np.diag(scores)[:, None]).sum(axis=1)
    return float((before < 1).mean()), float((before < 5).mean())


def both_sides(model: Aimv2Model, features: mx.array, ids: mx.array) -> tuple[mx.array, mx.array]:
    """The trainable ends of both sides: `(B, N, D), (B, L) -> (B, E), (B, E)` of unit length, float32."""
    images = unit_length(model.visual_projection(model.vision_model.head(features)))
    return images, unit_length(model.text_projection(model.text_model.unchecked(ids).pooler_output))


def contrastive_loss(logits: mx.array, keys: mx.array) -> mx.array:
    """Cross-entropy of each image among texts and of each text among images, their mean: `(B, B), (B,) -> ()`.

    Examples of equal keys have the same caption: such a pair is neither wrong nor counted.
    """
    same, own = keys[:, None] == keys[None], mx.eye(logits.shape[0], dtype=mx.bool_)
    logits = mx.where(same & ~own, -math.inf, logits)
    diagonal = mx.diagonal(logits)
    per_image = mx.logsumexp(logits, axis=1) - diagonal
    per_text = mx.logsumexp(logits, axis=0) - diagonal
    return 0.5 * (per_image.mean() + per_text.mean())


def of_all_ranks(x: mx.array, ranks: Ranks) -> mx.array:
    """Rows of every rank, in the order of the ranks: `(B, …) -> (ranks * B, …)`.

    Each rank differentiates the whole loss by its own rows alone, so the ranks' shares have to be summed. The loop
    takes their mean; therefore the gradient is made larger by the number of ranks here, and the value stays.
    """
    return ranks.rows(x + (ranks.size - 1) * (x - mx.stop_gradient(x)))


@dataclass(frozen=True)
class CaptionedFeatures:
    """The features of n images' views, the SHA-256 of each image's file, and its captions."""

    features: Features
    digests: list[bytes]
    texts: list[tuple[str, ...]]

    def view(self, image: int, view: int) -> Array:
        """A view of an image, (N, D) float32; view 0 is the image as it is."""
        return np.asarray(self.features[_key(self.digests[image], view)], np.float32)


def _key(digest: bytes, view: int) -> bytes:
    return hashlib.sha256(digest + view.to_bytes(4, "little")).digest() if view else digest


class Views(Decoder):
    """Turns a file into the levels of the image as it is and of random crops, (views, H, W, 3)."""

    def __init__(self, processor: Aimv2Processor, settings: LitSettings, cache: FeatureCache) -> None:
        """The crops of an image are drawn from the seed and its content, so that equal images have equal ones."""
        views = range(settings.views)
        super().__init__(processor, known=lambda _, digest: all(_key(digest, view) in cache.index for view in views))
        self.settings = settings

    def example(self, example: Example) -> Decoded:
        """An example's image; any thread may call it."""
        image = example.image
        return self.content(example.name, image) if isinstance(image, bytes) else self(str(image))

    def levels(self, opened: OpenImage, sha256: bytes) -> Levels:
        """The views, from their first."""
        settings, size = self.settings, self.processor.canvas
        rng = np.random.default_rng([settings.seed, 2, *np.frombuffer(sha256, "<u4").tolist()])
        image, _ = opened.rgb()
        images = [image, *(settings.augmentation(image, size, rng) for _ in range(settings.views - 1))]
        return np.stack([self.processor.levels(open_image(one)) for one in images])


def cache_features(
    model: Aimv2VisionModel,
    processor: Aimv2Processor,
    data: Data,
    folder: Path,
    *,
    settings: LitSettings,
    report: Callable[[str], None] = lambda line: None,
) -> CaptionedFeatures:
    """The trunk's last hidden states of every image, as it is and in `views - 1` random crops, in half precision.

    Each is computed once and kept on disk. An image that cannot be read is skipped with a note. Raises OSError where
    the disk has no room for them.
    """
    views, tokens, augmentation = settings.views, model.config.num_patches, asdict(settings.augmentation)
    if tokens is None:
        raise ValueError("LiT tuning keeps features of equal length; this encoder takes images of any size")
    own = folder / cache_key(model, processor, kind="tokens", augmentation=augmentation, seed=settings.seed)
    shape = (tokens, model.config.hidden_size)
    captions: deque[tuple[str, ...]] = deque()  # of the images that are being prepared
    digests, texts = list[bytes](), list[tuple[str, ...]]()

    def chunks() -> Iterator[list[Example]]:
        examples = data.epoch(None)
        while chunk := list(islice(examples, CHUNK)):
            captions.extend(example.texts for example in chunk)
            yield chunk

    def compute(levels: mx.array) -> dict[str, mx.array]:
        features = model(processor.normalised(levels.flatten(0, 1))).last_hidden_state
        return {"features": features.reshape(levels.shape[0], views, *shape)}

    with open_features(own, shape, KINDS["tokens"], advice="take fewer --views") as cache:
        count = sum(1 for _ in data.epoch(None))
        cache.reserve(count * views - len(cache.index))
        decoder, patch = Views(processor, settings, cache), model.config.patch_size
        for chunk in run_ahead(chunks(), decoder.example, compute, patch=patch, tokens=views * tokens):
            rows: list[tuple[bytes, Array]] = []
            for image, outputs in chunk:
                own_texts = captions.popleft()
                if image.failure is not None:
                    data.broken(f"{image.path} {image.failure}")
                    continue
                if image.note is not None:
                    warnings.warn(f"{image.path} {image.note}", stacklevel=2)
                if outputs is not None:
                    rows += [(_key(image.sha256, view), row) for view, row in enumerate(outputs["features"])]
                digests.append(image.sha256)
                texts.append(own_texts)
                if len(texts) % REPORT_EVERY == 0:
                    report(f"features of {len(texts):,} of {count:,} images")
            cache.append(rows)
        report(f"features of {len(texts):,} of {count:,} images")
        return CaptionedFeatures(cache.features(), digests, texts)
