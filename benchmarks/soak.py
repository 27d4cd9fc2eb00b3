"""A long run on the toy, watched from outside: memory, open files and number of its processes must stay flat.

    python benchmarks/soak.py [--steps 500] [--output soak.json]

Checkpoints every 10 steps, evaluates every 25, grades with the math reward in two workers (Linux). Every hundredth of a second the resident memory of each
process is looked at, every two seconds the processes and their open files. Within a step memory rises and falls by 100 MiB with the lengths of the
responses; what a process *holds* is the least of it in 20 steps, and that must not grow. The first half of the steps is the warm-up; the slope is a
least-squares line over the second half. The highest of 20 steps is shown beside it.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent.parent
WINDOW = 20  # steps


def family(root: int) -> list[int]:
    """A process and all below it."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue  # it has ended meanwhile
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def resident(pid: int) -> float | None:
    """MiB."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, IndexError):
        return None  # it has ended meanwhile


def open_files(pid: int) -> int | None:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None


def slope(points: list[tuple[float, float]]) -> float:
    """MiB per 100 steps of (step, MiB)."""
    return round(float(np.polyfit(*zip(*points), 1)[0]) * 100, 3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--sampler", default="transformers")
    parser.add_argument("--output")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "lite_ppo.py", *f"""--sampler {args.sampler} --steps {args.steps} --prompts-per-step 8 --group-size 8 --lr 1e-5 --eval-every 25
            --eval-size 10 --save-every 10 --reward-workers 2 --output-dir {folder}""".split()]  # fmt: skip
        began, run = time.time(), None
        log = open(Path(folder, "console"), "w")
        run = subprocess.Popen(command, cwd=HERE, stdout=log, stderr=log)
        low: dict[int, dict[int, float]] = {}  # of each process: the least and the most MiB in each window of steps
        high: dict[int, dict[int, float]] = {}
        files: dict[int, list[tuple[int, int]]] = {}
        names, counts, step, alive, next_look = {}, [], -1, [run.pid], 0.0
        metrics = Path(folder, "metrics.jsonl")
        lines = None
        while run.poll() is None:
            if lines is None and metrics.exists():
                lines = open(metrics, "rb")
            step += lines.read().count(b"\n") if lines else 0  # only what is new
            if time.monotonic() > next_look:
                next_look, alive = time.monotonic() + 2, family(run.pid)
                counts.append((step, len(alive)))
                for i, pid in enumerate(alive):  # the judge is the trainer's child, the workers are the judge's
                    names.setdefault(pid, ("trainer", "judge", "worker")[min(i, 2)])
                    if (number := open_files(pid)) and step >= 0:
                        files.setdefault(pid, []).append((step, number))
            for pid in alive if step >= 0 else ():
                if (mib := resident(pid)) is not None:
                    window = step // WINDOW
                    for extreme, seen in (min, low), (max, high):
                        seen.setdefault(pid, {})[window] = extreme(mib, seen.get(pid, {}).get(window, mib))
            time.sleep(0.01)
        code, seconds = run.returncode, time.time() - began
        steps_done = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
        left = [pid for pid in low if Path(f"/proc/{pid}").exists()]
    rows = []
    for pid, windows in low.items():
        late = [w for w in windows if args.steps / 2 <= w * WINDOW and (w + 1) * WINDOW <= args.steps]  # whole ones
        if len(late) > 2:
            numbers = [number for step, number in files[pid] if step >= args.steps / 2]
            held, most = ([(w * WINDOW, seen[pid][w]) for w in late] for seen in (low, high))
            rows.append(dict(process=names[pid], held_first=round(held[0][1], 1), held_last=round(held[-1][1], 1), held_per_100_steps=slope(held),
                             most_first=round(most[0][1], 1), most_last=round(most[-1][1], 1), most_per_100_steps=slope(most), held=[round(mib, 1) for _, mib in held],
                             most=[round(mib, 1) for _, mib in most], files_first=numbers[0], files_last=numbers[-1]))  # fmt: skip
    print(f"{args.steps} steps in {seconds:.0f} s, exit code {code}")
    print(f"{'process':<10}{'held, MiB':>19}{'per 100 steps':>14}{'most, MiB':>19}{'per 100 steps':>14}{'open files':>15}")
    for row in rows:
        held, most = (f"{row[f'{name}_first']:>9.1f} -> {row[f'{name}_last']:<6.1f}{row[f'{name}_per_100_steps']:>14.2f}" for name in ("held", "most"))
        print(f"{row['process']:<10}{held}{most}{row['files_first']:>9} -> {row['files_last']}")
    late_counts = [n for step, n in counts if step >= args.steps / 2]
    laws = {
        "exit code 0, each step once": code == 0 and steps_done == list(range(args.steps + 1)),
        "every process holds under 1 MiB more per 100 steps": len(rows) == 4 and all(row["held_per_100_steps"] < 1 for row in rows),
        "open files do not grow": all(row["files_last"] <= row["files_first"] + 2 for row in rows),
        "processes do not grow": bool(late_counts) and max(late_counts) <= late_counts[0],
        "no process left over": not left,
    }
    for law, holds in laws.items():
        print(f"{'PASS' if holds else 'FAIL'}  {law}")
    if args.output:
        record = dict(command="python " + " ".join(["benchmarks/soak.py", *sys.argv[1:]]), date=f"{datetime.now():%Y-%m-%d}", machine=f"{os.cpu_count()} cores, {platform.machine()}",
                      seconds=round(seconds), processes=rows, laws=laws)  # fmt: skip
        Path(args.output).write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(laws.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
