"""A setting stands in one place: its default, what holds for it, its flag and its help; whatever comes is checked."""

import argparse
from dataclasses import fields

import pytest

from mlx_aimv2.cli import main, parser
from mlx_aimv2.cli.flags import add_settings, groups, settings_of
from mlx_aimv2.config import Aimv2VisionConfig
from mlx_aimv2.learn.task_options import Options
from mlx_aimv2.pretrain import LitSettings, Settings
from mlx_aimv2.train.augment import Augmentation
from mlx_aimv2.train.settings import flag, flagged

OWN = {Settings: {"vision": Aimv2VisionConfig()}}
"""What a dataclass needs that has no flag."""

KINDS = {"fit": [Options], "pretrain": [Settings, Augmentation], "lit": [LitSettings, Augmentation]}

ALL = [Options, Settings, Augmentation, LitSettings]

FLAGGED = [(kind, one) for kind in ALL for one in flagged(kind)]


def named(value):
    return value.__name__ if isinstance(value, type) else getattr(value, "name", None)


def made(kind, **settings):
    return kind(**OWN.get(kind, {}), **settings)


def parsed(kind, *words):
    parser = argparse.ArgumentParser()
    add_settings(groups(parser, *dict.fromkeys(one.metadata["group"] for one in flagged(kind))), kind)
    return settings_of(kind, parser.parse_args(words), **OWN.get(kind, {}))


@pytest.mark.parametrize("verb", KINDS)
def test_a_verb_has_a_flag_for_every_setting(verb):
    found = {name: action for action in parser(verb).verbs.choices[verb]._actions for name in action.option_strings}
    for kind in KINDS[verb]:
        for one in flagged(kind):
            assert (found[flag(one)].dest, found[flag(one)].default) == (one.name, one.default)


@pytest.mark.parametrize("kind", ALL, ids=named)
def test_without_flags_the_settings_are_their_defaults(kind):
    assert parsed(kind) == made(kind)


@pytest.mark.parametrize(
    ("kind", "words", "wanted"),
    [
        (Options, ["--iters", "7", "--lora-scale", "1.5"], {"iters": 7, "lora_scale": 1.5}),
        (Options, ["--no-augment", "--flip"], {"augment": False, "flip": True}),
        (Augmentation, ["--no-flip", "--grey", "0.25"], {"flip": False, "grey": 0.25}),
        (Settings, ["--patches", "3", "11", "--dtype", "bfloat16"], {"patches": (3, 11), "dtype": "bfloat16"}),
        (LitSettings, ["--learning-rate", "2e-4", "--warm-up", "0"], {"learning_rate": 2e-4, "warm_up": 0}),
    ],
)
def test_flags_have_the_types_of_their_fields(kind, words, wanted):
    assert parsed(kind, *words) == made(kind, **wanted)


NUMBERS = [(kind, one) for kind, one in FLAGGED if str(one.type).split(" ")[0] in ("int", "float")]


@pytest.mark.parametrize(("kind", "one"), NUMBERS, ids=named)
def test_no_number_is_endless_or_none_at_all(kind, one):
    is_whole = str(one.type).startswith("int")
    for value in [10**20] if is_whole else [float("inf"), float("-inf"), float("nan"), 1e39]:
        with pytest.raises(ValueError, match=f"^{flag(one)} must be .*, got") as error:
            made(kind, **{one.name: value})
        assert "at most" in str(error.value) if is_whole else "a finite number" in str(error.value)


@pytest.mark.parametrize(
    ("verb", "words", "said"),
    [
        ("fit", ["--lora-rank", "100000000"], "--lora-rank must be at most 8,192, got 100000000"),
        ("fit", ["--lora-scale", "nan"], "--lora-scale must be a finite number, got nan"),
        ("fit", ["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        ("fit", ["--image-size", "1000000"], "--image-size must be at most 16,384, got 1000000"),
        ("pretrain", ["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        ("pretrain", ["--learning-rate", "inf"], "--learning-rate must be a finite number, got inf"),
        ("pretrain", ["--save-every", "-1"], "--save-every must be at least 0, got -1"),
        ("pretrain", ["--jitter", "2"], "--jitter must be from 0 to 1, got 2.0"),
        ("lit", ["--views", "0"], "--views must be at least 1, got 0"),
        ("lit", ["--seed", str(10**20)], f"--seed must be at most {2**64 - 1:,}, got {10**20}"),
        ("lit", ["--first-caption", "1.5"], "--first-caption must be from 0 to 1, got 1.5"),
    ],
)
def test_a_value_out_of_its_range_is_one_line_before_anything_is_read(verb, words, said, tmp_path, capsys):
    needed = {"fit": ["-m", "nowhere"], "pretrain": [], "lit": ["--encoder", "nowhere"]}[verb]
    assert main([verb, "nowhere", *needed, "-o", str(tmp_path / "out"), *words]) == 2
    assert capsys.readouterr().err == f"mlx-aimv2: {said}\n"


def test_the_largest_seed_is_taken():
    assert Options(seed=2**64 - 1).seed == LitSettings(seed=2**64 - 1).seed


def test_a_text_of_a_list_is_checked_in_python_too():
    with pytest.raises(ValueError, match="--dtype must be float32, float16, bfloat16, auto, got float64"):
        made(Settings, dtype="float64")


def test_what_has_no_flag_is_no_number_or_text_of_the_command_line():
    rest = {(kind.__name__, one.name) for kind in ALL for one in fields(kind)}
    rest -= {(kind.__name__, one.name) for kind, one in FLAGGED}
    of_models = {"vision", "decoder", "text", "projection_dim"}
    assert {name for _, name in rest} == of_models | {"augmentation", "operations", "probability", "strength"}
