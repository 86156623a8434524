"""A target chooses the fewest bits that were found to reach it, and the same ones each time."""

import itertools
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_aimv2 import bundled
from mlx_aimv2.conversion import fidelity
from mlx_aimv2.conversion.bit_search import _lowered, as_predicate, choose_bits, knapsack, most_common
from mlx_aimv2.convert import convert
from mlx_aimv2.quantize import resolve
from tests.small_encoder import small_encoder

ENCODER = small_encoder()
REFERENCE = Path(__file__).parents[1] / "golden" / "reference"
IMAGES = bundled.photographs()


def smallest(losses, sizes, allowance, dense_bits):
    """Every choice tried."""
    best = None
    for widths in itertools.product(*losses.values()):
        loss = sum(losses[path][width] for path, width in zip(losses, widths, strict=True))
        size = sum((width or dense_bits) * sizes[path] for path, width in zip(losses, widths, strict=True))
        if loss <= allowance and (best is None or size < best):
            best = size
    return best


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("allowance", [0.003, 0.02, 0.11])
def test_the_knapsack_finds_the_smallest_choice_there_is(seed, allowance):
    dice = np.random.default_rng(seed)
    losses = {f"l{i}": {None: 0.0} | {b: 4.0**-b * dice.uniform(0.2, 5) for b in (8, 6, 5, 4, 3)} for i in range(5)}
    sizes = {path: int(dice.integers(1, 9)) for path in losses}
    bits = knapsack(losses, sizes, allowance, dense_bits=16)
    assert sum(losses[path][width] for path, width in bits.items()) <= allowance
    assert sum((width or 16) * sizes[path] for path, width in bits.items()) == smallest(losses, sizes, allowance, 16)


def test_without_any_allowance_to_speak_of_all_stays_dense():
    assert knapsack({"a": {None: 0.0, 8: 1e-3}}, {"a": 7}, 1e-9, dense_bits=32) == {"a": None}


def test_the_shared_entry_is_what_most_layers_have():
    assert most_common({"a": 4, "b": 6, "c": 6, "d": None}) == 6
    assert most_common({"a": None}) == 8


def test_a_choice_is_a_predicate():
    predicate = as_predicate({"a": 5, "b": None})
    assert (predicate("a", None), predicate("b", None)) == ({"bits": 5}, False)


@pytest.fixture(scope="module")
def at_target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target") / "mlx"
    lines = []
    convert(ENCODER, folder, q_target=0.999, dtype="float16", log=lines.append)
    return folder, json.loads((folder / fidelity.FILE).read_text()), lines


@pytest.mark.slow
def test_the_folder_reaches_the_target_closely(at_target):
    _, found, lines = at_target
    assert 0.999 <= found["token_cosine"]["mean"] < 0.9992
    assert not any("misses" in line for line in lines)


def test_it_is_smaller_than_6_bits_everywhere(at_target, tmp_path):
    _, found, _ = at_target
    uniform = convert(ENCODER, tmp_path / "6", quantize=True, q_bits=6, dtype="float16")
    uniform = json.loads((uniform / fidelity.FILE).read_text())
    assert found["model"]["bits_per_weight"] < uniform["model"]["bits_per_weight"]


def test_layers_differ_in_bits_and_say_so_in_config_json(at_target):
    folder, _, _ = at_target
    section = json.loads((folder / "config.json").read_text())["quantization"]
    own = {path: entry for path, entry in section.items() if isinstance(entry, dict)}
    assert own
    assert all(entry["bits"] != section["bits"] and entry["group_size"] == 64 for entry in own.values())


def test_most_of_what_is_allowed_is_used(at_target):
    _, found, lines = at_target
    assert any(line.startswith("[INFO] Chose") for line in lines)
    assert 1 - found["token_cosine"]["mean"] > 0.9e-3


def test_what_is_left_over_lowers_the_layers_that_save_most_for_their_loss():
    losses = {
        path: {None: 0.0, 8: 0.1 * cost, 6: 0.3 * cost, 4: cost} for path, cost in (("a", 1.0), ("b", 0.2), ("c", 9.0))
    }
    sizes = {"a": 1, "b": 1, "c": 1}

    def whole(bits):
        return sum(losses[path][width] for path, width in bits.items())

    bits, loss = _lowered({"a": 6, "b": 8, "c": 8}, whole({"a": 6, "b": 8, "c": 8}), 1.5, losses, sizes, whole)
    assert bits == {"a": 6, "b": 4, "c": 8}
    assert loss == pytest.approx(0.3 + 0.2 + 0.9)


@pytest.mark.slow
def test_the_same_images_give_the_same_bits():
    one, two = (choose_bits(ENCODER, IMAGES[:1], target=0.995, settings=resolve(), dtype=mx.float16) for _ in range(2))
    assert one == two


@pytest.mark.slow
def test_a_higher_target_takes_more_bits():
    bits = [
        choose_bits(ENCODER, IMAGES[:1], target=target, settings=resolve(), dtype=mx.float32)
        for target in (0.99, 0.9999)
    ]
    assert sum(bits[1].values()) > sum(bits[0].values()) + 20


@pytest.mark.slow
def test_both_towers_of_a_pair_reach_the_target(tmp_path):
    folder = convert(REFERENCE / "lit", tmp_path / "mlx", q_target=0.99, q_group_size=32)
    section = json.loads((folder / "config.json").read_text())["quantization"]
    found = json.loads((folder / fidelity.FILE).read_text())
    assert section["visual_projection"] is False
    assert found["token_cosine"]["mean"] >= 0.99
    assert found["text_cosine"]["min"] > 0.95
    assert {path.split(".")[0] for path in section} >= {"text_model", "vision_model"}


def test_a_target_that_the_dtype_alone_misses_is_refused_before_the_search():
    with pytest.raises(ValueError, match=r"0.9999999 cannot be reached: bfloat16 alone.*--dtype float32"):
        choose_bits(ENCODER, IMAGES, target=0.9999999, settings=resolve(), dtype=mx.bfloat16)


def test_layers_that_8_bits_would_cost_too_much_stay_dense(tmp_path):
    folder = convert(ENCODER, tmp_path / "mlx", q_target=0.999999, verify=False)
    section = json.loads((folder / "config.json").read_text())["quantization"]
    assert False in section.values()
