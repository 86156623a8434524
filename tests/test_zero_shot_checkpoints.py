"""Zero-shot classification with other tokenizer files, after conversion, and in the examples."""

import importlib
import shutil
from dataclasses import replace

import numpy as np
import pytest

from mlx_aimv2 import Aimv2Config, bundled, load, zero_shot
from mlx_aimv2.convert import convert
from tests.small_lit import CONFIG, GOLDEN, TOKENIZER_FILES, small_lit, write

LABELS = ["cat", "dog", "red fox"]
VISION_ONLY = GOLDEN / "reference" / "fixed"


def test_vocab_and_merges_serve_as_well_as_tokenizer_json(lit_folder, noise_images, tmp_path):
    shutil.copytree(lit_folder, tmp_path / "split", ignore=shutil.ignore_patterns(*TOKENIZER_FILES))
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(GOLDEN / "tokenizer" / name, tmp_path / "split" / name)
    wanted = zero_shot(*load(lit_folder), noise_images[0], LABELS)[0].logits
    assert np.array_equal(zero_shot(*load(tmp_path / "split"), noise_images[0], LABELS)[0].logits, wanted)


# --- after conversion

WIDE = Aimv2Config(
    replace(CONFIG.vision_config, hidden_size=64, intermediate_size=96, num_attention_heads=2),
    replace(CONFIG.text_config, hidden_size=32, intermediate_size=64, num_attention_heads=2),
    projection_dim=96,
)
EIGHT_BITS = {"quantize": True, "q_bits": 8, "q_group_size": 32}


@pytest.mark.parametrize(
    ("how", "loading", "allowed"),
    [
        ({"dtype": "float16"}, {}, 0.3),
        (EIGHT_BITS, {}, 1.5),
        (EIGHT_BITS, {"keep_quantized": True}, 1.5),
        ({"export_layout": "apple"}, {}, 0),
        ({"export_layout": "transformers"}, {}, 0),
    ],
    ids=["float16", "8 bits", "8 bits kept", "to Apple's layout", "to transformers' layout"],
)
def test_a_converted_pair_classifies_as_its_source_does(noise_images, tmp_path, how, loading, allowed):
    source = write(tmp_path / "source", model=small_lit(WIDE))
    converted = convert(source, tmp_path / "converted", verify=False, **how)
    wanted = [prediction.logits for prediction in zero_shot(*load(source), noise_images, LABELS)]
    found = [prediction.logits for prediction in zero_shot(*load(converted, **loading), noise_images, LABELS)]
    assert np.ptp(wanted) > 5 and np.abs(np.subtract(found, wanted)).max() <= allowed


# --- the examples


@pytest.mark.parametrize(("example", "words"), [("zero_shot", []), ("search", ["a cup of coffee"])])
def test_the_examples_run_on_images_of_ones_own(tmp_path, capsys, lit_folder, example, words):
    flags = ["--model", str(lit_folder), "--output", str(tmp_path / "drawn.png")]
    importlib.import_module(f"examples.{example}").main([*words, *map(str, bundled.photographs()), *flags])
    lines = capsys.readouterr().out.splitlines()
    shown = {photograph.name for photograph in bundled.photographs() if str(photograph) in "".join(lines)}
    assert shown == {"astronaut.jpg", "chelsea.jpg", "coffee.jpg", "rocket.jpg"}
    assert len(lines) == 4
