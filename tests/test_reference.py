"""The features are those of Apple's own PyTorch code, on small models with known outputs."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_aimv2 import load
from mlx_aimv2.model import EncoderOutput
from tests.exact import ALLOWED, error, hidden_states

pytestmark = pytest.mark.rounding

REFERENCE = Path(__file__).parent / "golden" / "reference"


@pytest.fixture(scope="module", params=["fixed", "native", "outlier"])
def case(request: pytest.FixtureRequest) -> tuple[Path, EncoderOutput, dict[str, np.ndarray]]:
    folder = REFERENCE / request.param
    model, _ = load(folder)
    with np.load(folder / "expected.npz") as expected:
        wanted = dict(expected)
    pixels = mx.array(wanted["pixel_values"].transpose(0, 2, 3, 1))
    return folder, model.vision(pixels, output_hidden_states=True), wanted


def test_the_last_hidden_state_is_as_near_to_float64_as_apples(case):
    _, output, wanted = case
    exact = wanted["last_hidden_state_float64"]
    assert error(output.last_hidden_state, exact) <= ALLOWED * error(wanted["last_hidden_state"], exact)


def test_every_block_gives_what_apples_block_gives(case):
    folder, output, wanted = case
    exact = hidden_states(folder, wanted["pixel_values"])[1:-1]
    assert len(output.hidden_states) - 1 == len(wanted["blocks"]) == len(exact)
    for ours, apples, true in zip(output.hidden_states[1:], wanted["blocks"], exact, strict=True):
        assert error(ours, true) <= ALLOWED * error(apples, true)


def test_float64_in_numpy_is_apples_in_float64(case):
    folder, _, wanted = case
    exact = wanted["last_hidden_state_float64"]
    apples = error(wanted["last_hidden_state"], exact)
    # Not to the last digit: Apple's code keeps the native model's positions in float32 in its float64 run too.
    assert error(hidden_states(folder, wanted["pixel_values"])[-1], exact) <= apples / 10


def test_the_first_hidden_state_is_the_embedding_and_the_last_is_before_the_final_norm(case):
    _, output, wanted = case
    assert len(output.hidden_states) == len(wanted["blocks"]) + 1
    assert not np.allclose(np.array(output.hidden_states[-1]), np.array(output.last_hidden_state), atol=1e-2)
    assert not np.allclose(np.array(output.hidden_states[0]), wanted["blocks"][0], atol=1e-2)
