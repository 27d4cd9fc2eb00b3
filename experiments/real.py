"""The comparison on a real model: methods, learning rates and switches.

    python experiments/real.py --model Qwen/Qwen2.5-Coder-0.5B-Instruct \\
        --train-data gsm8k_train.jsonl --eval-data gsm8k=gsm8k_test.jsonl

    # seven runs side by side on one GPU of 140 GiB; each keeps a fixed cache
    LITE_PPO_KV_CACHE_GIB=1.25 python experiments/real.py ... --only methods --jobs 7 \\
        --methods lite_ppo grpo reinforce --machine "--micro-batch-tokens 8192"

    methods    every method at --lr
    rates      every method at every rate of --rates; the rows of --lr are those of "methods"
    switches   Lite PPO with one change
    clip       Lite PPO and clip-higher, with 8 optimizer steps per rollout
    overlong   Lite PPO and the overlong filter, with a tight and a loose token limit

All runs of a question have the same number of responses and optimizer steps, unless --methods
names dapo: it replaces groups without a signal, so it samples more. "dapo, no resampling" does not.

A run is a command, lite_ppo.py with the flags of RECIPE, --flags and its setting. Its line of the
results is that of run.py. A second call makes only the missing runs; one that was killed starts
again, or goes on if --machine has --save-every. The end of a failed run's output is printed, and
kept in a folder beside the results.
"""

import argparse
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path

from definitions import DEFINITIONS
from grid import METHODS, SETTINGS, Run, cells
from pool import Pool
from records import HERE, open_results, record
from run import complete, cores, missing, report

from support.logs import read_jsonl

# What is learned from, without the model and the data: the recipe of results/real.jsonl.
RECIPE = (
    "--prompts-per-step 32 --group-size 8 --max-new-tokens 512 --minibatches 2 --warmup-steps 3 "
    "--eval-size 660 --eval-samples 1 --eval-temperature 0"
)
SWITCHES = ["lite_ppo", "group std", "no std", "sequence level"]
CLIPS = ["lite_ppo", "clip 0.28"]
FILTERS = ["lite_ppo", "overlong filter"]
QUESTIONS = ["methods", "rates", "switches", "clip", "overlong"]
ALL = [name for name in SETTINGS if name not in DEFINITIONS]
RESULTS = HERE / "results/real.jsonl"
EQUAL = [name for name in METHODS if name != "dapo"]  # as many responses each


# ---- the runs ------------------------------------------------------------------------------------


def base_flags(args: argparse.Namespace) -> str:
    """The flags of every run. It is evaluated before, in the middle and after."""
    return f"{RECIPE} --steps {args.steps} --eval-every {max(1, args.steps // 2)} {args.flags}"


def methods(args: argparse.Namespace, rates: list[str]) -> list[Run]:
    """Every method at each of these learning rates."""
    runs = []
    for method in args.methods:
        for rate in rates:
            name = method if rate == args.lr else f"{method} at {rate}"
            flags = f"{base_flags(args)} {METHODS[method]} --lr {rate}"
            runs += [Run(args.name, name, seed, flags) for seed in args.seeds]
    return runs


def questions(args: argparse.Namespace) -> dict[str, list[Run]]:
    """The runs of each question. A run that two questions share is made once."""
    plain = f"{base_flags(args)} {METHODS['lite_ppo']} --lr {args.lr}"
    steps = {f"{args.name}, 8 steps": f"{plain} --minibatches 8"}
    limits = {f"{args.name}, {n} tokens": f"{plain} --max-new-tokens {n}" for n in args.limits}
    return {
        "methods": methods(args, [args.lr]),
        "rates": methods(args, args.rates),
        "switches": cells([args.name], args.switches, args.seeds, {args.name: plain}),
        "clip": cells(steps, CLIPS, args.seeds, steps),
        "overlong": cells(limits, FILTERS, args.seeds, limits),
    }


def chosen_runs(args: argparse.Namespace) -> list[Run]:
    """The runs of --only, once each."""
    found = questions(args)
    return list(dict.fromkeys(run for name in args.only for run in found[name]))


# ---- running -------------------------------------------------------------------------------------


