"""The launch budget of a pass on a Mac's GPU, counted in the graph, and MLX's conditions for its fast kernels there."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_aimv2 import Aimv2VisionConfig, Aimv2VisionModel, layers, load
from mlx_aimv2.backend import run_blocks
from mlx_aimv2.config import RELEASED
from mlx_aimv2.embed.loader import images_at_once
from mlx_aimv2.learn.lora import LoRALinear
from tests.exact import NEAR, roundings
from tests.metal_graph import launches
from tests.small_models import FIXED, NATIVE, write_lit

DTYPES = pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=["float32", "float16", "bfloat16"])

BLOCK = ["RMSNorm", "Matmul", "Attention", "AddMM", "RMSNorm", "Matmul", "Matmul", "SwiGLU", "AddMM"]
PATCHES = ["Copy", "AddMM", "RMSNorm", "Add"]  # pixels in the order of the kernel; the product; norm; positions


def small_block(dtype: mx.Dtype = mx.float32) -> layers.Block:
    """Heads of 128, as in every released checkpoint."""
    block = layers.Block(256, 192, 2, 1e-5)
    block.set_dtype(dtype)
    mx.eval(block.parameters())
    return block


@DTYPES
@pytest.mark.parametrize("sees", ["all", "causal", "mask"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_block_launches_nine_kernels_and_copies_casts_and_gathers_nothing(dtype, sees, batch):
    x = mx.zeros((batch, 37, 256), dtype)
    mask = [mx.ones((batch, 37, 37), mx.bool_)] if sees == "mask" else []
    block = small_block(dtype)
    assert launches(lambda x, mask=None: block(x, causal=sees == "causal", mask=mask), x, *mask) == BLOCK


def test_swiglu_is_one_kernel_of_a_compiled_function(tmp_path):
    mx.export_to_dot(str(tmp_path / "graph.dot"), layers._fused_swiglu(mx.zeros((2, 3)), mx.ones((2, 3))))
    labels = re.findall(r'label ="(\w+)"', (tmp_path / "graph.dot").read_text())
    (kernel,) = [label for label in labels if label not in ("Broadcast", "Full")]  # what zeros and ones are made of
    assert kernel.startswith("Compiled")


@pytest.mark.parametrize("kind", ["plain", "biased", "adapted", "packed"])
def test_a_product_is_added_in_one_kernel_where_the_layer_is_plain(kind):
    x, residual = mx.random.normal((2, 11, 128)), mx.random.normal((2, 11, 192))
    layer = nn.Linear(128, 192, bias=kind == "biased")
    if kind == "adapted":
        layer = LoRALinear(layer, rank=3, scale=1.7, dropout=0.0)
        layer.lora_b = mx.random.normal(layer.lora_b.shape)
    elif kind == "packed":
        layer = nn.QuantizedLinear.from_linear(layer)
    mx.eval(layer.parameters())
    added = layers.project_and_add(layer, x, residual)
    assert roundings(added, residual + layer(x)) <= NEAR
    assert (launches(lambda x: layers.project_and_add(layer, x, residual), x) == ["AddMM"]) == (kind == "plain")


def test_the_gradient_of_a_plain_layer_is_one_product_for_all_images():
    x, weight = mx.random.normal((3, 5, 16)), mx.random.normal((24, 16))
    layer = nn.Linear(16, 24, bias=False)

    def gradient(weight: mx.array) -> mx.array:
        layer.weight = weight
        return mx.grad(lambda w: _with(layer, w, x).square().sum())(weight)

    found = launches(gradient, weight)
    assert found.count("Matmul") == 1 and "Reduce" not in found, found


def _with(layer: nn.Linear, weight: mx.array, x: mx.array) -> mx.array:
    layer.weight = weight
    return layers.project_and_add(layer, x, mx.zeros((3, 5, 24)))


@DTYPES
def test_a_pass_of_large_224_launches_221_kernels(dtype):
    config = RELEASED["aimv2-large-patch14-224"].config
    model = Aimv2VisionModel(replace(config, hidden_size=128, intermediate_size=96, num_attention_heads=1))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    found = launches(lambda pixels: model(pixels).last_hidden_state, mx.zeros((2, 224, 224, 3), dtype))
    assert found == [*PATCHES, *BLOCK * 24, "RMSNorm"]
    assert len(found) == 221


@DTYPES
@pytest.mark.parametrize(("folder", "side"), [(FIXED, (42, 42)), (NATIVE, (61, 44))], ids=["fixed", "native"])
def test_a_loaded_checkpoint_launches_no_more(folder, side, dtype):
    """In Apple's layout, whose patch kernel has other axes than MLX's; a native grid, with a rest that is dropped."""
    model, _ = load(folder, dtype=dtype)
    found = launches(lambda pixels: model(pixels).last_hidden_state, mx.zeros((2, *side, 3), dtype))
    assert found == [*PATCHES, *BLOCK * len(model.blocks), "RMSNorm"]


@DTYPES
@pytest.mark.parametrize("batch", [1, 3])
def test_lit_reads_texts_in_nine_kernels_a_block_and_gathers_only_their_words(tmp_path, dtype, batch):
    text = load(write_lit(tmp_path / "lit"), dtype=dtype)[0].text_model

    def tokens(ids: mx.array) -> mx.array:
        *_, x = run_blocks(text.blocks, text.embed(ids), causal=True)
        return text.norm(x)

    found = launches(tokens, mx.zeros((batch, 11), mx.int32))
    assert found == ["Gather", "Add", *BLOCK * len(text.blocks), "RMSNorm"]


@DTYPES
def test_the_pooling_head_copies_only_for_the_one_query_of_several_images(dtype):
    head = layers.AttentionPoolingHead(256, 2)
    head.set_dtype(dtype)
    mx.eval(head.parameters())
    alone, several = (launches(head, mx.zeros((batch, 37, 256), dtype)) for batch in (1, 3))
    assert alone == ["Matmul", "Matmul", "Attention", "AddMM"]
    assert several == ["Matmul", "Matmul", *["Copy"] * 3, "Attention", "AddMM"]  # query, keys, values: vector kernel


# MLX's conditions for its fast kernels on Metal, by its source at 846d1762 (files below mlx/backend/metal)

PINS = ("mlx>=0.31.1,!=0.31.2; sys_platform == 'darwin'", "mlx[cpu]>=0.31.1,!=0.31.2; sys_platform == 'linux'")
"""What pyproject.toml asked for when these conditions were read: with another pin they are to be read again."""

SIMD_TILE, UNITS_TILE = 32, 64
"""Queries of a tile of full attention: scaled_dot_product_attention.cpp:240, and on M5's matrix units :32."""


