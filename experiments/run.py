"""Isolated evaluation: one trick at a time, over difficulty, model size, alignment and seeds.

    python experiments/run.py                      # every question on the toy; resumable
    python experiments/run.py --reduced            # one environment of each kind, two seeds
    python experiments/run.py --only clip methods  # some of the questions
    python experiments/run.py --models Qwen/Qwen3-4B-Base Qwen/Qwen3-4B \\
        --train-data easy medium hard --eval-data math500 aime24 amc23 \\
        --launch "torchrun --nproc-per-node 8" --flags "--steps 200 --minibatches 4" \\
        --results qwen3.jsonl                      # real models

A run is lite_ppo.py with the flags of an environment (model, data) and of a setting (one trick
switched). Exception: the settings of definitions.py replace the advantage. On the toy, each run is
a fork of this process with one thread. On real models, each run is a command. A finished run is
one line of the results file: flags, changed settings, curves, final figures. A second call makes
only the missing runs. plot.py turns the file into figures and tables.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import multiprocessing as mp
import os
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
from grid import (
    ISOLATED,
    METHODS,
    QUESTIONS,
    SETTINGS,
    Run,
    current_flags,
    questions,
    reduced_questions,
)
from tqdm import tqdm

import lite_ppo
from support import toy
from support.logs import read_jsonl

HERE = Path(__file__).resolve().parent

CURVES = """
reward/mean reward/std reward/std_within reward/solve_all reward/solve_none
response/length_mean response/truncated response/looping
policy/entropy policy/clip_low policy/clip_high policy/approx_kl policy/grad_norm
rollout/responses
""".split()
LATE = CURVES[5:]  # the final figures: mean of the last quarter of the run

MODEL_SETTINGS = {name: flags for name, flags in SETTINGS.items() if name not in DEFINITIONS}
MODEL_SETTINGS |= {f"preset {name}": flags for name, flags in METHODS.items()}

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


def changed_settings(folder: Path) -> dict:
    """The settings of a run that differ from the defaults."""
    defaults = json.loads(json.dumps(dataclasses.asdict(lite_ppo.Config())))
    config = json.loads((folder / "config.json").read_text())
    return {
        key: value
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
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def arguments(run: Run, folder: Path) -> list[str]:
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


def last_line(console: Path) -> str:
    lines = [line for line in console.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][-300:] if lines else "no output"


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

    def start(self, run: Run) -> Started:
        folder = self.folder / run.name.replace("/", "-").replace(" ", "_")
        if not self.keep:  # left by a grid that was killed
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        target, args = child, (run, folder)
        if self.launch:
            script = str(HERE.parent / "lite_ppo.py")
            command = [*shlex.split(self.launch), script, *arguments(run, folder)]
            target, args = launched, (command, folder / "console")
        process = mp.get_context("fork").Process(target=target, args=args)
        process.start()
        return Started(run, folder, process, time.time())

    def finish(self, started: Started) -> str:
        """Add the run to the results. Returns the failure in words, or nothing."""
        started.process.join()
        code, folder = started.process.exitcode, started.folder
        if code:
            console = folder / "console"
            return f"{started.run.name}: exit code {code}, {last_line(console)} (log: {console})"
        try:
            row = record(started.run, folder, time.time() - started.began)
        except (OSError, ValueError, KeyError, IndexError) as error:
            reason = f"{type(error).__name__}: {error}"
            return f"{started.run.name}: the logs in {folder} cannot be read: {reason}"
        with open(self.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if not self.keep:
            shutil.rmtree(folder)
        return ""

    def run_all(self, runs: list[Run]) -> list[str]:
        """Make the runs, `jobs` at a time. Returns the failures in words."""
        waiting = runs[::-1]
        running: dict[int, Started] = {}
        failures = []
        with tqdm(total=len(runs), unit="run", dynamic_ncols=True, smoothing=0) as bar:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    started = self.start(waiting.pop())
                    running[started.process.sentinel] = started
                for sentinel in wait(list(running)):
                    failure = self.finish(running.pop(sentinel))
                    bar.update()
                    if failure:
                        failures.append(failure)
                        tqdm.write(failure)
        return failures


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


def drop_cut_line(results: Path) -> None:
    """Remove an incomplete last line. Its run is made again."""
    if results.exists():
        text = results.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            results.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")


def by_seed(run: Run) -> int:
    return run.seed % 100  # the sweep has seeds from 101


def complete(runs: list[Run], pool: Pool) -> list[str]:
    """Make the runs that are not in the results. Returns the failures in words.

    Seed by seed, so that half a grid is a whole grid with fewer seeds.
    """
    done = set()
    for row in load(pool.results):
        name = f"{row['environment']}/{row['setting']}/{row['seed']}"
        done.add((name, row["flags"]))
    runs = list(dict.fromkeys(sorted(runs, key=by_seed)))
    missing = [run for run in runs if (run.name, current_flags(run.flags)) not in done]
    print(f"{len(runs)} runs, {len(runs) - len(missing)} of them in {pool.results}")
    return pool.run_all(missing)


# ---- command line --------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", default=[], metavar="QUESTION", help=", ".join(QUESTIONS))
    add("--reduced", action="store_true", help="one environment of each kind, two seeds")
    add("--results", type=Path, help="default: results/toy.jsonl, reduced.jsonl or models.jsonl")
    add("--folder", type=Path, default=HERE.parent / "runs/experiments", help="run directories")
    add("--keep", action="store_true", help="keep run directories (real models: always kept)")
    add("--jobs", type=int, help="runs at a time; default: one per core, or 1 with --models")
    add("--models", nargs="+", help="real models; the flags below need this one")
    add("--train-data", nargs="+", help="as for lite_ppo.py; one environment each")
    add("--eval-data", nargs="+", help="as for lite_ppo.py; all of them in each run")
    settings = f"default: {', '.join(ISOLATED)}; all: {', '.join(MODEL_SETTINGS)}"
    add("--settings", nargs="+", metavar="SETTING", help=settings)
    add("--seeds", nargs="+", type=int, help="default: 0 to 4")
    add("--flags", help="flags for every run")
    add("--launch", help='starts a run, such as "torchrun --nproc-per-node 8"; default: python')
    args = parser.parse_args()
    if message := contradiction(args):
        parser.error(message)
    return args


def contradiction(args: argparse.Namespace) -> str:
    """What is wrong with the command line, or nothing."""
    unknown = sorted(set(args.only) - set(QUESTIONS))
    if unknown:
        return f"--only {' '.join(unknown)}: the questions are {', '.join(QUESTIONS)}"
    if args.models:
        if args.only or args.reduced or not args.train_data or not args.eval_data:
            return "--models needs --train-data and --eval-data, and excludes --only and --reduced"
        for name in args.settings or ():
            if name not in MODEL_SETTINGS:
                return f"--settings {name!r}: real models take {', '.join(MODEL_SETTINGS)}"
        return ""
    for flag in ("train_data", "eval_data", "settings", "seeds", "flags", "launch"):
        if getattr(args, flag) is not None:
            return f"--{flag.replace('_', '-')} needs --models; the toy's grid sets its own"
    return ""


def short_names(models: list[str]) -> dict[str, str]:
    """The last part of each path, or the whole path where two models share it."""
    last = {model: Path(model).name for model in models}
    shared = Counter(last.values())
    return {model: name if shared[name] == 1 else model for model, name in last.items()}


def model_runs(args: argparse.Namespace) -> list[Run]:
    """The runs of real models, seed by seed."""
    names = short_names(args.models)
    runs = []
    for seed in args.seeds or range(5):
        for data in args.train_data:
            for model in args.models:
                eval_data = " ".join(args.eval_data)
                flags = f"--model {model} --train-data {data} --eval-data {eval_data}"
                for setting in args.settings or ISOLATED:
                    line = f"{flags} {args.flags or ''} {MODEL_SETTINGS[setting]}"
                    runs.append(Run(f"{data} {names[model]}", setting, seed, line))
    return runs


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
    words = run.flags.split()
    return words[words.index(flag) + 1]


def default_results(args: argparse.Namespace) -> Path:
    if args.models:
        return HERE / "results/models.jsonl"
    return HERE / ("results/reduced.jsonl" if args.reduced else "results/toy.jsonl")


def cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def main() -> int:
    args = parse_arguments()
    began = time.time()
    results = args.results or default_results(args)
    results.parent.mkdir(parents=True, exist_ok=True)
    drop_cut_line(results)
    if args.models:
        launch = args.launch or sys.executable
        pool = Pool(results, args.folder, args.jobs or 1, launch, keep=True)
        failures = complete(model_runs(args), pool)
    else:
        preload()
        pool = Pool(results, args.folder, args.jobs or cores(), keep=args.keep)
        failures = run_toy(pool, args.only, args.reduced)
    print(f"{time.time() - began:.0f} s; results in {results}")
    print(f"figures: python experiments/plot.py --results {results}")
    for failure in failures:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
