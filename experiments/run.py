"""Isolated evaluation: one trick at a time, over difficulty, model size, alignment and seeds.

    python experiments/run.py                      # every question on the toy; resumable
    python experiments/run.py --reduced            # one environment of each kind, two seeds
    python experiments/run.py --only clip methods  # some of the questions

A run is lite_ppo.py with the flags of an environment (model, data) and of a setting (one trick
switched). Exception: the settings of definitions.py replace the advantage. pool.py makes the runs,
and records.py writes a line of the results file for each. A second call makes only the missing
runs. plot.py turns the file into figures and tables.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from grid import QUESTIONS, Run, current_flags, questions, reduced_questions
from pool import Pool, preload
from records import HERE, load, open_results

from support import toy


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