def is_fused(queries: int, dims: int) -> bool:
    """Whether attention is one kernel: scaled_dot_product_attention.cpp:661-664, but 192 and 256 at :762."""
    if queries > 8:
        return dims in (64, 72, 80, 96, 128)
    return dims in (64, 96, 128, 256)  # :682-687, :765


def has_whole_attention_tiles(tokens: int, dims: int, *, has_units: bool) -> bool:
    """Whether queries and keys fill their tiles: scaled_dot_product_attention.cpp:240-244, on M5 :32-33, 77-78."""
    queries, keys = (UNITS_TILE, 32) if has_units else (SIMD_TILE, 32 if dims < 128 else 16)
    return tokens % queries == 0 and tokens % keys == 0


def is_one_row_a_group(width: int) -> bool:
    """Whether a norm reads a row once: RMS_LOOPED_LIMIT, kernels/defines.h:16, normalization.cpp:57-59."""
    return width <= 4096


def has_whole_product_tiles(rows: int, columns: int, *, has_units: bool) -> bool:
    """Whether a product fills its tiles: 64 x 64 at most on M1 to M4 (matmul.cpp:90-171), 128 x 128 on M5 (:206)."""
    tile = 128 if has_units else 64
    return rows % tile == 0 and columns % tile == 0


def is_split(rows: int, columns: int, inner: int, *, is_large: bool) -> bool:
    """Whether M1 to M4 split a product's sum, a second kernel, matmul.cpp:913-926; `is_large` for Max and Ultra."""
    tiles = -(-rows // 16) * -(-columns // 16)
    return tiles <= (2048 if is_large else 1024) and inner // 16 >= 8 and inner >= max(rows, columns)


def is_split_on_units(rows: int, columns: int, inner: int) -> bool:
    """The same on M5's matrix units: matmul.cpp:948-950."""
    longest = max(rows, columns)
    return inner >= 3 * longest or (longest <= 1024 and inner > 2 * longest)


def products(config: Aimv2VisionConfig) -> dict[str, tuple[int, int]]:
    """Columns and inner length of a block's products."""
    dims, hidden = config.hidden_size, config.intermediate_size
    return {
        "qkv": (3 * dims, dims), "proj": (dims, dims),
        "gate": (hidden, dims), "up": (hidden, dims), "down": (dims, hidden),
    }  # fmt: skip


def test_the_conditions_were_read_for_this_pin():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert all(f'"{pin}"' in text for pin in PINS), "read MLX's source again, then change PINS and what has changed"


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("has_units", [False, True], ids=["M1 to M4", "M5"])
def test_every_checkpoint_takes_the_fast_kernels(name, has_units):
    pair = RELEASED[name].config
    for config in {pair.vision, getattr(pair, "text_config", pair.vision)}:
        dims = config.hidden_size // config.num_attention_heads
        assert dims == 128 and is_fused(SIMD_TILE, dims) and is_one_row_a_group(config.hidden_size)
        assert all(columns % 128 == 0 for columns, _ in products(config).values())
    vision, tokens = pair.vision, pair.vision.num_patches
    if tokens is None:
        assert name == "aimv2-large-patch14-native"  # any number of tokens: the last tiles are not full
        return
    assert has_whole_attention_tiles(tokens, 128, has_units=has_units)
    batch = images_at_once(tokens)
    assert batch == {256: 16, 576: 8, 1024: 4}[tokens]
    for columns, inner in products(vision).values():
        assert has_whole_product_tiles(batch * tokens, columns, has_units=has_units)
        assert not is_split(batch * tokens, columns, inner, is_large=True)
        assert not is_split_on_units(batch * tokens, columns, inner)


def split_products(name: str, batch: int, condition: Callable[..., bool], **which: bool) -> set[str]:
    config = RELEASED[name].config.vision
    rows = batch * config.num_patches
    return {what for what, (columns, inner) in products(config).items() if condition(rows, columns, inner, **which)}


@pytest.mark.parametrize("is_large", [False, True], ids=["M4", "M4 Max"])
def test_only_one_image_at_224_splits_a_sum_before_m5(is_large):
    found = {
        (name, batch): split
        for name, released in RELEASED.items()
        for batch in (1, 2, 4)
        if released.config.vision.num_patches and (split := split_products(name, batch, is_split, is_large=is_large))
    }
    assert {key[0].rpartition("-patch14-")[2] for key in found} <= {"224", "224-distilled", "224-lit"}
    assert {batch for (name, batch) in found} <= ({1, 2} if is_large else {1})
    assert found["aimv2-large-patch14-224", 1] == {"proj", "down"}


def test_on_m5_only_the_last_product_of_large_splits_its_sum():
    for name in RELEASED:
        if RELEASED[name].config.vision.num_patches:
            wanted = {"down"} if "large" in name else set()
            assert split_products(name, 1, is_split_on_units) == wanted, name


def test_seven_images_at_336_would_not_fill_the_tiles_of_m5():
    assert not has_whole_product_tiles(7 * 576, 1024, has_units=True)
