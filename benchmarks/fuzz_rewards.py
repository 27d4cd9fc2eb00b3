r"""Hostile answers through the grader: python benchmarks/fuzz_rewards.py --answers 10000 --timeout 2 --output fuzz.json

Seeded nonsense (LaTeX, exponent towers, unicode, control characters, megabytes, nested braces, code) goes through Grader("math", ...).
Every 10th answer is an ordinary one whose verdict is known. The laws, of which a broken one gives exit code 1:

    order    each known verdict stands where its answer stood
    time     no verdict takes longer than the limit plus one second
    leak     no process is left over: as many as workers while it grades, none after close()
    memory   this process keeps its size: peak at most 64 MB above the largest batch in flight (two copies of it)
    eval     no code in an answer is executed: the canary file does not appear
"""

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rewards import Grader

COMMANDS = r"""\frac \sqrt \sum_{i=1}^{9} \int_0^1 \lim_{x\to0} \binom \text \left( \right) \sin \log_2 \gcd \max \operatorname{zeros} \operatorname{rank}
\begin{pmatrix} \end{pmatrix} & \\ \cdot \times \pm \leq \neq \in \cup \mathbb{R} \infty \pi ^\circ \% \$ \{ \} \overline \vec \boxed \mathrm \! \, \; ' ! ^ _ { } ( ) [ ]
| = < > + - * / , . : ; 1 2 37 0.5 1,000 1e9 x y f(x) n k i e dx""".split()
CODE = ["__import__('os').system('touch {}')", "open('{}','w')", "exec(\"open('{}','w')\")", "(lambda: open('{}','w'))()", "[].__class__.__base__.__subclasses__()",
        "\\text{{__import__('os').system('touch {}')}}", "\\operatorname{{eval}}(open('{}','w'))", "$(touch {})", "`touch {}`", "\\write18{{touch {}}}",
        "\\input{{{}}}", "'); open('{}','w'); ('", "sympify(\"open('{}','w')\")", "1;import os;os.system('touch {}')", "{{{{open('{}','w')}}}}"]  # fmt: skip
