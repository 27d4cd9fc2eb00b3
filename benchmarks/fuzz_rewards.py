r"""Hostile answers through the grader.

    python benchmarks/fuzz_rewards.py --answers 10000 --timeout 2 --output fuzz.json

Random nonsense from a seed (LaTeX, towers of exponents, unicode, control characters, megabytes,
nested braces, code) goes through the grader with the math reward. Every 10th answer is an ordinary
one with a known verdict. A broken law gives exit code 1:

    order    each known verdict is in the place of its answer
    time     no verdict takes longer than the limit plus one second
    leak     no process is left over: as many as workers while it grades, none after close()
    memory   the peak of this process is at most 64 MB above the largest batch (two copies of it)
    eval     no code in an answer is executed: the canary file does not appear
"""

import argparse
import contextlib
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.grader import Grader

BATCH = 500  # answers per call of the grader

# ---- answers -------------------------------------------------------------------------------------

COMMANDS = r"""
\frac \sqrt \sum_{i=1}^{9} \int_0^1 \lim_{x\to0} \binom \text \left( \right) \sin \log_2 \gcd \max
\operatorname{zeros} \operatorname{rank} \begin{pmatrix} \end{pmatrix} & \\ \cdot \times \pm \leq
\neq \in \cup \mathbb{R} \infty \pi ^\circ \% \$ \{ \} \overline \vec \boxed \mathrm \! \, \; ' ! ^
_ { } ( ) [ ] | = < > + - * / , . : ; 1 2 37 0.5 1,000 1e9 x y f(x) n k i e dx
""".split()
CODE = [  # PATH is replaced by the path of the canary file
    "__import__('os').system('touch PATH')",
    "open('PATH','w')",
    "exec(\"open('PATH','w')\")",
    "(lambda: open('PATH','w'))()",
    "[].__class__.__base__.__subclasses__()",
    r"\text{__import__('os').system('touch PATH')}",
    r"\operatorname{eval}(open('PATH','w'))",
    "$(touch PATH)",
    "`touch PATH`",
    r"\write18{touch PATH}",
    r"\input{PATH}",
    "'); open('PATH','w'); ('",
    "sympify(\"open('PATH','w')\")",
    "1;import os;os.system('touch PATH')",
    "{{open('PATH','w')}}",
]
GOLDS = [
    "7",
    r"\frac{1}{2}",
    r"2\sqrt{3}",
    "x^2 + 1",
    "(1, 2)",
    r"\{1, 2\}",
    r"x \in [0, 1)",
    r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
    r"\text{east}",
]


class Answer(NamedTuple):
    response: str
    row: dict
    score: float | None  # None: not known
    kind: str


