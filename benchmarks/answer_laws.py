r"""Laws of the math reward, over the gold answers of data sets.

    python benchmarks/answer_laws.py DATA.jsonl ... [--sample 1000] [--output laws.json]

Each different gold answer must accept itself, also with a full stop and with spaces around it, and
must refuse itself after one change. The changes are:

    digit, sign, case, letter, index, prime, transpose, order, operator, function, bracket

A changed answer that is accepted is either truly equal, for a reason that reason() names, or a
fault. Faults are printed and give exit code 1. Each verdict is also asked for the other way round.
"""

import argparse
import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.data import load_rows
from support.grader import Grader
from support.notation import as_word, tidy

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
            for found in re.finditer(r"(?<!\\)" + pattern if old == "!" else pattern, gold):
                yield kind, put(gold, found.start(), new, len(old))


def pairs_of(golds: list[str], sample: int, seed: int) -> list[tuple[str, str, str]]:
    """(kind, gold, answer): every gold with itself, and a sample of the changes of each kind."""
    generator = random.Random(seed)
    by_kind: dict[str, list] = {}
    for gold in golds:
        for form in (gold, gold.rstrip(".") + ".", f" {gold} "):
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


def reason(kind: str, gold: str, answer: str) -> str:
    """Why the changed answer is truly equal to the gold answer; "" if it is not."""
    if kind == "case" and as_word(tidy(gold))[1]:
        return "words count in any case"
    if kind == "index" and re.fullmatch(r"\d[0-9A-F]*_\{?\d+\}?\.?", gold) and "_" not in answer:
        return "a number base may be left out"
    if kind == "sign" and re.search(r"(=|\\neq?)\s*0$", gold):
        return "an equation with 0 holds times -1 too"
    if kind == "sign" and re.match(r"-?(?:\\\{)?0(?![.\d])", gold):
        return "0 has no sign"
    if kind == "sign" and answer == f"-{gold}" and re.fullmatch(r"\\pm[^-+,]*", gold):
        return "plus-minus has both signs"
    if kind == "operator" and re.sub(r"\^(?=1(?!\d))", "", gold) == answer:
        return "an exponent of 1"
    return ""


# ---- command line --------------------------------------------------------------------------------


def verdicts(pairs: list[tuple[str, str, str]], timeout: float, workers: int) -> list[list]:
    """[score, score the other way round, whether a limit was hit] of each pair."""
    config = SimpleNamespace(
        reward="math", reward_timeout=timeout, reward_workers=workers, reward_memory_gib=4.0
    )
    grader = Grader(config)
    found = []
    for start in tqdm(range(0, len(pairs), 500), unit="batch"):
        part = pairs[start : start + 500]
        ways = []
        for response, row in ((2, 1), (1, 2)):
            boxes = [rf"\boxed{{{pair[response]}}}" for pair in part]
            ways.append(grader(boxes, [{"answer": pair[row]} for pair in part]))
        for there, back in zip(*ways):
            found.append([there.score, back.score, bool(there.failure or back.failure)])
    grader.close()
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="+", help="FILE.jsonl, FILE.parquet or a hub data set")
    parser.add_argument("--sample", type=int, default=1000, help="pairs per kind; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds per verdict")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="a JSON file with the figures")
    args = parser.parse_args(argv)
    golds = [row["answer"] for name in args.data for row in load_rows(name)]
    different = list(dict.fromkeys(golds))
    pairs = pairs_of(different, args.sample, args.seed)
    tried, equal, late, faults, one_way = Counter(), Counter(), 0, [], []
    for pair, (score, back, failed) in zip(pairs, verdicts(pairs, args.timeout, args.workers)):
        kind = pair[0]
        tried[kind] += 1
        late += failed
        if kind == "itself" and not score:
            faults.append((*pair, "refused"))
        elif kind != "itself" and score:
            why = reason(*pair)
            equal[why] += bool(why)
            faults += [] if why else [(*pair, "accepted")]
        if score != back and not failed:
            one_way.append(pair)
    figures = {
        "date": f"{date.today()}",
        "golds": len(golds),
        "different golds": len(different),
        "pairs": dict(tried),
        "truly equal": {why: count for why, count in equal.items() if count},
        "without a verdict in time": late,
        "other verdict the other way round": one_way,
        "faults": faults,
    }
    print(json.dumps(figures, indent=1, ensure_ascii=False))
    if args.output:
        args.output.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
