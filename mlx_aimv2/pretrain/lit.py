"""LiT tuning (Zhai et al. 2022, arXiv 2111.07991): a frozen image trunk learns to be searched by words.

    trunk (frozen) -> features on disk -> pooling head, projection  \\
                                caption -> text encoder, projection   > contrastive loss over the global batch
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_aimv2.config import Aimv2Config, Aimv2TextConfig, Aimv2VisionConfig
from mlx_aimv2.conversion import pytorch_folder
from mlx_aimv2.model import Aimv2Model, Aimv2VisionModel
from mlx_aimv2.preprocessing import published
from mlx_aimv2.pretrain import contrastive, optimise, state
from mlx_aimv2.pretrain.augment import Augmentation
from mlx_aimv2.pretrain.captioned import Data
from mlx_aimv2.pretrain.captions import VOCAB_SIZE, as_tokenizer, save_tokenizer, train_tokenizer
from mlx_aimv2.pretrain.feature_cache import CaptionedFeatures, cache_features
from mlx_aimv2.pretrain.objective import initialise
from mlx_aimv2.pretrain.train import Log, all_captions
from mlx_aimv2.processor import Aimv2Processor
from mlx_aimv2.safe_write import atomic_folder, check_target
from mlx_aimv2.tokenizer import Tokenizer
from mlx_aimv2.x86_training import by_images

EMA = 0.999
"""Share of the average that stays at each step; early on less, so that the start does not linger."""


@dataclass(frozen=True)
class LitSettings:
    """Sizes of the text side and how it is trained; the text encoder's defaults are aimv2-large-patch14-224-lit's.

    `views` is how many crops of each image are kept: the whole image, and random ones. `first_caption` is how often a
    caption is an example's first one; otherwise all are drawn alike.
    """

    text: Aimv2TextConfig = field(default_factory=Aimv2TextConfig)
    projection_dim: int = 768
    batch: int = 256
    steps: int = 1000
    learning_rate: float = 1e-3
    warm_up: int | None = None
    weight_decay: float = optimise.WEIGHT_DECAY
    views: int = 1
    first_caption: float = 0.0
    seed: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        for name in ("batch", "steps", "views"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")


def lit(
    data: Data,
    encoder: Aimv2VisionModel,
    processor: Aimv2Processor,
    output: str | Path,
    *,
    settings: LitSettings,
    tokenizer: Tokenizer | None = None,
    group: mx.distributed.Group | None = None,
    log_every: int = 50,
    report: Callable[[str], None] = lambda line: None,
) -> Aimv2Model:
    """Trains text encoder, pooling head, projections and scale beside a frozen encoder; writes and returns the pair.

    `tokenizer` reads the captions; by default one is trained on them. With `group` the loss is over the batch of all
    ranks; each keeps the features of its own.
    """
    output = Path(output)
    check_target(output)
    rank, ranks = (group.rank(), group.size()) if group is not None else (0, 1)
    if settings.batch % ranks:
        raise ValueError(f"a batch of {settings.batch} does not divide into {ranks} ranks; change --batch")
    context = settings.text.max_position_embeddings
    if tokenizer is None:
        most = min(settings.text.vocab_size, VOCAB_SIZE)
        tokenizer = as_tokenizer(train_tokenizer(all_captions(data), vocab_size=most), context=context)
    tokenizer.context = context
    model = pair_with(encoder, settings, tokenizer)
    place = state.place_of(output)
    place.mkdir(parents=True, exist_ok=True)
    kept = place / f"features-{rank}"
    try:
        features = cache_features(
            encoder, processor, data, kept, views=settings.views, augmentation=settings.augmentation,
            seed=settings.seed, report=report,
        )  # fmt: skip
        if len(features.texts) < settings.batch:
            raise ValueError(
                f"the data has {len(features.texts)} images with captions, fewer than a batch of {settings.batch}; "
                "lower --batch"
            )
        log = Log(place / "log.jsonl", report, is_writer=rank == 0)
        fit(model, features, tokenizer, settings, group=group, log=log, log_every=log_every)
    finally:
        shutil.rmtree(kept, ignore_errors=True)
    if rank == 0:
        write_pair(model, output, tokenizer)
    return model


def pair_with(encoder: Aimv2VisionModel, settings: LitSettings, tokenizer: Tokenizer) -> Aimv2Model:
    """A LiT model around the encoder's trunk; everything else starts at random."""
    size = tokenizer.backend.get_vocab_size(with_added_tokens=True)
    text = Aimv2TextConfig(**(asdict(settings.text) | {"vocab_size": size, "eos_token_id": tokenizer.eos}))
    vision = Aimv2VisionConfig(**(asdict(encoder.config) | {"use_head": True}))
    model = Aimv2Model(Aimv2Config(vision, text, settings.projection_dim))
    initialise(model, text.num_hidden_layers, seed=settings.seed)
    trunk: Any = tree_flatten(encoder.parameters())
    model.vision_model.load_weights(
        [(name, array) for name, array in trunk if not name.startswith("head.")], strict=False
    )
    model.vision_model.freeze()
    model.vision_model.head.unfreeze()
    return model


