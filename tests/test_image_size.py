"""An encoder at another image size: positions resampled as timm does it, by one rule; everything else stays."""

import json
import re

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_aimv2 import load
from mlx_aimv2.bundled import photographs
from mlx_aimv2.cli import main
from mlx_aimv2.conversion.fidelity import compare
from mlx_aimv2.convert import convert
from mlx_aimv2.images.preprocessing import Preprocessing
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.index.reader import Index
from mlx_aimv2.learn import fit
from mlx_aimv2.learn.head_folder import load_head
from mlx_aimv2.loading import at_size, resample_positions
from tests.labelled import CHECKPOINT, write_digits
from tests.small_models import FIXED, NATIVE, pair_with_words

EPS = float(np.finfo(np.float32).eps)

# First, middle and last row of torch's interpolate(mode="bicubic", antialias=True, align_corners=False) in float64.
TORCH = {
    ((3, 5), (7, 11)): [
        [0.051969276, 1.145548168, -0.898346058],
        [0.92347002, 0.193502963, 0.936472535],
        [-1.268508521, 1.367852899, 0.947668781],
    ],
    ((7, 5), (3, 2)): [
        [0.061398441, -0.171981914, -0.169353445],
        [0.172880303, 0.212376859, 0.178594502],
        [-0.361147192, -0.029666254, 0.113147352],
    ],
    ((4, 4), (6, 6)): [
        [0.001506819, 1.013906083, -0.91636971],
        [-1.014823838, 0.188332763, -0.282140221],
        [1.113329949, -1.188250689, -0.539220377],
    ],
}


def waves(rows: int, columns: int) -> mx.array:
    """A table of positions that every machine makes alike, `-> (rows * columns, 3)`."""
    return mx.array(np.sin(np.arange(rows * columns * 3) ** 2).reshape(-1, 3).astype(np.float32))


