"""Adapters: zero at the start, fused equal to applied, in mlx-lm's files; `fuse` makes a checkpoint like any other."""

import json
import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_aimv2
from mlx_aimv2 import load
from mlx_aimv2.bundled import emoji_checkpoint, photographs
from mlx_aimv2.cli import main
from mlx_aimv2.convert import convert
from mlx_aimv2.files import write_json
from mlx_aimv2.learn import add_adapters, fit, fuse, lora
from tests.labelled import CHECKPOINT, write_digits
from tests.small_training import write_encoder

pytestmark = pytest.mark.rounding


def encoder_with(kind: str, *, num_layers: int = 4, seed: int = 3):
    """The small encoder with adapters whose every number is random."""
    model, _ = load(CHECKPOINT)
    lora.add_adapters(model, kind, num_layers=num_layers, rank=3, scale=1.7)
    keys = iter(mx.random.split(mx.random.key(seed), 99))
    changed = [
        (name, 0.1 * mx.random.normal(array.shape, key=next(keys)) + (array if name.endswith(".m") else 0))
        for name, array in tree_flatten(model.trainable_parameters())
    ]
    model.load_weights(changed, strict=False)
    return model


def save(model, folder, config):
    mx.save_safetensors(str(folder / lora.WEIGHTS_FILE), dict(tree_flatten(model.trainable_parameters())))
    write_json(folder / lora.CONFIG_FILE, config)


PIXELS = mx.random.normal((2, 56, 56, 3), key=mx.random.key(1))


def config_of(kind: str, *, num_layers: int) -> dict:
    """What `add_adapters` says of the adapters of `encoder_with`."""
    return lora.add_adapters(load(CHECKPOINT)[0], kind, num_layers=2, rank=3, scale=1.7) | {"num_layers": num_layers}


