"""LiT tuning (Zhai et al. 2022, arXiv 2111.07991): a frozen image trunk learns to be searched by words.

    trunk (frozen) -> features on disk -> pooling head, projection  \\
                                caption -> text encoder, projection   > contrastive loss over the global batch
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_aimv2.backend import WIDE_SIGHT, by_images, prepared
from mlx_aimv2.config import Aimv2Config, Aimv2TextConfig, Aimv2VisionConfig
from mlx_aimv2.embed.distributed import Ranks
from mlx_aimv2.embed.provenance import fingerprint
from mlx_aimv2.files import check_target
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.model import Aimv2Model, Aimv2VisionModel, unit_length
from mlx_aimv2.pretrain.captioned import Data
from mlx_aimv2.pretrain.feature_cache import CaptionedFeatures, cache_features
from mlx_aimv2.pretrain.objective import initialise
from mlx_aimv2.pretrain.pretraining import Log, check_enough, tokenizer_for, write_checkpoint
from mlx_aimv2.pretrain.settings import LitSettings
from mlx_aimv2.tokenizer import Tokenizer
from mlx_aimv2.train.batches import Batches, Shuffled
from mlx_aimv2.train.loop import Watch, is_due, train
from mlx_aimv2.train.optimizer import FROZEN, flat, freeze
from mlx_aimv2.train.state import StateFile, check_training_folder

FROZEN_TRUNK = [(r"vision_model\.(?!head\.).*", FROZEN)]


@prepared(WIDE_SIGHT)
def lit(
    data: Data,
    encoder: Aimv2VisionModel,
    processor: Aimv2Processor,
    output: str | Path,
    *,
    settings: LitSettings,
    tokenizer: Tokenizer | None = None,
    resume: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Aimv2Model:
    """Trains text encoder, pooling head, projections and scale beside a frozen encoder; writes and returns the pair.

    `tokenizer` reads the captions; by default one is trained on them. Of the ranks of `mlx.launch` each keeps the
    features of its own, and the loss is over the batch of all. The pair has the running average of the weights.
    `resume` goes on with a run that was stopped. `report` gets the entries of the log.
    """
    output, ranks = Path(output), Ranks()
    check_target(output)
    folder = check_training_folder(output, resume=resume)
    tokenizer = tokenizer_for(data, settings.text, tokenizer, folder if resume else None)
    about = {"encoder": fingerprint(encoder)["digest"][:16], "ranks": ranks.size}
    state = StateFile(folder, settings.identity | about)
    folder.mkdir(parents=True, exist_ok=True)
    if ranks.rank == 0:
        tokenizer.save_to(folder)
    model = pair_with(encoder, settings, tokenizer)
    kept = folder / f"features-{ranks.rank}"
    try:
        features = cache_features(
            encoder, processor, data, kept, views=settings.views, augmentation=settings.augmentation,
            seed=settings.seed, report=report,
        )  # fmt: skip
        check_enough(len(features.texts), settings.batch_size)
        _train(model, features, tokenizer, settings, state, report)
    finally:
        shutil.rmtree(kept, ignore_errors=True)
    if ranks.rank == 0:
        write_checkpoint(model, output, tokenizer=tokenizer)
        state.path.unlink(missing_ok=True)
    return model


def pair_with(encoder: Aimv2VisionModel, settings: LitSettings, tokenizer: Tokenizer) -> Aimv2Model:
    """A LiT model around the encoder's trunk; everything else starts at random."""
    text = Aimv2TextConfig(**(asdict(settings.text) | {"vocab_size": tokenizer.size, "eos_token_id": tokenizer.eos}))
    vision = Aimv2VisionConfig(**(asdict(encoder.config) | {"use_head": True}))
    model = Aimv2Model(Aimv2Config(vision, text, settings.projection_dim))
    initialise(model, text.num_hidden_layers, seed=settings.seed)
    trunk = flat(encoder.parameters()).items()
    model.vision_model.load_weights(
        [(name, array) for name, array in trunk if not name.startswith("head.")], strict=False
    )
    freeze(model, FROZEN_TRUNK)
    return model


@dataclass(frozen=True)
class Pair:
    """One view of an image with one caption: features (N, D), the caption, the number of the image's first caption."""

    features: np.ndarray[Any, Any]
    caption: str
    key: int


