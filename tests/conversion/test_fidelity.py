"""A fidelity report measures how far two models are apart, block by block."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from mlx_aimv2 import bundled, load
from mlx_aimv2.cli import main
from mlx_aimv2.conversion import fidelity
from mlx_aimv2.conversion.fidelity import MAX_IMAGES, BlockwiseRun, choose_images, cosines, run_blockwise, text_ids
from mlx_aimv2.convert import convert
from mlx_aimv2.loading import read_source
from tests.small_encoder import small_encoder
from tests.small_models import edit_weights

pytestmark = pytest.mark.rounding

REFERENCE = Path(__file__).parents[1] / "golden" / "reference"
ENCODER = small_encoder()
IMAGES = bundled.photographs()[:2]


def blockwise_run(tokens, *, dtype="float32", peaks=None, **more):
    tokens = [np.array(rows, float) for rows in tokens]
    return BlockwiseRun(
        "m", dtype, 10, 40, tokens, np.stack([t.mean(0) for t in tokens]), peaks or {"blocks.0": 1.0}, **more
    )


@pytest.fixture
def scaled(tmp_path):
    """The digits' encoder with the second block's `down` multiplied, so that its activations grow."""

    def make(factor):
        folder = tmp_path / f"scaled-{factor}"
        shutil.copytree(ENCODER, folder)
        down = "trunk.blocks.1.mlp.fc2.weight"
        edit_weights(folder, lambda tensors: tensors | {down: tensors[down] * np.float32(factor)})
        return folder

    return make


@pytest.mark.parametrize("folder", ["fixed", "native", "outlier"])
def test_block_by_block_gives_what_the_whole_model_gives(folder, tmp_path):
    images = []
    for i, image in enumerate(IMAGES):  # of two sizes, small because a native model takes them as they are
        images.append(tmp_path / f"{i}.png")
        Image.open(image).resize((70 + 14 * i, 42)).save(images[-1])
    seen = run_blockwise(read_source(REFERENCE / folder), images)
    model, processor = load(REFERENCE / folder)
    for image, tokens, vector in zip(images, seen.tokens, seen.vectors, strict=True):
        whole = model(processor(image), output_hidden_states=True)
        np.testing.assert_array_equal(tokens, np.array(whole.last_hidden_state[0]))
        np.testing.assert_array_equal(vector, np.array(model.encode_image(processor(image))[0]))
    states = [model(processor(image), output_hidden_states=True).hidden_states for image in images]
    largest = {f"blocks.{i}": max(float(mx.abs(s[i + 1]).max()) for s in states) for i in range(len(model.blocks))}
    assert seen.peaks == pytest.approx(largest)


def test_a_pairs_towers_are_observed_as_they_run():
    seen = run_blockwise(read_source(REFERENCE / "lit"), IMAGES)
    model, processor = load(REFERENCE / "lit")
    ids = text_ids(model, processor)
    np.testing.assert_array_equal(seen.vectors[1], np.array(model.encode_image(processor(IMAGES[1])))[0])
    np.testing.assert_array_equal(seen.text_vectors[2], np.array(model.encode_text(ids[2]))[0])
    np.testing.assert_allclose(
        seen.logits[1, 2], np.array(model(processor(IMAGES[1]), ids[2]).logits_per_image)[0, 0], rtol=1e-5
    )
    assert set(seen.peaks) == {f"{encoder}.blocks.{i}" for encoder in ("vision_model", "text_model") for i in (0, 1)}


def test_made_up_texts_differ_and_end_with_the_end():
    model, processor = load(REFERENCE / "lit")
    rows = [tuple(np.array(row)[0].tolist()) for row in text_ids(model, processor)]
    assert len(set(rows)) == len(rows)
    assert all(row.index(210) == len(row) - 1 <= 15 for row in rows)


def test_inside_a_block_more_is_seen_than_what_leaves_it():
    outside, inside = (run_blockwise(read_source(REFERENCE / "fixed"), IMAGES, inside=flag) for flag in (False, True))
    assert all(inside.peaks[name] >= outside.peaks[name] for name in outside.peaks)
    assert any(inside.peaks[name] > 1.001 * outside.peaks[name] for name in outside.peaks)
    for a, b in zip(inside.tokens, outside.tokens, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_cosines_are_of_each_row_with_its_fellow():
    a = np.array([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0], [1.0, 1.0]])
    b = np.array([[4.0, 3.0], [0.0, 7.0], [-5.0, 0.0], [np.nan, 1.0]])
    np.testing.assert_allclose(cosines(a, b), [0.96, 0.0, -1.0, 0.0])  # one that is not finite has 0


def test_the_report_holds_mean_and_least_over_all_tokens_of_all_images():
    one, other = blockwise_run([[[1, 0], [0, 1]], [[1, 1]]]), blockwise_run([[[1, 0], [1, 1]], [[1, 1]]])
    found = fidelity.report(one, other, ["a/b.jpg", "c.jpg"])
    assert found["token_cosine"] == pytest.approx({"mean": (2 + 0.5**0.5) / 3, "min": 0.5**0.5})
    assert found["image_cosine"]["mean"] == pytest.approx((1 + 3 / 10**0.5) / 2)
    assert (found["tokens"], found["images"]) == (3, ["b.jpg", "c.jpg"])


def test_a_pairs_report_has_texts_and_logits_too():
    words, logits = np.eye(2), np.array([[3.0, 5.0]])
    one = blockwise_run([[[1, 0]]], text_vectors=words, logits=logits)
    other = blockwise_run([[[1, 0]]], text_vectors=words + np.tri(2, k=-1), logits=logits + np.array([0.25, -0.5]))
    found = fidelity.report(one, other, ["a.jpg"])
    assert found["text_cosine"]["min"] == pytest.approx(0.5**0.5)
    assert found["largest_logit_difference"] == 0.5


@pytest.mark.parametrize(("peak", "warned"), [(32751.0, False), (32753.0, True), (70000.0, True)])
def test_a_block_that_leaves_float16_less_than_a_factor_of_2_is_named(peak, warned):
    one = blockwise_run([[[1, 0]]], peaks={"blocks.0": 3.0, "blocks.1": peak})
    found = fidelity.report(one, blockwise_run([[[1, 0]]], dtype="float16"), ["a.jpg"])
    assert found["largest_activation"] == {"block": "blocks.1", "value": peak}
    assert found["limit"] == 65504.0
    assert [line.split(":")[0] for line in found["warnings"]] == ["blocks.1"] * warned


def test_activations_beyond_float16_are_named_and_counted(scaled, tmp_path):
    source, lines = scaled(2e6), []
    folder = convert(source, tmp_path / "half", dtype="float16", log=lines.append)
    found = json.loads((folder / fidelity.FILE).read_text())
    assert found["token_cosine"]["min"] == 0.0
    assert any("not finite in float16" in line for line in found["warnings"])
    assert any(line.startswith("blocks.1:") for line in found["warnings"])
    assert "blocks.1:" in "\n".join(lines)
    assert found["largest_activation"]["value"] > 65504


def test_models_of_other_sizes_are_not_compared():
    with pytest.raises(ValueError, match="encoder makes 16 tokens of width 128 of an image, fixed makes 9 of width 96"):
        fidelity.compare(ENCODER, REFERENCE / "fixed", images=IMAGES)


def test_bits_per_weight_count_scales_and_what_stays_dense(tmp_path):
    folder = convert(ENCODER, tmp_path / "mlx", quantize=True, q_bits=8, dtype="float16", verify=False)
    found = fidelity.compare(ENCODER, folder, images=IMAGES)
    size = sum(array.nbytes for array in load_file(folder / "model.safetensors").values())
    assert found["model"]["bytes"] == size
    assert found["model"]["bits_per_weight"] == pytest.approx(8 * size / 734080, abs=1e-3)
    assert found["reference"]["bits_per_weight"] == 32


def test_what_was_written_is_what_is_measured(tmp_path, scaled):
    assert fidelity.compare(ENCODER, scaled(3), images=IMAGES)["token_cosine"]["mean"] < 0.99


def test_every_conversion_stores_its_proof_and_prints_it(tmp_path):
    lines = []
    folder = convert(ENCODER, tmp_path / "mlx", dtype="bfloat16", log=lines.append)
    found = json.loads((folder / fidelity.FILE).read_text())
    assert found == fidelity.compare(ENCODER, folder)
    assert 0.9999 < found["token_cosine"]["mean"] < 1
    assert fidelity.table(found) in lines
    assert len(found["images"]) == 4


def test_a_proof_can_be_left_out(tmp_path):
    assert not (convert(ENCODER, tmp_path / "mlx", verify=False) / fidelity.FILE).exists()


def test_a_lossless_conversion_proves_to_be_one(tmp_path):
    folder = convert(REFERENCE / "lit", tmp_path / "mlx")
    found = json.loads((folder / fidelity.FILE).read_text())
    assert found["token_cosine"]["min"] == pytest.approx(1, abs=1e-12)
    assert found["text_cosine"]["min"] == pytest.approx(1, abs=1e-12)
    assert found["largest_logit_difference"] == 0


def test_the_table_is_short_and_nothing_names_a_path():
    found = fidelity.compare(ENCODER, ENCODER, images=IMAGES)
    lines = fidelity.table(found).splitlines()
    assert len(lines) <= 9
    assert len(lines[-1].removeprefix("block by block").split()) == 4
    assert str(ENCODER.parent) not in json.dumps(found)


def test_of_many_images_some_are_taken_from_all_over(tmp_path):
    for i in range(3 * MAX_IMAGES):
        (tmp_path / f"{i:03}.png").touch()
    names = [path.name for path in choose_images(tmp_path)]
    assert len(names) == MAX_IMAGES
    assert names[:2] == ["000.png", "003.png"]


def test_a_folder_without_images_and_no_folder_at_all_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no images in this folder"):
        choose_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere: wanted a folder of images"):
        choose_images(tmp_path / "nowhere")


def test_compare_prints_a_table_or_json(capsys):
    assert main(["compare", str(ENCODER), str(ENCODER)]) == 0
    assert ["token", "cosine,", "mean", "1.000000"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    assert main(["compare", str(ENCODER), str(ENCODER), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["activations"]) == 4


@pytest.mark.parametrize(("factor", "flags"), [(np.nan, []), (np.inf, ["-q", "--q-bits", "8"])], ids=["nan", "inf"])
def test_damaged_weights_are_named_before_anything_is_written(scaled, tmp_path, capsys, factor, flags):
    target = tmp_path / "out"
    assert main(["convert", "--hf-path", str(scaled(factor)), "--mlx-path", str(target), *flags]) == 2
    assert "blocks.1 gives values that are not finite even in float32: its weights are" in capsys.readouterr().err
    assert not target.exists()


def test_of_the_ten_nearest_those_are_counted_that_both_models_find():
    angles = np.linspace(0, 1.5, 12)[:, None]
    a = np.hstack([np.cos(angles), np.sin(angles)])
    assert fidelity.nearest_in_common(a, 3 * a) == 1
    b = a.copy()
    b[0] = [-1, 0]  # was of the ten nearest to all but the last; now the twelve have eleven others to choose from
    found = [{*np.argsort(-(x @ x[i]) + 9 * (np.arange(12) == i))[:10]} for x in (a, b) for i in range(12)]
    common = [len(one & other) / 10 for one, other in zip(found[:12], found[12:], strict=True)]
    assert fidelity.nearest_in_common(a, b) == pytest.approx(np.mean(common))
    assert np.mean(common) < 1


def test_on_a_cpu_halves_are_computed_in_float32_unless_asked_for(tmp_path):
    half = convert(ENCODER, tmp_path / "half", dtype="float16", verify=False)
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    found = fidelity.compare(ENCODER, half, images=IMAGES)
    assert (found["model"]["dtype"], found["computed_in"]) == ("float16", "float32" if on_cpu else "float16")
    assert "in float16, against float32" in fidelity.table(
        fidelity.compare(ENCODER, half, images=IMAGES, dtype="float16")
    )


def test_a_reference_in_half_precision_runs_in_float32(tmp_path):
    half = convert(REFERENCE / "fixed", tmp_path / "half", dtype="bfloat16", verify=False)
    assert fidelity.run_reference(read_source(half), IMAGES).dtype == "float32"
    assert run_blockwise(read_source(half), IMAGES).dtype == "bfloat16"
