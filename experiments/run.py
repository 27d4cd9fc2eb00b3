"""Isolated evaluation: one trick at a time, over difficulty, model size, alignment and seeds, in the manner of the paper.

    python experiments/run.py                     # every question on the toy; resumable
    python experiments/run.py --reduced           # one environment, two seeds: what a small machine does in minutes
    python experiments/run.py --only clip methods # some of the questions
    python experiments/run.py --models Qwen/Qwen3-4B-Base Qwen/Qwen3-4B --train-data easy medium hard --eval-data math500 aime24 amc23 \\
        --launch "torchrun --nproc-per-node 8" --flags "--steps 200 --minibatches 4" --results qwen3.jsonl     # real models

A run is `lite_ppo.py` with the flags of an environment (data, model) and of a setting (one trick switched); nothing here trains. (The only
exception are the four definitions of a batch std that lite_ppo.py does not have: they replace its advantage.) On the toy each run is a fork of
this process, which has the libraries loaded, with one thread; on real models it is the command given. Finished runs are a line each in the
results file: flags, what differs from the defaults, curves, final figures. A second call runs what is missing.
`plot.py` makes figures and tables of the file. README.md says what each question is, and how the toy was made to show an effect.
"""

import argparse
import dataclasses
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
from datetime import date
from multiprocessing.connection import wait
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: runs side by side, a core each, and the same sums on every machine
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import lite_ppo  # noqa: E402
import matplotlib.figure  # noqa: E402, F401  here, and below: what each fork would import anew
import torch  # noqa: E402
import toy  # noqa: E402
import torch.utils.tensorboard  # noqa: E402, F401
import transformers.models.qwen3.modeling_qwen3  # noqa: E402, F401
from rundir import read_jsonl  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig  # noqa: E402, F401

# ---- settings: Lite PPO with one thing changed, and the other methods ------------------------------------------------

SETTINGS = {
    "lite_ppo": "",
    "group std": "--advantage-std group",
    "no std": "--advantage-std none",
    "batch mean": "--advantage-mean batch",
    "no normalisation": "--advantage-mean none --advantage-std none",
    "sequence level": "--loss-level sequence",
    "constant level": "--loss-level constant",
    "neither trick": "--advantage-mean none --advantage-std none --loss-level sequence",
    "clip 0.24": "--clip-high 0.24",
    "clip 0.28": "--clip-high 0.28",
    "clip 0.32": "--clip-high 0.32",
    "overlong filter": "--overlong-filter",
    "soft punishment": "--overlong-buffer 0.2",
    "eps 1e-4": "--advantage-eps 1e-4",
    **{f"{name}, -1/1": f"{flags} --reward-low -1" for name, flags in {  # of the rewards; all others are 0/1
        "lite_ppo": "", "group std": "--advantage-std group", "batch mean": "--advantage-mean batch",
        "no normalisation": "--advantage-mean none --advantage-std none"}.items()},
    **{f"std: {name}": "" for name in ("ddof 0", "within groups", "by tokens", "per rank")},  # see DEFINITIONS
}  # fmt: skip
METHODS = {
    **{preset: f"--preset {preset}" for preset in ("lite_ppo", "grpo", "dapo", "dr_grpo", "rloo", "reinforce")},
    "dapo, no resampling": "--preset dapo --no-dynamic-sampling",  # as many sampled responses as the others
}
RATES = ("1.25e-4", "2.5e-4", "5e-4", "1e-3")


def _std_ddof_0(rewards, lengths):
    return rewards.std(correction=0)


def _std_within_groups(rewards, lengths):
    """Root mean square of the rewards centred on their groups."""
    return (rewards - rewards.mean(1, keepdim=True)).square().mean().sqrt()


def _std_by_tokens(rewards, lengths):
    """The same over tokens: a response counts as often as it has tokens."""
    return ((rewards - rewards.mean(1, keepdim=True)).square() * lengths).sum().div(lengths.sum()).sqrt()


