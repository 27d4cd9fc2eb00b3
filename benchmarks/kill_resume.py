"""Kill a run at random moments, resume it each time, and compare it with an undisturbed run.

    python benchmarks/kill_resume.py               # one rank, 20 kills
    python benchmarks/kill_resume.py --ranks 2     # one is killed, the launcher ends the other
    python benchmarks/kill_resume.py --sampler vllm --kills 4

Each start of the run draws a phase (rollout, reward, logprobs, update, sync, save, evaluation), how
often that phase begins before the kill, and a delay within it. Then the process gets SIGKILL, which
no process can catch. The law: the weights of the final model have the same bits, every step is once
in metrics.jsonl with the same numbers, and the samples are the same.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("rollout", "reward", "logprobs", "update", "sync", "save", "evaluation")
FLAGS = """--prompts-per-step 8 --group-size 4 --eval-every 2 --eval-size 8 --save-every 1
    --reward-workers 1 --micro-batch-tokens 600""".split()

# ---- the process that kills itself ---------------------------------------------------------------


class Bomb:
    """Kills this process `delay` seconds into the count-th phase of this name."""

    def __init__(self, phase: str, count: int, delay: float):
        self.phase, self.left, self.delay = phase, count, delay

    def begin(self, phase: str) -> None:
        if phase != self.phase:
            return
        self.left -= 1
        if self.left == 0:
            threading.Timer(self.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()


def run_with_bomb(bomb: Bomb) -> int:
    """Run the trainer in this process."""
    sys.path.insert(0, str(ROOT))
    from support.clock import Clock

    enter = Clock.__call__

    @contextlib.contextmanager
    def enter_with_bomb(clock, phase):
        bomb.begin(phase)
        with enter(clock, phase):
            yield

    Clock.__call__ = enter_with_bomb
    import lite_ppo  # after the change: its decorators keep the clock that they find

    evaluate = lite_ppo.evaluate

    def evaluate_with_bomb(*args):
        bomb.begin("evaluation")
        return evaluate(*args)

    lite_ppo.evaluate = evaluate_with_bomb
    return lite_ppo.main()


def run_child() -> int:
    """Arguments: --doomed PHASE COUNT DELAY RANK, then the flags of lite_ppo.py."""
    phase, count, delay, victim, *flags = sys.argv[2:]
    sys.argv[1:] = flags
    if os.environ.get("RANK", "0") != victim:
        count = 0  # this rank survives
    return run_with_bomb(Bomb(phase, int(count), float(delay)))


# ---- kills and comparison ------------------------------------------------------------------------


class Runs:
    """Starts the trainer with the same flags, in folders below `work`."""

    def __init__(self, args, work: Path):
        self.args, self.work = args, work
        self.launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        self.launcher += ["--nproc-per-node", str(args.ranks)]
        self.flags = ["--sampler", args.sampler, "--steps", str(args.steps), *FLAGS]
        self.flags += args.flags.split()

    def start(self, folder: str, *doomed: str) -> subprocess.CompletedProcess:
        script = [str(ROOT / "lite_ppo.py")]
        if doomed:
            script = [str(Path(__file__).resolve()), "--doomed", *doomed]
        command = [*self.launcher, *script, *self.flags, "--output-dir", str(self.work / folder)]
        environment = os.environ | dict(OMP_NUM_THREADS="1")
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    def complete(self, folder: str) -> None:
        done = self.start(folder)
        if done.returncode:
            sys.exit(f"the run failed:\n{done.stderr[-3000:]}")

    def steps_done(self, folder: str) -> int:
        return max(0, len(rows(self.work / folder)) - 1)  # the first row is step 0

    def kill_often(self, folder: str) -> Counter:
        """Start and kill until there are enough kills, or the run is over. Returns the phases."""
        args, rng, kills = self.args, random.Random(self.args.seed), Counter()
        while kills.total() < args.kills:
            phase, delay = rng.choice(PHASES), rng.choice([0, rng.uniform(0, 0.1), rng.random()])
            steps_done = self.steps_done(folder)
            most = 1 if steps_done > args.steps - 6 else 2  # else the run ends before the last kill
            count, victim = rng.randint(1, most), rng.randrange(args.ranks)
            done = self.start(folder, phase, str(count), str(delay), str(victim))
            steps_done = self.steps_done(folder)
            if done.returncode:
                if "SIGKILL" not in done.stderr and "-9" not in done.stderr:
                    sys.exit(f"the run ended in another way:\n{done.stderr[-3000:]}")
                kills[phase] += 1
                print(f"killed in {phase} + {delay:.2f} s, {steps_done} steps logged", flush=True)
            elif steps_done == args.steps:
                break
        return kills


def rows(folder: Path, file: str = "metrics.jsonl") -> list[dict]:
    """The rows of a log without times and memory. The last line may be incomplete."""
    found, path = [], folder / file
    measured = ("time/", "perf/", "memory/")
    for line in path.read_text().split("\n") if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            found.append({key: row[key] for key in row if not key.startswith(measured)})
    return found


def digest(folder: Path) -> list[str]:
    files = sorted(folder.glob("*.safetensors"))
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]


def compare(whole: Path, killed: Path, steps: int) -> dict[str, bool]:
    samples = [rows(folder, "samples.jsonl") for folder in (whole, killed)]
    logged = [row["step"] for row in rows(killed)]
    return {
        "weights of the final model, bit for bit": digest(whole / "final")
        == digest(killed / "final"),
        "each step once in metrics.jsonl": logged == list(range(steps + 1)),
        "metrics equal": rows(whole) == rows(killed),
        "samples equal": samples[0] == samples[1],
        "no incomplete file left": not list(killed.glob("partial*")),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--sampler", default="transformers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flags", default="", help="more flags of lite_ppo.py, in one string")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    runs = Runs(args, work)
    runs.complete("whole")
    began = time.time()
    kills = runs.kill_often("killed")
    runs.complete("killed")
    laws = compare(work / "whole", work / "killed", args.steps)
    if args.sampler == "vllm" and not laws["weights of the final model, bit for bit"]:
        print("(with vLLM, only equal responses are promised)")
        laws.pop("weights of the final model, bit for bit")
        laws.pop("metrics equal")
    seconds = time.time() - began
    counts = dict(kills)
    print(
        f"{kills.total()} kills {counts} in {seconds:.0f} s, {args.ranks} rank(s), {args.sampler}"
    )
    for law, holds in laws.items():
        print(f"{'PASS' if holds else 'FAIL'}  {law}")
    if not all(laws.values()):
        print(f"the runs are in {work}")
        return 1
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(run_child() if sys.argv[1:2] == ["--doomed"] else main())
