"""Kill a run at random moments, resume it each time, and compare it with the run that nobody disturbed.

    python benchmarks/kill_resume.py                          # one rank, 20 kills
    python benchmarks/kill_resume.py --ranks 2                # one of the ranks is killed, the launcher ends the other
    python benchmarks/kill_resume.py --sampler vllm --kills 4

Each life of the run draws a phase (rollout, reward, logprobs, update, sync, save, evaluation), how many times that phase
may begin before, and a delay within it; then the process gets SIGKILL, which nothing can catch. The law: the weights of the
final model are the same bits, every step stands once in metrics.jsonl with the same numbers, and so do the samples.
"""

import argparse
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
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
PHASES = ("rollout", "reward", "logprobs", "update", "sync", "save", "evaluation")


def doomed(phase: str, count: int, delay: float, victim: int) -> None:
    """Run the trainer in this process; rank `victim` kills itself `delay` seconds into the count-th such phase."""
    sys.path.insert(0, str(HERE))
    import guard
    import lite_ppo

    if int(os.environ.get("RANK", 0)) == victim:
        begun, enter, evaluate = [], guard.Clock.__call__, lite_ppo.evaluate

        def begin(name: str) -> None:
            begun.append(name)
            if name == phase and begun.count(name) == count:
                threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()

        guard.Clock.__call__ = lambda clock, name: (begin(name), enter(clock, name))[1]
        lite_ppo.evaluate = lambda *args: (begin("evaluation"), evaluate(*args))[1]
    sys.exit(lite_ppo.main())


def main() -> int:
    if sys.argv[1:2] == ["--doomed"]:
        phase, count, delay, victim, *sys.argv[1:] = sys.argv[2:]
        doomed(phase, int(count), float(delay), int(victim))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--sampler", default="transformers")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    work, rng = Path(tempfile.mkdtemp()), random.Random(args.seed)
    flags = f"""--sampler {args.sampler} --steps {args.steps} --prompts-per-step 8 --group-size 4 --eval-every 2 --eval-size 8 --save-every 1 --reward-workers 1
        --micro-batch-tokens 600""".split()  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
    environment = os.environ | dict(OMP_NUM_THREADS="1")

    def start(folder: str, *before: str) -> subprocess.CompletedProcess:
        script = [str(Path(__file__).resolve()), "--doomed", *before] if before else [str(HERE / "lite_ppo.py")]
        return subprocess.run([*launcher, *script, *flags, "--output-dir", str(work / folder)], capture_output=True, text=True, env=environment)

    whole = start("whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    kills, lives, began = {}, 0, time.time()
    while sum(kills.values()) < args.kills:
        phase, delay = rng.choice(PHASES), rng.choice([0, rng.uniform(0, 0.1), rng.uniform(0, 1)])
        steps_done = len(rows(work / "killed")) - 1
        most = 1 if steps_done > args.steps - 6 else 2  # or the run would be over before the last kill
        life = start("killed", phase, str(rng.randint(1, most)), str(delay), str(rng.randrange(args.ranks)))
        lives += 1
        if life.returncode:
            assert "SIGKILL" in life.stderr or "-9" in life.stderr, life.stderr[-3000:]
            kills[phase] = kills.get(phase, 0) + 1
            print(f"killed in {phase} + {delay:.2f} s, steps in the log: {len(rows(work / 'killed')) - 1}", flush=True)
        elif len(rows(work / "killed")) == args.steps + 1:
            break
    last = start("killed")
    assert last.returncode == 0, last.stderr[-3000:]
    laws = {
        "weights of the final model, bit for bit": digest(work / "whole/final") == digest(work / "killed/final"),
        "each step once in metrics.jsonl": [row["step"] for row in rows(work / "killed")] == list(range(args.steps + 1)),
        "metrics equal": rows(work / "whole") == rows(work / "killed"),
        "samples equal": rows(work / "whole", "samples.jsonl") == rows(work / "killed", "samples.jsonl"),
        "nothing half-written left": not list((work / "killed").glob("partial*")),
    }
    if args.sampler == "vllm" and not laws["weights of the final model, bit for bit"]:
        print("(vLLM: only equal responses are promised)")
        laws.pop("weights of the final model, bit for bit"), laws.pop("metrics equal")
    print(f"{sum(kills.values())} kills {kills} in {time.time() - began:.0f} s, {args.ranks} rank(s), sampler {args.sampler}")
    for law, holds in laws.items():
        print(f"{'PASS' if holds else 'FAIL'}  {law}")
    if all(laws.values()):
        shutil.rmtree(work)
    else:
        print(f"look at {work}")
    return 0 if all(laws.values()) else 1


def rows(folder: Path, file: str = "metrics.jsonl") -> list[dict]:
    """The rows of a log, without what a clock says; the last line may be half-written."""
    found, path = [], folder / file
    for line in path.read_text().split("\n") if path.exists() else ():
        try:
            found.append({key: value for key, value in json.loads(line).items() if not key.startswith(("time/", "perf/", "memory/"))})
        except json.JSONDecodeError:
            continue
    return found


def digest(folder: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))]


if __name__ == "__main__":
    sys.exit(main())
