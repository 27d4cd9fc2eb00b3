"""A long run on the toy, watched from outside: memory, open files and number of its processes must stay flat.

    python benchmarks/soak.py [--steps 500] [--output soak.json]

Checkpoints every 10 steps, evaluates every 25, grades with the math reward in two workers. Every two seconds each process of the run is
looked at (Linux): resident memory, open files. Slopes are least-squares lines over the second half of the steps.
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


def look(pid: int) -> tuple[float, int, str] | None:
    """Resident MiB, open files, command."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(f"/proc/{pid}/fd")), command
    except OSError:
        return None


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
        seen: dict[int, list[tuple[int, float, int]]] = {}  # of each process: step, MiB, open files
        names, counts = {}, []
        metrics = Path(folder, "metrics.jsonl")
        while run.poll() is None:
            step = metrics.read_bytes().count(b"\n") - 1 if metrics.exists() else -1
            alive = family(run.pid)
            counts.append((step, len(alive)))
            for pid in alive:
                if (found := look(pid)) and step >= 0:
                    seen.setdefault(pid, []).append((step, *found[:2]))
                    names[pid] = "trainer" if pid == run.pid else "worker" if pid in family(run.pid)[2:] else "judge"
            time.sleep(2)
        code, seconds = run.returncode, time.time() - began
        steps_done = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
        left = [pid for pid in seen if Path(f"/proc/{pid}").exists()]
    rows = []
    for pid, points in seen.items():
        late = np.array([point for point in points if point[0] >= args.steps / 2], float)
        if len(late) > 10:
            slope = np.polyfit(late[:, 0], late[:, 1], 1)[0] * 100
            rows.append(dict(process=names[pid], mib_first=round(late[0, 1], 1), mib_last=round(late[-1, 1], 1), mib_per_100_steps=round(float(slope), 3),
                             files_first=int(late[0, 2]), files_last=int(late[-1, 2]), files_most=int(late[:, 2].max())))  # fmt: skip
    print(f"{args.steps} steps in {seconds:.0f} s, exit code {code}")
    print(f"{'process':<10}{'MiB':>18}{'MiB per 100 steps':>20}{'open files':>14}")
    for row in rows:
        print(f"{row['process']:<10}{row['mib_first']:>8.1f} -> {row['mib_last']:<8.1f}{row['mib_per_100_steps']:>18.2f}{row['files_first']:>8} -> {row['files_last']}")
    late_counts = [n for step, n in counts if step >= args.steps / 2]
    laws = {
        "exit code 0, each step once": code == 0 and steps_done == list(range(args.steps + 1)),
        "every process: under 1 MiB per 100 steps": bool(rows) and all(row["mib_per_100_steps"] < 1 for row in rows),
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
