"""The sizes of a model are read from every format of config.json."""

import pytest

from mlx_aimv2 import Aimv2Config, Aimv2TextConfig, Aimv2VisionConfig
from mlx_aimv2.checkpoint.detect import disagreements, sizes

SIZES = {"hidden_size": 60, "intermediate_size": 77, "num_hidden_layers": 3, "num_attention_heads": 5}
APPLE = {**SIZES, "model_type": "aimv2", "num_channels": 3, "patch_size": 14, "rms_norm_eps": 1e-5, "use_bias": False}
SHAPES = {
    "patch_embed.proj.weight": (60, 14, 14, 3),
    "pos_embed": (9, 60),
    "blocks.0.mlp.gate.weight": (77, 60),
    "blocks.2.norm1.weight": (60,),
}
NATIVE_SHAPES = {name: shape for name, shape in SHAPES.items() if name != "pos_embed"}


def read_config(raw, shapes):
    found = sizes(shapes)
    return (Aimv2Config if "text_config" in found else Aimv2VisionConfig).from_dict(raw, found)


def test_defaults_are_large_224():
    config = Aimv2VisionConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_patches) == (1024, 24, 256)


def test_apples_spelling():
    config = read_config({**APPLE, "image_size": 42}, SHAPES)
    assert config == Aimv2VisionConfig(**SIZES, image_size=42)


def test_apples_native_has_neither_a_size_nor_a_position_table():
    config = read_config(APPLE, NATIVE_SHAPES)
    assert config.is_native and config.image_size is None and config.num_patches is None


def test_a_missing_image_size_is_taken_from_the_position_table():
    assert read_config(APPLE, SHAPES).image_size == 42


def test_a_fixed_checkpoint_that_lost_its_position_table_is_not_taken_for_native():
    assert not read_config({**APPLE, "image_size": 42}, NATIVE_SHAPES).is_native


def test_transformers_spelling_of_native():
    config = read_config({**SIZES, "image_size": 224, "is_native": True, "use_head": True}, NATIVE_SHAPES)
    assert config.is_native and config.image_size is None


def test_native_with_a_position_table_is_refused():
    with pytest.raises(ValueError, match=r"is_native.*position table"):
        read_config({**SIZES, "is_native": True}, SHAPES)


def test_the_head_is_read_from_the_tensors_not_from_the_class_default():
    assert not read_config({**SIZES, "image_size": 42, "use_head": True}, SHAPES).use_head
    with_head = {**SHAPES, "head.cls_token": (1, 1, 60)}
    assert read_config({**SIZES, "image_size": 42, "use_head": False}, with_head).use_head


def test_timms_spelling_takes_sizes_from_the_tensors():
    raw = {"architecture": "aimv2_large_patch14_224", "pretrained_cfg": {"input_size": [3, 42, 42]}}
    shapes = {
        "patch_embed.proj.weight": (256, 14, 14, 3),
        "pos_embed": (9, 256),
        "blocks.0.mlp.gate.weight": (77, 256),
        "blocks.2.norm1.weight": (256,),
    }
    config = read_config(raw, shapes)
    assert config == Aimv2VisionConfig(256, 77, 3, 2, image_size=42)


def test_timms_model_args_say_the_heads():
    raw = {"architecture": "aimv2_x", "pretrained_cfg": {"input_size": [3, 42, 42]}, "model_args": {"num_heads": 5}}
    assert read_config(raw, SHAPES).num_attention_heads == 5


def test_heads_that_nothing_tells_are_asked_for():
    with pytest.raises(ValueError, match="add num_attention_heads"):
        read_config({"architecture": "aimv2_x", "pretrained_cfg": {"input_size": [3, 42, 42]}}, SHAPES)


def test_ovis2_keeps_the_towers_sizes_in_a_section():
    raw = {"hidden_size": 4096, "visual_tokenizer_config": {"backbone_config": {**APPLE, "image_size": 42}}}
    assert read_config(raw, SHAPES) == Aimv2VisionConfig(**SIZES, image_size=42)


