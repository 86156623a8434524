"""The converter does what its flags say, and refuses in one line what they cannot mean."""

import inspect
import json
import shutil
import stat
from pathlib import Path

import mlx.core as mx
import pytest
from safetensors import safe_open

from mlx_aimv2 import bundled, load
from mlx_aimv2 import convert as converter
from mlx_aimv2.cli import main
from mlx_aimv2.convert import convert
from tests.labelled import nearest_labels
from tests.small_encoder import small_encoder

ENCODER = small_encoder()
FIXED = Path(__file__).parent / "golden" / "reference" / "fixed"

MLX_LM = {
    "hf_path": inspect.Parameter.empty,
    "mlx_path": "mlx_model",
    "quantize": False,
    "q_group_size": None,
    "q_bits": None,
    "q_mode": "affine",
    "dtype": None,
    "upload_repo": None,
    "revision": None,
    "dequantize": False,
    "quant_predicate": None,
}
"""mlx-lm's keywords and their defaults."""


@pytest.fixture
def nothing_is_read(monkeypatch):
    def read(*_, **__):
        raise AssertionError("the source was read")

    monkeypatch.setattr(converter, "read_source", read)


def test_the_keywords_and_defaults_are_mlx_lms():
    own = {name: parameter.default for name, parameter in inspect.signature(convert).parameters.items()}
    assert {name: own[name] for name in MLX_LM} == MLX_LM


