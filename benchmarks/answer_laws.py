r"""Laws of the math reward, over the gold answers of data sets.

    python benchmarks/answer_laws.py DATA.jsonl ... [--sample 1000] [--jobs 2] [--output laws.json]

Each different gold answer must accept itself, also with a full stop and with spaces around it, and
must refuse itself after one change. The changes are:

    digit, sign, case, letter, index, prime, transpose, order, operator, function, bracket, removed

A changed answer that is accepted is either truly equal, for a reason that REASONS names, or a
fault. Faults are printed and give exit code 1. Verdicts are also compared in both directions.
"""

import argparse
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.data import load_rows
from support.rewards import Grader

# ---- changes -------------------------------------------------------------------------------------

TEXT = re.compile(r"\\(?:text|mathrm|operatorname|mbox|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+|\\.")
EXCHANGES = {  # a change of one operator, function or bracket
    "operator": [
        ("+", "-"),
        ("-", "+"),
        ("=", r"\ne "),
        ("<", r"\le "),
        (r"\le", "<"),
        (r"\leq", "<"),
        (r"\geq", r"\le "),
        (r"\cup", r"\cap "),
        (r"\neq", "="),
        (r"\pm", "+"),
        (r"\infty", "1"),
        (r"\times", "+"),
        ("!", ""),
        ("^", ""),
    ],
    "function": [
        (r"\sin", r"\cos "),
        (r"\cos", r"\sin "),
        (r"\tan", r"\cot "),
        (r"\ln", r"\exp "),
        (r"\log", r"\exp "),
        (r"\sqrt", ""),
        (r"\pi", "e"),
        (r"\max", r"\min "),
        (r"\gcd", r"\max "),
        (r"\overline", ""),
        (r"\hat", ""),
        (r"\alpha", r"\beta "),
        (r"\theta", r"\phi "),
        (r"\mathbb{R}", r"\mathbb{Q}"),
        (r"\mathbb{Z}", r"\mathbb{N}"),
        (r"\mathbb{F}", r"\mathbb{G}"),
        (r"\lfloor", r"\lceil "),
        (r"\int", r"\sum "),
    ],
    "bracket": [("(", "["), ("[", "("), (")", "]"), ("]", ")"), (r"\{", "("), (r"\}", ")")],
}


def letters(gold: str) -> list[int]:
    """Places of single letters outside commands, texts and words."""
    hidden = {i for found in TEXT.finditer(gold) for i in range(found.start(), found.end())}
    words = {i for m in re.finditer(r"[A-Za-z]{3,}", gold) for i in range(m.start(), m.end())}
    return [
        i for i, c in enumerate(gold) if c.isascii() and c.isalpha() and i not in hidden | words
    ]


def put(text: str, place: int, new: str, length: int = 1) -> str:
    return text[:place] + new + text[place + length :]


def changed(gold: str) -> Iterator[tuple[str, str]]:
    """(kind, gold with one change) for every place where the kind applies."""
    for found in re.finditer(r"\d", gold):
        new = str((int(found[0]) + 1) % 10)
        yield (
            ("index" if gold[: found.start()].endswith(("_", "_{")) else "digit"),
            put(gold, found.start(), new),
        )
    yield "sign", gold[1:] if gold.startswith("-") else "-" + gold
    for place in letters(gold):
        letter = gold[place]
        yield "case", put(gold, place, letter.swapcase())
        other = "q" if letter != "q" else "w"
        is_index = gold[:place].endswith(("_", "_{"))
        yield "index" if is_index else "letter", put(gold, place, other)
        if not is_index and letter != "e":
            yield "prime", put(gold, place, letter + "'")
            yield "transpose", put(gold, place, letter + "^T")
            yield "order", put(gold, place, letter + "^{(3)}")
            yield "index", put(gold, place, letter + "_7")
    for mark in re.finditer(r"'|\^T|\^\\top|_\{[^{}]*\}|_\w", gold):
        kind = {"'": "prime", "_": "index"}.get(mark[0][0], "transpose")
        yield kind, put(gold, mark.start(), "", len(mark[0]))
    for kind, pairs in EXCHANGES.items():
        for old, new in pairs:
            pattern = re.escape(old) + (r"(?![A-Za-z])" if old[-1].isalpha() else "")
            for found in re.finditer(pattern, gold):
                yield kind, put(gold, found.start(), new, len(old))


def pairs_of(golds: list[str], sample: int, seed: int) -> list[tuple[str, str, str]]:
    """(kind, gold, answer): every gold with itself, and a sample of the changes of each kind."""
    generator = random.Random(seed)
    by_kind: dict[str, list] = {}
    for gold in golds:
        for form in (gold, gold + ".", f" {gold} "):
            by_kind.setdefault("itself", []).append(("itself", gold, form))
        for kind, answer in dict.fromkeys(changed(gold)):
            if answer != gold:
                by_kind.setdefault(kind, []).append((kind, gold, answer))
    found = []
    for kind, pairs in by_kind.items():
        few = sample and kind != "itself" and len(pairs) > sample
        found += generator.sample(pairs, sample) if few else pairs
    return found


# ---- changes that leave the value as it is -------------------------------------------------------