def common_flags(args: argparse.Namespace) -> str:
    """Flags that do not enter the results: paths, and how a run uses this machine."""
    workers = max(1, min(8, cores() // args.jobs))
    paths = shlex.join(["--model", args.model, "--train-data", args.train_data])
    sets = shlex.join(["--eval-data", *args.eval_data])
    return f"{paths} {sets} --reward-workers {workers} {args.machine}"


def write_unfinished(pool: Pool, args: argparse.Namespace) -> None:
    """Write what the unfinished runs have so far to --partial, one line each."""
    lines = []
    for run in missing(chosen_runs(args), pool.results):
        folder = pool.folder_of(run)
        log = read_jsonl(folder / "metrics.jsonl")
        if any("reward/mean" in row for row in log):
            seconds = sum(row.get("time/step", 0) for row in log)
            lines.append(json.dumps(record(run, folder, seconds)) + "\n")
        print(f"{run.name}: {log[-1]['step'] if log else 0} of {args.steps} steps")
    args.partial.write_text("".join(lines), encoding="utf-8")


# ---- command line --------------------------------------------------------------------------------


def add_what(add) -> None:
    """Flags: which runs."""
    add("--model", required=True, help="as for lite_ppo.py")
    add("--train-data", required=True, help="as for lite_ppo.py")
    add("--eval-data", required=True, nargs="+", help="as for lite_ppo.py")
    add("--name", help="of model and data in the results; default: their file names")
    add("--only", nargs="+", choices=QUESTIONS, default=QUESTIONS, help="default: all")
    listed = dict(nargs="+", metavar="NAME")
    add("--methods", **listed, choices=METHODS, default=EQUAL, help=choice(EQUAL, METHODS))
    add("--switches", **listed, choices=ALL, default=SWITCHES, help=choice(SWITCHES, ALL))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    add("--steps", type=int, default=20, help="default: 20")
    add("--lr", type=rate, default="3e-6", help="learning rate; default: 3e-6")
    rates = ["3e-6", "1e-5"]
    add("--rates", nargs="+", type=rate, default=rates, help=f"default: {' '.join(rates)}")
    add("--limits", nargs="+", type=int, default=[320, 1024], help="default: 320 1024 tokens")
    add("--flags", default="", help='change RECIPE, such as "--prompts-per-step 64"')


def add_how(add) -> None:
    """Flags: how they are made."""
    add("--machine", default="", help='do not change what is learned: "--max-num-seqs 512"')
    add("--jobs", type=int, default=1, help="runs side by side, sharing the CPU cores; default: 1")
    add("--stagger", type=float, default=5, help="seconds between two starts; default: 5")
    add("--minutes", type=float, default=math.inf, help="no run starts later; default: no limit")
    add("--launch", default=sys.executable, help="starts a run; default: python")
    add("--results", type=Path, default=RESULTS, help="default: results/real.jsonl")
    add("--folder", type=Path, default=HERE.parent / "runs/real", help="run directories")
    add("--keep-models", action="store_true", help="keep the weights of finished runs")
    text = "make no run; write what the unfinished ones have so far to FILE"
    add("--partial", type=Path, metavar="FILE", help=text)


def rate(text: str) -> str:
    """A learning rate as results have it: 3.0e-6 is 3e-6."""
    mantissa, exponent = f"{float(text):e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def choice(default, every) -> str:
    return f"default: {'; '.join(default)}; all: {'; '.join(every)}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"RECIPE: {RECIPE}",
    )
    add_what(parser.add_argument)
    add_how(parser.add_argument)
    args = parser.parse_args()
    if args.jobs < 1 or args.steps < 1:
        parser.error(f"--jobs {args.jobs} --steps {args.steps}: must be at least 1")
    for flag in ("--steps", "--lr", "--preset", "--seed", "--eval-every"):
        for name, text in (("--flags", args.flags), ("--machine", args.machine)):
            if flag in {word.split("=")[0] for word in text.split()}:
                parser.error(f"{name} {flag}: real.py sets it for each run; see --help")
    args.name = args.name or f"{Path(args.train_data).stem} {Path(args.model).name}"
    return args


def main() -> int:
    args = parse_arguments()
    began = time.time()
    open_results(args.results)
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores() // args.jobs))  # of each run
    pool = Pool(
        args.results,
        args.folder,
        args.jobs,
        args.launch,
        keep=True,
        keep_models=args.keep_models,
        flags=common_flags(args),
        stagger=args.stagger,
        deadline=began + 60 * args.minutes,
    )
    if args.partial:
        write_unfinished(pool, args)
        return 0
    return report(complete(chosen_runs(args), pool), args.results, began)


if __name__ == "__main__":
    sys.exit(main())
