"""Figures and tables of the results of run.py, and the numbers of the project's README.

    python experiments/plot.py                                   # figures/*.png, results.md
    python experiments/plot.py --readme                          # also rewrites the marked numbers in ../README.md
    python experiments/plot.py --results experiments/results/qwen3.jsonl   # of other runs: what they allow, in a folder beside the file

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
from run import DEFINITIONS, ENVIRONMENTS, GRID, ISOLATED, LIMITS, LONG, METHODS, PAIR, RATES, STEPS, best_rate, load

HERE = Path(__file__).resolve().parent
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#999999"]  # Okabe and Ito: told apart by everybody
STYLES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (6, 2, 1, 2))]  # and in print

OTHER_MODEL = HERE / "results/other_model.jsonl"  # the main grid once more, made on a machine whose sums gave the warm-up other weights

Rows = dict[tuple[str, str], dict[int, dict]]  # (environment, setting) -> seed -> line of the results


def by_cell(rows: list[dict]) -> Rows:
    found: Rows = defaultdict(dict)
    for row in rows:
        found[row["environment"], row["setting"]][row["seed"]] = row
    return found


def t975(freedom: int) -> float:
    """Student's t, 97.5 %: from the table up to 9 degrees of freedom, then by its expansion around the normal quantile (error below 3e-4)."""
    if freedom < 10:
        return (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)[freedom]
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % interval; nan where one value gives none."""
    mean, n = statistics.mean(values), len(values)
    half = t975(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
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
    return f"{mean} [{low}, {high}]" if len(values) > 1 else f"{mean} [one seed]"


def equal_responses(budget: int) -> Callable[[dict], float]:
    """Accuracy when training had sampled so many responses, on a line between the evaluations before and after."""
    return lambda row: float(np.interp(budget, cost(row), row["evaluation"]["eval/toy/accuracy"]))


def cost(row: dict) -> np.ndarray:
    """Responses that training had sampled by each evaluation."""
    return np.cumsum([0, *row["curve"]["rollout/responses"]])[row["evaluation"]["step"]]


def accuracies(row: dict) -> list[float]:
    """At each evaluation, the mean over the sets."""
    return [statistics.mean(values) for values in zip(*(v for k, v in row["evaluation"].items() if k.endswith("/accuracy")))]


def gain(row: dict) -> float:
    return row["final"]["accuracy"] - row["final"]["accuracy_before"]


def pass_at_4(row: dict) -> float:
    return row["evaluation"]["eval/toy/pass_at_k"][-1]


def where(*words: str) -> list[str]:
    """Environments of the grid whose names hold all these words."""
    return [e for e in GRID if set(words) <= set(e.split())]


# ---- the numbers of the README ---------------------------------------------------------------------------------------


def claims(rows: Rows, lines: list[dict], other: Rows) -> dict[str, str]:
    """Every number that the README takes from here, by the name that stands behind it in a comment. other: the main grid from another warmed-up model."""
    found = {"runs": f"{len(lines)}"}
    for name in ISOLATED[1:]:
        for words in ((), ("base",), ("aligned",)):
            found[f"{name}: {' '.join(words) or 'all'}, other model"] = show(effect(other, name, "lite_ppo", where(*words))[0])
    for name in METHODS:
        found[f"rate of {name}, other model"] = best_rate([row for cell in other.values() for row in cell.values()], name)
        found[f"tuned {name} - lite_ppo: base, other model"] = show(effect(other, f"tuned {name}", "tuned lite_ppo", PAIR[:1])[0])
        found[f"common {name} - lite_ppo: base, other model"] = show(
            effect(other, at_common_rate(other, PAIR[0], name), at_common_rate(other, PAIR[0], "lite_ppo"), PAIR[:1])[0])
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
    for words in ((), ("base",), ("aligned",)):
        found[f"no normalisation: {' '.join(words) or 'all'}, pass@4"] = show(effect(rows, "no normalisation", "lite_ppo", where(*words), pass_at_4)[0])
    small = [n for n in ISOLATED[1:] if n not in ("no normalisation", "neither trick")]
    ends = [end for n in small if (values := effect(rows, n, "lite_ppo", GRID)[0]) for end in interval(values)[1:]]
    found["lowest end of the others"], found["highest end of the others"] = (f"{x:+.1f}" for x in ((min(ends), max(ends)) if ends else (math.nan, math.nan)))
    for e, label in zip(STEPS, ("base", "aligned")):
        for name in ("lite_ppo", "clip 0.24", "clip 0.28", "clip 0.32"):
            found[f"{name}: 8 steps, {label}"] = show(effect(rows, name, "lite_ppo", [e])[0])
            found[f"{name}: 8 steps, {label}, entropy"] = show(effect(rows, name, "lite_ppo", [e], final("policy/entropy"), 1)[0], 4)
            found[f"{name}: 8 steps, {label}, clip_high"] = show(level(rows, name, [e], final("policy/clip_high")), 2, False)
    for e, label in zip([*PAIR, *LONG], ("base", "aligned", "long, base", "long, aligned")):
        found[f"constant level: {label}"] = show(effect(rows, "constant level", "lite_ppo", [e])[0])
        found[f"sequence level: {label}, one cell"] = show(effect(rows, "sequence level", "lite_ppo", [e])[0])
        for name in ("sequence level", "constant level"):
            found[f"{name}: {label}, truncated effect"] = show(effect(rows, name, "lite_ppo", [e], lambda row: statistics.mean(curve(row, "response/truncated")))[0])
    for name in ("lite_ppo", "group std", "batch mean", "no normalisation"):
        found[f"{name}: -1/1 - 0/1"] = show(effect(rows, f"{name}, -1/1", name, PAIR[:1])[0])
    found["no normalisation, -1/1 - lite_ppo"] = show(effect(rows, "no normalisation, -1/1", "lite_ppo", PAIR[:1])[0])
    for e in LIMITS:
        label = e.rsplit(" ", 1)[1]
        for name in ("lite_ppo", "overlong filter", "soft punishment"):
            found[f"{name}: {label}"] = show(effect(rows, name, "lite_ppo", [e])[0])
            found[f"{name}: {label}, truncated"] = show(effect(rows, name, "lite_ppo", [e], final("response/truncated"))[0])
            found[f"{name}: {label}, truncated share"] = show(level(rows, name, [e], final("response/truncated")), 1, False)
            found[f"{name}: {label}, looping effect"] = show(effect(rows, name, "lite_ppo", [e], looping_share)[0], 0)
            found[f"{name}: {label}, looping share"] = show(level(rows, name, [e], looping_share), 0, False)
            found[f"{name}: {label}, length"] = show(level(rows, name, [e], final("response/length_mean"), 1), 0, False)
    for e, label in ((PAIR[0], "base"), (PAIR[1], "aligned"), ("easy small aligned", "easy aligned"), ("hard small base", "hard base")):
        found[f"reward std: {label}"] = show(level(rows, "lite_ppo", [e], lambda row: statistics.mean(row["curve"]["reward/std"]), 1), 2, False)
        found[f"std within / std: {label}"] = show(level(rows, "lite_ppo", [e], std_ratio, 1), 2, False)
    for name in (*DEFINITIONS, "eps 1e-4"):
        found[f"{name}: base"] = show(effect(rows, name, "lite_ppo", PAIR[:1])[0])
    for e, label in zip(PAIR, ("base", "aligned")):
        budget, ours = equal_responses(20 * 64), at_common_rate(rows, e, "lite_ppo")
        for name in METHODS:
            tuned, common = f"tuned {name}", at_common_rate(rows, e, name)
            found[f"{tuned}: {label}"] = show(level(rows, tuned, [e]), 1, False)
            found[f"{tuned} - lite_ppo: {label}"] = show(effect(rows, tuned, "tuned lite_ppo", [e])[0])
            found[f"{tuned}: {label}, equal responses"] = show(level(rows, tuned, [e], budget), 1, False)
            found[f"{tuned} - lite_ppo: {label}, equal responses"] = show(effect(rows, tuned, "tuned lite_ppo", [e], budget)[0])
            found[f"common {name}: {label}"] = show(level(rows, common, [e]), 1, False)
            found[f"common {name} - lite_ppo: {label}"] = show(effect(rows, common, ours, [e])[0])
            found[f"common {name} - lite_ppo: {label}, equal responses"] = show(effect(rows, common, ours, [e], budget)[0])
            found[f"rate of {name}"] = best_rate(lines, name)
            sampled = level(rows, tuned, [e], lambda row: sum(row["curve"]["rollout/responses"]), 1)
            found[f"responses of {name}: {label}"] = f"{statistics.mean(sampled):.0f}" if sampled else "not run"
    return found


def at_common_rate(rows: Rows, environment: str, method: str) -> str:
    """The setting in which a method ran at the rate that most methods chose: an own one, unless that is its choice too."""
    return f"common {method}" if (environment, f"common {method}") in rows else f"tuned {method}"


def std_ratio(row: dict) -> float:
    """Spread within groups over the std of the raw rewards, both averaged over the steps of a run."""
    spread = statistics.mean(row["curve"]["reward/std"])
    return statistics.mean(row["curve"]["reward/std_within"]) / spread if spread else math.nan


def looping_share(row: dict) -> float:
    """Share of the truncated responses of the whole run that end in a loop."""
    cut = sum(curve(row, "response/truncated"))
    return sum(curve(row, "looping")) / cut if cut else math.nan


MARKED = re.compile(r"(?P<text>not run|[+-]?(?:\d[\d.]*(?:e-\d)?|nan)(?: \[(?:one seed|[-+\d., na]+)\])?)<!-- (?P<name>[^>]+?) -->")


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
    "shaped": ("training reward", "with the punishment", "reward/mean", 1),
    "entropy": ("entropy", "nats per token", "policy/entropy", 1),
    "length": ("response length", "tokens", "response/length_mean", 1),
    "clip_high": ("clipped high", "% of tokens", "policy/clip_high", 100),
    "clip_low": ("clipped low", "% of tokens", "policy/clip_low", 100),
    "truncated": ("truncated", "% of responses", "response/truncated", 100),
    "looping": ("looping", "% of responses", "looping", 100),
    "spread": ("reward spread", "std of the step", "reward/std", 1),
}
NAMES = dict(lite_ppo="Lite PPO", grpo="GRPO", dapo="DAPO", dr_grpo="Dr. GRPO", rloo="RLOO", reinforce="REINFORCE")


def label_of(setting: str) -> str:
    method, comma, rest = setting.removeprefix("tuned ").removeprefix("common ").removeprefix("preset ").partition(",")
    return NAMES.get(method, method) + comma + rest + (", common rate" if setting.startswith("common ") else "")


def look(i: int, setting: str, settings: list[str]) -> dict:
    """Colour and line of the i-th setting; rewards -1/1 have the colour of their 0/1, so that pairs are seen."""
    partner = setting.removesuffix(", -1/1")
    if partner != setting and partner in settings:
        return dict(color=COLOURS[settings.index(partner) // 2 % len(COLOURS)], linestyle=":", linewidth=2.2)
    if f"{setting}, -1/1" in settings:
        return dict(color=COLOURS[i // 2 % len(COLOURS)], linestyle="-", linewidth=1.2)
    return dict(color=COLOURS[i % len(COLOURS)], linestyle=STYLES[(i + i // len(COLOURS)) % len(STYLES)], linewidth=1.9 if i == 0 else 1.4)


def curve(row: dict, key: str) -> list[float]:
    """A curve of the results; looping responses as a share of all, for a share of the truncated ones says nothing where none is truncated."""
    if key == "looping":
        return [cut * share for cut, share in zip(row["curve"]["response/truncated"], row["curve"]["response/looping"])]
    return row["curve"][key]


def smooth(values: list[float], width: int = 3) -> np.ndarray:
    """Centred moving average; a step has 64 responses, and its mean is noisy."""
    padded = np.pad(np.array(values, float), width // 2, mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def points(axes, x, values: np.ndarray, i: int, count: int, span: float, **line) -> None:
    """Few measured points, joined; the 95 % interval over seeds as a bar, moved aside a little so that bars stand side by side. values [seeds, points]."""
    mean, low, high = np.array([interval(list(column)) for column in values.T]).T
    x = np.asarray(x, float) + span * (i / max(1, count - 1) - 0.5)
    axes.plot(x, mean, marker="o", markersize=3, **line)
    axes.errorbar(x, mean, [mean - low, high - mean], fmt="none", ecolor=line["color"], elinewidth=0.9, alpha=0.8)


def multiples(rows: Rows, title: str, environments: list[str], settings: list[str], panels: list[str], path: Path) -> None:
    """Rows: environments. Columns: held-out accuracy, then curves over steps."""
    environments = [e for e in environments if any((e, s) in rows for s in settings)]
    if not environments:
        return
    figure = Figure(figsize=(1.5 + 1.65 * (1 + len(panels)), 2.2 * len(environments) + 1.1), layout="constrained")
    grid = figure.subplots(len(environments), 1 + len(panels), squeeze=False, sharex=True)
    for number, (e, line) in enumerate(zip(environments, grid)):
        here = [s for s in settings if (e, s) in rows]
        for i, setting in enumerate(here):
            cell, drawn = list(rows[e, setting].values()), look(i, setting, here)
            cell = [row for row in cell if row["evaluation"]["step"] == cell[0]["evaluation"]["step"]]  # a run of another length cannot be averaged
            steps = cell[0]["evaluation"]["step"]
            points(line[0], steps, 100 * np.array([accuracies(row) for row in cell]), i, len(here), 0.05 * steps[-1], label=label_of(setting), **drawn)
            for axes, panel in zip(line[1:], panels):
                curves = PANELS[panel][3] * np.array([smooth(curve(row, PANELS[panel][2])) for row in cell])
                curves = correct_share(cell[0], curves) if panel == "reward" else curves
                mean, low, high = np.array([interval(list(column)) for column in curves.T]).T
                axes.plot(np.arange(1, len(mean) + 1), mean, **drawn)
                if len(here) <= 5 or i == 0:  # more bands hide each other: then the first one's tells how wide they are
                    axes.fill_between(np.arange(1, len(mean) + 1), low, high, color=drawn["color"], alpha=0.13, linewidth=0)
        for axes, panel in zip(line, [None, *panels]):
            name, unit = PANELS[panel][:2] if panel else ("held-out accuracy", "%")
            axes.set_title("" if number else name, fontsize=10)
            axes.set_ylabel(unit if panel else "\n".join([*e.split(", "), unit]), fontsize=9)
            axes.tick_params(labelsize=8.5)
            axes.grid(alpha=0.25)
            if panel and panel not in ("reward", "shaped"):
                axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))  # an interval may reach below what a share can be
            if panel == "looping" and rows[e, here[0]][min(rows[e, here[0]])]["config"]["max_new_tokens"] < 64:
                axes.cla()
                axes.set_title("" if number else name, fontsize=10)
                axes.text(0.5, 0.5, "a loop is told\nfrom 64 tokens on", ha="center", va="center", fontsize=9, transform=axes.transAxes)
                axes.set_yticks([])
            if number + 1 == len(grid):
                axes.set_xlabel("step", fontsize=9)
    handles, labels = max((axes.get_legend_handles_labels() for axes in grid[:, 0]), key=lambda pair: len(pair[1]))
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), fontsize=9.5, frameon=False)
    seeds = sorted({len(rows[e, s]) for e in environments for s in settings if (e, s) in rows})
    figure.suptitle(f"{title}\nmean and 95 % interval over {' or '.join(map(str, seeds))} seeds; curves: moving average of 3 steps", fontsize=10.5)
    figure.savefig(path, dpi=110)


def by_responses(rows: Rows, path: Path) -> None:
    """Accuracy of the methods against the responses that training has sampled: resampling costs some."""
    environments, settings = [e for e in PAIR if (e, "tuned dapo") in rows], QUESTIONS["methods"][2]
    if not environments:
        return
    figure = Figure(figsize=(5.2 * len(environments), 4.2), layout="constrained")
    for e, axes in zip(environments, figure.subplots(1, len(environments), squeeze=False)[0]):
        here = [s for s in settings if (e, s) in rows]
        for i, setting in enumerate(here):
            cell = list(rows[e, setting].values())
            points(axes, np.mean([cost(row) for row in cell], 0), 100 * np.array([accuracies(row) for row in cell]), i, len(here), 30, label=label_of(setting),
                   **look(i, setting, here))  # fmt: skip
        axes.axvline(20 * 64, color="grey", linewidth=0.8, linestyle=":")
        axes.set_title(e, fontsize=10)
        axes.set_xlabel("sampled responses of training", fontsize=9)
        axes.set_ylabel("held-out accuracy, %", fontsize=9)
        axes.tick_params(labelsize=8.5)
        axes.grid(alpha=0.25)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9.5, frameon=False)
    figure.suptitle("(f) Methods, each at its own learning rate, by what they have sampled (dotted: 1,280 responses)", fontsize=10.5)
    figure.savefig(path, dpi=110)


def forest(rows: Rows, path: Path, value=final("accuracy"), unit: str = "held-out accuracy, percentage points") -> None:
    """Effect of each switch against Lite PPO, a row for each environment, and their mean."""
    tricks = [name for name in ISOLATED[1:] if effect(rows, name, "lite_ppo", GRID, value)[0]]
    if not tricks:
        return
    figure = Figure(figsize=(11, 4.6), layout="constrained")
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
        axes.set_title(name.replace("no normalisation", "no normali-\nsation").replace(" level", "\nlevel"), fontsize=10)
        axes.grid(axis="x", alpha=0.25)
        axes.tick_params(labelsize=8.5)
    panels[0].set_yticks([*places.values(), -14.2], [*places, "mean of all"], fontsize=9.5)
    figure.supxlabel(f"effect of the switch against Lite PPO: {unit}\ncircles: base, squares: aligned, with 95 % intervals over seeds; diamond: the mean, as wide as its interval",
                     fontsize=9.5)  # fmt: skip
    figure.savefig(path, dpi=110)


def tokens(rows: Rows, path: Path) -> None:
    """The most clipped tokens at each bound, both sides, summed over seeds; the side's total above its bars."""
    bounds = [("0.20", "lite_ppo"), ("0.24", "clip 0.24"), ("0.28", "clip 0.28"), ("0.32", "clip 0.32")]
    cells = [(e, bound, setting) for e in STEPS for bound, setting in bounds if (e, setting) in rows]
    if not cells:
        return
    figure = Figure(figsize=(11, 2.6 * len(STEPS)), layout="constrained")
    grid = figure.subplots(len(STEPS), len(bounds), squeeze=False, sharey="row")
    for e, bound, setting in cells:
        axes = grid[STEPS.index(e)][bounds.index((bound, setting))]
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


