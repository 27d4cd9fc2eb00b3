"""The math reward: which answers are equal. docs/answers.md is the specification."""

import re

import pytest

from benchmarks.answer_laws import changed, pairs_of
from support.answers import equal_answers
from support.data import load_rows
from tests.world import ROOT

DOCUMENT = (ROOT / "docs/answers.md").read_text()
FILES = sorted((ROOT.parent / "shared/data").glob("*.jsonl"))  # real data sets, if there are any


def table() -> list[tuple[str, list[str], list[str], bool]]:
    """(gold, accepted, refused, whether they may change places) of each row of the document."""
    rows = []
    for line in DOCUMENT.splitlines():
        cells = line.strip("| ").split(" | ")
        if line.startswith("| ") and "`" in line and len(cells) == 5:
            gold, accepted, refused = (re.findall(r"`([^`]+)`", cell) for cell in cells[1:4])
            rows.append((gold[0], accepted, refused, cells[4] == "yes"))
    return rows


def test_the_table_is_read():
    assert len(table()) == DOCUMENT.count("\n| ") - 1  # less its heading
    assert all(accepted and refused for _, accepted, refused, _ in table())


@pytest.mark.parametrize("gold, accepted, refused, both_ways", table())
def test_table(gold, accepted, refused, both_ways):
    assert equal_answers(gold, gold)
    for answer in accepted:
        assert equal_answers(gold, answer), answer
        assert not both_ways or equal_answers(answer, gold), answer
    for answer in refused:
        assert not equal_answers(gold, answer), answer
        assert not both_ways or not equal_answers(answer, gold), answer
