"""Isolated evaluation: one trick at a time, over difficulty, model size, alignment and seeds.

    python experiments/run.py                      # every question on the toy; resumable
    python experiments/run.py --reduced            # one environment of each kind, two seeds
    python experiments/run.py --only clip methods  # some of the questions

A run is lite_ppo.py with the flags of an environment (model, data) and of a setting (one trick
switched). Exception: the settings of definitions.py replace the advantage. Each run is a fork of
this process with one thread; those of real.py are commands. A finished run is one line of the
results file: flags, changed settings, curves, final figures. A second call makes only the missing
runs. plot.py turns the file into figures and tables.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import math
import multiprocessing as mp
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from datetime import date
from multiprocessing.connection import wait
from pathlib import Path

# One thread per run: runs share the cores, and sums are the same on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from definitions import DEFINITIONS, OtherStd
from grid import QUESTIONS, Run, current_flags, questions, reduced_questions
from tqdm import tqdm

import lite_ppo
from support import toy
from support.checkpoints import checkpoints
from support.logs import read_jsonl

HERE = Path(__file__).resolve().parent

CURVES = """
reward/mean reward/std reward/std_within reward/solve_all reward/solve_none
response/length_mean response/truncated response/looping
policy/entropy policy/clip_low policy/clip_high policy/approx_kl policy/grad_norm
rollout/responses rollout/logprob_gap_mean time/step
""".split()
LATE = CURVES[5:]  # the final figures: mean of the last quarter of the run

PRELOADED = [  # slow imports that every fork would repeat
    "matplotlib.figure",
    "torch.utils.tensorboard",
    "transformers.models.qwen3.modeling_qwen3",
]


# ---- a run as one line ---------------------------------------------------------------------------


def three_digits(value):
    """Numbers in the results have three significant digits, enough for every figure."""
    return float(f"{value:.3g}") if isinstance(value, float) else value


def evaluations(log: list[dict]) -> dict[str, list]:
    """The steps that were evaluated, and the metrics of each evaluation."""
    rows = [row for row in log if any(key.startswith("eval/") for key in row)]
    found = {"step": [row["step"] for row in rows]}
    for key in rows[-1]:
        if key.startswith("eval/") and not key.endswith(("_low", "_high")):
            found[key] = [three_digits(row[key]) for row in rows]
    return found


def final_figures(steps: list[dict], evaluation: dict[str, list]) -> dict[str, float]:
    """Accuracy before and after, reward over all steps, the rest over the last quarter."""
    sets = [values for key, values in evaluation.items() if key.endswith("/accuracy")]
    final = {
        "accuracy": statistics.mean(values[-1] for values in sets),
        "accuracy_before": statistics.mean(values[0] for values in sets),
        "reward": statistics.mean(row["reward/mean"] for row in steps),
    }
    late = steps[-max(1, len(steps) // 4) :]
    for key in LATE:
        if key in late[-1]:
            final[key] = statistics.mean(row[key] for row in late)
    return {key: three_digits(float(value)) for key, value in final.items()}


def clipped_tokens(folder: Path) -> dict[str, list]:
    """The 20 tokens that were clipped most, on each side."""
    counts = {"low": Counter(), "high": Counter()}
    for row in read_jsonl(folder / "clipped.jsonl"):
        for side, counter in counts.items():
            counter.update(dict(row[side]))
    return {side: counter.most_common(20) for side, counter in counts.items()}


def without_folders(value):
    """A setting without the folders of this machine: NAME=/a/b.jsonl is NAME=b.jsonl."""
    if isinstance(value, list):
        return [without_folders(part) for part in value]
    return re.sub(r"(^|=)/.*/", r"\1", value) if isinstance(value, str) else value


def changed_settings(folder: Path) -> dict:
    """The settings of a run that differ from the defaults."""
    defaults = json.loads(json.dumps(dataclasses.asdict(lite_ppo.Config())))
    config = json.loads((folder / "config.json").read_text())
    return {
        key: without_folders(value)
        for key, value in config.items()
        if value != defaults.get(key) and key != "output_dir"
    }


def record(run: Run, folder: Path, seconds: float) -> dict:
    """A finished run as one line of the results."""
    log = read_jsonl(folder / "metrics.jsonl")
    steps = [row for row in log if "reward/mean" in row]
    evaluation = evaluations(log)
    line = {
        "environment": run.environment,
        "setting": run.setting,
        "seed": run.seed,
        "seconds": round(seconds, 1),
        "date": f"{date.today()}",
        "flags": run.flags,
        "config": changed_settings(folder),
        "final": final_figures(steps, evaluation),
        "curve": {},
        "evaluation": evaluation,
        "clipped": clipped_tokens(folder),
    }
    for key in CURVES:
        if key in steps[-1]:
            line["curve"][key] = [three_digits(row[key]) for row in steps]
    if run.setting in DEFINITIONS:
        line["advantage"] = run.setting
    return line


# ---- running -------------------------------------------------------------------------------------


def preload() -> None:
    """Import slow packages once, before the forks."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def arguments(run: Run, folder: Path) -> list[str]:
    """The command line of a run."""
    return [*shlex.split(run.flags), "--seed", str(run.seed), "--output-dir", str(folder)]


