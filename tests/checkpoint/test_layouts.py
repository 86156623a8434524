"""Every released checkpoint's tensors translate one to one, in every layout, there and back."""

import json
import re
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_aimv2.checkpoint.detect import differences, recognise
from mlx_aimv2.checkpoint.layouts import LAYOUTS, MLX, layout_for
from mlx_aimv2.config import RELEASED, Aimv2VisionConfig
from mlx_aimv2.loading import build, parameter_shapes
from tests.small_models import LIT, random_weights
from tests.test_config import read_config

MANIFESTS = Path(__file__).parents[1] / "golden" / "manifests"

PARAMETERS = {
    "aimv2-large-patch14-224": 309_197_824,
    "aimv2-large-patch14-336": 309_525_504,
    "aimv2-large-patch14-448": 309_984_256,
    "aimv2-huge-patch14-224": 680_851_968,
    "aimv2-huge-patch14-336": 681_343_488,
    "aimv2-huge-patch14-448": 682_031_616,
    "aimv2-1B-patch14-224": 1_234_958_336,
    "aimv2-1B-patch14-336": 1_235_613_696,
    "aimv2-1B-patch14-448": 1_236_531_200,
    "aimv2-3B-patch14-224": 2_720_658_432,
    "aimv2-3B-patch14-336": 2_721_641_472,
    "aimv2-3B-patch14-448": 2_723_017_728,
    "aimv2-large-patch14-224-distilled": 309_197_824,
    "aimv2-large-patch14-336-distilled": 309_525_504,
    "aimv2-large-patch14-native": 308_935_680,
    "aimv2-large-patch14-224-lit": 436_680_193,
}
"""Golden: parameters of the sixteen checkpoints, counted on the original classes."""


def expand(table: dict[str, list[int]]) -> dict[str, tuple[int, ...]]:
    """A manifest writes the tensors of 24 equal blocks once: `blocks.{24}.norm1.weight`."""
    shapes = {}
    for name, shape in table.items():
        count = re.search(r"\{(\d+)\}", name)
        numbers = range(int(count[1])) if count else [0]
        shapes |= {name.replace(count[0], str(i)) if count else name: tuple(shape) for i in numbers}
    return shapes


INVENTORIES = {
    (layout, name): expand(table)
    for layout in ("apple", "transformers", "timm")
    for name, table in json.loads((MANIFESTS / f"{layout}.json").read_text()).items()
}


def product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def renamed(shapes, *pairs):
    for old, new in pairs:
        shapes = {name.replace(old, new): shape for name, shape in shapes.items()}
    return shapes


def test_the_inventories_are_all_there():
    assert {name for layout, name in INVENTORIES if layout == "apple"} == set(PARAMETERS)
    assert {name for layout, name in INVENTORIES if layout == "transformers"} == set(PARAMETERS)
    assert len(INVENTORIES) == 46


@pytest.mark.parametrize(("layout", "name"), INVENTORIES, ids=map(" ".join, INVENTORIES))
def test_an_inventory_translates_exactly_and_has_its_golden_count(layout, name):
    source = INVENTORIES[layout, name]
    match = recognise(source)
    assert (match.layout.name, match.prefix) == (layout, "")
    target = match.target_shapes(source)
    model = parameter_shapes(build(read_config({}, target)))
    assert target == model
    assert match.source_shapes(model) == source
    assert sum(map(product, model.values())) == PARAMETERS[name]


def test_no_published_checkpoint_is_missing_from_the_table():
    assert {name: checkpoint.parameters for name, checkpoint in RELEASED.items()} == PARAMETERS
    assert all(re.fullmatch("[0-9a-f]{40}", checkpoint.commit) for checkpoint in RELEASED.values())
    assert len({checkpoint.commit for checkpoint in RELEASED.values()}) == 16


@pytest.mark.parametrize("name", RELEASED)
def test_the_sizes_in_the_table_have_the_golden_number_of_parameters(name):
    assert sum(map(product, parameter_shapes(build(RELEASED[name].config)).values())) == PARAMETERS[name]


LARGE = "aimv2-large-patch14-224"
APPLE, HF = INVENTORIES["apple", LARGE], INVENTORIES["transformers", LARGE]
OVIS2 = renamed(HF, ("embeddings.patch_embed.", "embeddings.patch_embedding."))
DRAFT = renamed(HF, ("out_proj", "proj_out"), ("gate_proj", "fc1"), ("up_proj", "fc3"), ("down_proj", "fc2"))
APPLE_MLX = APPLE | {"preprocessor.patchifier.proj.weight": (1024, 14, 14, 3)}
LANGUAGE = {"llm.model.layers.0.self_attn.q_proj.bias": (8,), "llm.model.norm.weight": (8,), "vte.weight": (9, 8)}


