"""`save` writes what is in memory as a folder that `load` takes, to the bit, or nothing and one clear line."""

import json
import shutil
import warnings
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mlx_aimv2 import Aimv2Config, Aimv2TextConfig, Aimv2VisionConfig, Aimv2VisionModel, load, save
from mlx_aimv2.checkpoint.layouts import LAYOUTS, layout_for
from mlx_aimv2.cli import main
from mlx_aimv2.conversion.folder import PYTORCH_LAYOUTS, config_for
from mlx_aimv2.convert import convert
from mlx_aimv2.images.preprocessing import published
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.learn import lora
from mlx_aimv2.loading import read_source
from tests.small_models import FIXED, NATIVE, edit_config, pair_with_words, random_weights, write

TEXTS = ["a photo of a cat", "an umbrella in the rain, twice"]
WIDE = Aimv2Config(  # rows that divide into groups of 32
    Aimv2VisionConfig(32, 64, 2, 2, image_size=15, patch_size=5, use_head=True),
    Aimv2TextConfig(31, 32, 64, 3, 2, 11, 30),
    projection_dim=32,
)


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "noise.png"
    Image.effect_noise((61, 47), 80).convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    folder = pair_with_words(tmp_path_factory.mktemp("pair") / "words", WIDE)
    (folder / "LICENSE").write_text("terms")
    (folder / "README.md").write_text("---\nlicense: apple-amlr\n---\n")
    return folder


def outputs(model, processor, image: Path) -> dict[str, np.ndarray]:
    """Everything that a model gives of an image and of texts, with pixels and ids."""
    pixels = processor(image)
    seen = model.vision(pixels, output_hidden_states=True)
    found = {"pixels": pixels, "vector": model.encode_image(pixels), "tokens": seen.last_hidden_state}
    found |= {str(i): state for i, state in enumerate(seen.hidden_states)}
    if hasattr(model, "text_model") and processor.tokenizer is not None:
        ids = processor.tokenize(TEXTS)
        found |= {"ids": ids, "texts": model.encode_text(ids), "logits": model(pixels, ids).logits_per_image}
    return {name: np.array(array.astype(mx.float32)) for name, array in found.items()}


def assert_comes_back(model, processor, folder: Path, image: Path, **keywords) -> None:
    before = outputs(model, processor, image)
    assert save(model, processor, folder) == Path(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = outputs(*load(folder, **keywords), image)
    assert before.keys() == again.keys()
    for name, array in before.items():
        assert np.array_equal(array, again[name]), name


@pytest.mark.parametrize("folder", [FIXED, NATIVE, "pair"], ids=["fixed", "native", "pair"])
@pytest.mark.parametrize(
    "keywords",
    [{}, {"dtype": "float16"}, {"dtype": "bfloat16"}, {"image_size": 70}, {"lazy": True}],
    ids=["as it is", "float16", "bfloat16", "resized", "lazy"],
)
def test_what_was_loaded_comes_back(folder, keywords, pair, image, tmp_path):
    model, processor = load(pair if folder == "pair" else folder, **keywords)
    assert_comes_back(model, processor, str(tmp_path / "saved"), image)


KINDS = {
    "fixed": Aimv2VisionConfig(24, 13, 2, 2, image_size=15, patch_size=5),
    "native": Aimv2VisionConfig(24, 13, 2, 2, image_size=None, patch_size=5, is_native=True),
    "head": Aimv2VisionConfig(24, 13, 2, 2, image_size=15, patch_size=5, use_head=True),
    "pair": WIDE,
}


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        (layout.name, kind)
        for layout in LAYOUTS.values()
        for kind in KINDS
        if kind == "fixed" or (layout.pair and (kind == "pair" or layout.name in PYTORCH_LAYOUTS))
    ],
)
def test_a_model_of_every_layout_comes_back(layout, kind, image, tmp_path):
    config = KINDS[kind]
    tensors = layout_for(layout, pair=kind == "pair").to_source(random_weights(config).items())
    spelling = layout if layout in PYTORCH_LAYOUTS else "transformers"
    source = write(tmp_path / "source", dict(tensors), config_for(config, spelling))
    Aimv2Processor(published(config.vision.image_size), patch_size=5).save_to(source)
    assert read_source(source).layout == layout
    assert_comes_back(*load(source), tmp_path / "saved", image)


