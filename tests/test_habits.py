"""What transformers' users write by habit ends in one line that says how it is written here, and breaks no probing."""

import copy
import pickle

import mlx.core as mx
import pytest

import mlx_aimv2
from mlx_aimv2 import Aimv2Model, Aimv2Processor, Aimv2VisionModel, bundled, load
from mlx_aimv2.habits import ATTRIBUTES, KEYWORDS

MODEL, PROCESSOR = load(bundled.emoji_checkpoint())
IMAGE = bundled.photographs()[0]


@pytest.mark.parametrize(
    ("call", "kind", "line"),
    [
        (lambda x: MODEL(pixel_values=x), TypeError,
         "Aimv2Model takes no pixel_values: model(pixels) with pixels = processor(images)"),
        (lambda x: MODEL.vision(pixel_values=x), TypeError, "Aimv2VisionModel takes no pixel_values: model(pixels)"),
        (lambda x: MODEL.encode_image(pixel_values=x), TypeError, "takes no pixel_values: model(pixels)"),
        (lambda x: MODEL.text_model(input_ids=x), TypeError, "Aimv2TextModel takes no input_ids: model(pixels, ids), "),
        (lambda _: PROCESSOR(images=IMAGE, return_tensors="pt"), TypeError,
         "Aimv2Processor takes no return_tensors: leave it out: processor(images) returns an mlx array (B, H, W, 3)"),
        (lambda _: Aimv2Model.from_pretrained("x"), AttributeError,
         "Aimv2Model has no from_pretrained: model, processor = mlx_aimv2.load(NAME)"),
        (lambda _: Aimv2VisionModel.from_pretrained("x"), AttributeError, "Aimv2VisionModel has no from_pretrained: "),
        (lambda _: Aimv2Processor.from_pretrained("x"), AttributeError, "Aimv2Processor has no from_pretrained: "),
        (lambda x: MODEL.get_image_features(x), AttributeError, "has no get_image_features: model.encode_image("),
        (lambda x: MODEL.get_text_features(x), AttributeError, "has no get_text_features: model.encode_text(ids)"),
        (lambda _: MODEL.save_pretrained("x"), AttributeError, ": mlx_aimv2.save(model, processor, FOLDER)"),
        (lambda _: mlx_aimv2.AutoModel, AttributeError, "mlx_aimv2 has no AutoModel: model, processor = load(NAME)"),
    ],
)  # fmt: skip
def test_a_habit_is_answered_by_one_line(call, kind, line):
    with pytest.raises(kind) as caught:
        call(mx.zeros((1, 84, 84, 3)))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_probing_copying_and_pickling_work_as_before():
    pixels = PROCESSOR(images=IMAGE)
    for owner in (MODEL, MODEL.vision, MODEL.text_model, PROCESSOR, Aimv2Model):
        assert not any(hasattr(owner, name) for name in ATTRIBUTES)
        assert getattr(owner, "from_pretrained", None) is None
        assert not ATTRIBUTES.keys() & {*dir(owner)}
    with pytest.raises(AttributeError, match=r"no attribute 'something_else'"):
        MODEL.something_else  # noqa: B018
    with pytest.raises(TypeError, match=r"something_else"):
        MODEL(something_else=1)
    wanted = MODEL.encode_image(pixels)
    for copied in (copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        again = copied(MODEL)
        assert mx.array_equal(again.encode_image(pixels), wanted)
        assert str(again.origin) == str(MODEL.origin)
        assert mx.array_equal(copied(PROCESSOR)(IMAGE), pixels)


def test_no_keyword_of_ours_is_taken_for_a_habit():
    import inspect

    for owner in (Aimv2Model, Aimv2VisionModel, Aimv2Processor, mlx_aimv2.Aimv2TextModel):
        for method in ("__call__", "encode_image", "encode_text", "tokenize"):
            if hasattr(owner, method):
                assert not KEYWORDS.keys() & inspect.signature(getattr(owner, method)).parameters.keys()


def test_a_processor_says_size_mean_and_deviation():
    assert repr(PROCESSOR) == (
        "Aimv2Processor(84x84 pixels, patches of 14x14, mean (0.4815, 0.4578, 0.4082), "
        "deviation (0.2686, 0.2613, 0.2758))"
    )