@pytest.mark.parametrize(
    ("shapes", "layout", "prefix"),
    [
        (APPLE_MLX, "apple-mlx", ""),
        (DRAFT, "transformers-draft", ""),
        (OVIS2, "ovis2", ""),
        ({f"visual_tokenizer.backbone.{k}": v for k, v in APPLE.items()}, "apple", "visual_tokenizer.backbone."),
        (
            {f"model.vision_tower.transformer.{k}": v for k, v in OVIS2.items()},
            "ovis2",
            "model.vision_tower.transformer.",
        ),
    ],
    ids=["apple-mlx", "draft", "ovis2 encoder", "Ovis2", "transformers' ovis2"],
)
def test_the_further_forms_in_the_wild_are_recognised_with_the_rest_left_out(shapes, layout, prefix):
    match = recognise(shapes | LANGUAGE if prefix else shapes)
    assert (match.layout.name, match.prefix) == (layout, prefix)
    model = parameter_shapes(build(read_config({}, match.target_shapes(shapes))))
    assert match.source_shapes(model) == shapes
    assert not differences(match.source_shapes(model), shapes | LANGUAGE if prefix else shapes, match)


VISION = Aimv2VisionConfig(22, 13, 2, 2, image_size=15, patch_size=5)
SMALL = {
    "fixed": VISION,
    "native": Aimv2VisionConfig(20, 13, 3, 2, image_size=None, patch_size=5, is_native=True),
    "lit": LIT,
}
CASES = [
    (layout.name, kind)
    for layout in LAYOUTS.values()
    for kind in SMALL
    if layout.pair or kind != "lit"
    if layout.name != "timm" or kind == "fixed"
]


@pytest.mark.parametrize(("layout", "kind"), CASES, ids=map(" ".join, CASES))
def test_there_and_back_is_exact(layout, kind):
    target = random_weights(SMALL[kind])
    source = dict(layout_for(layout, pair=kind == "lit").to_source(target.items()))
    match = recognise({name: tuple(array.shape) for name, array in source.items()})
    assert match.layout.name == layout
    back = match.to_target(source, list(target))
    assert not source, "every tensor of the source is used"
    assert list(back) == list(target)
    assert all(mx.array_equal(back[name], target[name]) for name in target)


def test_query_key_and_value_are_thirds_of_one_matrix_in_that_order():
    target = random_weights(VISION)
    source = dict(layout_for("transformers", pair=False).to_source(target.items()))
    qkv = target["blocks.1.attn.qkv.weight"]
    for third, letter in enumerate("qkv"):
        part = source[f"encoder.layers.1.attention.{letter}_proj.weight"]
        assert mx.array_equal(part, qkv[22 * third : 22 * (third + 1)])


def test_the_patch_convolution_has_its_channels_first_elsewhere_and_last_here():
    target = random_weights(VISION)
    source = dict(layout_for("apple", pair=False).to_source(target.items()))
    conv, turned = target["patch_embed.proj.weight"], source["preprocessor.patchifier.proj.weight"]
    assert turned.shape == (22, 3, 5, 5)
    assert turned[7, 2, 1, 4].item() == conv[7, 1, 4, 2].item()


def test_gate_and_up_keep_their_roles():
    target = random_weights(VISION)
    wanted = {"apple": ("fc1", "fc3", "fc2"), "timm": ("fc1_g", "fc1_x", "fc2")}
    wanted["transformers"] = ("gate_proj", "up_proj", "down_proj")
    for layout, names in wanted.items():
        source = dict(layout_for(layout, pair=False).to_source(target.items()))
        for part, name in zip(("gate", "up", "down"), names, strict=True):
            found = [array for key, array in source.items() if re.search(rf"\b1\.(mlp|ffn)\.{name}\.weight$", key)]
            assert len(found) == 1
            assert mx.array_equal(found[0], target[f"blocks.1.mlp.{part}.weight"]), (layout, part)


def test_translating_frees_what_it_used():
    source = dict(layout_for("apple", pair=False).to_source(random_weights(VISION).items()))
    recognise({name: tuple(array.shape) for name, array in source.items()}).to_target(source, ["norm.weight"])
    assert "trunk.post_trunk_norm.weight" not in source


@pytest.mark.parametrize("layout", [layout.name for layout in LAYOUTS.values() if not layout.pair])
def test_a_layout_without_a_text_encoder_cannot_hold_a_pair(layout):
    with pytest.raises(ValueError, match=f"{layout} layout has no text encoder"):
        layout_for(layout, pair=True)


def test_every_layout_has_rows_for_every_part_exactly_once():
    for layout in LAYOUTS.values():
        for rows in filter(None, (layout.vision, layout.pair)):
            source = [name for row in rows for name in row.sources]
            assert len(set(source)) == len(source), layout.name
            target = [row.target for row in rows]
            assert len(set(target)) == len(target), layout.name
    assert {row.target for row in LAYOUTS[MLX].pair} == {row.target for row in LAYOUTS["apple"].pair}


