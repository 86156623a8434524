"""Quantizing with calibration: the arithmetic is GPTQ's, the format MLX's, and what judges was not calibrated on."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_aimv2 import bundled, load
from mlx_aimv2.cli import main
from mlx_aimv2.conversion.calibration import crops, split
from mlx_aimv2.conversion.gptq import DAMPING, Calibration
from mlx_aimv2.convert import convert
from mlx_aimv2.quantize import pack, resolve, unpack
from tests.small_encoder import small_encoder
from tests.small_models import edit_weights

pytestmark = pytest.mark.rounding

ENCODER = small_encoder()
LIT = Path(__file__).parents[1] / "golden" / "reference" / "lit"


@pytest.fixture
def images(tmp_path):
    """A folder of twenty emoji."""
    folder = tmp_path / "images"
    folder.mkdir()
    for file in list(bundled.emoji_images())[:20]:
        shutil.copy(file, folder)
    return folder


def tokens(count=700, width=128, seed=0):
    """Correlated inputs of a layer, one with large numbers."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) / width**0.5
    x[:, 7] *= 9
    return x.astype(np.float32)


def rounded(weight, x, **asked):
    """A weight packed with calibration on these inputs, and what it stands for."""
    settings = resolve(**asked)
    run = Calibration([], {}, mx.float32)
    parts = run._packed("a", weight, x.T @ x, settings)
    return parts, np.array(unpack(parts, settings))


def by_the_inverse(weight, x, *, bits, group):
    """GPTQ as its paper writes it, with the Cholesky factor of the inverse, in float64."""
    hessian = (x.T @ x).astype(np.float64)
    hessian += DAMPING * np.diag(hessian).mean() * np.eye(len(hessian))
    diagonal = np.diag(x.T @ x).reshape(-1, group)
    order = [g * group + i for g in np.argsort(-diagonal.sum(1)) for i in np.argsort(-diagonal[g])]
    factor = np.linalg.cholesky(np.linalg.inv(hessian[np.ix_(order, order)])).T
    left, result = weight[:, order].astype(np.float64), np.empty(weight.shape)
    for k, column in enumerate(order):
        if k % group == 0:
            block = mx.array(left[:, k : k + group].astype(np.float32))
            _, scales, biases = (np.array(part) for part in mx.quantize(block, group_size=group, bits=bits))
        levels = np.clip(np.rint((left[:, k : k + 1] - biases) / scales), 0, 2**bits - 1)
        result[:, column] = (levels * scales + biases)[:, 0]
        left[:, k + 1 :] -= np.outer((left[:, k] - result[:, column]) / factor[k, k], factor[k, k + 1 :])
    return result


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, 64)])
def test_the_numbers_are_those_of_gptq_as_its_paper_writes_it(bits, group):
    weight, x = np.random.default_rng(1).normal(size=(24, 128)).astype(np.float32), tokens()
    _, ours = rounded(weight, x, bits=bits, group_size=group)
    other = by_the_inverse(weight, x, bits=bits, group=group)
    # A number between two levels may fall to either side in float32, and what follows it with it.
    assert (np.abs(ours - other) < 1e-4).mean() > 0.98


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_what_a_layer_gives_errs_less_than_with_plain_rounding(bits):
    weight, x = np.random.default_rng(1).normal(size=(24, 128)).astype(np.float32), tokens()
    _, ours = rounded(weight, x, bits=bits)
    plain = np.array(unpack(pack(mx.array(weight), resolve(bits=bits), mx.float32), resolve(bits=bits)))
    unseen = tokens(seed=0)[::7]
    errors = [np.linalg.norm(unseen @ (other - weight).T) for other in (ours, plain)]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_any_reader_of_mlxs_format_takes_the_packed_weights(bits):
    weight, x = np.random.default_rng(1).normal(size=(24, 128)).astype(np.float32), tokens()
    (words, scales, biases), stands_for = rounded(weight, x, bits=bits, group_size=32)
    layer = nn.QuantizedLinear(128, 24, bias=False, group_size=32, bits=bits)
    assert layer.weight.shape == words.shape
    layer.weight, layer.scales, layer.biases = words, scales, biases
    np.testing.assert_allclose(np.array(layer(mx.array(x))), x @ stands_for.T, rtol=1e-4, atol=2e-3)


def test_a_converted_folder_is_a_quantized_one_like_any_other(tmp_path, images):
    folder = convert(ENCODER, tmp_path / "mlx", quantize=True, q_bits=3, q_method="gptq", calibration=images)
    plain = convert(ENCODER, tmp_path / "plain", quantize=True, q_bits=3, verify=False)
    a, b = (json.loads((place / "config.json").read_text()) for place in (folder, plain))
    assert a == b
    dense, kept = load(folder)[0], load(folder, keep_quantized=True)[0]
    inputs = mx.random.normal((2, 56, 56, 3), key=mx.random.key(3))
    np.testing.assert_allclose(dense.encode_image(inputs), kept.encode_image(inputs), atol=2e-5)
    assert isinstance(kept.blocks[0].mlp.down, nn.QuantizedLinear)


