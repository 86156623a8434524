"""The table of mutations fits the code: each text to replace is there once, and each test that should notice exists."""

import pytest

from tests.mutations import __main__ as mutations
from tests.mutations.__main__ import MUTATIONS, ROOT


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.name for mutation in MUTATIONS])
def test_a_mutation_changes_one_place_and_its_tests_are_there(mutation):
    assert mutations.counted(mutation, ROOT) == 1
    assert mutation.new != mutation.old
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert (ROOT / file).exists(), file
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8") if name else True, test


def test_every_mutation_has_a_name_of_its_own():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 36


def test_a_mutated_file_is_still_a_program():
    for mutation in MUTATIONS:
        text = (ROOT / mutation.file).read_text(encoding="utf-8")
        compile(text.replace(mutation.old, mutation.new), mutation.file, "exec")
