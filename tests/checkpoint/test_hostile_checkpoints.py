"""A damaged or malicious checkpoint ends in one line that names what is wrong."""

import json
import os
import re
import shutil
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_aimv2
from mlx_aimv2 import load
from mlx_aimv2.cli import main
from mlx_aimv2.convert import convert
from mlx_aimv2.loading import read_source
from tests.small_models import edit_config, edit_weights

REFERENCE = Path(__file__).parents[1] / "golden" / "reference"


@pytest.fixture
def fixed(tmp_path):
    return Path(shutil.copytree(REFERENCE / "fixed", tmp_path / "fixed"))


@pytest.fixture
def lit(tmp_path):
    return Path(shutil.copytree(REFERENCE / "lit", tmp_path / "lit"))


def refusal(folder: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


NAN, TIMM = float("nan"), {"pretrained_cfg": {"input_size": [3, 42, 42]}}
EDITS = [
    *(("fixed", {"rms_norm_eps": value}, "rms_norm_eps must be") for value in (NAN, float("inf"), 1e308, 1.5, 0, -1)),
    *(("fixed", {key: 10**30}, key) for key in ("image_size", "intermediate_size", "num_attention_heads")),
    *(("fixed", {"num_hidden_layers": value}, "num_hidden_layers") for value in (10**8, 10**6)),
    ("fixed", {"hidden_size": [1, [2]]}, "hidden_size"),
    ("fixed", {"patch_size": [[14]]}, "patch_size"),
    *(("fixed", {**TIMM, "model_args": value}, "model_args must be an object") for value in (["num_heads"], "x", 3)),
    *(("lit", {"max_logit_scale": value}, "max_logit_scale") for value in (NAN, -5.0)),
    *(("lit", {"projection_dim": value}, "projection_dim") for value in (-1, 10**30)),
]


@pytest.mark.parametrize(("kind", "changes", "words"), EDITS)
def test_what_cannot_be_in_config_json_is_named_before_a_model_is_built(request, kind, changes, words):
    folder = request.getfixturevalue(kind)
    edit_config(folder, **changes)
    assert words in refusal(folder)


@pytest.mark.parametrize("eos", [-7, [[]], [], 10**12])
def test_an_end_of_text_that_is_no_id(lit, eos):
    config = json.loads((lit / "config.json").read_text())
    edit_config(lit, text_config=config["text_config"] | {"eos_token_id": eos})
    assert "eos_token_id" in refusal(lit)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("fixed", "trunk.blocks.0.mlp.fc1.weight"),
        ("fixed", "preprocessor.pos_embed"),
        ("fixed", "trunk.blocks.0.attn.qkv.weight"),
        ("lit", "text_encoder.preprocessor.positional_embedding"),
        ("lit", "image_projector.weight"),
    ],
)
def test_a_tensor_without_axes_is_named(request, kind, name):
    folder = request.getfixturevalue(kind)
    edit_weights(folder, lambda tensors: tensors | {name: np.array(1, np.float32)})
    assert name in refusal(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "1" * 5000 + "}", "[1]", '"x"', "{"])
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_json_that_is_none(fixed, file, text):
    (fixed / file).write_text(text)
    assert file in refusal(fixed)


def test_a_byte_order_mark_is_harmless(fixed):
    text = (fixed / "config.json").read_bytes()
    (fixed / "config.json").write_bytes(b"\xef\xbb\xbf" + text)
    load(fixed)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_in_place_of_config_json_is_not_waited_for(fixed):
    (fixed / "config.json").unlink()
    os.mkfifo(fixed / "config.json")
    assert "config.json" in refusal(fixed)


@pytest.mark.parametrize(
    "section",
    [
        *("x", [1], 5, {"group_size": 32, "bits": 4.0}, {"mode": []}, {"bits": True}),
        {"bits": 8, "blocks.0.attn.qkv": "x"},
        {"group_size": 32, "bits": 8, "blocks.99.attn.qkv": False},
    ],
)
def test_a_quantization_section_of_another_kind(fixed, tmp_path, section):
    convert(fixed, tmp_path / "mlx", quantize=True, q_bits=8, q_group_size=32, verify=False)
    edit_config(tmp_path / "mlx", quantization=section)
    said = refusal(tmp_path / "mlx")
    assert "quantization" in said
    assert all(name in said for name in (section if isinstance(section, dict) else ()) if name.startswith("blocks."))


def test_the_home_of_nobody_is_no_traceback(capsys):
    assert main(["info", "~nosuchuser/x"]) == 2
    assert capsys.readouterr().err.startswith("mlx-aimv2: ")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("blocks.0.attn.qkv.scales", np.uint32),
        ("norm.weight", np.uint32),
        ("blocks.0.attn.qkv.weight", np.float32),
    ],
)
def test_a_tensor_of_a_quantized_folder_in_another_dtype_is_named(fixed, tmp_path, name, dtype):
    packed = convert(fixed, tmp_path / "mlx", quantize=True, q_bits=8, q_group_size=32, verify=False)
    edit_weights(packed, lambda tensors: tensors | {name: tensors[name].astype(dtype)})
    assert f"{name} is {np.dtype(dtype)}" in refusal(packed)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8"])
def test_the_scales_of_the_other_modes_are_bytes(fixed, tmp_path, mode):
    load(convert(fixed, tmp_path / "mlx", quantize=True, q_mode=mode, verify=False))


def test_a_path_that_mlx_cannot_open_is_named_as_such(fixed, tmp_path):
    target = tmp_path / os.fsdecode(b"src\xff")
    try:
        fixed.rename(target)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert "not UTF-8" in refusal(target)