def test_nobody_judges_what_he_was_calibrated_on(tmp_path, images):
    folder = convert(ENCODER, tmp_path / "mlx", quantize=True, q_method="gptq", calibration=images)
    found = json.loads((folder / "fidelity.json").read_text())
    names = sorted(file.name for file in images.iterdir())
    assert found["images"] == names[::5]
    assert found["method"] == "gptq, calibrated on 16 images"
    calibrating, judges = split(None, calibrates=True)
    assert not calibrating
    assert judges[0] == bundled.photographs()[-1]  # the crops are of the other three
    assert len(judges) == len({*judges}) == 20


def test_no_crop_is_of_the_photograph_that_judges(monkeypatch):
    photographs = [*bundled.photographs()[:-1], Path("judge.jpg")]
    monkeypatch.setattr(bundled, "photographs", lambda: photographs)
    assert {crop.size for crop in crops((42, 56))} == {(56, 42)}


def test_both_methods_are_judged_by_the_same_images(images):
    assert split(images, calibrates=False)[1] == split(images, calibrates=True)[1]


def test_a_pairs_texts_are_calibrated_too_and_its_embedding_keeps_six_bits(tmp_path):
    folder = convert(LIT, tmp_path / "mlx", quantize=True, q_group_size=32, q_method="gptq", dtype="float16")
    section = json.loads((folder / "config.json").read_text())["quantization"]
    assert section["text_model.token_embed"] == {"group_size": 32, "bits": 6, "mode": "affine"}
    found = json.loads((folder / "fidelity.json").read_text())
    other = convert(LIT, tmp_path / "plain", quantize=True, q_group_size=32, dtype="float16")
    plain = json.loads((other / "fidelity.json").read_text())
    assert 1 - found["text_cosine"]["mean"] < 0.8 * (1 - plain["text_cosine"]["mean"])
    assert 1 - found["token_cosine"]["mean"] < 1 - plain["token_cosine"]["mean"]
    assert plain["method"] == "plain"


def test_what_cannot_be_calibrated_well_is_a_line_each(tmp_path, images):
    source = Path(shutil.copytree(ENCODER, tmp_path / "source"))
    for file in sorted(images.iterdir())[10:]:
        file.unlink()
    norm = "trunk.blocks.1.norm_2.weight"

    def without_one_input(weights):
        weights[norm] = weights[norm].copy()
        weights[norm][5] = 0
        return weights

    edit_weights(source, without_one_input)
    with pytest.warns(UserWarning) as noted:
        convert(source, tmp_path / "mlx", quantize=True, q_method="gptq", calibration=images)
    lines = [str(one.message) for one in noted]
    assert any(line.startswith("calibrated on 128 tokens, fewer than") and "mlp.down" in line for line in lines)
    assert [line for line in lines if "zero" in line and line.endswith("blocks.1.mlp.gate, blocks.1.mlp.up")]


def test_a_hessian_that_cannot_be_factored_is_damped_more():
    run = Calibration([], {}, mx.float32)
    squares = np.eye(64, dtype=np.float32)
    squares[0, 1] = squares[1, 0] = 1.2  # no X'X: its smallest number is -0.2
    run._packed("blocks.0.attn.qkv", np.ones((2, 64), np.float32), squares, resolve())
    assert list(run.notes) == ["X'X could not be factored, so its diagonal was raised by 30%"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--q-method", "gptq"], "--q-method would have no effect without --quantize"),
        (["-q", "--q-method", "gptq", "--q-mode", "mxfp4"], "gptq takes affine bits only; leave --q-mode mxfp4 out"),
        (["-q", "--q-method", "gptq", "--q-group-size", "128", "--calibration", "ONE"], "has one image; calibration"),
    ],
)
def test_what_gptq_cannot_do_is_one_line(tmp_path, capsys, flags, message):
    shutil.copy(bundled.photographs()[0], tmp_path)
    flags = [str(tmp_path) if flag == "ONE" else flag for flag in flags]
    assert main(["convert", "--model", str(ENCODER), "--mlx-path", str(tmp_path / "mlx"), *flags]) == 2
    assert message in capsys.readouterr().err


def test_remote_code_is_not_run_whoever_trusts_it(tmp_path):
    lines = []
    convert(ENCODER, tmp_path / "mlx", trust_remote_code=True, verify=False, log=lines.append)
    assert any("--trust-remote-code has no effect" in line for line in lines)


def loss(reference, folder, images):
    """1 - cosine of the tokens, in the mean."""
    outputs = []
    for path in (reference, folder):
        model, processor = load(path, dtype="float32")
        outputs.append(np.array(model.vision(processor(images)).last_hidden_state).astype(np.float64))
    a, b = outputs
    return 1 - ((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).mean()


@pytest.mark.slow
def test_on_the_bundled_pair_calibration_is_worth_a_bit_and_more(tmp_path):
    pair, emoji, kind = bundled.emoji_checkpoint(), list(bundled.emoji_images()), tmp_path / "kind"
    kind.mkdir()
    for file in emoji[::2]:
        shutil.copy(file, kind)

    def measured(name, **options):
        return loss(pair, convert(pair, tmp_path / name, quantize=True, dtype="float16", **options), emoji[1::2])

    plain = {bits: measured(f"plain{bits}", q_bits=bits) for bits in (4, 3)}
    own = {bits: measured(f"own{bits}", q_bits=bits, q_method="gptq", calibration=kind) for bits in (4, 3, 2)}
    assert own[4] < 0.15 * plain[4]
    assert own[3] < plain[4]
    assert own[2] < plain[3]
    assert measured("crops", q_bits=4, q_method="gptq") < 0.3 * plain[4]
