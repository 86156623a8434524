"""Makes what the tests of texts and images run on: a small random LiT model with the small trained vocabulary.

Random weights know no cat from a dog: what is tested with them is arithmetic and messages. The pair made by hand knows
three colours, so that images and words really meet. How well Apple's weights do is beyond these tests.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from tokenizers import Tokenizer

from mlx_aimv2 import Aimv2Config, Aimv2Model, Aimv2TextConfig, Aimv2VisionConfig
from mlx_aimv2.checkpoint import layouts
from mlx_aimv2.conversion.folder import config_for
from mlx_aimv2.images.preprocessing import published
from mlx_aimv2.images.processor import Aimv2Processor

GOLDEN = Path(__file__).parent / "golden"
REFERENCE = GOLDEN / "reference" / "lit"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

COLOURS = ("red", "green", "blue")

CONFIG = Aimv2Config(
    Aimv2VisionConfig(60, 77, 3, 5, image_size=42, use_head=True),
    Aimv2TextConfig(778, 36, 53, 2, 3, max_position_embeddings=23, eos_token_id=777),
    projection_dim=29,
)


def small_lit(config: Aimv2Config = CONFIG, *, seed: int = 7) -> Aimv2Model:
    """A pair whose weights are random, its norms' included, with a logit scale above the limit as the trained one."""
    dice = np.random.default_rng(seed)
    model = Aimv2Model(config)
    weights = []
    for name, parameter in tree_flatten(model.parameters()):
        values = dice.normal(size=parameter.shape, scale=max(parameter.shape[-1:], default=1) ** -0.5 * 1.5)
        if "norm" in name:
            values = dice.uniform(0.5, 1.5, parameter.shape)
        elif "embed" in name:
            values *= 3  # so that different words and places differ
        weights.append((name, mx.array(values.astype(np.float32))))
    model.load_weights(weights)
    model.logit_scale = mx.array(4.75)
    return model


def colour_lit() -> Aimv2Model:
    """A pair made by hand that knows three words: both encoders turn red, green and blue into the first three axes.

    The blocks pass on what they get, except that each token of the text adds the mean of those before it.
    """
    tokenizer = Tokenizer.from_file(str(GOLDEN / "tokenizer" / "tokenizer.json"))
    model = Aimv2Model(replace(CONFIG, projection_dim=3))
    weights = {name: np.zeros(array.shape, np.float32) for name, array in tree_flatten(model.parameters())}
    for name in weights:
        if "norm" in name:
            weights[name] += 1
    contrast = np.eye(3) - 1 / 3  # so that grey, and words of no colour, lie in no direction
    weights["vision_model.patch_embed.proj.weight"][:3] = contrast[:, None, None, :]
    weights["vision_model.head.v.weight"] += np.eye(60)
    weights["vision_model.head.linear.weight"] += np.eye(60)
    weights["visual_projection.weight"][:, :3] = np.eye(3)
    weights["text_model.token_embed.weight"][:, 3] = 1
    for axis, word in enumerate(COLOURS):
        for token in tokenizer.encode(word, add_special_tokens=False).ids:
            weights["text_model.token_embed.weight"][token, axis] = 5
    weights["text_model.blocks.0.attn.qkv.weight"][-36:] = np.eye(36)
    weights["text_model.blocks.0.attn.proj.weight"] += np.eye(36)
    weights["text_projection.weight"][:, :3] = contrast
    weights["logit_scale"] = np.float32(4.75)
    model.load_weights([(name, mx.array(array)) for name, array in weights.items()])
    return model


def write(folder: Path, *, model: Aimv2Model | None = None, files: tuple[str, ...] = TOKENIZER_FILES) -> Path:
    """A folder in Apple's layout with the pair, a preprocessor_config.json and these tokenizer files."""
    model = model or small_lit()
    folder.mkdir(parents=True, exist_ok=True)
    match = layouts.layout_for("apple", pair=True)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(match.to_source(tree_flatten(model.parameters()))))
    (folder / "config.json").write_text(json.dumps(config_for(model.config, "apple")))
    Aimv2Processor(published(model.config.vision_config.image_size)).save_to(folder)
    for name in files:
        shutil.copy(GOLDEN / "tokenizer" / name, folder / name)
    return folder
