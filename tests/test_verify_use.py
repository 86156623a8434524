"""`make verify` uses a checkpoint as a reader would: embed, fit, a folder's speed, memory; energy in test_power.py.

The checkpoints are small random ones under the names of Apple's, on a Hub on the loopback interface.
"""

import dataclasses
import platform
import re
from pathlib import Path

import pytest

from convert import report, verify_use
from convert.verify import STEPS
from tests.loopback import serve
from tests.small_models import FIXED, NATIVE, pair_with_words
from tests.test_maintainer_scripts import row, run, subject_of, write_list

TEMPLATE = Path(__file__).parents[1] / ".github" / "ISSUE_TEMPLATE" / "verify.yml"
LARGE, OWN_SIZE, LIT = "aimv2-large-patch14-224", "aimv2-large-patch14-native", "aimv2-large-patch14-224-lit"


@pytest.mark.slow
def test_all_steps_run_on_checkpoints_of_the_released_names(tmp_path):
    with serve() as hub:
        rows = row(hub, LARGE, FIXED), row(hub, OWN_SIZE, NATIVE), row(hub, LIT, pair_with_words(tmp_path / "pair"))
        listed = write_list(hub, tmp_path / "l.toml", *rows)
        code, text = run(hub, tmp_path, LARGE, OWN_SIZE, LIT, "--list", listed)
    assert code == 0, text
    sections = text.split("### ")[2:]
    assert [section.split("\n")[0] for section in sections] == [LARGE, OWN_SIZE, LIT]
    for section in sections:
        assert "| embed | pass | 10 of 10 images embedded in " in section
        assert "; 10 find themselves first; the second run embedded 0 in " in section
        assert re.search(r"\| embed, peak memory \| measured \| [\d,]+ MB in MLX, [1-9]\d[\d,]* MB resident ", section)
        assert re.search(r"\| fit, linear \| pass \| top-1 \d+ % on 4 digits after 6, [\d.]+ s;", section)
        speeds = r"[\d.]+ from files to vectors, [\d.]+ the model alone; 32 JPEGs of "
        assert re.search(rf"\| images a second from a folder, float32 \| measured \| {speeds}", section)
        if platform.system() != "Darwin":
            assert "| energy | not done | powermetrics is a program of macOS |" in section


@pytest.mark.slow
def test_the_last_line_says_what_to_paste_where(tmp_path):
    with serve() as hub:
        _, text = run(hub, tmp_path, "--list", write_list(hub, tmp_path / "l.toml", row(hub, LARGE, FIXED)))
    last = text.splitlines()[-1]
    assert last.startswith("Paste all of report.md, this line too, into a new issue")
    template = re.search(r"template \*(.+)\*", last)[1]
    assert f"name: {template}\n" in TEMPLATE.read_text()


def test_a_step_that_fails_is_one_line_and_the_others_go_on(tmp_path):
    subject = subject_of(FIXED, tmp_path)

    def broken(subject):
        raise KeyError(f"a | b\n{Path.home()}/x")

    steps = {"broken": broken, "fit": verify_use.use_fit}
    findings = report.run_steps(steps, subject, lambda line: None)
    assert [finding.verdict for finding in findings] == [report.FAIL, report.PASS]
    lines = report.section(subject.row, findings).splitlines()
    assert lines[4] == "| broken | **FAIL** | KeyError: 'a \\| b\\n~/x' |"
    assert len(lines) == 6


def test_an_embed_command_that_fails_is_a_failed_step_with_its_message(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/nowhere")  # a report writes ~ for the home folder, in which TMPDIR may lie
    subject = subject_of(FIXED, tmp_path)
    subject = dataclasses.replace(subject, row=dataclasses.replace(subject.row, repo=str(tmp_path / "nothing")))
    (finding,) = report.run_steps({"embed": verify_use.use_embed}, subject, lambda line: None)
    assert (finding.what, finding.verdict) == ("embed", report.FAIL)
    assert finding.detail.startswith(f"mlx-aimv2: {tmp_path}/nothing")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["nearest", "again"])
def test_an_image_that_is_not_found_or_embedded_twice_fails(tmp_path, monkeypatch, fault):
    subject, original = subject_of(FIXED, tmp_path), verify_use._embed_command
    if fault == "nearest":
        found = verify_use.embed
        monkeypatch.setattr(verify_use, "embed", lambda *given: _rotated(list(found(*given))))
    else:
        twice = lambda *given: ({**original(*given)[0], "embedded": 10}, {"mlx": 1, "resident": 1})  # noqa: E731
        monkeypatch.setattr(verify_use, "_embed_command", twice)
    embed, _ = verify_use.use_embed(subject)
    assert embed.verdict == report.FAIL
    assert ("another image is nearer to" in embed.detail) == (fault == "nearest")


def _rotated(found):
    """Each image with the vector of the one before it."""
    return [dataclasses.replace(one, vector=found[place - 1].vector) for place, one in enumerate(found)]


def test_energy_comes_first_before_sudo_forgets_the_password():
    assert next(iter(STEPS)) == "energy"
