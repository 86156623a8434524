"""powermetrics' text is understood, nobody is asked for a password, and a refusal is no failure.

sudo and powermetrics are small scripts here, the text is of the form that macOS prints on Apple silicon.
"""

import time

import pytest

from convert import power, report, verify_use
from tests.small_models import FIXED
from tests.test_maintainer_scripts import subject_of

SAMPLE = """
*** Sampled system activity (Wed Nov  4 09:30:0{number} 2026 +0100) ({elapsed}ms elapsed) ***


**** Processor usage ****

E-Cluster HW active frequency: 1020 MHz
E-Cluster HW active residency:  41.30% (600 MHz:  12% 1020 MHz:  29%)
CPU 0 frequency: 1017 MHz

CPU Power: {cpu} mW
GPU Power: {gpu} mW
ANE Power: 0 mW
Combined Power (CPU + GPU + ANE): {combined} mW


**** GPU usage ****

GPU HW active frequency: 1296 MHz
GPU HW active residency:  97.20% (389 MHz: .30% 1296 MHz:  97%)
GPU idle residency:   2.80%
GPU Power: 9999 mW
"""

TEXT = (
    "Machine model: Mac14,7\nOS version: 23A344\nBoot arguments: \n"
    + SAMPLE.format(number=1, elapsed="1000.00", cpu=1100, gpu=8900, combined=10000)
    + SAMPLE.format(number=2, elapsed="3000.00", cpu=1500, gpu=12500, combined=14000)
)

SUDO = """#!/bin/sh
printf '%s\\n' "$*" >> "$0.calls"
[ "$1" = -n ] || exit 9
shift
exec "$@"
"""


def put(folder, name, content):
    (folder / name).write_text(content)
    (folder / name).chmod(0o755)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder of programs before all others."""
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", str(place), prepend=":")
    return place


@pytest.fixture
def mac(programs, monkeypatch):
    monkeypatch.setattr(verify_use.platform, "system", lambda: "Darwin")
    put(programs, "sudo", SUDO)
    put(programs, "powermetrics", f"#!/bin/sh\nsleep 0.3\ncat <<'END'\n{TEXT}\nEND\n")
    return programs


def test_watts_are_averaged_over_the_length_of_the_samples():
    assert power.parse(TEXT) == power.Power(seconds=4.0, cpu=1.4, gpu=11.6, combined=13.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no sample: ''"),
        ("something else", "no sample: 'something else'"),
        (TEXT.replace("Combined Power", "Total Power"), "no Combined Power in a sample of 1000.00 ms"),
    ],
)
def test_a_text_of_another_form_is_an_error_that_says_what_is_missing(text, message):
    with pytest.raises(ValueError, match=message):
        power.parse(text)


def test_energy_per_image_is_power_over_speed(mac, tmp_path):
    (finding,) = verify_use.use_energy(subject_of(FIXED, tmp_path))
    assert finding.verdict == report.MEASURED, finding.detail
    joules, rest = finding.detail.split(" J per image: ")
    rate = float(rest.split(" at ")[1].split(" images")[0])
    assert rest.startswith("13.00 W (CPU 1.40, GPU 11.60) over 4.0 s at ")
    assert float(joules) == pytest.approx(13 / rate, abs=6e-4)
    (call,) = (mac / "sudo.calls").read_text().splitlines()
    assert call == "-n powermetrics --samplers cpu_power,gpu_power -i 1000 -n 5"


def test_images_are_counted_while_powermetrics_runs(mac):
    def work():
        calls.append(3)
        time.sleep(0.01)
        return 3

    calls: list[int] = []
    began = time.perf_counter()
    _, rate = power.measure(work)
    assert 0.3 <= sum(calls) / rate <= time.perf_counter() - began  # powermetrics' own time, of the first with it


def test_where_a_password_is_needed_energy_is_not_done_and_the_line_says_what_to_type(mac, tmp_path):
    put(mac, "sudo", "#!/bin/sh\necho 'sudo: a password is required' >&2\nexit 1\n")
    (finding,) = verify_use.use_energy(subject_of(FIXED, tmp_path))
    assert finding.verdict == report.NOT_DONE
    assert finding.detail == f"sudo: a password is required; {verify_use.TO_TYPE}"
    assert "sudo -v && make verify" in verify_use.TO_TYPE


def test_an_answer_that_is_not_understood_is_a_failure(mac, tmp_path):
    put(mac, "powermetrics", "#!/bin/sh\necho nothing\n")
    (finding,) = report.run_steps({"energy": verify_use.use_energy}, subject_of(FIXED, tmp_path), lambda line: None)
    assert finding.verdict == report.FAIL
    assert finding.detail == "powermetrics gave no sample: 'nothing'"


def test_a_powermetrics_that_hangs_ends_the_step(mac, monkeypatch):
    monkeypatch.setattr(power, "LONGEST", -0.7)
    put(mac, "powermetrics", "#!/bin/sh\nexec sleep 300\n")
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="has not ended after"):
        power.measure(lambda: 1, samples=1)
    assert time.monotonic() - began < 150  # it was not waited for


def test_other_systems_are_not_asked(programs, tmp_path, monkeypatch):
    put(programs, "sudo", SUDO)
    monkeypatch.setattr(verify_use.platform, "system", lambda: "Linux")
    (finding,) = verify_use.use_energy(subject_of(FIXED, tmp_path))
    assert (finding.verdict, finding.detail) == (report.NOT_DONE, "powermetrics is a program of macOS")
    assert not (programs / "sudo.calls").exists()