def fit(
    model: Aimv2Model,
    features: CaptionedFeatures,
    tokenizer: Tokenizer,
    settings: LitSettings,
    *,
    group: mx.distributed.Group | None,
    log: Log,
    log_every: int,
) -> None:
    """Trains what is not frozen; at the end the model holds the running average of its weights."""
    rank, ranks = (group.rank(), group.size()) if group is not None else (0, 1)
    warm_up = settings.warm_up if settings.warm_up is not None else settings.steps // 10
    optimizer = optimise.adamw(
        settings.learning_rate, steps=settings.steps, warm_up=warm_up, weight_decay=settings.weight_decay
    )
    optimise.lay_out(model, optimizer)
    own = settings.batch // ranks
    mine = slice(rank * own, (rank + 1) * own)
    keys = {texts[0]: number for number, texts in enumerate(dict.fromkeys(features.texts))}

    def both_sides(x: mx.array, ids: mx.array) -> tuple[mx.array, mx.array]:
        return contrastive.embed_features(model, x), contrastive.embed_texts(model, ids)

    def loss(x: mx.array, ids: mx.array, same: mx.array) -> mx.array:
        images, texts = by_images(both_sides, x, ids)
        images, texts = contrastive.over_all_ranks(images, group), contrastive.over_all_ranks(texts, group)
        return contrastive.contrastive_loss(model.logits(images, texts), same)

    step_of = nn.value_and_grad(model, loss)
    average: dict[str, mx.array] = dict(_flat(model.trainable_parameters()))
    order = _endless(len(features.texts), settings.seed)
    for step in range(1, settings.steps + 1):
        chance = np.random.default_rng((settings.seed, 3, step))
        chosen = [next(order) for _ in range(settings.batch)]
        views = chance.integers(settings.views, size=settings.batch)
        captions = [_caption(features.texts[i], chance, settings.first_caption) for i in chosen]
        same = contrastive.same_captions([keys[features.texts[i][0]] for i in chosen])
        x = features.take(chosen[mine], views[mine].tolist())
        value, gradient = step_of(mx.array(x).astype(model.dtype), mx.array(tokenizer(captions[mine])), same)
        gradient = contrastive.averaged_gradients(gradient, group)
        optimise.check_finite([optimise.number(value)], step, state="the start")
        optimizer.update(model, optimise.clipped(gradient))
        keep = min(EMA, (1 + step) / (10 + step))
        for name, array in _flat(model.trainable_parameters()):
            average[name] = keep * average[name] + (1 - keep) * array
        mx.eval(model.parameters(), optimizer.state, average)
        if step % log_every == 0 or step == settings.steps:
            log.add(step, loss=optimise.number(value), scale=optimise.number(mx.exp(model.logit_scale)))
    model.load_weights(list(average.items()), strict=False)


def write_pair(model: Aimv2Model, output: Path, tokenizer: Tokenizer) -> None:
    """A folder in Apple's layout: weights in float32, config.json, preprocessor_config.json, the tokenizer."""
    with atomic_folder(output) as folder:
        pytorch_folder.save_model(model.config, _flat(model.parameters()), folder, layout="apple", dtype=mx.float32)
        vision = model.config.vision_config
        Aimv2Processor(published(vision.image_size), patch_size=vision.patch_size).save_to(folder)
        save_tokenizer(tokenizer.backend, folder, context=model.config.text_config.max_position_embeddings)


def _caption(texts: tuple[str, ...], chance: np.random.Generator, first_caption: float) -> str:
    if chance.random() < first_caption:
        return texts[0]
    return texts[int(chance.integers(len(texts)))]


def _endless(count: int, seed: int) -> Any:
    epoch = 0
    while True:
        yield from np.random.default_rng((seed, 4, epoch)).permutation(count).tolist()
        epoch += 1


def _flat(tree: Any) -> list[tuple[str, mx.array]]:
    flat: Any = tree_flatten(tree)
    return flat