GOLDS = ["7", r"\frac{1}{2}", r"2\sqrt{3}", "x^2 + 1", "(1, 2)", r"\{1, 2\}", r"x \in [0, 1)", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\text{east}"]


def answers(seed: int, canary: str):
    """(response, row, score or None where it is anybody's guess, kind) without end."""
    rng, number = random.Random(seed), 0

    def latex() -> str:
        return " ".join(rng.choice(COMMANDS) for _ in range(rng.randint(1, 25)))

    def tower() -> str:
        base, height = rng.choice(["9", "99", "x", "(-2)", "0.9", r"\pi"]), rng.randint(2, 5)
        return rng.choice(["", "-", r"\frac{1}{2}+"]) + "^{".join([base] + [rng.choice(["9", "99", "x"]) for _ in range(height)]) + "}" * height

    def huge() -> str:
        return rng.choice(["9", "1e", "{", "}", r"\boxed{", r"\frac{", "(", "\\", "^", "x+", "1,", "\x00", "é"]) * rng.choice([500, 20_000, 150_000])

    def mutant() -> str:
        text = list(rng.choice(GOLDS))
        for _ in range(rng.randint(1, 4)):
            text.insert(rng.randrange(len(text) + 1), rng.choice(COMMANDS) if rng.random() < 0.7 else chr(rng.randrange(32, 0x2FF)))
        return "".join(text)

    kinds = {
        "latex": (4, latex), "mutant": (5, mutant), "tower": (0.3, tower), "huge": (0.5, huge), "factorial": (0.1, lambda: "9" * rng.randint(1, 9) + "!" * rng.randint(1, 3)),
        "nested": (1, lambda: (d := rng.randint(1, 400)) * rng.choice(["{", "(", r"\sqrt{", r"\frac{1}{", "-", r"\left("]) + "1" + d * rng.choice(["}", ")", r"\right)"])),
        "unicode": (3, lambda: "".join(chr(rng.choice([rng.randrange(1, 0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(rng.randint(1, 60)))),
        "control": (2, lambda: "".join(chr(rng.randrange(32)) + rng.choice("17x{}\x7f\u202e") for _ in range(rng.randint(1, 30)))),
        "digits": (2, lambda: str(rng.randrange(10 ** rng.randint(1, 60))) + rng.choice(["", ".", ".5", "e5", "e99999", "%", "/0", "/7", "²", "٣"])),
        "code": (3, lambda: rng.choice(CODE).format(*[canary] * 2)),
    }  # fmt: skip
    names, weights = list(kinds), [weight for weight, _ in kinds.values()]
    while True:
        number += 1
        if number % 10 == 0:
            gold = rng.randrange(10_000)
            given = rng.choice([str(gold), f"{gold}.0", str(gold + 1), "", None])
            yield "so it is " + ("unknown" if given is None else f"\\boxed{{{given}}}"), {"answer": str(gold)}, float(given in (str(gold), f"{gold}.0")), "known"
        else:
            kind = rng.choices(names, weights)[0]
            text = kinds[kind][1]()
            yield rng.choice([f"\\boxed{{{text}}}", f"\\boxed{{{text}}}", text, f"\\boxed{{{text}"]), {"answer": rng.choice(GOLDS)}, None, kind


def children(pid: int) -> list[int]:
    """The living processes that descend from pid (Linux)."""
    below = [int(child) for tasks in Path(f"/proc/{pid}/task").glob("*/children") for child in tasks.read_text().split()]
    return below + [pid for child in below for pid in children(child)]


def fuzz(total: int, timeout: float, workers: int, seed: int, batch: int = 500, say=lambda text: None) -> tuple[dict, list[str]]:
    """Grade `total` answers; the figures, and which laws they break."""
    def rss() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

    broken, kinds, worst, spent, slow, failed, largest, peak, counts = [], Counter(), Counter(), Counter(), Counter(), Counter(), 0, 0.0, []
    with tempfile.TemporaryDirectory() as folder:
        canary = os.path.join(folder, "canary")
        stream, before, size, began = answers(seed, canary), len(children(os.getpid())), rss(), time.monotonic()
        grader = Grader("math", timeout, workers)
        for first in range(0, total, batch):
            responses, rows, scores, names = zip(*(next(stream) for _ in range(min(batch, total - first))))
            largest = max(largest, sum(map(len, responses)) * 4 / 1e6)
            verdicts = grader(list(responses), list(rows))
            for name, score, (given, reason), seconds in zip(names, scores, verdicts, grader.seconds, strict=True):
                kinds[name] += 1
                spent[name] += seconds
                worst[name] = max(worst[name], seconds)
                slow[name] += reason.startswith("no verdict")
                failed[name] += bool(reason) and not reason.startswith("no verdict")
                if given not in (0.0, 1.0) or (given and reason) or score not in (None, given) or (score is not None and reason) or len(reason) > 300:
                    broken.append(f"order: known score {score}, verdict {(given, reason)}")
            counts.append(len(children(os.getpid())) - before)
            peak = max(peak, rss())
            say(f"{first + len(responses)} answers, {time.monotonic() - began:.0f} s, slowest verdict {max(worst.values()):.2f} s, {rss():.0f} MB")
        took, end = time.monotonic() - began, rss()
        grader.close()
        left = len(children(os.getpid())) - before
        if os.path.exists(canary):
            broken.append("eval: the canary was touched")
    if max(worst.values()) > timeout + 1:
        broken.append(f"time: {max(worst.values()):.2f} s for one verdict, limit {timeout:g} s")
    if set(counts) != {workers + 1} or left:
        broken.append(f"leak: {counts} processes after the batches, {left} after close()")
    if peak > size + 64 + 2 * largest:
        broken.append(f"memory: from {size:.0f} to {peak:.0f} MB with batches of {largest:.0f} MB at most")
    table = {name: dict(answers=kinds[name], mean_s=spent[name] / kinds[name], max_s=worst[name], over_limit=slow[name], died_or_raised=failed[name]) for name in kinds}
    return dict(answers=total, timeout=timeout, workers=workers, seed=seed, seconds=took, max_verdict_s=max(worst.values()), processes_while_grading=max(counts),
                processes_left=left, rss_mb=dict(start=size, peak=peak, end=end), largest_batch_mb=largest, kinds=table, broken=broken), broken  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in {"answers": 10_000, "timeout": 2.0, "workers": 2, "seed": 0, "output": ""}.items():
        parser.add_argument(f"--{flag}", type=type(default), default=default)
    args = parser.parse_args()
    figures, broken = fuzz(args.answers, args.timeout, args.workers, args.seed, say=lambda text: print(text, flush=True))
    print(f"\n{'kind':10s} {'answers':>8s} {'mean s':>8s} {'max s':>8s} {'too slow':>9s} {'died':>6s}")
    for name, row in figures["kinds"].items():
        print(f"{name:10s} {row['answers']:8d} {row['mean_s']:8.4f} {row['max_s']:8.3f} {row['over_limit']:9d} {row['died_or_raised']:6d}")
    print(f"{figures['seconds']:.0f} s, slowest verdict {figures['max_verdict_s']:.2f} s, processes left {figures['processes_left']}, RSS MB {figures['rss_mb']}")
    print("broken laws: " + ("; ".join(broken[:10]) or "none"))
    if args.output:
        Path(args.output).write_text(json.dumps(figures, indent=1) + "\n")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
