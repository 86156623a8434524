"""The golden values agree with this package's models, and the check against PyTorch tells right from wrong."""

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from convert import check
from mlx_aimv2 import load
from mlx_aimv2.convert import convert
from tests.exact import ALLOWED, APART
from tests.loopback import serve
from tests.small_models import FIXED
from tests.test_maintainer_scripts import row, run, write_list
from tools import make_golden


@pytest.fixture(scope="module", params=make_golden.SIZES)
def golden(request, tmp_path_factory):
    place = make_golden.make(tmp_path_factory.mktemp("golden") / request.param, request.param, seed=5)
    with np.load(place / "expected.npz") as values:
        return place, dict(values)


def test_every_hidden_state_is_as_near_to_float64_as_theirs(golden):
    place, values = golden
    output = load(place)[0].vision(mx.array(values["pixel_values"].transpose(0, 2, 3, 1)), output_hidden_states=True)
    found = {"last_hidden_state": np.array(output.last_hidden_state), "hidden_states": np.stack(output.hidden_states)}
    for name, actual in found.items():
        exact = values[f"{name}_float64"]
        assert np.linalg.norm(actual - exact) <= ALLOWED * np.linalg.norm(values[name] - exact), name


def test_the_pairs_logits_are_theirs(golden):
    place, values = golden
    if "input_ids" in values:
        ids = mx.array(values["input_ids"].astype(np.int32))
        actual = load(place)[0](mx.array(values["pixel_values"].transpose(0, 2, 3, 1)), ids).logits_per_image
        exact = values["logits_per_image_float64"]
        assert np.abs(np.array(actual) - exact).max() <= APART * np.abs(exact).max()


@pytest.fixture
def fixed(tmp_path):
    return make_golden.make(tmp_path / "fixed", "fixed", seed=7)


def test_the_check_passes_a_right_checkpoint(fixed, capsys):
    assert check.main([str(fixed)]) == 0
    assert "largest relative error" in capsys.readouterr().out


def test_the_check_fails_where_the_numbers_differ(fixed, monkeypatch):
    def spoiled(*arguments, **flags):
        model, processor = load(*arguments, **flags)
        model.vision.norm.weight = model.vision.norm.weight * 1.001
        return model, processor

    monkeypatch.setattr(check, "load", spoiled)
    assert check.main([str(fixed)]) == 1


def test_verify_compares_with_what_transformers_itself_reads_from_main(tmp_path):
    with serve() as hub:
        entry = row(hub, "fixed", FIXED)
        exported = convert(FIXED, tmp_path / "exported", export_layout="transformers", verify=False)
        hub.publish("apple/fixed", "f" * 40, exported)  # `main`, as in Apple's repositories since mid-2025
        code, report = run(hub, tmp_path, "--list", write_list(hub, tmp_path / "l.toml", entry), torch=True)
        asked = [path for verb, path in hub.requests if verb == "GET" and "model.safetensors" in path]
    assert code == 0, report
    assert "| transformers on torch | pass | relative error " in report
    assert len(asked) == 2, "each layout once"