def _train(
    model: Aimv2Model,
    features: CaptionedFeatures,
    tokenizer: Tokenizer,
    settings: LitSettings,
    state: StateFile,
    report: Callable[[str], None],
) -> None:
    """Trains what is not frozen; at the end the model holds the running average of its weights."""
    ranks = Ranks()
    keys = {texts[0]: number for number, texts in enumerate(dict.fromkeys(features.texts))}

    def make(item: tuple[int, np.random.Generator]) -> Pair:
        image, rng = item
        view, texts = int(rng.integers(settings.views)), features.texts[image]
        chosen = 0 if rng.random() < settings.first_caption else int(rng.integers(len(texts)))
        return Pair(features.take([image], [view])[0], texts[chosen], keys[texts[0]])

    def collate(pairs: Sequence[Pair]) -> tuple[mx.array, mx.array, mx.array]:
        x = mx.array(np.stack([pair.features for pair in pairs])).astype(model.dtype)
        return x, mx.array(tokenizer([pair.caption for pair in pairs])), mx.array([pair.key for pair in pairs])

    def loss(model: Any, batch: tuple[mx.array, mx.array, mx.array], key: mx.array) -> dict[str, mx.array]:
        x, ids, own_keys = batch
        images, texts = by_images(lambda *both: both_sides(model, *both), x, ids)
        images, texts = (of_all_ranks(side, ranks) for side in (images, texts))
        found = contrastive_loss(model.logits(images, texts), same_captions(ranks.rows(own_keys)))
        return {"loss": found, "scale": mx.exp(model.logit_scale)}

    log = Log(state.folder / "log.jsonl", report)

    def after_step(step: int, losses: dict[str, float]) -> None:
        if ranks.rank == 0 and (is_due(step, settings.steps_per_report) or step == settings.iters):
            log.add(step, **losses)

    order = Shuffled(
        range(len(features.texts)),
        batch_size=settings.batch_size,
        seed=settings.seed,
        rank=ranks.rank,
        ranks=ranks.size,
    )
    batches = Batches(order, make, collate=collate)
    try:
        watch = Watch(after_step=after_step, say=report)
        train(model, loss, batches, settings.plan(), state=state, ranks=ranks, watch=watch)
    finally:
        batches.close()


def both_sides(model: Aimv2Model, features: mx.array, ids: mx.array) -> tuple[mx.array, mx.array]:
    """The trainable ends of both sides: `(B, N, D), (B, L) -> (B, E), (B, E)` of unit length, float32."""
    images = unit_length(model.visual_projection(model.vision_model.head(features)))
    return images, unit_length(model.text_projection(model.text_model(ids).pooler_output))


def contrastive_loss(logits: mx.array, same: mx.array) -> mx.array:
    """Cross-entropy of each image among texts and of each text among images, their mean: `(B, B), (B, B) -> ()`.

    `same` is true where two examples have the same caption: such a pair is neither wrong nor counted.
    """
    own = mx.eye(logits.shape[0], dtype=mx.bool_)
    logits = mx.where(same & ~own, -math.inf, logits)
    diagonal = mx.diagonal(logits)
    per_image = mx.logsumexp(logits, axis=1) - diagonal
    per_text = mx.logsumexp(logits, axis=0) - diagonal
    return 0.5 * (per_image.mean() + per_text.mean())


def of_all_ranks(x: mx.array, ranks: Ranks) -> mx.array:
    """Rows of every rank, in the order of the ranks: `(B, …) -> (ranks * B, …)`.

    Each rank differentiates the whole loss by its own rows alone, so the ranks' shares have to be summed. The loop
    takes their mean; therefore the gradient is made larger by the number of ranks here.
    """
    if ranks.size == 1:
        return x

    @mx.custom_function
    def gathered(x: mx.array) -> mx.array:
        return ranks.rows(x)

    @gathered.vjp
    def gathered_vjp(x: mx.array, gradient: mx.array, _: mx.array) -> mx.array:
        own = gradient[ranks.rank * x.shape[0] : (ranks.rank + 1) * x.shape[0]]
        return ranks.size * own

    result: Any = gathered(x)
    return result


def same_captions(keys: mx.array) -> mx.array:
    """Which pairs of examples have the same key: `(B,) -> (B, B)` boolean."""
    return keys[:, None] == keys[None]
