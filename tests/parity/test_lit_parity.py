"""Logits of texts and images equal those of transformers' LiT, small and at full size, in both layouts.

transformers' text encoder is causal, as Apple's is, only in eager attention and with a mask.
"""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import save_file  # noqa: E402

from mlx_aimv2 import Aimv2Config, bundled, load  # noqa: E402
from mlx_aimv2.cli import main  # noqa: E402
from mlx_aimv2.convert import convert  # noqa: E402
from mlx_aimv2.images.preprocessing import published  # noqa: E402
from mlx_aimv2.images.processor import Aimv2Processor  # noqa: E402
from tests.exact import APART  # noqa: E402
from tests.parity.test_tokenizer_parity import clip  # noqa: E402, F401

SMALL = {
    "vision_config": {
        "hidden_size": 60, "intermediate_size": 77, "num_hidden_layers": 3, "num_attention_heads": 5, "image_size": 42
    },
    "text_config": {
        "vocab_size": 211, "hidden_size": 36, "intermediate_size": 53, "num_hidden_layers": 2, "num_attention_heads": 3,
        "max_position_embeddings": 23, "eos_token_id": 210,
    },
    "projection_dim": 29,
}  # fmt: skip
FULL = {"vision_config": {}, "text_config": {}, "projection_dim": 768}

# transformers' name -> Apple's, written independently of the package's table, which is under test.
TO_APPLE = {
    "vision_model.": "image_encoder.",
    "text_model.": "text_encoder.",
    "embeddings.patch_embed.": "preprocessor.patchifier.proj.",
    "embeddings.rms_norm.": "preprocessor.patchifier.norm.",
    "image_encoder.embeddings.position_embedding.weight": "image_encoder.preprocessor.pos_embed",
    "embeddings.token_embedding.": "preprocessor.text_embedding.",
    "text_encoder.embeddings.position_embedding.weight": "text_encoder.preprocessor.positional_embedding",
    "encoder.layers.": "trunk.blocks.",
    ".rms_norm1.": ".norm_1.",
    ".rms_norm2.": ".norm_2.",
    "attention.out_proj": "attn.proj",
    "ffn.gate_proj": "mlp.fc1",
    "ffn.up_proj": "mlp.fc3",
    "ffn.down_proj": "mlp.fc2",
    "encoder.rms_norm.": "encoder.trunk.post_trunk_norm.",
    "head.k_proj": "head.k",
    "head.v_proj": "head.v",
    "head.output_proj": "head.linear",
    "visual_projection": "image_projector",
    "text_projection": "text_projector",
    "logit_scale": "log_logit_scale",
}


def random_pair(sizes: dict, spread: float) -> "transformers.Aimv2Model":
    """transformers' class with random weights, norms included; the logit scale above its limit, as the trained one."""
    torch.manual_seed(5)
    config = transformers.Aimv2Config(**sizes)
    model = transformers.Aimv2Model._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "embedding" in name or "cls_token" in name or "bias" in name:
                parameter.normal_(std=1.0)
            elif parameter.ndim > 1:
                parameter.normal_(std=spread * parameter[0].numel() ** -0.5)
        model.logit_scale.fill_(math.log(115))
    return model