class Nonsense:
    """Hostile texts of several kinds, from one random generator."""

    WEIGHTS = dict(
        latex=4,
        mutant=5,
        tower=0.3,
        huge=0.5,
        factorial=0.1,
        nested=1,
        unicode=3,
        control=2,
        digits=2,
        code=3,
    )

    def __init__(self, rng: random.Random, canary: str):
        self.rng, self.canary = rng, canary

    def latex(self) -> str:
        return " ".join(self.rng.choice(COMMANDS) for _ in range(self.rng.randint(1, 25)))

    def mutant(self) -> str:
        text, rng = list(self.rng.choice(GOLDS)), self.rng
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(text) + 1)
            command = rng.random() < 0.7
            text.insert(place, rng.choice(COMMANDS) if command else chr(rng.randrange(32, 0x2FF)))
        return "".join(text)

    def tower(self) -> str:
        base = self.rng.choice(["9", "99", "x", "(-2)", "0.9", r"\pi"])
        height = self.rng.randint(2, 5)
        sign = self.rng.choice(["", "-", r"\frac{1}{2}+"])
        exponents = [self.rng.choice(["9", "99", "x"]) for _ in range(height)]
        return sign + "^{".join([base, *exponents]) + "}" * height

    def huge(self) -> str:
        parts = [
            "9",
            "1e",
            "{",
            "}",
            r"\boxed{",
            r"\frac{",
            "(",
            "\\",
            "^",
            "x+",
            "1,",
            "\x00",
            "é",
        ]
        return self.rng.choice(parts) * self.rng.choice([500, 20_000, 150_000])

    def factorial(self) -> str:
        return "9" * self.rng.randint(1, 9) + "!" * self.rng.randint(1, 3)

    def nested(self) -> str:
        depth = self.rng.randint(1, 400)
        opening = self.rng.choice(["{", "(", r"\sqrt{", r"\frac{1}{", "-", r"\left("])
        return depth * opening + "1" + depth * self.rng.choice(["}", ")", r"\right)"])

    def unicode(self) -> str:
        letters = []
        for _ in range(self.rng.randint(1, 60)):
            below, above = self.rng.randrange(1, 0xD800), self.rng.randrange(0xE000, 0x110000)
            letters.append(chr(self.rng.choice([below, above])))  # no surrogates
        return "".join(letters)

    def control(self) -> str:
        letters = []
        for _ in range(self.rng.randint(1, 30)):
            letters += [chr(self.rng.randrange(32)), self.rng.choice("17x{}\x7f\u202e")]
        return "".join(letters)

    def digits(self) -> str:
        number = str(self.rng.randrange(10 ** self.rng.randint(1, 60)))
        ends = ["", ".", ".5", "e5", "e99999", "%", "/0", "/7", "²", "٣"]
        return number + self.rng.choice(ends)

    def code(self) -> str:
        return self.rng.choice(CODE).replace("PATH", self.canary)

    def draw(self) -> Answer:
        kind = self.rng.choices(list(self.WEIGHTS), list(self.WEIGHTS.values()))[0]
        text = getattr(self, kind)()
        boxed = rf"\boxed{{{text}}}"
        response = self.rng.choice([boxed, boxed, text, rf"\boxed{{{text}"])
        return Answer(response, {"answer": self.rng.choice(GOLDS)}, None, kind)


def ordinary_answer(rng: random.Random) -> Answer:
    """An answer with a known score: right, wrong, empty or missing."""
    gold = rng.randrange(10_000)
    right = [str(gold), f"{gold}.0"]
    given = rng.choice([*right, str(gold + 1), "", None])
    text = "unknown" if given is None else rf"\boxed{{{given}}}"
    return Answer(f"so it is {text}", {"answer": str(gold)}, float(given in right), "known")


def answers(seed: int, canary: str) -> Iterator[Answer]:
    """Answers without end."""
    rng = random.Random(seed)
    nonsense = Nonsense(rng, canary)
    while True:
        for _ in range(9):
            yield nonsense.draw()
        yield ordinary_answer(rng)


# ---- what happens to them ------------------------------------------------------------------------


def session(leader: int) -> list[int]:
    """The living processes of the session that a process has started (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, _, its_session, *_ = stat.read_text().rpartition(")")[2].split()
            if int(its_session) == leader and state != "Z":
                found.append(int(stat.parent.name))
    return found


def resident() -> float:
    """Memory of this process, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


@dataclass
class Statistics:
    """What is observed of all verdicts so far."""

    broken: list[str] = field(default_factory=list)  # laws
    answers: Counter = field(default_factory=Counter)  # by kind
    spent: Counter = field(default_factory=Counter)  # seconds
    worst: Counter = field(default_factory=Counter)  # seconds
    slow: Counter = field(default_factory=Counter)  # verdicts that hit the limit
    failed: Counter = field(default_factory=Counter)  # verdicts that died or raised
    processes: list[int] = field(default_factory=list)  # after each batch
    largest: float = 0.0  # batch, in MB
    peak: float = 0.0  # of this process, in MB

    def add(self, answer: Answer, verdict: tuple[float, str, float]) -> None:
        score, reason, seconds = verdict
        kind = answer.kind
        timed_out = reason.startswith("no score within")
        self.answers[kind] += 1
        self.spent[kind] += seconds
        self.worst[kind] = max(self.worst[kind], seconds)
        self.slow[kind] += timed_out
        self.failed[kind] += bool(reason) and not timed_out
        possible = score in (0.0, 1.0) and not (score and reason) and len(reason) <= 300
        expected = answer.score is None or (score == answer.score and not reason)
        if not (possible and expected):
            text = f"order: known score {answer.score}, verdict {(score, reason)}"
            self.broken.append(text)

    def by_kind(self) -> dict[str, dict]:
        table = {}
        for kind, count in self.answers.items():
            table[kind] = dict(
                answers=count,
                mean_s=self.spent[kind] / count,
                max_s=self.worst[kind],
                over_limit=self.slow[kind],
                died_or_raised=self.failed[kind],
            )
        return table


