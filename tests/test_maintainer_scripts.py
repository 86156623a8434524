"""`convert.verify` passes right checkpoints, fails wrong ones, and lists what it could not check.

The published checkpoints are small random ones here, and the Hub is on the loopback interface.
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from convert import machine, verify_numbers
from convert import report as lines
from convert.published import FILE, Row, choose, read
from mlx_aimv2 import load
from mlx_aimv2.backend import x86
from mlx_aimv2.config import RELEASED
from mlx_aimv2.loading import read_source
from tests.checkpoint.test_layouts import PARAMETERS
from tests.loopback import Hub, serve
from tests.programs import HANGS
from tests.small_models import FIXED, NATIVE, pair_with_words

ROOT = Path(__file__).parents[1]
COMMIT = "b" * 40
RUN = "import sys; from convert.verify import main; sys.exit(main(sys.argv[1:]))"
WITHOUT_TORCH = RUN.replace("sys;", "sys; sys.modules['torch'] = None;", 1)


def image() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((84, 70), 90).convert("RGB").save(file, "PNG")
    return file.getvalue()


IMAGE = image()


def row(hub: Hub, name: str, folder: Path, *, shift: float = 0.0, parameters: int | None = None) -> str:
    """Publishes a folder and describes it as a row of a list, with its features as the published values."""
    hub.publish(f"apple/{name}", COMMIT, folder)
    hub.repositories[f"apple/{name}"][COMMIT].pop("expected.npz", None)
    model, processor = load(folder)
    features = np.array(model.vision(processor([IMAGE])).last_hidden_state)
    counted = sum(array.size for array in read_source(folder).weights.values())
    lines = [
        f'name = "{name}"',
        f'repo = "apple/{name}"',
        f'commit = "{COMMIT}"',
        f"parameters = {parameters or counted}",
        f"expected_shape = {list(features.shape)}",
        f"expected = {(features[0, :7, :4] + shift).round(4).tolist()}",
    ]
    return "\n".join(["[[checkpoint]]", *lines])


def write_list(hub: Hub, file: Path, *rows: str, url: str = "/image.png") -> Path:
    hub.pages["/image.png"] = IMAGE
    head = f'[image]\nname = "noise"\nurl = "{hub.address}{url}"\nsize = [84, 70]\n'
    file.write_text("\n\n".join([head, *rows]))
    return file


def subject_of(folder: Path, place: Path) -> lines.Subject:
    """What the steps get for a checkpoint on disk, with the noise as its image."""
    model, processor = load(folder)
    pixels = processor([IMAGE])
    features = model.vision(pixels).last_hidden_state
    row = Row("small", str(folder), 1)
    return lines.Subject(row, model, processor, Path("noise.png"), pixels, features, "", place, 1)


def run(hub: Hub, tmp_path: Path, *arguments: object, torch: bool = False) -> tuple[int, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            RUN if torch else WITHOUT_TORCH,
            *map(str, arguments),
            "--report",
            tmp_path / "report.md",
            "--repeats",
            "1",
        ],
        capture_output=True,
        text=True,
        env=inherited | hub.environment(tmp_path / "home"),
        cwd=ROOT,
        timeout=HANGS,
    )
    assert "Traceback" not in result.stderr, result.stderr
    if result.returncode < 2:
        assert (tmp_path / "report.md").read_text() == result.stdout
    return result.returncode, result.stdout or result.stderr


@pytest.mark.slow
def test_right_checkpoints_pass_and_the_report_says_what_was_not_done(tmp_path):
    with serve() as hub:
        rows = row(hub, "fixed", FIXED), row(hub, "native", NATIVE), row(hub, "lit", pair_with_words(tmp_path / "pair"))
        code, report = run(hub, tmp_path, "fixed", "lit", "--list", write_list(hub, tmp_path / "l.toml", *rows))
    assert code == 0, report
    assert report.count("| published values | pass | largest difference ") == 2
    assert report.count("the folder gives the same features to the bit") == 2
    assert report.count("torch is not installed") == 2
    assert f"commit {COMMIT[:12]}" in report
    assert "float16: largest activation" in report
    assert "images a second, float32" in report
    assert report.count("| yardstick, one pass | computed | large-224 63 ms, large-336 133 ms, large-448 252 ms: ") == 2
    assert report.count("an M4 with ten GPU cores, computed from SigLIP2-L's published times, not measured |") == 2
    assert "### native" not in report
    assert report.count("| zero-shot | measured | a photo of a cat: ") == 1
    for fact in ("chip", "memory", "system", "python", "mlx", "device", "mlx-aimv2"):
        assert f"| {fact} | " in report
    if mx.default_device().type == mx.DeviceType.cpu:
        assert report.count("| fused attention | not done | no GPU here |") == 2


@pytest.mark.slow
def test_wrong_values_a_wrong_count_and_a_missing_checkpoint_fail(tmp_path):
    with serve() as hub:
        rows = [
            row(hub, "shifted", FIXED, shift=0.01),
            row(hub, "counted", NATIVE, parameters=7),
            row(hub, "gone", FIXED),
        ]
        del hub.repositories["apple/gone"]
        code, report = run(
            hub, tmp_path, "shifted", "counted", "gone", "--list", write_list(hub, tmp_path / "l.toml", *rows)
        )
    assert code == 1
    shifted, counted, gone = report.split("### ")[2:]
    assert "| published values | **FAIL** | largest difference 1.0e-02, allowed 1e-03 |" in shifted
    assert "parameters, commit bbbbbbbbbbbb, wanted 7 |" in counted
    assert "| published values | pass |" in counted, "the other steps go on"
    assert "| download and read | **FAIL** | apple/gone: neither a folder here" in gone


@pytest.mark.slow
def test_without_the_image_published_values_are_not_compared(tmp_path):
    with serve() as hub:
        rows = row(hub, "fixed", FIXED)
        code, report = run(hub, tmp_path, "--list", write_list(hub, tmp_path / "l.toml", rows, url="/none.png"))
        assert code == 0, report
        assert "/none.png could not be fetched (HTTP Error 404: Not Found); give it with --image |" in report
        Image.effect_noise((85, 70), 90).convert("RGB").save(tmp_path / "other.png")
        code, report = run(
            hub, tmp_path, "--list", write_list(hub, tmp_path / "l.toml", rows), "--image", tmp_path / "other.png"
        )
    assert "not done | other.png has 85 x 70 pixels, noise has 84 x 70 |" in report


def test_an_unknown_name_is_one_line_with_the_known_ones(tmp_path):
    with serve() as hub:
        code, line = run(
            hub, tmp_path, "fixt", "--list", write_list(hub, tmp_path / "l.toml", row(hub, "fixed", FIXED))
        )
    assert code == 2
    assert line == "mlx-aimv2: no such checkpoint: fixt; there are fixed\n"


def test_attention_that_is_not_fused_is_found_out(monkeypatch, tmp_path):
    subject = subject_of(FIXED, tmp_path)
    monkeypatch.setattr(x86, "on_x86_cpu", lambda: False)
    monkeypatch.setattr(mx, "default_device", lambda: type("Gpu", (), {"type": mx.DeviceType.gpu}))
    original = mx.fast.scaled_dot_product_attention

    def unfused(*arguments, force_fused=False, **flags):
        if force_fused:
            raise ValueError("[scaled_dot_product_attention] cannot be fused")
        return original(*arguments, **flags)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", unfused)
    assert [finding.verdict for finding in verify_numbers.fused_attention(subject)] == [lines.FAIL] * 9
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", lambda *a, force_fused, **f: original(*a, **f))
    findings = verify_numbers.fused_attention(subject)
    assert [finding.verdict for finding in findings] == [lines.PASS] * 9
    assert [finding.what for finding in findings[:3]] == [
        "fused attention, float32", "fused attention, float32, a native grid", "fused attention, float32, texts"
    ]  # fmt: skip
    assert [finding.detail for finding in findings[:3]] == ["3 calls in 3 blocks", *["2 calls in 2 blocks"] * 2]
    monkeypatch.setattr(x86, "on_x86_cpu", lambda: True)
    assert {finding.verdict for finding in verify_numbers.fused_attention(subject)} == {lines.FAIL}, (
        "no call, so nothing is shown"
    )


@pytest.mark.parametrize("name", ["Apple Paravirtual device", "Apple M4"])
def test_a_paravirtual_device_is_said_to_be_no_measurement_of_a_mac(monkeypatch, name):
    monkeypatch.setattr(mx, "device_info", lambda device=None: {"device_name": name, "memory_size": 7})
    said = machine.facts()["device"]
    assert said.startswith(f"device_name {name}, memory_size 7")
    assert ("its times are no measurement of a Mac" in said) == ("Paravirtual" in name)


def test_a_machine_is_described_with_its_times_beside_the_yardstick(monkeypatch, capsys):
    monkeypatch.setattr(machine, "random_model", lambda config, dtype: config)
    monkeypatch.setattr(machine, "random_pixels", lambda config, batch: batch)
    times = {"dtype": "float16", "seconds": 0.0712}
    monkeypatch.setattr(machine, "measure_speed", lambda model, pixels, runs: times)
    assert machine.main() == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-4] == "| large-patch14-224, random weights, float16 | 71 ms |"
    assert said[-1] == f"| yardstick | {machine.yardstick()} |"
    assert machine.yardstick().startswith(
        "large-224 63 ms, large-336 133 ms, large-448 252 ms: an M4 with ten GPU cores"
    )


# The list of checkpoints


def test_the_list_has_all_sixteen_at_their_pins_with_their_golden_counts():
    rows, _ = read()
    assert {row.repo: row.commit for row in rows} == {f"apple/{name}": known.commit for name, known in RELEASED.items()}
    assert {row.name: row.parameters for row in rows} == PARAMETERS


def test_published_values_are_of_the_shape_that_they_claim():
    rows, image = read()
    published = {row.name: row for row in rows if row.expected}
    assert set(published) == {"aimv2-large-patch14-224", "aimv2-large-patch14-native"}
    for found in published.values():
        assert np.shape(found.expected) == (7, 4)
    width, height = image.size
    assert published["aimv2-large-patch14-native"].expected_shape == (1, (width // 14) * (height // 14), 1024)


def test_rows_are_chosen_by_name_or_repository():
    rows, _ = read(FILE)
    assert [row.name for row in choose(rows, ["apple/aimv2-1B-patch14-224"])] == ["aimv2-1B-patch14-224"]
    assert choose(rows, []) == rows


# The run over all


def test_the_run_over_all_converts_skips_what_is_there_and_names_what_failed(tmp_path, capsys, monkeypatch):
    import convert.__main__ as every

    list_file = tmp_path / "l.toml"
    rows = [f'[[checkpoint]]\nname = "{name}"\nrepo = "{path}"\nparameters = 1' for name, path in
            (("good", FIXED), ("bad", tmp_path / "nothing"))]  # fmt: skip
    list_file.write_text("\n\n".join(['[image]\nname = "x"\nurl = "x"\nsize = [1, 1]', *rows]))
    arguments = ["--list", str(list_file), "--out", str(tmp_path / "out"), "--variants", "fp16", "fp32"]
    assert every.main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'out' / 'good-fp16'}: written"
    assert lines[2].startswith(f"{tmp_path / 'out' / 'bad-fp16'}: failed: ")
    assert json.loads((tmp_path / "out" / "good-fp16" / "config.json").read_text())["torch_dtype"] == "float16"
    every.main(["good", *arguments])
    assert capsys.readouterr().out.splitlines()[1] == f"{tmp_path / 'out' / 'good-fp32'}: is there already"
    monkeypatch.setattr(every.hub, "upload", lambda folder, repo, **_: f"{repo} from {folder.name}")
    assert every.main(["good", *arguments, "--upload", "somebody"]) == 0
    assert "is there already, uploaded to somebody/good-fp16 from good-fp16" in capsys.readouterr().out