@pytest.mark.parametrize(("grid", "target"), TORCH, ids=lambda size: "x".join(map(str, size)))
def test_positions_are_resampled_as_torch_does_it_with_antialiasing(grid, target):
    found = np.array(resample_positions(waves(*grid), grid, target))
    assert found.shape == (target[0] * target[1], 3)
    wanted = np.array(TORCH[grid, target])
    np.testing.assert_allclose(found[[0, len(found) // 2, -1]], wanted, rtol=0, atol=16 * EPS)


def test_resampling_to_the_same_grid_changes_nothing():
    assert mx.array_equal(resample_positions(waves(3, 5), (3, 5), (3, 5)), waves(3, 5))


def test_rows_and_columns_keep_their_order():
    row, column = np.mgrid[0:4, 0:6]
    table = mx.array(np.stack([row, column], axis=2).reshape(24, 2).astype(np.float32))
    found = np.array(resample_positions(table, (4, 6), (8, 6))).reshape(8, 6, 2)
    np.testing.assert_allclose(found[2:6, 3, 0], [0.75, 1.25, 1.75, 2.25], atol=0.1)
    np.testing.assert_allclose(found[3, :, 1], np.arange(6), atol=32 * EPS)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_resampled_in_float32_and_rounded_once(dtype):
    table = waves(4, 4).astype(dtype)
    wanted = resample_positions(table.astype(mx.float32), (4, 4), (6, 6)).astype(dtype)
    assert mx.array_equal(resample_positions(table, (4, 4), (6, 6)), wanted)


def test_a_fixed_encoder_takes_the_new_size_and_the_old_one_stays():
    model, processor = load(FIXED)
    own, patch = model.config.image_size, model.config.patch_size
    side = own + 2 * patch
    larger, resized = at_size(model.vision, processor, side)
    image = np.zeros((own, 2 * own, 3), np.uint8)
    assert larger(resized(image)).last_hidden_state.shape[1] == (side // patch) ** 2
    assert larger.blocks[0].attn.qkv.weight.tolist() == model.blocks[0].attn.qkv.weight.tolist()
    assert model(processor(image)).last_hidden_state.shape[1] == (own // patch) ** 2


def test_the_own_size_changes_nothing():
    model, processor = load(FIXED)
    for size in (None, model.config.image_size):
        assert at_size(model.vision, processor, size) == (model.vision, processor)


def test_whole_images_are_stretched_and_others_cut():
    model, processor = load(FIXED)
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 20:] = 255
    image[:, :2] = 255
    _, whole = at_size(model.vision, processor, None, whole=True)
    cut, all_of_it = (p.pixels(image)[5, 0].mean() for p in (processor, whole))
    assert cut < 0 < all_of_it


def test_a_native_encoder_gets_a_square():
    model, processor = load(NATIVE)
    same, resized = at_size(model.vision, processor, 6 * model.config.patch_size, whole=True)
    assert same is model.vision
    assert resized.preprocessing.final_size == (6 * model.config.patch_size,) * 2
    assert at_size(model.vision, processor, None, whole=True)[1].preprocessing.final_size[0] in range(434, 449)


def test_load_gives_an_encoder_for_the_size_asked_for():
    model, processor = load(FIXED, image_size=70)
    assert (model.config.image_size, processor.preprocessing.final_size) == (70, (70, 70))
    image = np.zeros((50, 90, 3), np.uint8)
    assert model(processor(image)).last_hidden_state.shape == (1, 25, 96)
    own, side = load(FIXED)[0].pos_embed, (3, 3)
    assert mx.array_equal(model.pos_embed, resample_positions(own, side, (5, 5)))


def test_load_gives_a_pair_for_the_size_asked_for_with_its_tokenizer(tmp_path):
    folder = pair_with_words(tmp_path / "lit")
    model, processor = load(folder, image_size=25)
    assert model.config.vision_config.image_size == model.vision.config.image_size == 25
    assert model.encode_image(processor(np.zeros((30, 41, 3), np.uint8))).shape == (1, 19)
    assert model.encode_text(processor.tokenize(["a cat"])).shape == (1, 19)


@pytest.mark.parametrize("settings", [{"lazy": True}, {"keep_quantized": True}, {"dtype": "float16"}], ids=str)
def test_the_size_goes_together_with_every_other_setting(tmp_path, settings):
    folder = convert(FIXED, tmp_path / "8bit", quantize=True, q_bits=8, q_group_size=32, verify=False)
    model, processor = load(folder, image_size=70, **settings)
    assert model(processor(np.zeros((50, 90, 3), np.uint8))).last_hidden_state.shape == (1, 25, 96)


@pytest.mark.parametrize("size", ["70", 70.0, True, [70]])
def test_a_size_that_is_no_whole_number_is_refused(size):
    with pytest.raises(ValueError, match="image_size must be a whole number of pixels, got"):
        load(FIXED, image_size=size)


@pytest.mark.parametrize(
    ("size", "fitting"), [(0, "14"), (-70, "14"), (1, "14"), (57, "56 or 70"), (60, "56 or 70"), (10**6, "2044")]
)
def test_a_size_that_is_no_multiple_of_the_patch_is_refused_with_one_that_is(size, fitting):
    message = f"image_size must be a multiple of the patch of 14 pixels.*use {fitting}$"
    with pytest.raises(ValueError, match=message):
        load(FIXED, image_size=size)


@pytest.mark.parametrize(
    ("resize", "crop", "sized"),
    [(62, (56, 56), 93), ((62, 62), (56, 56), (93, 93)), ((56, 56), None, (84, 84)), (None, (56, 56), 84)],
    ids=["timm's share", "squashed, a share", "squashed", "cut alone"],
)
def test_the_processor_prepares_the_new_size_as_it_did_its_own(resize, crop, sized):
    steps = Preprocessing(resize=resize, crop=crop, resample=2, image_mean=(0.1, 0.2, 0.3))
    found = Aimv2Processor(steps).at_size(84).preprocessing
    assert found == Preprocessing(resize=sized, crop=(84, 84), resample=2, image_mean=(0.1, 0.2, 0.3))


@pytest.mark.parametrize("bits", [None, 8], ids=["dense", "8 bits"])
def test_convert_writes_the_resized_folder(tmp_path, bits):
    quantized = {"quantize": True, "q_bits": bits, "q_group_size": 32} if bits else {}
    folder = convert(FIXED, tmp_path / "mlx", image_size=70, **quantized)
    model, processor = load(folder)
    assert (model.config.image_size, processor.preprocessing.final_size) == (70, (70, 70))
    assert json.loads((folder / "preprocessor_config.json").read_text())["size"] == {"shortest_edge": 70}
    wanted = load(FIXED, image_size=70)[0]
    assert mx.array_equal(model.pos_embed, wanted.pos_embed)
    report = json.loads((folder / "fidelity.json").read_text())
    assert report["tokens"] == len(report["images"]) * 25
    assert report["token_cosine"]["min"] > 0.99
    if not bits:
        same = dict(tree_flatten(wanted.parameters()))
        assert all(mx.array_equal(array, same[name]) for name, array in tree_flatten(model.parameters()))
        assert report["token_cosine"]["min"] == pytest.approx(1, abs=64 * EPS)


def test_convert_keeps_the_files_own_words_at_the_files_own_size(tmp_path):
    own = (FIXED / "preprocessor_config.json").read_bytes()
    same = convert(FIXED, tmp_path / "same", image_size=load(FIXED)[0].config.image_size, verify=False)
    assert (same / "preprocessor_config.json").read_bytes() == own
    native = convert(NATIVE, tmp_path / "native", image_size=70, verify=False)
    assert load(native)[1].preprocessing.final_size == (70, 70)
    assert load(native)[0].config.is_native


def test_an_index_is_made_and_searched_at_the_size_asked_for(tmp_path, folder, embed_command, search):
    assert embed_command(str(folder), "--image-size", "70", "--store", "float32")[0] == 0
    with Index.open("photos.db") as index:
        made = index.provenance
        stored = index.vector(str(folder / "3.png"))
    assert (made["image_size"], made["preprocessing"]["crop"]) == (70, [70, 70])
    model, processor = load(FIXED, image_size=70)
    wanted = np.array(model.encode_image(processor(str(folder / "3.png"))))[0]
    assert stored @ wanted / np.linalg.norm(wanted) / np.linalg.norm(stored) == pytest.approx(1, abs=64 * EPS)
    assert search(str(folder / "3.png"), "-m", str(FIXED), "--top", "1")[1].endswith("3.png\n")
    (folder / "9.png").write_bytes((folder / "3.png").read_bytes())
    assert embed_command(str(folder), model=None)[0] == 0  # the index knows its size
    code, _, err = embed_command(str(folder), "--image-size", "84")
    assert code == 2
    assert "preprocessing: resize=70 crop=70 70 there resize=84 crop=84 84 here" in re.sub(r"[][,]", "", err)


@pytest.mark.parametrize("size", ["0", "-14", "57"])
def test_every_verb_refuses_a_size_that_does_not_fit_in_one_line(tmp_path, folder, capsys, monkeypatch, size):
    monkeypatch.chdir(tmp_path)
    image, fixed = str(folder / "1.png"), str(FIXED)
    for verb in (
        ["embed", image, "-o", "a.db", "-m", fixed],
        ["map", image, "-m", fixed],
        ["compare", fixed, fixed],
        ["export", "-m", fixed, "-o", "a.mlxfn"],
        ["convert", "--hf-path", fixed, "--mlx-path", "mlx"],
        ["bench", "-m", fixed],
        ["bench", "--random", "large-patch14-224"],
        ["classify", image, "--labels", "a,b", "-m", str(pair_with_words(tmp_path / f"lit{size}"))],
    ):
        asked = size if verb[0] != "classify" or size != "57" else "56"  # its patch has 5 pixels
        assert main([*verb, "--image-size", asked]) == 2, verb
        err = capsys.readouterr().err
        assert f"image_size must be a multiple of the patch of {5 if verb[0] == 'classify' else 14} pixels" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", f"lit{size}"]


def test_compare_says_what_a_size_costs():
    images = photographs()
    same = compare(FIXED, FIXED, images=images, image_size=load(FIXED)[0].config.image_size)
    assert same["image_cosine"]["min"] == pytest.approx(1, abs=64 * EPS)
    assert not any("resampled" in line for line in same["warnings"])
    other = compare(FIXED, FIXED, images=images, image_size=84)
    side = load(FIXED)[0].config.image_size // 14
    assert other["tokens"] == 4 * side**2
    assert f"tokens of 6x6 patches were resampled to the reference's {side}x{side}" in other["warnings"]
    vectors = []
    for size in (None, 84):
        model, processor = load(FIXED, image_size=size)
        vectors.append(np.array(model.encode_image(processor(images), normalize=True)))
    cosines = (vectors[0] * vectors[1]).sum(axis=1)
    assert other["image_cosine"]["min"] == pytest.approx(cosines.min(), abs=64 * EPS)
    with pytest.raises(ValueError, match="a native one has none"):
        compare(NATIVE, NATIVE, images=images, image_size=84)


def test_a_head_at_another_size_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "cache"))
    fit(write_digits(tmp_path / "digits"), CHECKPOINT, tmp_path / "head", fine_tune_type="knn", image_size=84)
    assert load_head(tmp_path / "head").learner.encoder.config.image_size == 84
