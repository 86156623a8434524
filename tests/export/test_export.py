"""An exported encoder gives what the model gives, from every layout; its description says how to call it."""

import json
import re
import shutil
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from mlx_aimv2 import bundled, layers, load
from mlx_aimv2.cli import main
from mlx_aimv2.convert import convert
from mlx_aimv2.export import export, write
from mlx_aimv2.export.encoder import prepare
from mlx_aimv2.images.open import open_image
from mlx_aimv2.learn import predict
from tests.small_models import NATIVE, pair_with_words
from tests.small_training import Workshop, write_encoder

COSINE = 0.999999

EMOJI = bundled.emoji_checkpoint()
PHOTOGRAPHS = bundled.photographs()[:3]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One encoder in every layout, and a native one."""
    place = tmp_path_factory.mktemp("sources")
    apple = write_encoder(place / "apple")
    own = {"verify": False}
    return {
        "apple": apple,
        "transformers": convert(apple, place / "transformers", export_layout="transformers", **own),
        "mlx": convert(apple, place / "mlx", **own),
        "quantized": convert(EMOJI, place / "quantized", quantize=True, q_bits=4, q_group_size=32, **own),
        "native": NATIVE,
        "emoji": EMOJI,
        "pair": pair_with_words(place / "pair"),
    }


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("learning"))


def cosines(found, wanted):
    """The cosine of each row, in float64."""
    one, other = (np.array(x.astype(mx.float32)).astype(np.float64).reshape(x.shape[0], -1) for x in (found, wanted))
    assert one.shape == other.shape
    return (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


@pytest.mark.parametrize("output", [None, "tokens", "both"])
@pytest.mark.parametrize("layout", ["apple", "transformers", "mlx", "quantized", "native", "emoji", "pair"])
def test_from_every_layout_the_function_gives_what_the_model_gives(sources, tmp_path, layout, output):
    side = {} if layout != "native" else {"image_size": 224}
    model, processor = load(sources[layout], dtype="float32", **side)
    file = export(sources[layout], tmp_path / "encoder.mlxfn", output=output, dtype="float32", batch=(3,))
    pixels = processor(PHOTOGRAPHS)
    found = mx.import_function(str(file))(pixels)
    wanted = {"image": model.encode_image(pixels), "tokens": model.vision(pixels).last_hidden_state}
    described = json.loads((tmp_path / "encoder.json").read_text())
    names = [one["name"] for one in described["outputs"]]
    assert names == {None: ["image"], "tokens": ["tokens"], "both": ["image", "tokens"]}[output]
    assert [one["shape"] for one in described["outputs"]] == [list(x.shape[1:]) for x in found]
    for name, x in zip(names, found, strict=True):
        assert cosines(x, wanted[name]).min() >= COSINE


@pytest.mark.parametrize("layout", ["emoji", "pair"])
def test_a_text_encoder_takes_ids_of_one_length_filled_with_eos(sources, tmp_path, layout):
    model, processor = load(sources[layout], dtype="float32")
    file = export(sources[layout], tmp_path / "text.mlxfn", output="text", dtype="float32", batch=(2,))
    described = json.loads((tmp_path / "text.json").read_text())
    length, eos = described["input"]["shape"][0], described["eos"]
    ids = processor.tokenize(["a cat", "a dog on a bench beside many other dogs"])
    filled = np.full((2, length), eos, np.int32)
    filled[:, : ids.shape[1]] = np.array(ids)
    found = mx.import_function(str(file))(mx.array(filled))
    assert cosines(found[0], model.encode_text(ids)).min() >= COSINE
    assert "preprocessing" not in described
    assert processor.tokenizer.backend.to_str() == (tmp_path / "tokenizer.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("grid", [None, (3, 2)])
def test_a_native_checkpoint_takes_one_grid_as_levels(tmp_path, grid):
    model, processor = load(NATIVE)
    file = export(NATIVE, tmp_path / "encoder.mlxfn", grid=grid, input="uint8")
    described = json.loads((tmp_path / "encoder.json").read_text())
    patch = processor.patch_size
    size = [224 // patch * patch] * 2 if grid is None else [3 * patch, 2 * patch]
    assert described["input"] == {"dtype": "uint8", "batches": [1], "shape": [*size, 3]}
    assert described["preprocessing"]["crop"] == size
    assert described["preprocessing"]["resize"] == (size[0] if grid is None else size)
    levels = mx.array(np.random.default_rng(1).integers(0, 256, (1, *size, 3), np.uint8))
    found = mx.import_function(str(file))(levels)
    assert cosines(found[0], model.encode_image(processor.normalised(levels)))[0] >= COSINE


def test_another_size_resamples_the_positions(sources, tmp_path):
    model, processor = load(sources["apple"], image_size=56)
    file = export(sources["apple"], tmp_path / "encoder.mlxfn", image_size=56)
    pixels = processor(PHOTOGRAPHS[:1])
    assert cosines(mx.import_function(str(file))(pixels)[0], model.encode_image(pixels))[0] >= COSINE


@pytest.mark.parametrize("kind", ["linear", "attentive", "knn", "lora", "full"])
def test_with_a_head_inside_come_the_probabilities_that_predict_gives(workshop, tmp_path, kind):
    settings = {} if kind in ("linear", "knn") else {"iters": 2, "batch_size": 4}
    head = workshop.head("classify", kind, **settings)
    file = export(head, tmp_path / "labels.mlxfn", input="uint8")
    described = json.loads((tmp_path / "labels.json").read_text())
    assert described["labels"] == ["dark", "grey", "light"]
    assert described["outputs"] == [{"name": "probabilities", "dtype": "float32", "shape": [3]}]
    _, processor = load(workshop.encoder)
    image = workshop.data["classify"] / "grey" / "0.png"
    [(_, wanted)] = predict(head, [image])
    found = mx.import_function(str(file))(mx.array(processor.levels(open_image(image)))[None])[0]
    np.testing.assert_allclose(np.array(found)[0], wanted.probabilities, atol=2e-6)


def test_one_file_takes_every_batch_that_was_asked_for_and_no_other(sources, tmp_path):
    encode = mx.import_function(str(export(sources["apple"], tmp_path / "encoder.mlxfn", batch=(1, 3))))
    _, processor = load(sources["apple"])
    pixels = processor(PHOTOGRAPHS)
    alone = mx.concatenate([encode(pixels[i : i + 1])[0] for i in range(3)])
    np.testing.assert_allclose(encode(pixels)[0], alone, atol=1e-5)
    with pytest.raises(ValueError, match="No imported function"):
        encode(pixels[:2])


def test_half_precision_stays_half_precision(sources, tmp_path):
    export(sources["apple"], tmp_path / "encoder.mlxfn", dtype="float16")
    described = json.loads((tmp_path / "encoder.json").read_text())
    assert (described["dtype"], described["outputs"][0]["dtype"]) == ("float16", "float16")


def test_the_command_keeps_the_checkpoints_dtype(sources, tmp_path):
    source = convert(sources["apple"], tmp_path / "half", dtype="float16", verify=False)
    assert main(["export", "-m", str(source), "-o", str(tmp_path / "encoder.mlxfn")]) == 0
    assert json.loads((tmp_path / "encoder.json").read_text())["dtype"] == "float16"


def test_what_metal_computes_in_one_kernel_is_exported_as_its_operations(sources, tmp_path, monkeypatch):
    """On a GPU SwiGLU is compiled, and what MLX has compiled cannot be written."""
    monkeypatch.setattr(layers, "swiglu", layers._fused_swiglu)
    assert export(sources["apple"], tmp_path / "encoder.mlxfn").is_file()


def test_the_description_says_where_it_comes_from_and_how_to_prepare_an_image(sources, tmp_path):
    source = shutil.copytree(sources["apple"], tmp_path / "source")
    (source / "LICENSE").write_text("research only")
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: apple-amlr\n---\n")
    assert main(["export", "-m", str(source), "-o", str(tmp_path / "app" / "encoder.mlxfn"), "--batch", "1,4"]) == 0
    assert sorted(file.name for file in (tmp_path / "app").iterdir()) == ["LICENSE", "encoder.json", "encoder.mlxfn"]
    described = json.loads((tmp_path / "app" / "encoder.json").read_text())
    _, processor = load(source)
    steps = processor.preprocessing
    assert described["checkpoint"] == "source"
    assert str(tmp_path) not in json.dumps(described)
    assert described["license"] == {"license": "other", "license_name": "apple-amlr"}
    assert described["device"] == "cpu" and len(described["fingerprint"]["digest"]) == 64
    assert described["input"] == {"dtype": "float32", "batches": [1, 4], "shape": [42, 42, 3]}
    assert described["preprocessing"] == {
        "resize": 42,
        "crop": [42, 42],
        "resample": "bicubic",
        "rescale_factor": steps.rescale_factor,
        "image_mean": list(steps.image_mean),
        "image_std": list(steps.image_std),
    }


WRONG = {
    "-o encoder.onnx": r"-o must end in .*\.mlxfn.*, got encoder\.onnx",
    "-o \udcff.mlxfn": "is not UTF-8, which MLX cannot write: choose another name",
    "-o encoder.mlxfn --batch 0": "--batch must be different numbers above 0, such as 1,4,16; got 0",
    "-o encoder.mlxfn --batch 1,1": "--batch must be different numbers",
    "-o encoder.mlxfn --batch some": "argument --batch: wanted whole numbers such as 3,5, got 'some'",
    "-o encoder.mlxfn --grid 3,3": r"--grid is for native checkpoints; .* takes 42 pixels: leave it out",
    "-o encoder.mlxfn --grid 3,3 --image-size 56": "choose one of --image-size and --grid",
    "-o encoder.mlxfn --image-size 0": "image_size must be a multiple of the patch",
    "-o encoder.mlxfn --image-size 50": "image_size must be a multiple of the patch",
    "-o encoder.mlxfn --output text": r"--output text: .* has no text encoder; apple/aimv2-large-patch14-224-lit has",
    "-o encoder.mlxfn --output text --input uint8": "--input are for images: leave them out of --output text",
    "-o encoder.mlxfn --output vector": "invalid choice: 'vector'",
    "-m native -o encoder.mlxfn --grid 3": "--grid must be rows,columns of patches, each from 1 to",
    "-m native -o encoder.mlxfn --grid 3,9999": "--grid must be rows,columns of patches",
    "-m head -o labels.mlxfn --output tokens": "by fit: leave --output, --image-size, --grid and --revision out",
    "-m segments -o labels.mlxfn": "is a head to segment: only one to classify, multilabel, regression can be exported",
    "-m nothing -o encoder.mlxfn": "nothing: no such file or folder",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_use_ends_in_one_line_and_writes_nothing(sources, workshop, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    models = {"native": NATIVE, "apple": sources["apple"]}
    if "-m head" in words or "-m segments" in words:
        models["head"] = workshop.head("classify", "linear")
        models["segments"] = workshop.head("segment", "linear", iters=2, batch_size=4)
    given = words if "-m" in words else f"-m apple {words}"
    try:
        code = main(["export", *(str(models.get(word, word)) for word in given.split())])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert (code, len(said.splitlines())) == (2, 1), said
    assert re.search(WRONG[words], said), said
    assert list(tmp_path.iterdir()) == []


def test_without_its_extra_core_ml_ends_in_one_line(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    assert main(["export", "-m", str(sources["apple"]), "-o", str(tmp_path / "E.mlpackage")]) == 2
    said = capsys.readouterr().err
    assert said == "mlx-aimv2: .mlpackage needs coremltools: pip install 'mlx-aimv2[coreml]'\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["encoder.mlxfn", "encoder.json", "LICENSE"])
def test_no_file_that_is_there_is_replaced(sources, tmp_path, name):
    source = shutil.copytree(sources["apple"], tmp_path / "source")
    (source / "LICENSE").write_text("research only")
    place = tmp_path / "app"
    place.mkdir()
    (place / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"Cannot save to the path .*{name} as it already exists"):
        export(source, place / "encoder.mlxfn")
    assert [file.name for file in place.iterdir()] == [name]
    assert (place / name).read_text() == "mine"


def test_two_functions_share_a_licence(sources, tmp_path):
    source = shutil.copytree(EMOJI, tmp_path / "source")
    (source / "LICENSE").write_text("research only")
    for output in ("image", "text"):
        export(source, tmp_path / "app" / f"{output}.mlxfn", output=output)
    assert len(list((tmp_path / "app").iterdir())) == 6  # two functions, two descriptions, licence, tokenizer


def test_what_ends_while_it_is_written_leaves_nothing(sources, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(write.WRITERS, ".mlxfn", stop)
    with pytest.raises(KeyboardInterrupt):
        export(sources["apple"], tmp_path / "encoder.mlxfn")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_reads_back_otherwise_is_refused(sources, tmp_path, monkeypatch):
    """As MLX reads back a transposed weight."""

    def with_views(*given, **own):
        exported = prepare(*given, **own)
        exported.vision.update(tree_map(lambda x: mx.contiguous(x.T).T, exported.vision.parameters()))
        return exported

    monkeypatch.setattr(write, "prepare", with_views)
    with pytest.raises(RuntimeError, match=r"MLX reads other values from encoder\.mlxfn than the model's"):
        export(sources["apple"], tmp_path / "encoder.mlxfn")
    assert list(tmp_path.iterdir()) == []
