"""The math reward: which answers are equal. docs/answers.md is the specification."""

import json
import re

import pytest

from benchmarks import answer_laws
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


EQUAL = [  # further pairs of gold answer and answer
    (r"\boxed{42}", "42"),
    (r"73", "73\\"),
    (r"2", r"(1+i)(1-i)"),
    (r"\sqrt{\frac{a}{b}}", r"\frac{\sqrt a}{\sqrt b}"),
    (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}"),
    (r"\tan x", r"\frac{\sin x}{\cos x}"),
    (r"\sum_{k=1}^n k", r"\frac{n(n+1)}{2}"),
    (r"100, 200, 300", "100,200,300"),
    (r"0<x<1", "1 > x > 0"),
    (r"x^2 + 1 > 0", r"0 < 1 + x^2"),
    (r"x^2 + 1 > 0", r"2x^2 + 2 > 0"),
    (r"x^2 = 4", r"2x^2 - 8 = 0"),
    (r"f(x) = x^2", "x^2"),
    (r"362,\!880", "362880"),
    (r"10 000", "10000"),
    (r"\frac{x}{y}", r"\frac{dy}{dx} = \frac{x}{y}"),
    (r"1\frac{1}{2}", "1½"),
    (r"3\text{ hours}", "3 hrs"),
    (r"-\$5", "-5"),
]
DIFFERENT = [
    (r"4ab", "4"),
    (r"AB", "ab"),
    ("E", "e"),
    (r"\Gamma", r"\gamma"),
    ("x!!", "(x!)!"),
    ("(AB)^T", "AB"),
    ("(A+B)'", "A+B"),
    (r"\angle ABC", r"\angle ACB"),
    (r"\mathcal{A}", r"\mathfrak{A}"),
    ("D", "D_7"),
    (r"K \, dA", r"k \, dA"),
    (r"x^2 + 1 > 0", r"x^2 + 2 > 0"),
    (r"x^2 + 1 = 0", r"x^2 + 2 = 0"),
    (r"(3,\infty)", r"(3,\infty]"),
    (r"a = b = c = 0", r"a = b = q = 0"),
    (r"(DN)^k = 0", r"(DN_7)^k = 0"),
    (r"I = J", r"I = J'"),
    (r"\sum_{i=1}^n X_i", r"\sum_{q=1}^n X_i"),
    (r"2^{1000}+\sqrt{2}", r"2^{1000}+\sqrt{3}"),
    (r"x+10^{-50}", r"x+10^{-51}"),
    (r"e^{-1000}", r"e^{-1001}"),
    (r"100!", "100!+1"),
    (r"f(x) = x^2", r"f(y) = y^2"),
    (r"\{x : x > 2\}", "x > 2"),
    (r"6", r"\text{(6)"),
    ("", ""),
    ("5", ""),
]


@pytest.mark.parametrize("gold, answer", EQUAL)
def test_equal(gold, answer):
    assert equal_answers(gold, answer)
    assert equal_answers(answer, gold)


@pytest.mark.parametrize("gold, answer", DIFFERENT)
def test_different(gold, answer):
    assert not equal_answers(gold, answer)
    assert not equal_answers(answer, gold)


# ---- laws ----------------------------------------------------------------------------------------

GOLDS = [
    r"-\frac{3}{41}",
    r"2\sqrt{3} + \pi",
    r"\left( 3, \frac{\pi}{2} \right)",
    r"[0, 1) \cup (2, \infty)",
    r"\{1, 2, 30\}",
    r"x^2 - 3y_1 + 7",
    r"y = C_1 e^{-2t} + C_2",
    r"f'(x) = 2A^T x",
    r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
    r"\ln(2) - \frac{\sin k}{n!}",
    r"3.4 \times 10^{-31}",
    r"k \neq 1",
    r"\gcd(n, p-1)",
    r"-2 \le x \le 7",
    r"1 - i",
    r"\mathbb{F}_2",
]


def check_laws(pairs: list[tuple[str, str, str]]) -> None:
    for kind, gold, answer in pairs:
        equal = equal_answers(gold, answer)
        assert equal == (kind == "itself") or answer_laws.reason(kind, gold, answer), (gold, answer)


def test_one_change_makes_another_answer():
    check_laws(answer_laws.pairs_of(GOLDS, sample=25, seed=1))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_one_change_makes_another_answer_in_real_data(file):
    golds = list(dict.fromkeys(row["answer"] for row in load_rows(str(file))))
    check_laws(answer_laws.pairs_of(golds[::29], sample=10, seed=2))


def test_answer_laws_finds_a_fault(tmp_path, monkeypatch, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"problem": "?", "answer": "x=1"}\n{"problem": "??", "answer": "2"}\n')
    command = [str(data), "--workers", "1", "--output", str(tmp_path / "laws.json")]
    assert answer_laws.main(command) == 0
    figures = json.loads((tmp_path / "laws.json").read_text())
    assert figures["golds"] == 2 and figures["pairs"]["itself"] == 6 and not figures["faults"]
    monkeypatch.setattr(answer_laws, "verdicts", lambda pairs, *_: [[1.0, 0.0, False]] * len(pairs))
    assert answer_laws.main(command) == 1
    assert '"accepted"' in capsys.readouterr().out