BLOCK_BIAS = {f"trunk.blocks.{i}.attn.qkv.bias": (3072,) for i in range(24)}


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"preprocessor.cls_token": (1, 1, 1024)}, r"a CLS token \(preprocessor.cls_token\)"),
        ({"preprocessor.register_tokens": (1, 4, 1024)}, "register tokens"),
        ({"trunk.blocks.0.attn.rope.inv_freq": (64,)}, r"rotary positions \(trunk.blocks.0.attn.rope"),
        (BLOCK_BIAS, "biases in the blocks"),
        ({"trunk.blocks.3.ls1.gamma": (1024,)}, "layer scale"),
        ({"trunk.blocks.3.attn.q_norm.weight": (128,)}, "norms on queries and keys"),
    ],
    ids=["CLS", "registers", "RoPE", "biases", "layer scale", "qk norm"],
)
def test_a_network_that_resembles_aimv2_is_refused_with_the_reason(extra, reason):
    with pytest.raises(ValueError, match=rf"apple layout.*{reason}.*another network") as caught:
        recognise(APPLE | extra)
    assert len(str(caught.value)) < 300


def blocks(names: list[str], count: int, where: str) -> dict[str, tuple[int, ...]]:
    return {f"{where}.{i}.{name}": (16, 16) for i in range(count) for name in names}


OTHERS = {
    "a timm ViT": {"cls_token": (1, 1, 16), "pos_embed": (1, 17, 16), "patch_embed.proj.weight": (16, 3, 14, 14)}
    | {"patch_embed.proj.bias": (16,), "norm.weight": (16,), "norm.bias": (16,)}
    | blocks(["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "mlp.fc1.weight"], 2, "blocks")
    | blocks(["attn.proj.weight", "norm2.weight", "mlp.fc2.weight", "ls1.gamma"], 2, "blocks"),
    "DINOv2": {"embeddings.cls_token": (1, 1, 16), "embeddings.patch_embeddings.projection.weight": (16, 3, 14, 14)}
    | blocks(["norm1.weight", "attention.attention.query.weight", "mlp.fc1.weight"], 2, "encoder.layer"),
    "SigLIP": {
        "vision_model.embeddings.patch_embedding.weight": (16, 3, 14, 14),
        "vision_model.embeddings.patch_embedding.bias": (16,),
        "vision_model.embeddings.position_embedding.weight": (16, 16),
    }
    | blocks(["layer_norm1.weight", "self_attn.k_proj.bias", "mlp.fc1.weight"], 2, "vision_model.encoder.layers"),
    "Ovis2.5": {"visual_tokenizer.vit.vision_model.embeddings.patch_embedding.weight": (16, 588)}
    | blocks(["self_attn.q_proj.weight", "layer_norm1.weight"], 2, "visual_tokenizer.vit.vision_model.encoder.layers")
    | blocks(["self_attn.q_proj.weight"], 2, "llm.model.layers"),
    "a language model": blocks(["self_attn.q_proj.weight", "mlp.gate_proj.weight"], 2, "model.layers"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_network_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match=r"unknown layout|another network") as caught:
        recognise(OTHERS[name])
    assert "\n" not in str(caught.value)


def test_an_unknown_layout_says_which_are_known_and_the_first_foreign_names():
    with pytest.raises(ValueError) as caught:
        recognise({f"w{i}": (1,) for i in range(9)})
    assert str(caught.value) == (
        "unknown layout: the tensors match none of apple, apple-mlx, transformers, transformers-draft, ovis2, timm, "
        "mlx-aimv2; the first names are w0, w1, w2, w3, w4"
    )


def test_an_encoder_without_its_patch_convolution_is_still_recognised():
    shapes = {name: shape for name, shape in APPLE.items() if "patchifier.proj" not in name}
    assert recognise(shapes).layout.name == "apple"


def test_many_differences_fit_in_one_line_and_none_is_left_out():
    match = recognise(APPLE)
    found = {name: shape for name, shape in APPLE.items() if ".mlp.fc2." not in name and "blocks.7." not in name}
    found |= {f"trunk.blocks.{i}.mlp.fc9.weight": (5, 7) for i in (0, 1, 2, 5, 23)}
    found["trunk.blocks.1.norm_1.weight"] = (1023,)
    lines = differences(APPLE, found, match)
    assert lines[0].startswith("missing trunk.blocks.{0-23}.mlp.fc2.weight, trunk.blocks.7.attn.proj.weight, ")
    assert lines[1] == "extra trunk.blocks.{0-2,5,23}.mlp.fc9.weight"
    assert lines[2] == "of another shape trunk.blocks.1.norm_1.weight (wanted (1024,), got (1023,))"