@pytest.mark.parametrize("kind", lora.KINDS)
def test_a_new_adapter_changes_nothing(kind):
    model, _ = load(CHECKPOINT)
    before = np.array(model.encode_image(PIXELS))
    lora.add_adapters(model, kind, num_layers=4)
    np.testing.assert_allclose(np.array(model.encode_image(PIXELS)), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", lora.KINDS)
def test_fused_equals_applied(kind):
    model = encoder_with(kind)
    applied = np.array(model(PIXELS).last_hidden_state)
    plain, _ = load(CHECKPOINT)
    assert np.abs(applied - np.array(plain(PIXELS).last_hidden_state)).max() > 0.1
    lora.remove_adapters(model)
    assert not any(isinstance(module, lora.LoRALinear) for module in model.modules())
    fused = np.array(model(PIXELS).last_hidden_state)
    assert np.abs(fused - applied).max() <= 1e-5 * np.abs(applied).max()


def test_dora_is_its_formula():
    layer = nn.Linear(5, 7, bias=False)
    adapter = lora.DoRALinear(layer, rank=2, scale=1.5, dropout=0.0)
    adapter.lora_b = mx.random.normal((2, 7), key=mx.random.key(0))
    adapter.m = adapter.m * 1.3
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    weight, a, b, m = (
        np.array(array, np.float64) for array in (layer.weight, adapter.lora_a, adapter.lora_b, adapter.m)
    )
    whole = weight + 1.5 * (a @ b).T
    wanted = x @ (m[:, None] * whole / np.linalg.norm(whole, axis=1, keepdims=True)).T
    np.testing.assert_allclose(np.array(adapter(mx.array(x))), wanted, rtol=1e-4, atol=1e-5)


def test_the_lengths_of_doras_rows_are_constants_for_the_gradient():
    """As in the paper (section 4.3) and in mlx-lm."""
    adapter = lora.DoRALinear(nn.Linear(5, 7, bias=False), rank=2, scale=1.5, dropout=0.0)
    adapter.lora_b = mx.random.normal((2, 7), key=mx.random.key(0))
    x, y = (mx.random.normal((3, width), key=mx.random.key(width)) for width in (5, 7))
    lengths = adapter.m / mx.linalg.norm(adapter.linear.weight + 1.5 * (adapter.lora_a @ adapter.lora_b).T, axis=1)

    def applied(b):
        adapter.lora_b = b
        return (adapter(x) * y).sum()

    def constant(b):
        return (lengths * (adapter.linear(x) + 1.5 * (x @ adapter.lora_a) @ b) * y).sum()

    found, wanted = (np.array(mx.grad(one)(adapter.lora_b)) for one in (applied, constant))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_only_the_matrices_of_the_last_blocks_are_adapted_and_all_else_is_frozen():
    model, _ = load(CHECKPOINT)
    lora.add_adapters(model, "lora", num_layers=3)
    names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    wanted = {f"blocks.{i}.{layer}.lora_{part}" for i in (1, 2, 3) for layer in lora.KEYS for part in "ab"}
    assert names == wanted


def test_the_files_are_mlx_lms(tmp_path):
    model = encoder_with("dora", num_layers=2)
    config = config_of("dora", num_layers=2)
    save(model, tmp_path, config)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["fine_tune_type"] == "dora"
    assert stored["num_layers"] == 2
    assert stored["lora_parameters"] == {"rank": 3, "scale": 1.7, "dropout": 0.0, "keys": lora.KEYS}
    shapes = {name: array.shape for name, array in mx.load(str(tmp_path / "adapters.safetensors")).items()}
    assert len(shapes) == 2 * 5 * 3
    assert shapes["blocks.3.mlp.down.lora_a"] == (256, 3)
    assert shapes["blocks.3.mlp.down.lora_b"] == (3, 128)
    assert shapes["blocks.3.mlp.down.m"] == (128,)
    again, _ = load(CHECKPOINT)
    lora.load_adapters(again, tmp_path)
    np.testing.assert_array_equal(np.array(again(PIXELS).last_hidden_state), np.array(model(PIXELS).last_hidden_state))


def test_adapters_of_all_blocks_may_say_so_by_minus_one(tmp_path):
    """As mlx-lm does."""
    model, again = encoder_with("lora"), load(CHECKPOINT)[0]
    save(model, tmp_path, config_of("lora", num_layers=-1))
    lora.load_adapters(again, tmp_path)
    np.testing.assert_array_equal(np.array(again(PIXELS).last_hidden_state), np.array(model(PIXELS).last_hidden_state))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_layers": 9}, "num_layers 9, and this encoder has 4 blocks"),
        ({"num_layers": 3}, "is not for this encoder: blocks.1.attn.proj.lora_a is missing, wanted"),
        ({"fine_tune_type": "magic"}, "wanted fine_tune_type lora or dora"),
        ({"lora_parameters": {"scale": 2.0}}, "lora_parameters has None for rank"),
        ({"lora_parameters": {"rank": 10**9, "scale": 2.0}}, "lora_parameters has 1000000000 for rank"),
        ({"lora_parameters": {"rank": 3, "scale": math.nan}}, "lora_parameters has nan for scale"),
        ({"lora_parameters": {"rank": 3, "scale": 2.0, "keys": ["attn.q"]}}, "the adapters of this package are on"),
    ],
)
def test_adapters_for_something_else_are_refused(tmp_path, change, words):
    config = config_of("lora", num_layers=2)
    save(encoder_with("lora", num_layers=2), tmp_path, config)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=words):
        lora.load_adapters(load(CHECKPOINT)[0], tmp_path)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_fuse_makes_a_checkpoint_that_load_and_the_converter_read(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "cache"))
    digits = write_digits(tmp_path / "digits")
    fit(digits, CHECKPOINT, tmp_path / "head", fine_tune_type=kind, iters=2, batch_size=4)
    assert main(["fuse", "--adapter-path", str(tmp_path / "head"), "--save-path", str(tmp_path / "fused")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "fused")
    from mlx_aimv2.learn.head_folder import load_head

    fused, _ = load(tmp_path / "fused")
    assert json.loads((tmp_path / "fused" / "config.json").read_text())["torch_dtype"] == "float32"
    assert ", fine-tuned and converted to MLX by" in (tmp_path / "fused" / "README.md").read_text()
    wanted = np.array(load_head(tmp_path / "head").learner.encoder(PIXELS).last_hidden_state)
    np.testing.assert_allclose(np.array(fused(PIXELS).last_hidden_state), wanted, atol=1e-5)
    convert(tmp_path / "fused", tmp_path / "exported", export_layout="transformers", verify=False)
    exported, _ = load(tmp_path / "exported")
    np.testing.assert_allclose(np.array(exported(PIXELS).last_hidden_state), wanted, atol=1e-5)
    with pytest.raises(
        ValueError,
        match=r"head was trained on another encoder \(.*say where it is \(predict",
    ):
        fuse(tmp_path / "head", tmp_path / "wrong", model=write_encoder(tmp_path / "other", fused.config))


def test_there_is_nothing_to_fuse_in_a_probe(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "cache"))
    fit(write_digits(tmp_path / "digits"), CHECKPOINT, tmp_path / "head")
    with pytest.raises(ValueError, match=r"did not change the encoder \(linear\): nothing to fuse"):
        fuse(tmp_path / "head", tmp_path / "fused")
    with pytest.raises(ValueError, match="does not say which encoder it is for: give --model"):
        fuse(tmp_path, tmp_path / "fused")


