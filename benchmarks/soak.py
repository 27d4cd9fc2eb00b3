"""A long run of the toy, observed from outside: memory, files and processes must not grow.

    python benchmarks/soak.py [--steps 500] [--output soak.json]

It saves a checkpoint every 10 steps, evaluates every 25 and grades with the math reward in two
workers (Linux). It reads the resident memory of each process every hundredth of a second, and the
processes and their open files every two seconds. Within a step, memory rises and falls by 100 MiB
with the lengths of the responses. So what a process holds is the minimum over 20 steps, and that
must not grow. The first half of the steps is warm-up; the slope is a least-squares line over the
second half. The maximum over 20 steps is printed as well.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import datetime
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 20  # steps


# ---- processes -----------------------------------------------------------------------------------


def family(root: int) -> list[int]:
    """A process and all its descendants."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
            parents[int(status.parent.name)] = int(fields[1])
        except OSError:
            continue  # it has ended in the meantime
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def resident(pid: int) -> float | None:
    """MiB; None after the end of the process."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, IndexError):
        return None


def open_files(pid: int) -> int | None:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None


# ---- observation ---------------------------------------------------------------------------------


class Observer:
    """Memory, open files and number of the processes of a run, by step."""

    def __init__(self, run: subprocess.Popen, metrics: Path):
        self.run, self.metrics = run, metrics
        self.lines = None  # the open log
        self.step = -1
        self.alive = [run.pid]
        self.look_every = 2.0  # seconds between looks at processes and files
        self.next_look = 0.0
        self.names: dict[int, str] = {}
        self.counts: list[tuple[int, int]] = []  # (step, processes)
        self.files: dict[int, list[tuple[int, int]]] = defaultdict(list)  # pid: (step, files)
        # pid: window of steps: MiB
        self.low: dict[int, dict[int, float]] = defaultdict(dict)
        self.high: dict[int, dict[int, float]] = defaultdict(dict)

    def observe(self) -> None:
        """Look until the run has ended."""
        while self.run.poll() is None:
            self.count_steps()
            if time.monotonic() > self.next_look:
                self.next_look = time.monotonic() + self.look_every
                self.look_at_processes()
            if self.step >= 0:
                self.look_at_memory()
            time.sleep(0.01)

    def count_steps(self) -> None:
        if self.lines is None and self.metrics.exists():
            self.lines = open(self.metrics, "rb")
        if self.lines:
            self.step += self.lines.read().count(b"\n")  # reads only new lines

    def look_at_processes(self) -> None:
        self.alive = family(self.run.pid)
        self.counts.append((self.step, len(self.alive)))
        for i, pid in enumerate(self.alive):
            # the server is the child of the trainer, the workers are children of the server
            self.names.setdefault(pid, ("trainer", "server", "worker")[min(i, 2)])
            number = open_files(pid)
            if number and self.step >= 0:
                self.files[pid].append((self.step, number))

    def look_at_memory(self) -> None:
        window = self.step // WINDOW
        for pid in self.alive:
            mib = resident(pid)
            if mib is not None:
                self.low[pid][window] = min(mib, self.low[pid].get(window, mib))
                self.high[pid][window] = max(mib, self.high[pid].get(window, mib))


def slope(windows: list[int], mib: list[float]) -> float:
    """MiB per 100 steps."""
    steps = [window * WINDOW for window in windows]
    return round(float(np.polyfit(steps, mib, 1)[0]) * 100, 3)


def summarize(seen: Observer, steps: int) -> list[dict]:
    """One row for each process that lived through three windows of the second half."""
    rows = []
    for pid in seen.low:
        late = [w for w in seen.low[pid] if steps / 2 <= w * WINDOW and (w + 1) * WINDOW <= steps]
        if len(late) <= 2:
            continue
        row = dict(process=seen.names[pid])
        for name, extreme in (("held", seen.low[pid]), ("most", seen.high[pid])):
            mib = [extreme[window] for window in late]
            row[f"{name}_first"] = round(mib[0], 1)
            row[f"{name}_last"] = round(mib[-1], 1)
            row[f"{name}_per_100_steps"] = slope(late, mib)
            row[name] = [round(x, 1) for x in mib]
        numbers = [number for step, number in seen.files[pid] if step >= steps / 2]
        row["files_first"], row["files_last"] = numbers[0], numbers[-1]
        rows.append(row)
    return rows


def check_laws(seen: Observer, rows: list[dict], steps: int, logged: list[int]) -> dict[str, bool]:
    late = [number for step, number in seen.counts if step >= steps / 2]
    flat = [row["held_per_100_steps"] < 1 for row in rows]
    files = [row["files_last"] <= row["files_first"] + 2 for row in rows]
    complete = seen.run.returncode == 0 and logged == list(range(steps + 1))
    return {
        "exit code 0, each step once": complete,
        "every process holds under 1 MiB more per 100 steps": len(rows) == 4 and all(flat),
        "open files do not grow": all(files),
        "processes do not grow": bool(late) and max(late) <= late[0],
        "no process left over": not any(Path(f"/proc/{pid}").exists() for pid in seen.low),
    }


def print_rows(rows: list[dict]) -> None:
    memory = f"{'held, MiB':>19}{'per 100 steps':>14}{'most, MiB':>19}{'per 100 steps':>14}"
    print(f"{'process':<10}{memory}{'open files':>15}")
    for row in rows:
        line = f"{row['process']:<10}"
        for name in ("held", "most"):
            first, last, growth = (row[f"{name}_{x}"] for x in ("first", "last", "per_100_steps"))
            line += f"{first:>9.1f} -> {last:<6.1f}{growth:>14.2f}"
        print(f"{line}{row['files_first']:>9} -> {row['files_last']}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--sampler", default="transformers")
    parser.add_argument("--flags", default="", help="more flags of lite_ppo.py, in one string")
    parser.add_argument("--output", help="JSON file")
    args = parser.parse_args()
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        flags = f"""--sampler {args.sampler} --steps {args.steps} --prompts-per-step 8
            --group-size 8 --lr 1e-5 --eval-every 25 --eval-size 10 --save-every 10
            --reward-workers 2 --output-dir {folder} {args.flags}"""
        command = [sys.executable, "lite_ppo.py", *flags.split()]
        console, metrics = Path(folder, "console"), Path(folder, "metrics.jsonl")
        with open(console, "w") as log:
            run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
            seen = Observer(run, metrics)
            seen.observe()
        if not metrics.exists():
            sys.exit(f"the run failed:\n{console.read_text()[-3000:]}")
        logged = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    seconds = time.time() - began
    rows = summarize(seen, args.steps)
    laws = check_laws(seen, rows, args.steps, logged)
    print(f"{args.steps} steps in {seconds:.0f} s, exit code {run.returncode}")
    print_rows(rows)
    for law, holds in laws.items():
        print(f"{'PASS' if holds else 'FAIL'}  {law}")
    if args.output:
        record = dict(
            command=" ".join(["python", "benchmarks/soak.py", *sys.argv[1:]]),
            date=f"{datetime.now():%Y-%m-%d}",
            machine=f"{os.cpu_count()} cores, {platform.machine()}",
            seconds=round(seconds),
            processes=rows,
            laws=laws,
        )
        Path(args.output).write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(laws.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