@pytest.mark.parametrize("size", [None, 25])
def test_the_encoder_of_a_larger_model_comes_back_with_its_own_pixels(size, image, tmp_path):
    """Ovis2 squashes images to a square."""
    config = KINDS["fixed"]
    prefix = "visual_tokenizer.backbone."
    named = layout_for("apple", pair=False).to_source(random_weights(config).items())
    tensors = {prefix + name: array for name, array in named}
    tensors["llm.model.embed_tokens.weight"] = mx.zeros((7, 3))
    about = {"model_type": "ovis", "visual_tokenizer_config": {"backbone_config": config_for(config, "apple")}}
    source = write(tmp_path / "Ovis2", tensors, about)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, processor = load(source, image_size=size)
    assert isinstance(processor.preprocessing.resize, tuple)
    assert_comes_back(model, processor, tmp_path / "saved", image)


@pytest.mark.parametrize("keep", [True, False], ids=["packed", "dequantized"])
@pytest.mark.parametrize(
    "settings",
    [{"q_bits": 4}, {"q_bits": 3}, {"quant_predicate": lambda path, _: {"bits": 8 if "attn" in path else 2}},
     {"q_mode": "mxfp4"}, {"quant_predicate": lambda path, _: "mlp" in path}],
    ids=["4 bits", "3 bits", "own bits", "mxfp4", "partly"],
)  # fmt: skip
def test_a_quantized_model_comes_back_with_the_same_bits(pair, settings, keep, image, tmp_path):
    converted = convert(pair, tmp_path / "q", quantize=True, q_group_size=32, verify=False, **settings)
    model, processor = load(converted, keep_quantized=keep)
    assert_comes_back(model, processor, tmp_path / "saved", image, keep_quantized=keep)
    files = [mx.load(str(folder / "model.safetensors")) for folder in (tmp_path / "q", tmp_path / "saved")]
    assert (files[0].keys() == files[1].keys()) == keep
    assert "by mlx-aimv2" in (tmp_path / "saved" / "README.md").read_text()


def test_layers_that_mlx_itself_has_quantized_come_back_packed(pair, image, tmp_path):
    model, processor = load(pair)
    nn.quantize(model, 32, 8, class_predicate=lambda _, layer: hasattr(layer, "to_quantized") and
                layer.weight.shape[-1] % 32 == 0)  # fmt: skip
    assert_comes_back(model, processor, tmp_path / "saved", image, keep_quantized=True)
    packed = [name for name, _ in tree_flatten(load(tmp_path / "saved", keep_quantized=True)[0].parameters())]
    assert sum(name.endswith(".scales") for name in packed) == sum(
        name.endswith(".scales") for name, _ in tree_flatten(model.parameters())
    )


def test_changed_weights_fused_adapters_and_the_encoder_of_a_pair_come_back(pair, image, tmp_path):
    model, processor = load(pair)
    lora.add_adapters(model.vision, "lora", num_layers=2, rank=3)
    changed = [(name, array + 0.25) for name, array in tree_flatten(model.vision.trainable_parameters())]
    model.vision.load_weights(changed, strict=False)
    with pytest.raises(ValueError, match=r"extra .*lora_a.*; merge the adapters first with mlx_aimv2.learn.fuse"):
        save(model, processor, tmp_path / "saved")
    assert not any(tmp_path.iterdir())
    lora.remove_adapters(model.vision)
    model.text_projection.weight = model.text_projection.weight * 1.5
    assert_comes_back(model, processor, tmp_path / "saved", image)
    assert_comes_back(model.vision, processor, tmp_path / "vision", image)
    assert not np.array_equal(outputs(*load(pair), image)["texts"], outputs(model, processor, image)["texts"])


def test_licence_origin_and_tokenizer_go_along_and_a_source_that_is_gone_is_said(pair, image, tmp_path):
    source = Path(shutil.copytree(pair, tmp_path / "source"))
    model, processor = load(source)
    for name in ("one", "two"):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert_comes_back(model, processor, tmp_path / name, image)
        assert [str(one.message).partition(" is gone")[2] for one in said] == (
            [] if name == "one" else [f": its licence could not be copied into {tmp_path / 'two'}"]
        )
        shutil.rmtree(source, ignore_errors=True)
    assert (tmp_path / "one" / "LICENSE").read_text() == "terms"
    card = (tmp_path / "one" / "README.md").read_text()
    assert "license: apple-amlr" in card
    assert "source, loaded, perhaps changed, and saved for MLX by mlx-aimv2" in card
    save(*load(tmp_path / "one"), tmp_path / "three", is_tuned=True)
    assert (tmp_path / "three" / "LICENSE").is_file()
    assert "fine-tuned and converted to MLX" in (tmp_path / "three" / "README.md").read_text()