def apples(weights: dict) -> dict:
    """transformers' tensors under Apple's names, in Apple's shapes."""
    named = {}
    for name, tensor in weights.items():
        for reference, apple in TO_APPLE.items():
            name = name.replace(reference, apple)
        named[name] = tensor[None] if name.endswith("pos_embed") else tensor
    for name in [name for name in named if name.endswith("attention.q_proj.weight")]:
        parts = [named.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        named[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    return {name: tensor.clone().contiguous() for name, tensor in named.items()}


def write(model: "transformers.Aimv2Model", folder: Path, layout: str) -> Path:
    """A checkpoint as it is on the Hub: transformers' own file, or the one of Apple's release."""
    model.save_pretrained(folder)
    if layout == "apple":
        save_file(apples(model.state_dict()), folder / "model.safetensors", {"format": "pt"})
        config = model.config.to_dict()
        text = {**config["text_config"], "max_context_length": config["text_config"]["max_position_embeddings"]}
        del text["max_position_embeddings"]
        (folder / "config.json").write_text(json.dumps({**config, "text_config": text}))
    Aimv2Processor(published(model.config.vision_config.image_size)).save_to(folder)
    return folder


def rows(*lengths: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts of so many tokens, filled with the end of text, and the mask of what is not filling."""
    dice = np.random.default_rng(3)
    ids = np.full((len(lengths), max(lengths)), 210)
    for row, length in zip(ids, lengths, strict=True):
        row[: length - 1] = [209, *dice.integers(0, 209, length - 2)]
    return ids, (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(int)


def far(found: mx.array, reference: "torch.Tensor") -> float:
    wanted = reference.detach().numpy()
    return float(np.abs(np.array(found) - wanted).max() / np.abs(wanted).max())


@pytest.fixture(scope="module")
def small():
    return random_pair(SMALL, spread=1.5)


@pytest.mark.parametrize("masked", ["all", "texts"])
@pytest.mark.parametrize("layout", ["apple", "transformers"])
def test_a_small_random_pair(small, layout, masked, tmp_path):
    model, _ = load(write(small, tmp_path, layout))
    ids, mask = rows(7, 3, 23, 2, 11)
    pixels = np.random.default_rng(4).normal(size=(4, 3, 42, 42)).astype(np.float32)
    with torch.no_grad():
        reference = small(
            pixel_values=torch.tensor(pixels),
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask if masked == "texts" else np.ones_like(mask)),
        )
    got = model(mx.array(pixels.transpose(0, 2, 3, 1)), mx.array(ids))
    assert got.logits_per_image.shape == (4, 5)
    pooled = [
        (pair.vision_model_output.pooler_output, pair.text_model_output.pooler_output) for pair in (got, reference)
    ]
    for mine, wanted in zip(*pooled, strict=True):
        assert far(mine, wanted) <= APART
    for name in ("image_embeds", "text_embeds", "logits_per_image", "logits_per_text"):
        assert far(getattr(got, name), getattr(reference, name)) <= APART, name


def test_the_default_attention_of_transformers_is_another_function(small, tmp_path):
    """Why the comparison is with eager attention: the day this fails, transformers has become causal by itself."""
    ids, _ = rows(7, 3)
    other = transformers.Aimv2Model.from_pretrained(write(small, tmp_path, "transformers"), attn_implementation="sdpa")
    with torch.no_grad():
        eager = small.text_model(torch.tensor(ids), attention_mask=torch.ones(ids.shape, dtype=torch.int))
        default = other.text_model(torch.tensor(ids))
    assert far(mx.array(default.last_hidden_state.numpy()), eager.last_hidden_state) > 1e-2


LABELS = ["cat", "cup of coffee", "rocket", "astronaut", "Zürich, by night", "dog"]
TEMPLATES = ["a photo of a {}", "a blurry photo of the {}.", "itap of my {}."]


@pytest.fixture(scope="module")
def full(clip, tmp_path_factory) -> Iterator[tuple["transformers.Aimv2Model", Path]]:  # noqa: F811
    """A random pair of the released size and its MLX folder, converted from Apple's layout, with CLIP's vocabulary."""
    place = tmp_path_factory.mktemp("full")
    reference = random_pair(FULL, spread=1.0)
    source = write(reference, place / "apple", "apple")
    for file in clip[0].iterdir():
        shutil.copy(file, source)
    convert(source, place / "mlx", verify=False)
    shutil.rmtree(source)
    yield reference, place / "mlx"
    shutil.rmtree(place)  # 1.7 GB


def test_the_full_size_pair_classifies_photographs_as_transformers_does(full, clip, capsys, tmp_path):  # noqa: F811
    reference, folder = full
    photographs = [str(file) for file in bundled.photographs()]
    (tmp_path / "labels.txt").write_text("\n".join(LABELS), encoding="utf-8")
    flags = [flag for template in TEMPLATES for flag in ("--template", template)]
    files = ["-m", str(folder), "--labels-file", str(tmp_path / "labels.txt")]
    assert main(["classify", *photographs, *files, *flags, "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    texts = [template.replace("{}", label) for label in LABELS for template in TEMPLATES]
    tokens = clip[2](texts, padding=True, return_tensors="pt")
    tokens["attention_mask"] = torch.ones_like(tokens["input_ids"])
    _, processor = load(folder, lazy=True)
    pixels = torch.tensor(np.array(processor(photographs)).transpose(0, 3, 1, 2))
    with torch.no_grad():
        pair = reference(pixel_values=pixels, **tokens)
    means = pair.text_embeds.reshape(len(LABELS), len(TEMPLATES), -1).mean(dim=1)
    wanted = 100 * pair.image_embeds @ (means / means.norm(dim=1, keepdim=True)).T
    assert [answer["path"] for answer in answers] == photographs
    for answer, logits, shares in zip(answers, wanted, wanted.softmax(dim=1), strict=True):
        found = {entry["label"]: entry for entry in answer["labels"]}
        assert np.allclose([found[label]["logit"] for label in LABELS], logits, atol=2e-4)
        assert np.allclose([found[label]["probability"] for label in LABELS], shares, atol=1e-5)
        assert answer["labels"][0]["label"] == LABELS[int(logits.argmax())]


def test_the_full_size_pair_has_the_released_number_of_parameters(full):
    model, processor = load(full[1], lazy=True)
    assert sum(array.size for _, array in tree_flatten(model.parameters())) == 436_680_193
    assert model.config == Aimv2Config()
    assert (processor.tokenize("a cat")[0, 0].item(), processor.tokenize("a cat")[0, -1].item()) == (49406, 49407)
