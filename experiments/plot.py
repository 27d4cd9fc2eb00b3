"""Figures and tables of the results of run.py, and the numbers of the project's README.

    python experiments/plot.py                                   # figures/*.png, results.md
    python experiments/plot.py --readme                          # also rewrites the marked numbers in ../README.md
    python experiments/plot.py --results experiments/results/qwen3.jsonl --figures DIR     # of other runs: what they allow

An effect is the difference of two settings in the same environment with the same seed (same prompts, same seeds of the samples, same
test problems), in percentage points of held-out accuracy at the last step; its interval is Student's, 95 %, over the seeds. An effect over
several environments is first averaged over them, seed by seed. A curve's band is the same interval of the value itself.
"""

import argparse
import math
import re
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Callable, Iterable

import numpy as np
from matplotlib.figure import Figure
from run import DEFINITIONS, GRID, ISOLATED, METHODS, PAIR, RATES, STEPS, best_rate, load

HERE = Path(__file__).resolve().parent
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#999999"]  # Okabe and Ito: told apart by everybody
STYLES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (6, 2, 1, 2))]  # and in print
T975 = [math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # Student's t, 97.5 %, of 0, 1, ... degrees of freedom
TIGHT, LOOSE = "hard small looping, tight", "hard small looping, loose"

Rows = dict[tuple[str, str], dict[int, dict]]  # (environment, setting) -> seed -> line of the results


def by_cell(rows: list[dict]) -> Rows:
    found: Rows = defaultdict(dict)
    for row in rows:
        found[row["environment"], row["setting"]][row["seed"]] = row
    return found


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % interval; nan where one value gives none."""
    mean, n = statistics.mean(values), len(values)
    half = T975[n - 1] * statistics.stdev(values) / math.sqrt(n) if 1 < n <= len(T975) else math.nan
    return mean, mean - half, mean + half


def final(key: str) -> Callable[[dict], float]:
    return lambda row: correct_share(row, row["final"][key]) if key == "reward" else row["final"][key]


def correct_share(row: dict, reward):
    """A mean reward on the scale from 0 to 1, whatever the reward of a wrong response was."""
    low = row["config"].get("reward_low", 0)
    return (reward - low) / (1 - low)


def effect(rows: Rows, setting: str, baseline: str, environments: Iterable[str], value=final("accuracy"), scale: float = 100) -> tuple[list[float], int]:
    """(difference of each seed, averaged over the environments; number of environments). Seeds that lack a run are left out."""
    environments = [e for e in environments if (e, setting) in rows and (e, baseline) in rows]
    pairs = [(rows[e, setting], rows[e, baseline]) for e in environments]
    seeds = sorted(set.intersection(*(set(a) & set(b) for a, b in pairs))) if pairs else []
    return [scale * statistics.mean(value(a[s]) - value(b[s]) for a, b in pairs) for s in seeds], len(environments)


def level(rows: Rows, setting: str, environments: Iterable[str], value=final("accuracy"), scale: float = 100) -> list[float]:
    """The value itself, seed by seed, averaged over the environments."""
    cells = [rows[e, setting] for e in environments if (e, setting) in rows]
    seeds = sorted(set.intersection(*map(set, cells))) if cells else []
    return [scale * statistics.mean(value(cell[s]) for cell in cells) for s in seeds]


def show(values: list[float], digits: int = 1, sign: bool = True) -> str:
    """+1.2 [-0.3, +2.7]"""
    if not values:
        return "not run"
    mean, low, high = (f"{x:{'+' if sign else ''}.{digits}f}" for x in interval(values))
    return f"{mean} [{low}, {high}]"


def equal_responses(budget: int) -> Callable[[dict], float]:
    """Accuracy at the last evaluation that had cost at most so many sampled responses of training."""

    def value(row: dict) -> float:
        cost = np.cumsum([0, *row["curve"]["rollout/responses"]])
        return [a for step, a in zip(row["evaluation"]["step"], row["evaluation"]["eval/toy/accuracy"]) if cost[step] <= budget][-1]

    return value


def where(*words: str) -> list[str]:
    """Environments of the grid whose names hold all these words."""
    return [e for e in GRID if set(words) <= set(e.split())]


# ---- the numbers of the README ---------------------------------------------------------------------------------------


def claims(rows: Rows, lines: list[dict]) -> dict[str, str]:
    """Every number that the README takes from here, by the name that stands behind it in a comment."""
    found = {"runs": f"{len(lines)}"}
    for name in ISOLATED[1:]:
        for words in ((), ("base",), ("aligned",), *((d,) for d in ("easy", "medium", "hard")), *((s,) for s in ("tiny", "small"))):
            found[f"{name}: {' '.join(words) or 'all'}"] = show(effect(rows, name, "lite_ppo", where(*words))[0])
        found[f"{name}: easy aligned"] = show(effect(rows, name, "lite_ppo", where("easy", "aligned"))[0])
        for variant in ("base", "aligned"):
            found[f"{name}: {variant}, entropy"] = show(effect(rows, name, "lite_ppo", where(variant), final("policy/entropy"), 1)[0], 3)
            found[f"{name}: {variant}, length"] = show(effect(rows, name, "lite_ppo", where(variant), final("response/length_mean"), 1)[0])
    pairs = [(one, "neither trick") for one in ("sequence level", "no normalisation", "lite_ppo")] + [(one, "group std") for one in ("batch mean", "no std")]
    for one, two in pairs:
        for words in ((), ("base",), ("aligned",)):
            found[f"{one} - {two}: {' '.join(words) or 'all'}"] = show(effect(rows, one, two, where(*words))[0])
    for e, label in zip(STEPS, ("base", "aligned")):
        for name in ("clip 0.24", "clip 0.28", "clip 0.32"):
            found[f"{name}: 8 steps, {label}"] = show(effect(rows, name, "lite_ppo", [e])[0])
            found[f"{name}: 8 steps, {label}, entropy"] = show(effect(rows, name, "lite_ppo", [e], final("policy/entropy"), 1)[0], 4)
            found[f"{name}: 8 steps, {label}, clip_high"] = show(level(rows, name, [e], final("policy/clip_high")), 2, False)
        found[f"lite_ppo: 8 steps, {label}, clip_high"] = show(level(rows, "lite_ppo", [e], final("policy/clip_high")), 2, False)
    for e, label in zip(PAIR, ("base", "aligned")):
        found[f"constant level: {label}"] = show(effect(rows, "constant level", "lite_ppo", [e])[0])
    for name in ("lite_ppo", "group std", "batch mean", "no normalisation"):
        found[f"{name}: -1/1 - 0/1"] = show(effect(rows, f"{name}, -1/1", name, PAIR[:1])[0])
    for e, label in ((TIGHT, "tight"), (LOOSE, "loose")):
        for name in ("overlong filter", "soft punishment"):
            found[f"{name}: {label}"] = show(effect(rows, name, "lite_ppo", [e])[0])
            found[f"{name}: {label}, truncated"] = show(effect(rows, name, "lite_ppo", [e], final("response/truncated"))[0])
        for name in ("lite_ppo", "overlong filter", "soft punishment"):
            found[f"{name}: {label}, truncated share"] = show(level(rows, name, [e], final("response/truncated")), 1, False)
            found[f"{name}: {label}, looping share"] = show(level(rows, name, [e], looping_share), 0, False)
    for e, label in ((PAIR[0], "base"), (PAIR[1], "aligned"), ("easy small aligned", "easy aligned"), ("hard small base", "hard base")):
        found[f"reward std: {label}"] = show(level(rows, "lite_ppo", [e], lambda row: statistics.mean(row["curve"]["reward/std"]), 1), 2, False)
        found[f"std within / std: {label}"] = show(level(rows, "lite_ppo", [e], std_ratio, 1), 2, False)
    for name in (*DEFINITIONS, "eps 1e-4"):
        found[f"{name}: base"] = show(effect(rows, name, "lite_ppo", PAIR[:1])[0])
    for e, label in zip(PAIR, ("base", "aligned")):
        budget = equal_responses(20 * 64)
        for name in METHODS:
            found[f"tuned {name}: {label}"] = show(level(rows, f"tuned {name}", [e]), 1, False)
            found[f"tuned {name} - lite_ppo: {label}"] = show(effect(rows, f"tuned {name}", "tuned lite_ppo", [e])[0])
            found[f"tuned {name}: {label}, equal responses"] = show(level(rows, f"tuned {name}", [e], budget), 1, False)
            found[f"tuned {name} - lite_ppo: {label}, equal responses"] = show(effect(rows, f"tuned {name}", "tuned lite_ppo", [e], budget)[0])
            found[f"tuned {name} - common lite_ppo: {label}"] = show(effect(rows, f"tuned {name}", "common lite_ppo", [e])[0])
            found[f"common {name}: {label}"] = show(level(rows, f"common {name}", [e]), 1, False)
            found[f"rate of {name}"] = best_rate(lines, name)
            sampled = level(rows, f"tuned {name}", [e], lambda row: sum(row["curve"]["rollout/responses"]), 1)
            found[f"responses of {name}: {label}"] = f"{statistics.mean(sampled):.0f}" if sampled else "not run"
    return found


def std_ratio(row: dict) -> float:
    """Spread within groups over the std of the raw rewards, both averaged over the steps of a run."""
    return statistics.mean(row["curve"]["reward/std_within"]) / statistics.mean(row["curve"]["reward/std"])


def looping_share(row: dict) -> float:
    """Share of the truncated responses of the whole run that end in a loop."""
    cut = sum(curve(row, "response/truncated"))
    return sum(curve(row, "looping")) / cut if cut else math.nan


MARKED = re.compile(r"(?P<text>not run|[+-]?(?:\d[\d.]*(?:e-\d)?|nan)(?: \[[-+\d., na]+\])?)<!-- (?P<name>[^>]+?) -->")


def refresh(text: str, found: dict[str, str]) -> str:
    """README text with every marked number replaced by what the results say. ValueError for a name that they do not know."""

    def replace(match: re.Match) -> str:
        if match["name"] not in found:
            raise ValueError(f"README names {match['name']!r}; the results have: {', '.join(found)}")
        return f"{found[match['name']]}<!-- {match['name']} -->"

    return MARKED.sub(replace, text)


# ---- figures ---------------------------------------------------------------------------------------------------------

PANELS = {  # of a curve: title, label of the axis, key, factor
    "reward": ("training reward", "mean of a step, 0 to 1", "reward/mean", 1),
    "entropy": ("entropy", "nats per token", "policy/entropy", 1),
    "length": ("response length", "tokens", "response/length_mean", 1),
    "clip_high": ("clipped high", "% of tokens", "policy/clip_high", 100),
    "clip_low": ("clipped low", "% of tokens", "policy/clip_low", 100),
    "truncated": ("truncated", "% of responses", "response/truncated", 100),
    "looping": ("looping", "% of responses", "looping", 100),
    "grad_norm": ("gradient norm", "before clipping", "policy/grad_norm", 1),
    "spread": ("reward spread", "std of the step", "reward/std", 1),
}


def label_of(setting: str) -> str:
    if setting.startswith("common "):
        return label_of(setting.removeprefix("common ")) + ", common rate"
    return setting.removeprefix("tuned ").replace("lite_ppo", "Lite PPO")


def band(axes, x, curves: np.ndarray, i: int, label: str) -> None:
    """Mean over seeds and its 95 % interval; curves [seeds, points]."""
    mean, low, high = np.array([interval(list(column)) for column in curves.T]).T
    axes.plot(x, mean, color=COLOURS[i], linestyle=STYLES[i], linewidth=1.8 if i == 0 else 1.4, label=label)
    axes.fill_between(x, low, high, color=COLOURS[i], alpha=0.13, linewidth=0)


def curve(row: dict, key: str) -> list[float]:
    """A curve of the results; looping responses as a share of all, for a share of the truncated ones says nothing where none is truncated."""
    if key == "looping":
        return [cut * share for cut, share in zip(row["curve"]["response/truncated"], row["curve"]["response/looping"])]
    return row["curve"][key]


def smooth(values: list[float], width: int = 3) -> np.ndarray:
    """Centred moving average; a step has 64 responses, and its mean is noisy."""
    padded = np.pad(np.array(values, float), width // 2, mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def multiples(rows: Rows, title: str, environments: list[str], settings: list[str], panels: list[str], path: Path) -> None:
    """Rows: environments. Columns: held-out accuracy, then curves over steps."""
    environments = [e for e in environments if any((e, s) in rows for s in settings)]
    if not environments:
        return
    figure = Figure(figsize=(2.75 * (1 + len(panels)), 2.45 * len(environments) + 0.9), layout="constrained")
    grid = figure.subplots(len(environments), 1 + len(panels), squeeze=False, sharex=True)
    for number, (e, line) in enumerate(zip(environments, grid)):
        for i, setting in enumerate(s for s in settings if (e, s) in rows):
            cell = list(rows[e, setting].values())
            key = next(k for k in cell[0]["evaluation"] if k.endswith("/accuracy"))
            band(line[0], cell[0]["evaluation"]["step"], 100 * np.array([row["evaluation"][key] for row in cell]), i, label_of(setting))
            for axes, panel in zip(line[1:], panels):
                curves = PANELS[panel][3] * np.array([smooth(curve(row, PANELS[panel][2])) for row in cell])
                curves = correct_share(cell[0], curves) if panel == "reward" else curves
                band(axes, np.arange(1, curves.shape[1] + 1), curves, i, label_of(setting))
        for axes, (name, unit) in zip(line, [("held-out accuracy", "%"), *(PANELS[p][:2] for p in panels)]):
            axes.set_title("" if number else name, fontsize=10)
            axes.set_ylabel(unit if axes is not line[0] else f"{e}\n{unit}", fontsize=8.5)
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.25)
            if name not in ("held-out accuracy", "training reward"):
                axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))  # an interval may reach below what a share can be
            if number + 1 == len(grid):
                axes.set_xlabel("step", fontsize=8.5)
    handles, labels = max((axes.get_legend_handles_labels() for axes in grid[:, 0]), key=lambda pair: len(pair[1]))
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), fontsize=9, frameon=False)
    seeds = sorted({len(rows[e, s]) for e in environments for s in settings if (e, s) in rows})
    figure.suptitle(f"{title}   (mean and 95 % interval over {' or '.join(map(str, seeds))} seeds)", fontsize=11)
    figure.savefig(path, dpi=110)


def forest(rows: Rows, path: Path, value=final("accuracy"), unit: str = "held-out accuracy, percentage points") -> None:
    """Effect of each switch against Lite PPO, a row for each environment, and their mean."""
    tricks = [name for name in ISOLATED[1:] if any((e, name) in rows for e in GRID)]
    if not tricks:
        return
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(1, len(tricks), sharey=True, sharex=True, squeeze=False)[0]
    places = {e: -i - (i // 4) * 0.5 for i, e in enumerate(GRID)}
    for axes, name in zip(panels, tricks):
        for e, y in places.items():
            if values := effect(rows, name, "lite_ppo", [e], value)[0]:
                mean, low, high = interval(values)
                colour, marker = (COLOURS[5], "o") if "base" in e else (COLOURS[4], "s")
                axes.plot([low, high], [y, y], color=colour, linewidth=1.3)
                axes.plot(mean, y, marker, color=colour, markersize=5)
        mean, low, high = interval(effect(rows, name, "lite_ppo", GRID, value)[0])
        axes.fill([low, mean, high, mean], [-14.2, -13.9, -14.2, -14.5], color="black")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.axhline(-13.25, color="grey", linewidth=0.6)
        axes.set_title(name, fontsize=10)
        axes.grid(axis="x", alpha=0.25)
        axes.tick_params(labelsize=8)
    panels[0].set_yticks([*places.values(), -14.2], [*places, "mean of all"], fontsize=9)
    figure.supxlabel(f"effect of the switch against Lite PPO: {unit} (circles: base, squares: aligned; 95 % interval over seeds)", fontsize=9.5)
    figure.savefig(path, dpi=110)


def tokens(rows: Rows, path: Path) -> None:
    """The most clipped tokens at each bound, both sides, summed over seeds; the side's total above its bars."""
    bounds = [("0.20", "lite_ppo"), ("0.24", "clip 0.24"), ("0.28", "clip 0.28"), ("0.32", "clip 0.32")]
    cells = [(e, bound, setting) for e in STEPS for bound, setting in bounds if (e, setting) in rows]
    if not cells:
        return
    figure = Figure(figsize=(12, 2.6 * len(STEPS)), layout="constrained")
    grid = figure.subplots(len(STEPS), len(bounds), squeeze=False)
    for (e, bound, setting), axes in zip(cells, grid.flat):
        counts = {side: Counter() for side in ("low", "high")}
        for row in rows[e, setting].values():
            for side, of_run in row["clipped"].items():
                counts[side].update(dict(of_run))
        names = [token for token, _ in (counts["low"] + counts["high"]).most_common(9)]
        at = np.arange(len(names))
        axes.bar(at - 0.2, [counts["high"][t] for t in names], 0.4, color=COLOURS[1], edgecolor="black", linewidth=0.4, hatch="//", label="high")
        axes.bar(at + 0.2, [counts["low"][t] for t in names], 0.4, color=COLOURS[5], edgecolor="black", linewidth=0.4, label="low")
        axes.set_xticks(at, [{"\n": "\\n", "\\boxed{": "box"}.get(t, t).replace("<", "").replace(">", "") for t in names], fontsize=8)
        axes.set_title(f"{'base' if 'base' in e else 'aligned'}, {bound}: {counts['high'].total()} high, {counts['low'].total()} low", fontsize=8.5)
        axes.tick_params(axis="y", labelsize=8)
    for line in grid:
        line[0].set_ylabel("clipped tokens, all seeds", fontsize=9)
    figure.suptitle("Most clipped tokens by upper bound of the ratio (1 + 0.20 to 1 + 0.32; lower bound 1 - 0.20)", fontsize=11)
    grid[0][0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


QUESTIONS = {  # file: title, environments, settings, panels
    "normalisation": ("(a) Normalisation of the reward", [*PAIR, "hard small base"], ["lite_ppo", "group std", "batch mean", "no std", "no normalisation"],
                      ["reward", "entropy", "length", "grad_norm"]),
    "scale": ("(a) Rewards 0/1 and -1/1", PAIR[:1], [f"{n}{s}" for n in ("lite_ppo", "group std", "batch mean", "no normalisation") for s in ("", ", -1/1")],
              ["reward", "entropy", "grad_norm"]),
    "std": ("(b) With and without a standard deviation", ["easy small aligned", "hard small base"], ["lite_ppo", "group std", "no std"],
            ["reward", "spread", "entropy", "grad_norm"]),
    "clip": ("(c) Clip-higher, 8 optimizer steps per rollout", STEPS, ["lite_ppo", "clip 0.24", "clip 0.28", "clip 0.32"],
             ["reward", "entropy", "clip_high", "clip_low"]),
    "level": ("(d) Level of the loss", PAIR, ["lite_ppo", "sequence level", "constant level"], ["reward", "entropy", "length", "clip_low"]),
    "overlong": ("(e) Responses that are cut", [TIGHT, LOOSE], ["lite_ppo", "overlong filter", "soft punishment"], ["reward", "truncated", "looping", "length"]),
    "parts": ("(f) Lite PPO and its two parts", PAIR, ["lite_ppo", "sequence level", "no normalisation", "neither trick"],
              ["reward", "entropy", "length", "grad_norm"]),
    "definitions": ("(g) What others call the std of the batch", PAIR[:1], ["lite_ppo", *DEFINITIONS, "eps 1e-4"], ["reward", "entropy", "grad_norm"]),
    "methods": ("(f) Methods, each at its own learning rate", PAIR, [*(f"tuned {name}" for name in METHODS), "common lite_ppo"],
                ["reward", "entropy", "length", "clip_high"]),
}  # fmt: skip


# ---- tables ----------------------------------------------------------------------------------------------------------


def tables(rows: Rows, lines: list[dict], found: dict[str, str]) -> str:
    """results.md: every cell of every question."""
    text = ["# Results", "", "Made by `python experiments/plot.py` from `results/toy.jsonl`. Accuracy: held out, in %, at the last step; effects: percentage "
            "points against Lite PPO in the same environment, seed by seed; intervals: Student's, 95 %, over the seeds.", ""]  # fmt: skip
    seconds, days = sum(row["seconds"] for row in lines), sorted({row["date"] for row in lines})
    text += [f"{len(lines)} runs, {seconds / 3600:.1f} hours of single-threaded runs, {days[0]} to {days[-1]}.", ""]

    def table(title: str, head: list[str], body: list[list[str]]) -> None:
        text.extend([f"## {title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(line)} |" for line in body), ""])

    body = [[e, *(show(effect(rows, name, "lite_ppo", [e])[0]) for name in ISOLATED[1:])] for e in GRID]
    body += [[f"**mean, {' '.join(words) or 'all'}**", *(show(effect(rows, name, "lite_ppo", where(*words))[0]) for name in ISOLATED[1:])]
             for words in ((), ("base",), ("aligned",), ("easy",), ("medium",), ("hard",), ("tiny",), ("small",))]  # fmt: skip
    table("Effect of each switch", ["environment", *ISOLATED[1:]], body)
    columns = {"accuracy": ("accuracy", 100, 1), "reward": ("reward over all steps", 100, 1), "policy/entropy": ("entropy, last quarter", 1, 4),
               "response/length_mean": ("length", 1, 1), "policy/clip_high": ("clipped high, %", 100, 3), "policy/clip_low": ("clipped low, %", 100, 3),
               "response/truncated": ("truncated, %", 100, 1)}  # fmt: skip
    for title, (environments, settings) in {name: q[1:3] for name, q in QUESTIONS.items()}.items():
        body = [[e, label_of(s), str(len(rows[e, s])), *(show(level(rows, s, [e], final(key), scale), digits, False) for key, (_, scale, digits) in columns.items())]
                for e in environments for s in settings if (e, s) in rows]  # fmt: skip
        table(QUESTIONS[title][0], ["environment", "setting", "seeds", *(name for name, _, _ in columns.values())], body)
    body = [[label_of(name), *(show(level(rows, f"{name} at {rate}", PAIR[:1]), 1, False) for rate in RATES), best_rate(lines, name)] for name in METHODS]
    table(f"Sweep of the learning rate: {PAIR[0]}, seeds 101 to 103", ["method", *RATES, "chosen"], body)
    for e, name in zip(PAIR, ("base", "aligned")):
        body = [[label_of(m), found[f"rate of {m}"], str(len(rows.get((e, f"tuned {m}"), {}))), found[f"tuned {m}: {name}"], found[f"tuned {m} - lite_ppo: {name}"],
                 found[f"tuned {m} - common lite_ppo: {name}"], found[f"responses of {m}: {name}"], found[f"tuned {m}: {name}, equal responses"],
                 found[f"tuned {m} - lite_ppo: {name}, equal responses"]]
                for m in METHODS]  # fmt: skip
        table(f"Methods, {e}", ["method", "rate", "seeds", "accuracy at equal steps", "against Lite PPO", "against Lite PPO at the common rate",
                                "sampled responses", "accuracy at 1,280 responses", "against Lite PPO"], body)  # fmt: skip
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results/toy.jsonl")
    parser.add_argument("--figures", type=Path, default=HERE / "figures")
    parser.add_argument("--readme", action="store_true")
    args = parser.parse_args()
    lines = load(args.results)
    if not lines:
        raise SystemExit(f"--results {args.results}: no results; experiments/run.py makes them")
    rows = by_cell(lines)
    args.figures.mkdir(parents=True, exist_ok=True)
    if any(e in GRID for e, _ in rows):
        forest(rows, args.figures / "overview.png")
        tokens(rows, args.figures / "tokens.png")
        for name, question in QUESTIONS.items():
            multiples(rows, *question, args.figures / f"{name}.png")
        found = claims(rows, lines)
        (args.figures.parent / "results.md").write_text(tables(rows, lines, found))
        if args.readme:
            readme = HERE.parent / "README.md"
            readme.write_text(refresh(readme.read_text(), found))
    else:  # real models
        settings = list(dict.fromkeys(s for _, s in rows))
        for e in dict.fromkeys(e for e, _ in rows):
            multiples(rows, e, [e], settings, ["reward", "entropy", "length", "clip_high", "truncated"], args.figures / f"{e.replace(' ', '_')}.png")
            for s in settings[1:]:
                print(f"{e}: {s} against {settings[0]}: {show(effect(rows, s, settings[0], [e])[0])}")


if __name__ == "__main__":
    main()
