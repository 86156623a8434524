"""The steps from an image to pixels are read from the checkpoint's own files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_aimv2.config import Aimv2Config, Aimv2TextConfig, Aimv2VisionConfig
from mlx_aimv2.images.preprocessing import Preprocessing, from_processor, published, read_preprocessing, to_clip
from mlx_aimv2.images.processor import Aimv2Processor
from tests.pixels import stored

FIXED = Aimv2Processor(published(42))
NATIVE = Aimv2Processor(published(None))


def test_without_any_file_apples_preprocessing_is_taken_with_a_remark(tmp_path):
    with pytest.warns(UserWarning, match=r"no preprocessor_config\.json.*centre crop 336x336"):
        fixed = Aimv2Processor.from_folder(tmp_path, config=Aimv2VisionConfig(image_size=336))
    with pytest.warns(UserWarning, match="keep their size"):
        native = Aimv2Processor.from_folder(tmp_path, config=Aimv2VisionConfig(is_native=True))
    assert (fixed.preprocessing, native.preprocessing) == (published(336), published(None))
    assert (fixed.is_native, native.is_native) == (False, True)


def test_without_any_file_or_config_the_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no preprocessor_config\.json"):
        Aimv2Processor.from_folder(tmp_path)


CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 70},
    "resample": 2,
    "do_center_crop": True,
    "crop_size": {"height": 56, "width": 42},
    "do_rescale": True,
    "rescale_factor": 0.5,
    "do_normalize": True,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
}


def test_every_field_of_preprocessor_config_counts(tmp_path):
    assert Aimv2Processor.from_folder(stored(tmp_path, CLIP)).preprocessing == Preprocessing(
        resize=70, crop=(56, 42), resample=2, rescale_factor=0.5, image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6)
    )


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"size": 70, "crop_size": 56}, {"resize": 70, "crop": (56, 56)}),
        ({"size": {"height": 70, "width": 84}}, {"resize": (70, 84)}),
        ({"size": {"shortest_edge": 70, "longest_edge": None}}, {"resize": 70}),
        ({"do_resize": False}, {"resize": None}),
        ({"do_center_crop": False}, {"crop": None}),
        ({"do_rescale": False}, {"rescale_factor": None}),
        ({"do_normalize": False}, {"image_mean": None, "image_std": None}),
        ({"image_mean": 0.5}, {"image_mean": (0.5, 0.5, 0.5)}),
        ({"size": None, "crop_size": None}, {"resize": 224, "crop": (224, 224)}),
    ],
)
def test_spellings_of_preprocessor_config(change, wanted):
    whole = from_processor(CLIP, Path("preprocessor_config.json"))
    assert from_processor(CLIP | change, Path("preprocessor_config.json")) == replace(whole, **wanted)


def test_transformers_5_keeps_the_same_in_processor_config(tmp_path):
    file = stored(tmp_path, {"image_processor": CLIP, "processor_class": "CLIPProcessor"}, "processor_config.json")
    assert Aimv2Processor.from_folder(file).preprocessing.crop == (56, 42)


def test_a_processor_config_without_settings_is_refused_or_passed_over(tmp_path):
    with pytest.raises(ValueError, match=r"processor_config\.json: image_processor must be a JSON object"):
        Aimv2Processor.from_folder(stored(tmp_path, {"image_processor": "CLIP"}, "processor_config.json"))
    with pytest.raises(FileNotFoundError, match=r"no preprocessor_config\.json"):
        Aimv2Processor.from_folder(stored(tmp_path, {"processor_class": "CLIPProcessor"}, "processor_config.json"))


TIMM = {
    "input_size": [3, 56, 56],
    "interpolation": "bilinear",
    "crop_pct": 0.9,
    "crop_mode": "center",
    "mean": [0.1, 0.2, 0.3],
    "std": [0.4, 0.5, 0.6],
}


@pytest.mark.parametrize(("change", "resize"), [({}, 62), ({"crop_pct": 1.0}, 56), ({"crop_mode": "squash"}, (62, 62))])
def test_timms_pretrained_cfg_is_read(tmp_path, change, resize):
    stored(tmp_path, {"architecture": "aimv2_large_patch14_224", "pretrained_cfg": TIMM | change}, "config.json")
    assert Aimv2Processor.from_folder(tmp_path).preprocessing == Preprocessing(
        resize=resize, crop=(56, 56), resample=2, image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6)
    )


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"resample": 9}, "resample must be one of nearest"),
        ({"resample": True}, "resample must be"),
        ({"size": {"longest_edge": 224}}, "size must be a number"),
        ({"size": 0}, "size must be in whole pixels from 1"),
        ({"crop_size": {"height": 224, "width": 22.5}}, "crop_size.width must be in whole pixels"),
        ({"do_resize": "yes"}, "do_resize must be true or false"),
        ({"image_mean": [0.5, 0.5]}, "image_mean must be three numbers"),
        ({"image_mean": ["a", "b", "c"]}, "image_mean must be a number"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std must be a number from 1e-06"),
        ({"rescale_factor": 0}, "rescale_factor must be a number from 1e-06"),
        ({"do_pad": True}, "do_pad is set"),
        ({"use_square_size": True}, "use_square_size is set"),
        ({"image_processor_type": "LevitImageProcessor"}, "asks for LevitImageProcessor.*CLIPImageProcessor there"),
        ({"image_processor_type": "CLIPImageProcessor", "image_size": 448}, "image_size and says no size"),
        ({"auto_map": {"AutoProcessor": "processing_x.XProcessor"}}, r"code of its own \(auto_map\)"),
        ({"auto_map": {"AutoImageProcessor": "image_x.XImageProcessor"}, "size": 224}, "asks for XImageProcessor"),
        ({"auto_map": [], "image_size": 448}, "image_size and says no size"),
        ({"image_processor_type": "SAILVLImageProcessor", "image_size": 0}, "size must be in whole pixels"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(tmp_path, fields, line):
    with pytest.raises(ValueError, match=line) as caught:
        Aimv2Processor.from_folder(stored(tmp_path, fields))
    assert "preprocessor_config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"interpolation": "random"}, "interpolation must be one of"),
        ({"crop_pct": 1.2}, "crop_pct must be above 0 and at most 1"),
        ({"crop_mode": "border"}, "crop_mode must be center or squash"),
        ({"input_size": [1, 56, 56]}, r"input_size must be \[3, height, width\]"),
        ({"input_size": [3, 56, 70]}, "not square"),
    ],
)
def test_timms_settings_that_cannot_be_followed_are_refused(tmp_path, change, line):
    with pytest.raises(ValueError, match=line):
        Aimv2Processor.from_folder(stored(tmp_path, {"pretrained_cfg": TIMM | change}, "config.json"))


@pytest.mark.parametrize("content", ["{", "[1]", "\xff\xfe"])
def test_a_settings_file_that_is_no_json_object_is_named(tmp_path, content):
    (tmp_path / "preprocessor_config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        Aimv2Processor.from_folder(tmp_path)


IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
SAILVL = {
    "auto_map": {"AutoImageProcessor": "image_processing_sailvl.SAILVLImageProcessor", "AutoProcessor": "a.B"},
    "max_dynamic_patch": 10,
    "patch_size": 14,
    "image_size": 70,
    "use_msac": False,
    "pad_input": True,
}


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"image_processor_type": "Ovis2ImageProcessor", "size": {"height": 70, "width": 70}}, {}),
        ({"image_processor_type": "Ovis2ImageProcessorFast", "crop_to_patches": True}, {}),
        ({"image_processor_type": "Ovis2ImageProcessorPil", "size": {"shortest_edge": 70}}, {}),
        ({"image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": 70}, "do_pad": True}, {}),
        ({"auto_map": {"AutoImageProcessor": [None, "a.Ovis2ImageProcessorFast"]}, "size": 70}, {}),
        (SAILVL, IMAGENET),
        (SAILVL | {"image_mean": [0.1, 0.2, 0.3]}, IMAGENET | {"image_mean": (0.1, 0.2, 0.3)}),
        ({"image_processor_type": "SiglipImageProcessor", "size": 70}, dict.fromkeys(IMAGENET, (0.5,) * 3)),
        (
            {"image_processor_type": "ViTImageProcessor", "size": 70},
            dict.fromkeys(IMAGENET, (0.5,) * 3) | {"resample": 2},
        ),
    ],
    ids=[
        "Ovis2",
        "Ovis2 without a size",
        "a shortest edge",
        "LLaVA-NeXT",
        "a list",
        "SAIL-VL2",
        "another mean",
        "SigLIP",
        "ViT",
    ],
)
def test_processors_that_squash_are_followed_as_their_own_code_does(tmp_path, fields, steps):
    found = Aimv2Processor.from_folder(stored(tmp_path, fields), config=Aimv2VisionConfig(image_size=70))
    assert found.preprocessing == Preprocessing(resize=(70, 70), crop=None, **steps)


OVIS2 = {**CLIP, "do_center_crop": False, "crop_size": {"height": 70, "width": 70}}


@pytest.mark.parametrize(
    ("model", "file", "steps"),
    [
        ({"model_type": "ovis"}, None, {}),
        ({"model_type": "ovis"}, OVIS2, from_processor(OVIS2, Path())),
        ({"model_type": "ovis2"}, None, {}),
        ({"model_type": "internvl_chat"}, None, IMAGENET),
        ({"model_type": "sailvl"}, None, IMAGENET),
        ({"model_type": "llava_qwen", "image_aspect_ratio": "anyres_max_9"}, None, {}),
    ],
    ids=["Ovis2", "Ovis2's own file", "transformers' Ovis2", "SAIL-VL 1.6", "SAIL-VL2", "LLaVA's anyres"],
)
def test_what_a_vision_language_models_code_does_counts_where_no_file_says_it(tmp_path, model, file, steps):
    stored(tmp_path, model, "config.json")
    if file is not None:
        found = Aimv2Processor.from_folder(stored(tmp_path, file), config=Aimv2VisionConfig(image_size=70))
        assert found.preprocessing == replace(steps, resize=(70, 70))
        return
    with pytest.warns(UserWarning, match="70x70 whatever the shape"):
        found = Aimv2Processor.from_folder(tmp_path, config=Aimv2VisionConfig(image_size=70))
    assert found.preprocessing == Preprocessing(resize=(70, 70), crop=None, **steps)


def test_llavas_padding_is_refused_with_the_remedy_and_its_square_is_apples(tmp_path):
    stored(tmp_path, {"model_type": "llava_qwen", "image_aspect_ratio": "pad"}, "config.json")
    with pytest.raises(ValueError, match=r"image_aspect_ratio: pad.*put the preprocessor_config\.json"):
        Aimv2Processor.from_folder(tmp_path, config=Aimv2VisionConfig(image_size=70))
    stored(tmp_path, {"model_type": "llava_qwen", "mm_vision_tower": "apple/aimv2"}, "config.json")
    with pytest.warns(UserWarning, match="centre crop 70x70"):
        found = Aimv2Processor.from_folder(tmp_path, config=Aimv2VisionConfig(image_size=70))
    assert found.preprocessing == published(70)


def test_a_fixed_models_size_must_be_that_of_its_images(tmp_path):
    with pytest.raises(ValueError, match="prepared as 56x42, but the model takes 336x336"):
        Aimv2Processor.from_folder(stored(tmp_path, CLIP), config=Aimv2VisionConfig(image_size=336))
    with pytest.raises(ValueError, match="less than one patch of 57"):
        Aimv2Processor.from_folder(stored(tmp_path, CLIP), config=Aimv2VisionConfig(is_native=True, patch_size=57))


def test_the_vision_part_of_a_pair_gives_its_sizes(tmp_path):
    config = Aimv2Config(vision_config=Aimv2VisionConfig(image_size=70), text_config=Aimv2TextConfig())
    with pytest.warns(UserWarning, match="70x70"):
        assert Aimv2Processor.from_folder(tmp_path, config=config).preprocessing == published(70)


@pytest.mark.parametrize(
    "steps",
    [
        published(336),
        published(None),
        Preprocessing(resize=(31, 37), crop=None, resample=1, rescale_factor=None, image_mean=None, image_std=None),
        Preprocessing(resize=None, crop=(31, 37), rescale_factor=0.25, image_mean=(0, 0, 0), image_std=(1, 2, 3)),
    ],
)
def test_what_is_saved_is_read_back(tmp_path, steps):
    Aimv2Processor(steps).save_to(tmp_path)
    assert Aimv2Processor.from_folder(tmp_path).preprocessing == steps
    assert from_processor(to_clip(steps), tmp_path) == steps


def test_a_native_image_above_max_patches_is_scaled_down_in_its_shape():
    processor = Aimv2Processor(published(None))
    image = np.full((14 * 20, 14 * 45, 3), 99, np.uint8)
    height, width, _ = processor.pixels(image, max_patches=100).shape
    assert 80 <= (height // 14) * (width // 14) <= 100
    assert abs(width / height - 45 / 20) < 0.05
    assert processor(image, max_patches=900).shape == (1, 280, 630, 3)


def test_max_patches_changes_nothing_for_a_fixed_checkpoint():
    processor = Aimv2Processor(published(56))
    assert processor.pixels(np.full((140, 280, 3), 99, np.uint8), max_patches=3).shape == (56, 56, 3)


def test_a_processor_that_is_not_known_is_named_in_one_line(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "Other\\n"}')
    with pytest.raises(ValueError, match=r"asks for 'Other\\n', which is not followed"):
        read_preprocessing(tmp_path)