def fuzz(total: int, timeout: float, workers: int, seed: int) -> dict:
    """Grade `total` answers. Returns the figures, with the laws that they break."""
    cfg = SimpleNamespace(
        reward="math", reward_timeout=timeout, reward_workers=workers, reward_memory_gib=4.0
    )
    seen = Statistics()
    with tempfile.TemporaryDirectory() as folder:
        canary = os.path.join(folder, "canary")
        stream = answers(seed, canary)
        start, began = resident(), time.monotonic()
        grader = Grader(cfg)
        for first in range(0, total, BATCH):
            batch = [next(stream) for _ in range(min(BATCH, total - first))]
            size = sum(len(answer.response) for answer in batch) * 4 / 1e6
            seen.largest = max(seen.largest, size)
            verdicts = grader([answer.response for answer in batch], [a.row for a in batch])
            for answer, verdict in zip(batch, verdicts, strict=True):
                seen.add(answer, verdict)
            seen.processes.append(len(session(grader.server.pid)))
            seen.peak = max(seen.peak, resident())
            print(
                f"{first + len(batch)} answers, {time.monotonic() - began:.0f} s, "
                f"slowest verdict {max(seen.worst.values()):.2f} s, {resident():.0f} MB",
                flush=True,
            )
        seconds, end = time.monotonic() - began, resident()
        grader.close()
        left = len(session(grader.server.pid))
        if os.path.exists(canary):
            seen.broken.append("eval: an answer was executed")
    check_laws(seen, timeout, workers, left, start)
    return dict(
        answers=total,
        timeout=timeout,
        workers=workers,
        seed=seed,
        seconds=seconds,
        max_verdict_s=max(seen.worst.values()),
        processes_while_grading=max(seen.processes),
        processes_left=left,
        rss_mb=dict(start=start, peak=seen.peak, end=end),
        largest_batch_mb=seen.largest,
        kinds=seen.by_kind(),
        broken=seen.broken,
    )


def check_laws(seen: Statistics, timeout: float, workers: int, left: int, start: float) -> None:
    slowest = max(seen.worst.values())
    if slowest > timeout + 1:
        seen.broken.append(f"time: {slowest:.2f} s for one verdict, limit {timeout:g} s")
    if set(seen.processes) != {workers + 1} or left:
        seen.broken.append(f"leak: {seen.processes} processes while grading, {left} after close()")
    if seen.peak > start + 64 + 2 * seen.largest:
        text = (
            f"memory: from {start:.0f} to {seen.peak:.0f} MB, largest batch {seen.largest:.0f} MB"
        )
        seen.broken.append(text)


def report(figures: dict) -> None:
    print(
        f"\n{'kind':10s} {'answers':>8s} {'mean s':>8s} {'max s':>8s} {'too slow':>9s} {'died':>6s}"
    )
    for name, row in figures["kinds"].items():
        times = f"{row['answers']:8d} {row['mean_s']:8.4f} {row['max_s']:8.3f}"
        print(f"{name:10s} {times} {row['over_limit']:9d} {row['died_or_raised']:6d}")
    print(
        f"{figures['seconds']:.0f} s, slowest verdict {figures['max_verdict_s']:.2f} s, "
        f"processes left {figures['processes_left']}, memory in MB {figures['rss_mb']}"
    )
    print("broken laws: " + ("; ".join(figures["broken"][:10]) or "none"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--answers", type=int, default=10_000)
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds per verdict")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="", help="JSON file")
    args = parser.parse_args()
    figures = fuzz(args.answers, args.timeout, args.workers, args.seed)
    report(figures)
    if args.output:
        Path(args.output).write_text(json.dumps(figures, indent=1) + "\n")
    return bool(figures["broken"])


if __name__ == "__main__":
    sys.exit(main())