# One's own loop


@pytest.mark.parametrize("kind", lora.KINDS)
def test_the_adapters_of_a_pair_learn_alone_and_fuse_into_what_they_do(kind, tmp_path):
    model, processor = load(emoji_checkpoint(), dtype="float32")
    config = add_adapters(model, kind, num_layers=2, rank=3)
    assert config["num_layers"] == 2
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert len(names) == 2 * 2 * len(lora.KEYS) * (2 if kind == "lora" else 3)
    assert all(name.rpartition(".")[2] in ("lora_a", "lora_b", "m") for name in names)
    pixels, ids = processor(photographs()[:2]), processor.tokenize(["a cat", "a cup"])

    def loss(model):
        return nn.losses.cross_entropy(model(pixels, ids).logits_per_image, mx.arange(2)).mean()

    optimizer = optim.AdamW(learning_rate=1e-3)
    before = dict(tree_flatten(model.parameters()))
    for _ in range(3):
        _, grads = nn.value_and_grad(model, loss)(model)
        optimizer.update(model, grads)
    changed = {name for name, array in tree_flatten(model.parameters()) if not mx.array_equal(array, before[name])}
    assert changed and changed <= set(names)
    applied = np.array(model(pixels, ids).logits_per_image)
    assert fuse(model) is model
    fused = np.array(model(pixels, ids).logits_per_image)
    assert np.abs(fused - applied).max() <= 1e-4 * np.abs(applied).max()
    again, _ = load(mlx_aimv2.save(model, processor, tmp_path / "tuned", is_tuned=True))
    np.testing.assert_array_equal(np.array(again(pixels, ids).logits_per_image), fused)


def test_adapters_that_cannot_be_added_or_fused_are_refused_with_what_can(tmp_path):
    model, _ = load(CHECKPOINT)
    for keywords, words in (
        ({"kind": "prefix"}, "adapters must be lora or dora, got 'prefix'"),
        ({"num_layers": 0}, "num_layers must be from 1 to 4, the blocks, or -1 for all, got 0"),
        ({"num_layers": 9}, "num_layers must be from 1 to 4"),
        ({"rank": 0}, "rank must be from 1 to"),
        ({"dropout": 1.0}, r"dropout must be from 0 to 0.999, got 1.0"),
        ({"scale": math.nan}, "scale must be from"),
    ):
        with pytest.raises(ValueError, match=words):
            add_adapters(model, **keywords)
    assert not any("lora" in name for name, _ in tree_flatten(model.parameters()))
    with pytest.raises(ValueError, match="the model has no adapters, so there is nothing to fuse"):
        fuse(model)
    add_adapters(model)
    with pytest.raises(ValueError, match=r"blocks.0 already has LoRALinear layers: fuse\(model\) first"):
        add_adapters(model, "dora")
    convert(CHECKPOINT, tmp_path / "q", quantize=True, verify=False)
    with pytest.raises(ValueError, match="already has QuantizedLinear layers: load it without keep_quantized"):
        add_adapters(load(tmp_path / "q", keep_quantized=True)[0])