USUAL = ["reward", "entropy", "length", "clip_high", "clip_low"]
QUESTIONS = {  # file: title, environments, settings, panels
    "normalisation": ("(a) Normalisation of the reward", [*PAIR, "hard small base"], ["lite_ppo", "group std", "batch mean", "no std", "no normalisation"], USUAL),
    "scale": ("(a) Rewards 0/1 and -1/1", PAIR[:1], [f"{n}{s}" for n in ("lite_ppo", "group std", "batch mean", "no normalisation") for s in ("", ", -1/1")], USUAL),
    "std": ("(b) With and without a standard deviation", ["easy small aligned", "hard small base"], ["lite_ppo", "group std", "no std"],
            ["spread", "entropy", "length", "clip_high", "clip_low"]),
    "clip": ("(c) Clip-higher, 8 optimizer steps per rollout", STEPS, ["lite_ppo", "clip 0.24", "clip 0.28", "clip 0.32"], USUAL),
    "level": ("(d) Level of the loss", [*PAIR, *LONG], ["lite_ppo", "sequence level", "constant level"], ["reward", "entropy", "length", "truncated", "clip_low"]),
    "overlong": ("(e) Responses that are cut", LIMITS, ["lite_ppo", "overlong filter", "soft punishment"], ["shaped", "entropy", "length", "truncated", "looping"]),
    "parts": ("(f) Lite PPO and its two parts", PAIR, ["lite_ppo", "sequence level", "no normalisation", "neither trick"], USUAL),
    "definitions": ("(g) What others call the std of the batch", PAIR[:1], ["lite_ppo", *DEFINITIONS, "eps 1e-4"], USUAL),
    "methods": ("(f) Methods, each at its own learning rate (the training reward of DAPO is that of the groups it keeps)", PAIR,
                [*(f"tuned {name}" for name in METHODS), "common lite_ppo"], USUAL),
}  # fmt: skip