@pytest.mark.parametrize(
    ("key", "value"),
    [("image_std", [1e-300] * 3), ("rescale_factor", 1e300), ("rescale_factor", 10**299), ("size", 100_000)],
)
def test_preprocessing_that_leaves_no_image(fixed, key, value):
    file = fixed / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    assert f"preprocessor_config.json: {key} must be" in refusal(fixed)


def test_a_size_with_a_part_of_a_patch_over_is_no_disagreement(fixed):
    edit_config(fixed, image_size=43)
    assert read_source(fixed).config.num_patches == 9


@pytest.mark.parametrize("section", [[1], "x", 5, {"bits": []}])
def test_a_foreign_quantization_section_is_not_taken_for_ours(fixed, section, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    edit_config(fixed, quantization=section)
    load(fixed)
    image = str(Path(mlx_aimv2.__file__).parent / "assets" / "photographs" / "astronaut.jpg")
    assert main(["info", str(fixed)]) == 0
    assert main(["embed", image, "-m", str(fixed), "-o", "photos.db"]) == 0
    assert main(["convert", "--hf-path", str(fixed), "--mlx-path", "mlx", "--no-verify"]) == 0


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (("head.bias", "head.weight"), ""),
        (("classifier.bias", "classifier.weight"), "aimv2."),
        (("classifier.0.w",), ""),
    ],
)
def test_a_classifier_on_top_is_named_and_left_out(fixed, names, prefix):
    more = {name: np.ones((10, 3), np.float32) for name in names}
    edit_weights(fixed, lambda tensors: {prefix + name: array for name, array in tensors.items()} | more)
    with pytest.warns(UserWarning, match=f"a classifier is left out .{names[0]}.*only the encoder is used"):
        load(fixed)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("embeddings.position_ids", None),
        ("text_model.embeddings.position_ids", None),
        ("x.num_batches_tracked", None),
        ("x.running_mean", "extra x.running_mean"),
        ("rotary.inv_freq", "rotary positions .rotary.inv_freq"),
        ("attn_mask", "extra attn_mask"),
    ],
)
def test_a_buffer_that_means_nothing_is_left_out_aloud_and_any_other_refused(fixed, name, words):
    edit_weights(fixed, lambda tensors: tensors | {name: np.arange(3)})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if words is not None:
            with pytest.raises(ValueError, match=words):
                load(fixed)
            return
        load(fixed)
    assert [f"a buffer without weights is left out ({name})" in str(one.message) for one in told] == [True]


@pytest.mark.parametrize(
    ("own", "ema"), [("", "model_ema."), ("model.", "model_ema."), ("model.", "ema."), ("backbone.", "a_ema.module.")]
)
@pytest.mark.parametrize("is_whole", [True, False])
def test_of_weights_and_their_moving_average_the_weights_are_taken_aloud(fixed, own, ema, is_whole):
    before = dict(tree_flatten(load(fixed)[0].parameters()))

    def both(tensors):
        averages = {ema + name: array + 1 for name, array in list(tensors.items())[: None if is_whole else 2]}
        return {own + name: array for name, array in tensors.items()} | averages

    edit_weights(fixed, both)
    with pytest.warns(UserWarning, match=r"a moving average of the weights \(EMA\) is left out \("):
        after = dict(tree_flatten(load(fixed)[0].parameters()))
    assert all(mx.array_equal(before[name], after[name]) for name in before | after)


def test_a_moving_average_alone_is_taken_aloud(fixed):
    edit_weights(fixed, lambda tensors: {f"model_ema.{name}": array for name, array in tensors.items()})
    with pytest.warns(UserWarning, match=r"the encoder used is a moving average of weights \(model_ema\."):
        load(fixed)


def test_two_encoders_in_one_file_are_refused(fixed):
    edit_weights(fixed, lambda own: {f"{who}.{name}": own[name] for who in ("teacher", "student") for name in own})
    with pytest.raises(ValueError, match=r"more than once, as student\. and as teacher\.: keep only one of them"):
        load(fixed)


def test_a_link_to_a_private_file_is_not_followed(fixed, tmp_path):
    (tmp_path / "private").write_text("secret")
    (fixed / "LICENSE").symlink_to(tmp_path / "private")
    (fixed / "NOTICE").write_text("public")
    (fixed / "LICENSE.txt").symlink_to("NOTICE")
    with pytest.warns(UserWarning, match="LICENSE is a link to outside the checkpoint: not copied"):
        mlx = convert(fixed, tmp_path / "mlx", verify=False)
    assert sorted(file.name for file in mlx.iterdir() if file.name.startswith(("LIC", "NOT"))) == [
        "LICENSE.txt",
        "NOTICE",
    ]
    assert not any(b"secret" in file.read_bytes() for file in mlx.iterdir())


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("head", [f"{BOMB}license: *i\n", "license: !!python/object/apply:os.system [true]\n"])
def test_yaml_at_the_head_of_a_card_is_not_run(fixed, tmp_path, head):
    (fixed / "README.md").write_text(f"---\n{head}license_name: 'Apple terms'\n---\n")
    card = (convert(fixed, tmp_path / "mlx", verify=False) / "README.md").read_text()
    assert len(card) < 10_000
    assert "license_name: Apple terms" in card and "os.system" not in card


def test_a_file_of_labels_without_an_end_is_one_line(capsys):
    for file in ("/dev/zero", "/dev/stdin", str(REFERENCE)):
        assert main(["classify", "a.jpg", "-m", "x", "--labels-file", file]) == 2
        assert re.search("is a (device|named pipe|socket|folder), not a file", capsys.readouterr().err)


def test_a_file_of_labels_may_lie_below_the_home_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "labels.txt").write_text("x\nx\n")
    assert main(["classify", "a.jpg", "-m", "x", "--labels-file", "~/labels.txt"]) == 2
    assert "labels given more than once: x" in capsys.readouterr().err