def child(run: Run, folder: Path) -> None:
    """A run in a fork of this process. Its output goes to a file."""
    torch.set_num_threads(1)
    console = os.open(folder / "console", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(console, sys.stdout.fileno())
    os.dup2(console, sys.stderr.fileno())
    sys.argv = ["lite_ppo.py", *arguments(run, folder)]
    if run.setting in DEFINITIONS:
        OtherStd(lite_ppo, run.setting)
    sys.exit(lite_ppo.main())


def launched(command: list[str], console: Path) -> None:
    """A run as a command of its own. Its output goes to a file."""
    with open(console, "w") as file:
        done = subprocess.run(command, stdout=file, stderr=file)
    sys.exit(done.returncode)


LAST_LINES = 40  # of a failed run, which are kept


def last_lines(console: Path) -> list[str]:
    """The end of a run's output. Of a progress bar, only its last state."""
    text = console.read_text(errors="replace") if console.exists() else ""
    lines = [line.rsplit("\r", 1)[-1] for line in text.replace("\r\n", "\n").split("\n")]
    return [line[-300:] for line in lines if line.strip()][-LAST_LINES:] or ["no output"]


@dataclass
class Started:
    """A run in progress."""

    run: Run
    folder: Path
    process: mp.Process
    began: float


@dataclass
class Pool:
    """Runs side by side. Each finished run becomes a line of the results file."""

    results: Path
    folder: Path  # of the run directories
    jobs: int = 1
    launch: str = ""  # the command that starts a run; empty: fork this process
    keep: bool = False  # keep the run directories
    keep_models: bool = True  # and the weights in them
    flags: str = ""  # of every run: what does not change the result, such as paths
    stagger: float = 0  # seconds between two starts
    deadline: float = math.inf  # no run starts later

    def folder_of(self, run: Run) -> Path:
        """The directory of a run."""
        return self.folder / run.name.replace("/", "-").replace(" ", "_")

    def start(self, run: Run) -> Started:
        """Start a run in its directory."""
        folder = self.folder_of(run)
        if not self.keep:  # left by a grid that was killed
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        target, args = child, (run, folder)
        if self.launch:
            script = str(HERE.parent / "lite_ppo.py")
            flags = [*shlex.split(self.flags), *arguments(run, folder)]
            command = [*shlex.split(self.launch), script, *flags]
            target, args = launched, (command, folder / "console")
        process = mp.get_context("fork").Process(target=target, args=args)
        process.start()
        return Started(run, folder, process, time.time())

    def finish(self, started: Started) -> str:
        """Add the run to the results. Returns the failure in words, or nothing."""
        started.process.join()
        code, folder = started.process.exitcode, started.folder
        if code:
            return self.keep_reason(started)
        try:
            row = record(started.run, folder, time.time() - started.began)
        except (OSError, ValueError, KeyError, IndexError) as error:
            reason = f"{type(error).__name__}: {error}"
            return f"{started.run.name}: the logs in {folder} cannot be read: {reason}"
        with open(self.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if not self.keep:
            shutil.rmtree(folder)
        elif not self.keep_models:
            for weights in (folder / "final", *checkpoints(folder)):
                shutil.rmtree(weights, ignore_errors=True)
        return ""

    def keep_reason(self, started: Started) -> str:
        """Print and store the end of a failed run's output. Returns the failure in words."""
        lines = last_lines(started.folder / "console")
        kept = self.results.with_suffix("") / "failed" / f"{started.folder.name}.txt"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text("\n".join(lines) + "\n", encoding="utf-8")
        for line in lines:
            tqdm.write(f"    {line}")
        name, code = started.run.name, started.process.exitcode
        return f"{name}: exit code {code}, {lines[-1]} (log: {kept})"

    def run_all(self, runs: list[Run]) -> list[str]:
        """Make the runs, `jobs` at a time. Returns the failures in words."""
        waiting = runs[::-1]
        running: dict[int, Started] = {}
        failures = []
        with tqdm(total=len(runs), unit="run", dynamic_ncols=True, smoothing=0) as bar:
            while running or (waiting and time.time() < self.deadline):
                pause = None  # until a run ends
                if waiting and len(running) < self.jobs and time.time() < self.deadline:
                    started = self.start(waiting.pop())
                    running[started.process.sentinel] = started
                    pause = self.stagger
                for sentinel in wait(list(running), pause):
                    failure = self.finish(running.pop(sentinel))
                    bar.update()
                    if failure:
                        failures.append(failure)
                        tqdm.write(failure)
        return failures + [f"{run.name}: not started, the time is over" for run in waiting[::-1]]


# ---- the results file ----------------------------------------------------------------------------


def load(results: Path) -> list[dict]:
    """The newest line of each run, with the flags that exist today."""
    rows = {}
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            raise SystemExit(f"{results}: line {number} is not JSON; remove it") from None
        row["flags"] = current_flags(row["flags"])
        rows[row["environment"], row["setting"], row["seed"]] = row
    return list(rows.values())


def open_results(results: Path) -> None:
    """Make the folder, and remove an incomplete last line. Its run is made again."""
    results.parent.mkdir(parents=True, exist_ok=True)
    if results.exists():
        text = results.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            results.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")


def by_seed(run: Run) -> int:
    """Sort key: the number of the seed within its question."""
    return run.seed % 100  # the sweep has seeds from 101


def complete(runs: list[Run], pool: Pool) -> list[str]:
    """Make the runs that are not in the results. Returns the failures in words.

    Seed by seed, so that half a grid is a whole grid with fewer seeds.
    """
    runs = list(dict.fromkeys(sorted(runs, key=by_seed)))
    todo = missing(runs, pool.results)
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them in {pool.results}")
    return pool.run_all(todo)


def missing(runs: list[Run], results: Path) -> list[Run]:
    """The runs that have no line, or one with other flags."""
    done = set()
    for row in load(results):
        name = f"{row['environment']}/{row['setting']}/{row['seed']}"
        done.add((name, row["flags"]))
    return [run for run in runs if (run.name, current_flags(run.flags)) not in done]


# ---- command line --------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", default=[], metavar="QUESTION", help=", ".join(QUESTIONS))
    add("--reduced", action="store_true", help="one environment of each kind, two seeds")
    add("--results", type=Path, help="default: results/toy.jsonl, or reduced.jsonl")
    add("--folder", type=Path, default=HERE.parent / "runs/experiments", help="run directories")
    add("--keep", action="store_true", help="keep run directories")
    add("--jobs", type=int, help="runs at a time; default: one per core")
    args = parser.parse_args()
    if unknown := sorted(set(args.only) - set(QUESTIONS)):
        parser.error(f"--only {' '.join(unknown)}: the questions are {', '.join(QUESTIONS)}")
    return args


def stages(only: list[str]) -> list[list[str]]:
    """Questions in two stages: the methods need the learning rates that the sweep finds."""
    chosen = set(only or QUESTIONS)
    if "methods" in chosen:
        chosen.add("sweep")
    first = [name for name in QUESTIONS if name in chosen and name != "methods"]
    return [first, ["methods"]] if "methods" in chosen else [first]


def run_toy(pool: Pool, only: list[str], reduced: bool) -> list[str]:
    """The toy's grid. Returns the failures in words."""
    grid = reduced_questions if reduced else questions
    failures = []
    for names in stages(only):
        if any(" at " in failure for failure in failures):
            break  # an incomplete sweep gives no rate
        found = grid(load(pool.results))
        runs = [run for name in names for run in found[name]]
        for model in dict.fromkeys(flag_value(run, "--model") for run in runs):
            toy.resolve_model(model)  # made once, before the forks
        failures += complete(runs, pool)
    return failures


def flag_value(run: Run, flag: str) -> str:
    """The value of a flag of the run."""
    words = run.flags.split()
    return words[words.index(flag) + 1]


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def report(failures: list[str], results: Path, began: float) -> int:
    """Print how it went. Returns the exit code."""
    print(f"{time.time() - began:.0f} s; results in {results}")
    print(f"figures: python experiments/plot.py --results {results}")
    for failure in failures:
        print(failure)
    return 1 if failures else 0


def main() -> int:
    args = parse_arguments()
    began = time.time()
    default = HERE / ("results/reduced.jsonl" if args.reduced else "results/toy.jsonl")
    results = args.results or default
    open_results(results)
    preload()
    pool = Pool(results, args.folder, args.jobs or cores(), keep=args.keep)
    return report(run_toy(pool, args.only, args.reduced), results, began)


if __name__ == "__main__":
    sys.exit(main())
