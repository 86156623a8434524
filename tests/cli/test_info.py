"""`info` says what an index and a checkpoint hold."""

import json
import re
from pathlib import Path

import pytest

from mlx_aimv2.cli import main
from mlx_aimv2.convert import convert

REFERENCE = Path(__file__).parents[1] / "golden" / "reference"


def test_info_says_what_an_index_holds(photo_index, capsys):
    capsys.readouterr()
    assert main(["info", "photos.db", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["images"] == 5
    assert facts["pool"] == "mean"
    assert facts["checkpoint"] == str(REFERENCE / "fixed")
    assert facts["holds"] == "one vector for each image, width 96, float16"
    assert main(["info", "photos.db"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"images +5", line) for line in lines)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("fixed", {"layout": "apple", "width": 96, "encoders": "vision", "bits_per_weight": 32.0}),
        ("native", {"images": "any size (native)", "projection": None}),
        ("lit", {"encoders": "vision and text", "pooling_head": True, "projection": 40}),
    ],
)
def test_info_says_what_a_checkpoint_holds(capsys, name, facts):
    assert main(["info", str(REFERENCE / name), "--json"]) == 0
    assert facts.items() <= json.loads(capsys.readouterr().out).items()
    assert main(["info", str(REFERENCE / name)]) == 0


def test_info_says_how_a_folder_was_quantized(tmp_path, capsys):
    convert(REFERENCE / "fixed", tmp_path / "q", quantize=True, q_group_size=32, verify=False)
    assert main(["info", str(tmp_path / "q"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layout"] == "mlx-aimv2"
    assert found["quantization"]["bits"] == 4
    assert found["parameters"] == 307008
    assert 4 < found["bits_per_weight"] < 16


def test_info_about_nothing_is_one_line(tmp_path, capsys):
    assert main(["info", str(tmp_path / "none.db")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