def test_special_tokens_of_another_name_come_back(pair, image, tmp_path):
    source = Path(shutil.copytree(pair, tmp_path / "source"))
    for file in ("tokenizer.json", "vocab.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (source / file).is_file():
            text = (source / file).read_text()
            (source / file).write_text(text.replace("<|endoftext|>", "<end>").replace("<|startoftext|>", "<start>"))
    assert_comes_back(*load(source), tmp_path / "saved", image)


def test_a_model_that_was_never_a_checkpoint_is_saved_too(image, tmp_path):
    config = Aimv2VisionConfig(22, 13, 2, 2, image_size=15, patch_size=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, processor = Aimv2VisionModel(config), Aimv2Processor(published(15), patch_size=5)
        assert_comes_back(model, processor, tmp_path / "new" / "folder", image)


def test_what_cannot_come_back_is_refused_and_nothing_is_left(pair, tmp_path):
    model, processor = load(pair)
    mixed, _ = load(pair)
    mixed.vision.norm.weight = mixed.vision.norm.weight.astype(mx.float16)
    larger, other = load(pair, image_size=25)
    headed, _ = load(FIXED)
    headed.extra = nn.Linear(3, 5)
    taken = tmp_path / "taken"
    taken.mkdir()
    for arguments, kind, words in (
        ((processor, model, "x"), TypeError, "model must be Aimv2VisionModel or Aimv2Model, got Aimv2Processor"),
        ((model.text_model, processor, "x"), TypeError, "model must be Aimv2VisionModel or Aimv2Model, got Aimv2Text"),
        ((model, None, "x"), TypeError, "processor must be Aimv2Processor, got NoneType"),
        ((model, processor, 7), TypeError, "folder must be str or PathLike, got int"),
        ((model, processor, taken), FileExistsError, "Cannot save to the path .*taken as it already exists"),
        ((mixed, processor, tmp_path / "x"), ValueError, r"of one dtype, .*got float16, float32: call model.set_dtype"),
        (
            (larger, processor, tmp_path / "x"),
            ValueError,
            "x: images are prepared as 15x15, but the model takes 25x25;",
        ),
        ((model, other, tmp_path / "x"), ValueError, "save a model with the processor that load returned with it"),
        ((headed, load(FIXED)[1], tmp_path / "x"), ValueError, "do not match .*extra extra.bias, extra.weight$"),
    ):
        with pytest.raises(kind, match=words) as caught:
            save(*arguments)
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == [taken]


def test_weights_alone_lead_to_save(pair, tmp_path, capsys):
    model, _ = load(pair)
    for name in ("model.safetensors", "w.safetensors", "w.npz"):
        (tmp_path / name).mkdir()
        model.save_weights(str(tmp_path / name / name))
    words = r"save\(model, processor, FOLDER\)"
    for given in ("model.safetensors", "model.safetensors/model.safetensors", "w.safetensors/w.safetensors"):
        with pytest.raises(FileNotFoundError, match=rf"no config.json beside it; {words}"):
            load(tmp_path / given)
    for given in ("w.safetensors", "w.npz", "w.npz/w.npz"):
        with pytest.raises((FileNotFoundError, ValueError), match=words):
            load(tmp_path / given)
    assert main(["info", str(tmp_path / "w.safetensors" / "w.safetensors")]) == 2
    assert "FOLDER" in capsys.readouterr().err


def test_a_saved_folder_is_a_checkpoint_like_any_other(pair, tmp_path):
    save(*load(pair), tmp_path / "saved")
    assert main(["convert", "--hf-path", str(tmp_path / "saved"), "--mlx-path", str(tmp_path / "again")]) == 0
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config == json.loads((tmp_path / "again" / "config.json").read_text())
    edit_config(tmp_path / "saved", torch_dtype="float16")
    assert load(tmp_path / "saved")[0].dtype == mx.float32