def _std_per_rank(rewards, lengths):
    """Each of 4 ranks divides by the std of its own two groups."""
    parts = rewards.view(4, -1).std(1, keepdim=True)
    return parts.repeat_interleave(rewards.shape[0] // 4, 0)


DEFINITIONS = {"std: ddof 0": _std_ddof_0, "std: within groups": _std_within_groups, "std: by tokens": _std_by_tokens, "std: per rank": _std_per_rank}


def define_std(std) -> None:
    """In this process, Lite PPO's advantage divides by another "batch std": what other code bases mean by the name."""
    shape, lengths = lite_ppo.shape_rewards, []

    def shape_rewards(responses, cfg):
        rewards = shape(responses, cfg)
        lengths[:] = [torch.tensor([len(r.token_ids) for r in responses], dtype=torch.float32).view(rewards.shape)]
        return rewards

    def compute_advantages(rewards, cfg):
        return (rewards - rewards.mean(1, keepdim=True)) / (std(rewards, lengths[0]) + cfg.advantage_eps)

    lite_ppo.shape_rewards, lite_ppo.compute_advantages = shape_rewards, compute_advantages


# ---- environments and questions --------------------------------------------------------------------------------------

DIFFICULTIES, SIZES, VARIANTS = ("easy", "medium", "hard"), ("tiny", "small"), ("base", "aligned")
TOY = """--sampler transformers --reward exact --reward-workers 1 --prompts-per-step 8 --group-size 8 --minibatches 4 --steps 20 --warmup-steps 4
    --lr 3e-4 --eval-every 10 --eval-size 100 --samples-per-step 0"""


def environment(difficulty: str, size: str, variant: str, flags: str = "") -> str:
    return f"{TOY} --model toy:{size}:{variant} --train-data toy:{difficulty} --eval-data toy=toy:{difficulty}:test {flags}"


ENVIRONMENTS = {f"{d} {s} {v}": environment(d, s, v) for d in DIFFICULTIES for s in SIZES for v in VARIANTS}
ENVIRONMENTS |= {  # more optimizer steps per rollout, so that clips bind, and more responses, so that learning stands it
    f"medium small {v}, 8 steps": environment("medium", "small", v, "--prompts-per-step 16 --minibatches 8") for v in VARIANTS
}
ENVIRONMENTS |= {  # one response in eight gets stuck and is five times as long as a right one
    f"medium small {v}, long": environment("medium", "small", v, "--max-new-tokens 192") for v in ("looping", "aligned-looping")
}
ENVIRONMENTS |= {  # limits that cut right chains, second attempts and loops, and loops only
    f"hard small looping, {name}": environment("hard", "small", "looping", f"--max-new-tokens {limit}")
    for name, limit in (("tight", 56), ("middle", 96), ("loose", 224))
}
GRID = list(ENVIRONMENTS)[:12]
PAIR = ["medium small base", "medium small aligned"]
STEPS = [f"{name}, 8 steps" for name in PAIR]
LONG = [e for e in ENVIRONMENTS if e.endswith(", long")]
LIMITS = [e for e in ENVIRONMENTS if e.startswith("hard small looping")]


@dataclasses.dataclass(frozen=True)
class Run:
    environment: str
    setting: str
    seed: int
    flags: str

    def __post_init__(self):
        object.__setattr__(self, "flags", " ".join(self.flags.split()))

    @property
    def name(self) -> str:
        return f"{self.environment}/{self.setting}/{self.seed}"


def cells(environments, settings, seeds, flags: str = "") -> list[Run]:
    return [Run(e, s, seed, f"{ENVIRONMENTS[e]} {SETTINGS[s]} {flags}") for e in environments for s in settings for seed in seeds]


def sweep(seeds=(101, 102, 103)) -> list[Run]:
    """Learning rates of the methods, on seeds that no other question uses."""
    return [Run(PAIR[0], f"{name} at {rate}", seed, f"{ENVIRONMENTS[PAIR[0]]} {flags} --lr {rate}") for name, flags in METHODS.items() for rate in RATES
            for seed in seeds]  # fmt: skip


def best_rate(rows: list[dict], method: str) -> str:
    """The rate with the highest mean final accuracy in the sweep; the lower one of equals."""
    found = {rate: [row["final"]["accuracy"] for row in rows if row["setting"] == f"{method} at {rate}"] for rate in RATES}
    return max(RATES, key=lambda rate: statistics.mean(found[rate]) if found[rate] else -1.0)


def methods(rows: list[dict], environments, seeds) -> list[Run]:
    """The methods, each with its own learning rate, at equal optimizer steps; evaluated often, for a comparison at equal responses."""
    rates = {f"tuned {name}": best_rate(rows, name) for name in METHODS}
    common = statistics.mode(rates.values())  # and those whose rate is another one, at that of most: three seeds choose with some luck
    rates |= {f"common {name}": common for name in METHODS if rates[f"tuned {name}"] != common}
    return [Run(e, name, seed, f"{ENVIRONMENTS[e]} {METHODS[name.split(' ', 1)[1]]} --lr {rate} --eval-every 3") for e in environments
            for name, rate in rates.items() for seed in seeds]  # fmt: skip


ISOLATED = ["lite_ppo", "group std", "no std", "batch mean", "no normalisation", "sequence level", "neither trick", "clip 0.28"]


def questions(rows: list[dict], reduced: bool) -> dict[str, list[Run]]:
    """The runs of each question. Those that several of them share are made once."""
    seeds, environments, pair = (range(2), [PAIR[0]], PAIR[:1]) if reduced else (range(5), GRID, PAIR)
    return {
        "sweep": sweep((101,) if reduced else (101, 102, 103)),
        "isolated": cells(environments, ISOLATED, seeds),
        "scale": cells(pair[:1], [s for s in SETTINGS if s.endswith("-1/1")], seeds),
        "clip": cells(STEPS[: len(pair)], ["lite_ppo", "clip 0.24", "clip 0.28", "clip 0.32"], seeds if reduced else range(10)),
        "level": cells(pair, ["constant level"], seeds) + cells(LONG[: len(pair)], ["lite_ppo", "sequence level", "constant level"], seeds),
        "overlong": cells(LIMITS[-1:] if reduced else LIMITS, ["lite_ppo", "overlong filter", "soft punishment"], seeds),
        "definitions": cells(pair[:1], [*DEFINITIONS, "eps 1e-4"], seeds),
        "methods": methods(rows, pair[:1], seeds if reduced else range(10)) + ([] if reduced else methods(rows, pair[1:], seeds)),
    }


# ---- running ---------------------------------------------------------------------------------------------------------

CURVES = """reward/mean reward/std reward/std_within reward/solve_all reward/solve_none response/length_mean response/truncated response/looping
    policy/entropy policy/clip_low policy/clip_high policy/approx_kl policy/grad_norm rollout/responses""".split()


def record(run: Run, folder: Path, seconds: float) -> dict:
    """A finished run as one line: three digits are enough for every figure."""
    log, clipped = read_jsonl(folder / "metrics.jsonl"), {"low": Counter(), "high": Counter()}
    for row in read_jsonl(folder / "clipped.jsonl"):
        for side, counts in clipped.items():
            counts.update(dict(row[side]))
    short = lambda x: x if not isinstance(x, float) else float(f"{x:.3g}")  # noqa: E731
    steps, evaluated = [row for row in log if "reward/mean" in row], [row for row in log if any(key.startswith("eval/") for key in row)]
    evaluation = {key: [short(row[key]) for row in evaluated] for key in evaluated[-1] if key.startswith("eval/") and not key.endswith(("_low", "_high"))}
    late = steps[-max(1, len(steps) // 4):]  # the last quarter
    accuracy = [statistics.mean(values) for values in zip(*(v for k, v in evaluation.items() if k.endswith("/accuracy")))]
    final = {"accuracy": accuracy[-1], "accuracy_before": accuracy[0], "reward": statistics.mean(row["reward/mean"] for row in steps)}
    final |= {key: statistics.mean(row[key] for row in late) for key in CURVES[5:] if key in late[-1]}
    config, defaults = json.loads((folder / "config.json").read_text()), json.loads(json.dumps(dataclasses.asdict(lite_ppo.Config())))
    return {
        "environment": run.environment, "setting": run.setting, "seed": run.seed, "seconds": round(seconds, 1), "date": f"{date.today()}", "flags": run.flags,
        "config": {key: value for key, value in config.items() if value != defaults.get(key) and key != "output_dir"},
        "final": {key: short(float(value)) for key, value in final.items()},
        "curve": {key: [short(row[key]) for row in steps] for key in CURVES if key in steps[-1]},
        "evaluation": {"step": [row["step"] for row in evaluated]} | evaluation,
        "clipped": {side: counts.most_common(20) for side, counts in clipped.items()},
    } | ({"advantage": run.setting} if run.setting in DEFINITIONS else {})  # fmt: skip


def arguments(run: Run, folder: Path) -> list[str]:
    return [*shlex.split(run.flags), "--seed", str(run.seed), "--output-dir", str(folder)]


def child(run: Run, folder: Path) -> None:
    """A run in a fork of this process, its console in a file."""
    torch.set_num_threads(1)
    console = os.open(folder / "console", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(console, 1), os.dup2(console, 2)
    sys.argv = ["lite_ppo.py", *arguments(run, folder)]
    if run.setting in DEFINITIONS:
        define_std(DEFINITIONS[run.setting])
    sys.exit(lite_ppo.main())


def last_words(console: Path) -> str:
    return ([line for line in console.read_text(errors="replace").splitlines() if line.strip()] or ["(said nothing)"])[-1][-300:]


def run_all(runs: list[Run], results: Path, folder: Path, jobs: int, launch: str, keep: bool) -> list[str]:
    """Run them, `jobs` at a time, and add each to the results. Returns what failed, in words."""
    waiting, running, failed = runs[::-1], {}, []
    bar = tqdm(total=len(runs), unit="run", dynamic_ncols=True, smoothing=0)
    while waiting or running:
        while waiting and len(running) < jobs:
            run = waiting.pop()
            place = folder / run.name.replace("/", "-").replace(" ", "_")
            if not keep:
                shutil.rmtree(place, ignore_errors=True)  # of a grid that was killed; what is kept goes on from its checkpoint, if it has one
            place.mkdir(parents=True, exist_ok=True)
            if launch:
                with open(place / "console", "w") as console:
                    command = [*shlex.split(launch), str(HERE.parent / "lite_ppo.py"), *arguments(run, place)]
                    process = mp.get_context("fork").Process(target=lambda: sys.exit(subprocess.run(command, stdout=console, stderr=console).returncode))
                    process.start()
            else:
                process = mp.get_context("fork").Process(target=child, args=(run, place))
                process.start()
            running[process.sentinel] = process, run, place, time.time()
        for sentinel in wait(list(running)):
            process, run, place, began = running.pop(sentinel)
            process.join()
            bar.update()
            if process.exitcode:
                failed.append(f"{run.name}: exit code {process.exitcode}, {last_words(place / 'console')} (all of it: {place}/console)")
                tqdm.write(failed[-1])
                continue
            try:
                row = json.dumps(record(run, place, time.time() - began)) + "\n"
            except (OSError, ValueError, KeyError, IndexError) as error:
                failed.append(f"{run.name}: its logs in {place} cannot be read: {type(error).__name__}: {error}")
                tqdm.write(failed[-1])
                continue
            with open(results, "a", encoding="utf-8") as file:
                file.write(row)
            if not keep:
                shutil.rmtree(place)
    bar.close()
    return failed


def load(results: Path) -> list[dict]:
    """The newest line of each run."""
    rows = {}
    for i, line in enumerate(results.read_text(encoding="utf-8").splitlines() if results.exists() else ()):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            raise SystemExit(f"{results}: line {i + 1} is not JSON; remove it") from None
        rows[row["environment"], row["setting"], row["seed"]] = row
    return list(rows.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="QUESTION", help=", ".join(questions([], False)))
    parser.add_argument("--reduced", action="store_true", help="one environment, two seeds, one seed of the sweep")
    parser.add_argument("--results", type=Path, help="default: experiments/results/toy.jsonl, reduced.jsonl or models.jsonl")
    parser.add_argument("--folder", type=Path, default=HERE.parent / "runs/experiments", help="of the run directories")
    parser.add_argument("--keep", action="store_true", help="keep the run directories; otherwise only what the results hold stays (real models: always kept)")
    parser.add_argument("--jobs", type=int, help="runs at a time; default: one per core, or 1 with --models")
    parser.add_argument("--models", nargs="+", help="real models instead of the toy; the flags below go with it")
    parser.add_argument("--train-data", nargs="+", help="as of lite_ppo.py, one environment each")
    parser.add_argument("--eval-data", nargs="+", help="as of lite_ppo.py, all of them in each run")
    choices = {name: flags for name, flags in SETTINGS.items() if name not in DEFINITIONS} | {f"preset {name}": flags for name, flags in METHODS.items()}
    parser.add_argument("--settings", nargs="+", metavar="SETTING", help=f"default: {', '.join(ISOLATED)}; there are {', '.join(choices)}")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 to 4")
    parser.add_argument("--flags", help="of every run")
    parser.add_argument("--launch", help='what starts a run, such as "torchrun --nproc-per-node 8"; default: this Python')
    args = parser.parse_args()
    if unknown := set(args.only) - set(questions([], False)):
        parser.error(f"--only {' '.join(sorted(unknown))}: there are {', '.join(questions([], False))}")
    for flag in ("train_data", "eval_data", "settings", "seeds", "flags", "launch"):
        if getattr(args, flag) is not None and not args.models:
            parser.error(f"--{flag.replace('_', '-')} goes with --models; the toy's grid has its own")
    if args.models and (args.only or args.reduced or not args.train_data or not args.eval_data):
        parser.error("--models goes with --train-data and --eval-data, and without --only and --reduced")
    args.results = args.results or HERE / "results" / ("models.jsonl" if args.models else "reduced.jsonl" if args.reduced else "toy.jsonl")
    args.results.parent.mkdir(parents=True, exist_ok=True)
    if args.results.exists() and not (text := args.results.read_text(encoding="utf-8")).endswith("\n"):
        args.results.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")  # a line that was cut off: its run is made again
    began, failed = time.time(), []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs, launch = args.jobs or (1 if args.models else cores), (args.launch or sys.executable) if args.models else ""
    if args.models:
        if bad := [name for name in args.settings or () if name not in choices]:
            parser.error(f"--settings {bad[0]!r}: real models take {', '.join(choices)}")
        short = {model: Path(model).name for model in args.models}
        short = {model: name if list(short.values()).count(name) == 1 else model for model, name in short.items()}  # a/final and b/final are two
        names = {f"{data} {short[model]}": f"--model {model} --train-data {data} --eval-data {' '.join(args.eval_data)}" for data in args.train_data
                 for model in args.models}  # fmt: skip
        runs = [Run(e, s, seed, f"{names[e]} {args.flags or ''} {choices[s]}") for seed in args.seeds or range(5) for e in names
                for s in args.settings or ISOLATED]  # fmt: skip
        stages = [lambda rows: runs]
    else:
        chosen = args.only or list(questions([], False))
        early = [n for n in questions([], False) if n != "methods" and (n in chosen or (n == "sweep" and "methods" in chosen))]  # gives them their rates
        late = [name for name in chosen if name == "methods"]
        stages = [lambda rows, names=names: [run for name in names for run in questions(rows, args.reduced)[name]] for names in (early, late)]
        for run in stages[0]([]):  # the models, made one at a time before anything else
            toy.resolve_model(next(flag for flag in run.flags.split() if flag.startswith("toy:")))
    for stage in stages:
        if any(" at " in name for name in failed):  # no rate without the whole sweep
            break
        rows = load(args.results)
        done = {(f"{row['environment']}/{row['setting']}/{row['seed']}", row["flags"]) for row in rows}
        runs = list(dict.fromkeys(sorted(stage(rows), key=lambda run: run.seed % 100)))  # seed by seed: half a grid is a whole one with fewer seeds
        missing = [run for run in runs if (run.name, run.flags) not in done]
        print(f"{len(runs)} runs, {len(runs) - len(missing)} of them in {args.results}")
        failed += run_all(missing, args.results, args.folder, jobs, launch, args.keep or bool(args.models))
    print(f"{time.time() - began:.0f} s; {args.results}; figures: python experiments/plot.py --results {args.results}")
    print(*failed, sep="\n", end="\n" * bool(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