def test_each_flag_is_a_keyword():
    import argparse

    parser = argparse.ArgumentParser()
    converter.add_convert(parser)
    flags = vars(parser.parse_args(["--model", "x"]))
    keywords = set(inspect.signature(convert).parameters) - {"log", "on_progress"}
    assert set(flags) == keywords
    assert {name: flags[name] for name in flags if name in MLX_LM and name != "hf_path"} == {
        name: value for name, value in MLX_LM.items() if name != "hf_path"
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": True, "dequantize": True, "q_bits": 7}, r"^Choose either quantize or dequantize, not both\.$"),
        ({"q_bits": 4}, "--q-bits would have no effect without --quantize; add -q"),
        ({"q_mode": "mxfp8"}, "--q-mode would have no effect"),
        ({"dequantize": True, "q_group_size": 32}, "--q-group-size would have no effect"),
        ({"quant_predicate": "mixed_3_6"}, "--quant-predicate would have no effect"),
        ({"quantize": True, "quant_predicate": "mixed_5_6"}, "must be mixed_2_6, mixed_3_4, mixed_3_6, mixed_4_6, got"),
        ({"quantize": True, "quant_predicate": "mixed_3_6", "q_bits": 4}, "sets the bits; leave --q-bits out"),
        ({"quantize": True, "quant_predicate": "mixed_3_6", "q_mode": "nvfp4"}, "leave --q-mode nvfp4 out"),
        ({"quantize": True, "q_bits": 7}, "q_bits must be 2, 3, 4, 5, 6 or 8"),
        ({"export_layout": "timm"}, "--export-layout must be transformers or apple, got timm"),
        ({"export_layout": "apple", "quantize": True}, "choose either --export-layout or quantize"),
        ({"calibration": "images", "verify": False}, "--calibration is for gptq and the fidelity report"),
        ({"calibration": "nowhere"}, "nowhere: wanted a folder of images"),
        *(({"upload_repo": name}, "not a Hub name of the form owner/name") for name in ("bad/na/me", "-x/y")),
        ({"upload_repo": "somebody/model"}, "nothing can be uploaded while HF_HUB_OFFLINE is set"),
        ({"dtype": "float8"}, "dtype must be float32, float16, bfloat16, got float8"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_what_cannot_be_meant_is_refused_before_anything_is_read(tmp_path, nothing_is_read, options, message):
    with pytest.raises((ValueError, FileNotFoundError, ConnectionError), match=message) as caught:
        convert(ENCODER, tmp_path / "mlx", **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_existing_target_is_named_before_anything_is_read(tmp_path, nothing_is_read):
    with pytest.raises(FileExistsError, match=f"^Cannot save to the path {tmp_path} as it already exists"):
        convert(ENCODER, tmp_path)


def test_an_image_that_cannot_be_read_ends_it_before_anything_is_written(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ValueError, match=r"broken\.jpg"):
        convert(ENCODER, tmp_path / "mlx", calibration=images)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_the_proof_is_given_on_the_images_of_ones_own(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    shutil.copy(bundled.photographs()[1], images / "mine.jpg")
    folder = convert(ENCODER, tmp_path / "mlx", calibration=images)
    assert json.loads((folder / "fidelity.json").read_text())["images"] == ["mine.jpg"]


def test_the_source_is_opened_once_whatever_becomes_of_it_meanwhile(tmp_path):
    source = Path(shutil.copytree(FIXED, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())

    def change(line):
        if "Using dtype" in line:  # the source has been read
            (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.25}))

    folder = convert(source, tmp_path / "mlx", log=change)
    assert json.loads((folder / "config.json").read_text())["rms_norm_eps"] == config["rms_norm_eps"]
    assert json.loads((folder / "fidelity.json").read_text())["token_cosine"]["min"] == pytest.approx(1, abs=1e-12)


def test_a_source_that_is_replaced_meanwhile_is_one_line(tmp_path):
    source = Path(shutil.copytree(FIXED, tmp_path / "source"))

    def replace(line):
        if "Using dtype" in line:
            shutil.copy(ENCODER / "model.safetensors", source / "model.safetensors")

    with pytest.raises(ValueError, match=r"source: its weights changed while being read; run it again"):
        convert(source, tmp_path / "mlx", log=replace)
    assert not (tmp_path / "mlx").exists()


def test_any_thread_may_convert(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    for i in range(3):  # each with a thread of its own, whose streams are not the others'
        with ThreadPoolExecutor(1) as pool:
            folder = pool.submit(convert, ENCODER, tmp_path / str(i), quantize=True).result()
        assert (folder / "fidelity.json").is_file()


def test_a_quantized_source_is_refused_quantized_again_or_as_it_is(tmp_path):
    folder = convert(ENCODER, tmp_path / "4bit", quantize=True, verify=False)
    for options in ({"quantize": True}, {}, {"dtype": "float16"}):
        with pytest.raises(ValueError, match=r"4bit is already quantized.*with -d"):
            convert(folder, tmp_path / "again", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["4bit"]


def test_a_dense_source_has_nothing_to_dequantize(tmp_path):
    with pytest.raises(ValueError, match="is not quantized, so there is nothing to dequantize; leave -d out"):
        convert(ENCODER, tmp_path / "mlx", dequantize=True)


def test_a_quantized_source_is_exported_dense(tmp_path):
    packed = convert(ENCODER, tmp_path / "8bit", quantize=True, q_bits=8, verify=False)
    exported = convert(packed, tmp_path / "pt", export_layout="apple", verify=False)
    inputs = mx.random.normal((1, 56, 56, 3), key=mx.random.key(2))
    a, b = (load(folder)[0].encode_image(inputs) for folder in (packed, exported))
    assert mx.allclose(a, b, atol=1e-5)


def test_what_happens_is_said_in_the_words_of_mlx_lm(tmp_path):
    lines = []
    folder = convert(
        ENCODER, tmp_path / "mlx", quantize=True, q_bits=8, dtype="float16", verify=False, log=lines.append
    )
    assert lines == [
        "[INFO] Loading",
        "[INFO] Using dtype: float16",
        "[INFO] Quantizing",
        "[INFO] Quantized model with 9.304 bits per weight.",
        f"[INFO] {converter.GAIN}",
    ]
    lines.clear()
    convert(folder, tmp_path / "dense", dequantize=True, verify=False, log=lines.append)
    assert "[INFO] Dequantizing" in lines


def test_without_a_dtype_the_checkpoints_stays(tmp_path):
    half = convert(ENCODER, tmp_path / "half", dtype="bfloat16", verify=False)
    again = convert(half, tmp_path / "again", verify=False)
    assert load(again)[0].dtype == mx.bfloat16
    assert json.loads((again / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_folder_is_as_the_ecosystem_knows_it(tmp_path):
    folder = convert(ENCODER, tmp_path / "mlx", quantize=True, dtype="float16")
    assert {path.name for path in folder.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "preprocessor_config.json",
        "fidelity.json",
        "README.md",
    }
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "mlx"}
        names = list(file.keys())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert list(index["weight_map"]) == sorted(names)
    assert index["metadata"]["total_parameters"] == 734080  # numbers, however they are packed
    text = (folder / "config.json").read_text()
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert text.startswith('{\n    "')
    assert stat.S_IMODE(folder.stat().st_mode) & 0o700 == 0o700


def test_a_checkpoint_that_says_nothing_about_images_gets_it_written(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ENCODER, source)
    (source / "preprocessor_config.json").unlink()
    with pytest.warns(UserWarning, match="no preprocessor_config.json"):
        folder = convert(source, tmp_path / "mlx", verify=False)
    assert json.loads((folder / "preprocessor_config.json").read_text())["crop_size"] == {"height": 56, "width": 56}


def test_the_command_line_prints_the_folder_and_keeps_quiet_on_stdout(tmp_path, capsys):
    target = str(tmp_path / "mlx")
    assert main(["convert", "--hf-path", str(ENCODER), "--mlx-path", target, "-q", "--q-mode", "mxfp8"]) == 0
    output = capsys.readouterr()
    assert output.out == f"{target}\n"
    assert "token cosine, mean" in output.err


def test_digits_are_told_apart_as_before_at_8_bits(tmp_path):
    folder = convert(ENCODER, tmp_path / "mlx", quantize=True, q_bits=8, dtype="float16")
    assert json.loads((folder / "fidelity.json").read_text())["token_cosine"]["mean"] >= 0.9995
    all_scans = bundled.digits()
    scans = bundled.Digits(*(part[:80] for part in all_scans[:2]), *(part[:40] for part in all_scans[2:]))
    found = [nearest_labels(*load(path, dtype="float32"), scans) for path in (ENCODER, folder)]
    assert (found[0] == found[1]).mean() >= 0.97  # all of them: benchmarks/quantization.py


def test_6_bits_keep_a_token_cosine_of_0998(tmp_path):
    folder = convert(ENCODER, tmp_path / "mlx", quantize=True, q_bits=6, dtype="float16")
    assert json.loads((folder / "fidelity.json").read_text())["token_cosine"]["mean"] >= 0.998


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert convert(ENCODER, "~/out", verify=False) == tmp_path / "out"
