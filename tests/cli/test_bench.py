"""`bench` counts what it says it counts, and says what it measured."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from benchmarks import forward, images
from mlx_aimv2 import Aimv2VisionConfig, Aimv2VisionModel, bundled, load
from mlx_aimv2.cli import bench, main
from mlx_aimv2.config import Released, released
from mlx_aimv2.convert import convert

REFERENCE = Path(__file__).parents[1] / "golden" / "reference"
FIXED = REFERENCE / "fixed"

SMALL = Aimv2VisionConfig(22, 13, 3, 2, image_size=15, patch_size=5)
LARGE_224 = 309_197_824


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("large-patch14-224", LARGE_224),
        ("aimv2-huge-patch14-336", 681_343_488),
        ("apple/aimv2-1B-patch14-448", 1_236_531_200),
        ("3B-448", 2_723_017_728),
        ("large-patch14-native", 308_935_680),
    ],
)
def test_released_sizes_go_by_their_names(name, parameters):
    model = Aimv2VisionModel(released(name).config.vision)
    assert sum(array.size for _, array in tree_flatten(model.parameters())) == parameters


@pytest.mark.parametrize("name", ["", "large", "giant-patch14-224", "large-patch14-512", "3B-patch14-native"])
def test_other_sizes_are_refused(name):
    with pytest.raises(ValueError, match=r"no released checkpoint is called .*; there are aimv2-large-patch14-224"):
        released(name)


@pytest.mark.parametrize("use_head", [False, True])
def test_the_count_is_that_of_every_matrix_product(monkeypatch, use_head):
    config = Aimv2VisionConfig(22, 13, 3, 2, image_size=15, patch_size=5, use_head=use_head)
    model, counted = Aimv2VisionModel(config), []

    def counting(multiply):
        def counted_multiply(*arrays):
            left, right = arrays[-2:]
            counted.append(2 * int(np.prod(left.shape)) * right.shape[-1])
            return multiply(*arrays)

        return counted_multiply

    def conv2d(pixels, weight, *rest, convolve=mx.conv2d):
        out = convolve(pixels, weight, *rest)
        counted.append(2 * out.size * int(np.prod(weight.shape[1:])))
        return out

    def attention(q, k, v, attend=mx.fast.scaled_dot_product_attention, **options):
        counted.append(4 * q.size * k.shape[2])
        return attend(q, k, v, **options)

    monkeypatch.setattr(mx, "addmm", counting(mx.addmm))
    monkeypatch.setattr(mx, "conv2d", conv2d)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(mx.array, "__matmul__", counting(mx.array.__matmul__))
    monkeypatch.setattr("mlx_aimv2.backend.x86.on_x86_cpu", lambda: True)
    monkeypatch.setattr("mlx_aimv2.backend.x86.MIN_SHARED", 1)
    model(mx.zeros((2, 15, 15, 3)))
    assert sum(counted) == forward.matrix_flops(config, batch=2, tokens=9)


def test_a_large_image_costs_165_gigaflops():
    flops = forward.matrix_flops(released("large-patch14-224").config.vision, batch=1, tokens=256)
    assert flops == pytest.approx(164.6e9, rel=1e-3)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_a_random_model_is_in_the_dtype_asked_for(dtype):
    model = bench.random_model(SMALL, dtype)
    assert {array.dtype for _, array in tree_flatten(model.parameters())} == {dtype}


@pytest.mark.parametrize("kind", ["fixed", "native", "lit"])
def test_every_kind_of_model_is_measured(kind):
    model, _ = load(REFERENCE / kind)
    pixels = bench.random_pixels(model.vision.config, batch=2, side=70)
    speed = forward.measure_speed(model.vision, pixels, runs=1)
    assert pixels.shape == (2, 70, 70, 3) if kind == "native" else (2, 42, 42, 3)
    assert (speed["dtype"], speed["batch"], speed["tokens"]) == ("float32", 2, 25 if kind == "native" else 9)
    assert min(speed["seconds"], speed["bare_seconds"], speed["peak_bytes"]) > 0
    assert speed["weight_bytes"] == sum(array.nbytes for _, array in tree_flatten(model.vision.parameters()))


def test_loading_is_compared_with_the_bytes_of_the_files():
    weights = FIXED / "model.safetensors"
    loading = forward.measure_loading(lambda: load(FIXED), [weights], runs=1)
    assert loading["bytes"] == weights.stat().st_size
    assert loading["ratio"] == loading["seconds"] / loading["reading_seconds"] > 0


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main(["bench", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_json_says_what_was_measured_on_what(capsys):
    code, out, err = run(capsys, "-m", FIXED, "--dtype", "float32", "--batch", 1, 3, "--runs", 1, "--json")
    found = json.loads(out)
    assert code == 0
    assert {"device", "chip", "cores", "mlx", "mlx-aimv2", "advice", "model"} <= set(found)
    assert [(row["dtype"], row["batch"], row["tokens"]) for row in found["speed"]] == [
        ("float32", 1, 9),
        ("float32", 3, 9),
    ]
    row = found["speed"][1]
    assert row["images_per_second"] == pytest.approx(3 / row["seconds"])
    assert "float32 dense, batch 3" in err


def test_a_forward_pass_is_compared_with_its_bare_products(capsys):
    assert forward.main(["-m", str(FIXED), "--batch", "1", "3", "--runs", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loading"]["ratio"] > 0 and [row["batch"] for row in found["speed"]] == [1, 3]
    row = found["speed"][1]
    assert row["images_per_second"] == pytest.approx(3 / row["seconds"])
    assert row["flops_per_second"] == pytest.approx(row["flops"] / row["seconds"])
    assert row["fraction_of_bare"] == pytest.approx(row["bare_seconds"] / row["seconds"])


def test_the_table_names_its_columns_and_its_conditions(capsys, monkeypatch):
    monkeypatch.setattr("mlx_aimv2.cli.bench.released", lambda name: Released("", SMALL, 0))
    code, out, _ = run(
        capsys, "--random", "large-patch14-224", "--dtype", "float32", "float16", "--batch", 2, "--runs", 1
    )
    assert code == 0
    for word in ("machine", "versions", "images/s", "peak MB", "median of 1 runs", "float16"):
        assert word in out


def test_packed_weights_have_their_own_row(capsys, tmp_path):
    folder = convert(FIXED, tmp_path / "mlx", quantize=True, q_group_size=32, verify=False)
    options = ("--dtype", "float32", "--batch", 1, "--runs", 1, "--keep-quantized", "--json")
    rows = json.loads(run(capsys, "-m", folder, *options)[1])["speed"]
    assert [row["weights"] for row in rows] == ["dense", "packed"]
    assert rows[1]["weight_bytes"] < rows[0]["weight_bytes"] / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--random", "larger"], "no released checkpoint is called larger"),
        (["--random", "large-224", "--keep-quantized"], "needs quantized weights, but random large-224 has dense ones"),
        (["-m", FIXED, "--keep-quantized", "--batch", 1, "--runs", 1], "needs quantized weights"),
        (["-m", "/no/such/folder"], "/no/such/folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value[1:])),
)
def test_a_mistake_is_one_line(capsys, arguments, message):
    code, _, err = run(capsys, *arguments)
    last = err.strip().splitlines()[-1]
    assert code == 2
    assert last.startswith("mlx-aimv2: ")
    assert message in last


@pytest.mark.parametrize(
    "flags",
    [*(["--batch", count] for count in ("0", "-1", "two", str(10**30))), ["--batch", str(10**8)], ["--runs", "0"]],
)
def test_counts_are_whole_positive_and_what_a_machine_can_do(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--random", "large-patch14-native", *flags])
    err = capsys.readouterr().err
    assert "a whole number from 1 to" in err and err.count("\n") == 1


# Embedding a folder, step by step (benchmarks.images)


def test_each_step_of_a_folder_is_timed_and_what_bounds_it_is_said(capsys):
    folder, model = str(bundled.photographs()[0].parent), str(bundled.emoji_checkpoint())
    assert images.main([folder, "-m", model, "--threads", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == len(bundled.photographs()) and found["threads"] == 2 and found["decode"] == "fast"
    for step in ("reading", "hashing", "decoding", "resizing", "model", "together"):
        assert found[step] > 0
    assert found["bound_by"] in ("decoding", "the model")
    assert images.main([folder, "-m", model, "--decode", "exact"]) == 0
    out = capsys.readouterr().out
    assert "ms per image" in out and "sets the pace" in out


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(ValueError, match="no images to time: give a folder that holds some"):
        images.main([str(tmp_path), "-m", str(FIXED)])