def test_lit_in_apples_and_in_transformers_spelling():
    text = {"vocab_size": 31, "hidden_size": 22, "intermediate_size": 13, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "eos_token_id": 30}
    shapes = {
        **{f"vision_model.{name}": shape for name, shape in SHAPES.items()},
        "vision_model.head.cls_token": (1, 1, 60),
        "text_model.token_embed.weight": (31, 22),
        "text_model.pos_embed": (7, 22),
        "visual_projection.weight": (17, 60),
    }
    vision = {**APPLE, "image_size": 42}
    wanted = Aimv2Config(
        Aimv2VisionConfig(**SIZES, image_size=42, use_head=True),
        Aimv2TextConfig(31, 22, 13, 2, 2, 7, 30),
        projection_dim=17,
    )
    apple = {"projection_dim": 17, "vision_config": vision, "text_config": {**text, "max_context_length": 7}}
    hf = {"vision_config": vision, "text_config": {**text, "max_position_embeddings": 7, "eos_token_id": [30, 29]}}
    assert read_config(apple, shapes) == wanted
    assert read_config(hf, shapes) == wanted


@pytest.mark.parametrize("config", [Aimv2VisionConfig(), Aimv2VisionConfig(is_native=True), Aimv2Config()])
def test_what_is_written_is_read_again(config):
    assert type(config).from_dict(config.to_dict()) == config


def test_every_disagreement_is_named():
    config = read_config({**APPLE, "image_size": 56, "num_hidden_layers": 4}, SHAPES)
    assert disagreements(config, sizes(SHAPES)) == [
        "num_hidden_layers is 4, the weights say 3",
        "image_size is 56, the weights say 42",
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"qkv_bias": True}, "qkv_bias: True; AIMv2's blocks have no biases"),
        ({"mlp_bias": True}, "mlp_bias: True; .* no biases"),
        ({"use_bias": True}, "use_bias: True; .* no biases"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'; AIMv2 uses silu, so this is another network"),
        ({"disable_rope": False, "preserve_original_pe": True}, "rotary positions"),  # AndesVL
        ({"fullatt_block_indexes": [3, 7]}, "nor windows"),
        ({"image_size": [42, 56]}, "image_size must be a number or equal numbers"),
        ({"hidden_size": "60"}, "hidden_size must be of type int"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be"),
        ({"patch_size": 0}, "patch_size must be from 1"),
        ({"num_attention_heads": 7}, "does not divide into 7"),
    ],
)
def test_nonsense_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        read_config({**APPLE, **wrong}, SHAPES)


def test_the_image_encoders_config_can_be_read_from_a_lit_models():
    lit = Aimv2Config(Aimv2VisionConfig(**SIZES, image_size=42, use_head=True))
    assert Aimv2VisionConfig.from_dict(lit.to_dict()) == lit.vision_config


def test_without_weights_to_tell_there_is_a_head_as_in_transformers():
    assert Aimv2VisionConfig.from_dict({**SIZES, "image_size": 42}).use_head


def test_a_vision_section_that_is_none_is_no_section():
    assert read_config({**APPLE, "image_size": 42, "vision_config": None}, SHAPES).image_size == 42


@pytest.mark.parametrize("kind", ["apple", "timm", "ovis2"])
def test_every_format_is_read_without_weights_too(kind):
    apple, timm = {**APPLE, "image_size": 42}, {"embed_dim": 60, "depth": 3, "num_heads": 5}
    raw = {
        "apple": apple,
        "timm": {"pretrained_cfg": {"input_size": [3, 42, 42]}, "model_args": timm},
        "ovis2": {"hidden_size": 4096, "visual_tokenizer_config": {"backbone_config": apple}},
    }[kind]
    config = Aimv2VisionConfig.from_dict(raw)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (60, 3, 5)
    assert (config.image_size, config.is_native) == (42, False)
