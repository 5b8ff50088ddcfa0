"""The list of mutants does not rot, and the program tells who lives; `make mutants` runs all of them."""

import re
from dataclasses import replace

import mutants
import pytest
from mutants import ROOT

pytestmark = pytest.mark.tools

LISTED = mutants.listed()
PACKED = next(mutant for mutant in LISTED if mutant.name == "packed-once-for-all")


def test_eighty_six():
    assert len(LISTED) == 86
    assert sum(mutant.compiled for mutant in LISTED) >= 10


@pytest.mark.parametrize("mutant", LISTED, ids=lambda mutant: mutant.name)
def test_the_list_fits_the_sources(mutant):
    """The old text stands in its file once, and the tests are there."""
    assert mutant.source(ROOT) != (ROOT / mutant.file).read_text()
    for test in mutant.tests:
        file, name = test.split("[")[0].split("::")
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE)


def test_text_that_is_not_there_once():
    for text, times in (("no such text", 0), (":", (ROOT / PACKED.file).read_text().count(":"))):
        message = f"^packed-once-for-all: expected its old text once in .*, got {times} times$"
        with pytest.raises(ValueError, match=message):
            mutants.judge([replace(PACKED, old=text)])


def test_who_is_noticed_and_who_lives():
    """End to end: a fault, and a change without effect."""
    without_effect = replace(PACKED, name="without effect", new=f"# nothing\n        {PACKED.old}")
    before = (ROOT / PACKED.file).read_text()
    verdicts = mutants.judge([PACKED, without_effect], jobs=1)
    assert [verdict.killed for verdict in verdicts] == [True, False]
    assert str(verdicts[1]).startswith("LIVES")
    assert (ROOT / PACKED.file).read_text() == before


def test_tests_that_fail_without_a_mutant():
    rotten = replace(PACKED, tests=(*PACKED.tests, "tests/ops/test_packed.py::test_that_is_not_there"))
    with pytest.raises(RuntimeError, match="pytest ended with status 4"):
        mutants.judge([rotten], jobs=1)


def test_hangs_are_noticed():
    assert mutants._output(("sleep", "60"), ROOT, 0.1)[0] < 0