# ---- tables ----------------------------------------------------------------------------------------------------------


def tables(rows: Rows, lines: list[dict], found: dict[str, str], source: str, other: Rows) -> str:
    """results.md: every cell of every question."""
    text = ["# Results", "", f"Made by `python experiments/plot.py` from `{source}`. Accuracy: held out, in %, at the last step; effects: percentage "
            "points against Lite PPO in the same environment, seed by seed; intervals: Student's, 95 %, over the seeds, not corrected for their number. "
            "All runs of an environment start from one warmed-up model and are tested on the same 100 problems.", ""]  # fmt: skip
    seconds, days = sum(row["seconds"] for row in lines), sorted({row["date"] for row in lines})
    text += [f"{len(lines)} runs, {seconds / 3600:.1f} hours of single-threaded runs, {days[0]} to {days[-1]}.", ""]

    def table(title: str, head: list[str], body: list[list[str]]) -> None:
        text.extend([f"## {title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(line)} |" for line in body), ""])

    body = [[e, *(show(effect(rows, name, "lite_ppo", [e])[0]) for name in ISOLATED[1:])] for e in GRID]
    means = lambda of: [[f"**mean, {' '.join(words) or 'all'}**", *(show(effect(of, name, "lite_ppo", where(*words))[0]) for name in ISOLATED[1:])]  # noqa: E731
                        for words in ((), ("base",), ("aligned",), ("easy",), ("medium",), ("hard",), ("tiny",), ("small",))]  # fmt: skip
    table("Effect of each switch", ["environment", *ISOLATED[1:]], body + means(rows))
    if other:
        table("The same from other warmed-up models", ["environment", *ISOLATED[1:]], means(other))
        body = [[label_of(m), found[f"rate of {m}, other model"], *(found[f"{kind} {m} - lite_ppo: base, other model"] for kind in ("tuned", "common"))] for m in METHODS]
        table(f"Methods from another warmed-up model, {PAIR[0]}", ["method", "rate", "against Lite PPO", "both at the common rate"], body)
    columns = {"accuracy": ("accuracy", 100, 1), "gain": ("since step 0", 100, 1), "pass": ("pass@4", 100, 1), "reward": ("shaped reward over all steps", 100, 1), "policy/entropy": ("entropy, last quarter", 1, 4),
               "response/length_mean": ("length", 1, 1), "policy/clip_high": ("clipped high, %", 100, 3), "policy/clip_low": ("clipped low, %", 100, 3),
               "response/truncated": ("truncated, %", 100, 1)}  # fmt: skip
    for title, (environments, settings) in {name: q[1:3] for name, q in QUESTIONS.items()}.items():
        body = [[e, label_of(s), str(len(rows[e, s])), *(show(level(rows, s, [e], {"gain": gain, "pass": pass_at_4}.get(key, final(key)), scale), digits, key == "gain")
                for key, (_, scale, digits) in columns.items())]
                for e in environments for s in settings if (e, s) in rows]  # fmt: skip
        table(QUESTIONS[title][0], ["environment", "setting", "seeds", *(name for name, _, _ in columns.values())], body)
    body = [[label_of(name), *(show(level(rows, f"{name} at {rate}", PAIR[:1]), 1, False) for rate in RATES), best_rate(lines, name)] for name in METHODS]
    seeds = sorted({row["seed"] for row in lines if " at " in row["setting"]})
    table(f"Sweep of the learning rate: {PAIR[0]}, {f'seeds {seeds[0]} to {seeds[-1]}' if seeds else 'not run'}", ["method", *RATES, "chosen"], body)
    for e, name in zip(PAIR, ("base", "aligned")):
        body = [[label_of(m), found[f"rate of {m}"], str(len(rows.get((e, f"tuned {m}"), {}))), found[f"tuned {m}: {name}"], found[f"tuned {m} - lite_ppo: {name}"],
                 found[f"responses of {m}: {name}"], found[f"tuned {m}: {name}, equal responses"], found[f"tuned {m} - lite_ppo: {name}, equal responses"],
                 found[f"common {m} - lite_ppo: {name}"], found[f"common {m} - lite_ppo: {name}, equal responses"]]
                for m in METHODS]  # fmt: skip
        table(f"Methods, {e}", ["method", "rate", "seeds", "accuracy at equal steps", "against Lite PPO", "sampled responses", "accuracy at 1,280 responses",
                                "against Lite PPO", "both at the common rate: at equal steps", "at 1,280 responses"], body)  # fmt: skip
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results/toy.jsonl")
    parser.add_argument("--figures", type=Path, help="folder; default: figures/, or for other results one beside the file, of its name")
    parser.add_argument("--readme", action="store_true", help="rewrite the marked numbers of ../README.md")
    args = parser.parse_args()
    lines = load(args.results)
    if not lines:
        raise SystemExit(f"--results {args.results}: no results; experiments/run.py makes them")
    ours = args.results.resolve() == HERE / "results/toy.jsonl"  # what the README is about
    if args.readme and not ours:
        raise SystemExit(f"--readme: its numbers are those of results/toy.jsonl, not of {args.results}")
    rows, other = by_cell(lines), by_cell(load(OTHER_MODEL)) if ours else {}
    folder = args.figures or (HERE / "figures" if ours else args.results.with_suffix(""))
    folder.mkdir(parents=True, exist_ok=True)
    environments = list(dict.fromkeys(e for e, _ in rows))
    if set(environments) <= set(ENVIRONMENTS):
        forest(rows, folder / "overview.png")
        tokens(rows, folder / "tokens.png")
        by_responses(rows, folder / "responses.png")
        for name, question in QUESTIONS.items():
            multiples(rows, *question, folder / f"{name}.png")
        found, document = claims(rows, lines, other), HERE / "results.md" if ours and not args.figures else folder / "results.md"
        document.write_text(tables(rows, lines, found, f"results/{args.results.name}", other))
        if args.readme:
            readme = HERE.parent / "README.md"
            readme.write_text(refresh(readme.read_text(), found))
    else:  # real models
        settings = sorted(dict.fromkeys(s for _, s in rows), key=lambda s: s != "lite_ppo")  # the first is the baseline
        for e in environments:
            multiples(rows, e, [e], settings, [*USUAL, "truncated"], folder / f"{re.sub('[^A-Za-z0-9.-]+', '_', e)}.png")
            for s in settings[1:]:
                print(f"{e}: {s} against {settings[0]}: {show(effect(rows, s, settings[0], [e])[0])}")


if __name__ == "__main__":
    main()
