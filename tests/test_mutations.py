"""The run of mutations tells what is noticed, what is not, and what does not fit the code any more."""

import subprocess

import pytest

from tests.mutations import Mutation
from tests.mutations import __main__ as run

TEST = ("tests/test_sums.py",)
NOTICED = Mutation("sums are differences", "a + b", "a - b", TEST)
SURVIVES = Mutation("products are sums", "a * b", "a + b", ("tests/test_sums.py::test_sums",))


@pytest.fixture
def project(tmp_path):
    """A project of one module and one test, as git knows it."""
    (tmp_path / run.PACKAGE / "deep").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    for place in (run.PACKAGE, f"{run.PACKAGE}/deep"):
        (tmp_path / place / "__init__.py").touch()
    (tmp_path / run.PACKAGE / "deep" / "sums.py").write_text(
        "def plus(a, b):\n    return a + b\n\n\ndef times(a, b):\n    return a * b\n"
    )
    (tmp_path / "tests" / "test_sums.py").write_text(
        f"from {run.PACKAGE}.deep.sums import plus\n\n\ndef test_sums():\n    assert plus(2, 1) == 3\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow: is slow\n")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


@pytest.mark.slow
def test_what_is_noticed_and_what_survives_is_told(project, capsys):
    assert run.main([], root=project, mutations=[NOTICED]) == 0
    assert run.main([], root=project, mutations=[NOTICED, SURVIVES]) == 1
    out, err = capsys.readouterr()
    file = f"{run.PACKAGE}/deep/sums.py"
    assert f"| sums are differences | `{file}` | `tests/test_sums.py::test_sums` |" in out
    assert f"| products are sums | `{file}` | `{run.SURVIVED}` |" in out
    assert err.splitlines() == ["1 of 1 noticed", "1 of 2 noticed"]


@pytest.mark.parametrize(
    ("mutation", "said"),
    [
        (Mutation("a", "a / b", "a", TEST), "must stand once in mlx_aimv2/, it stands 0 times: nowhere"),
        (Mutation("a", "return a", "return b", TEST), "it stands 2 times: mlx_aimv2/deep/sums.py"),
        (Mutation("a", "a + b", "a +", TEST), "is no program with it"),
        (Mutation("a", "a + b", "a - b", ("tests/gone.py",)), "there is no test tests/gone.py"),
        (Mutation("a", "a + b", "a - b", (f"{TEST[0]}::test_gone",)), "there is no test tests/test_sums.py::test_gone"),
    ],
)
def test_what_does_not_fit_the_code_is_an_error_of_its_own(project, capsys, mutation, said):
    assert run.main([], root=project, mutations=[mutation]) == 1
    out, err = capsys.readouterr()
    assert "0 of 1 noticed\nnot tried, a: " in err and said in err
    assert "| a |" not in out


def test_words_that_no_name_holds_are_wrong_use(project, capsys):
    with pytest.raises(SystemExit):
        run.main(["--only", "nothing"], root=project, mutations=[NOTICED])
    assert "no mutation's name holds 'nothing'" in capsys.readouterr().err


def test_every_break_fits_the_code():
    """Each text stands once in the package and its tests are there; the run itself tells whether it is noticed."""
    for mutation in run.MUTATIONS:
        run.file_of(mutation, run.ROOT)
