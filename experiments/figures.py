"""Figures: one question each, the effect with its interval, and the answer as title.

Every title is computed from the results, so it cannot contradict them.
"""

import statistics
from collections import Counter
from collections.abc import Callable

import numpy as np
from drawing import (
    ALIGNED,
    BASE,
    BLACK,
    BLUE,
    DPI,
    GREEN,
    GREY,
    MARKS,
    ONLY,
    ORANGE,
    POINTS,
    RED,
    SKY,
    Effects,
    Series,
    add_legend,
    does,
    each,
    footer,
    forest,
    is_empty,
    named,
    new_figure,
    signs,
)
from effects import (
    ACCURACY,
    AT_BUDGET,
    BUDGET,
    CLIP_HIGH,
    ENTROPY,
    REWARD_STD,
    TRUNCATED,
    TRUNCATED_LATE,
    Rows,
    accuracies,
    at_common_rate,
    clipped_counts,
    cost,
    effect,
    in_brackets,
    interval,
    label_of,
    level,
    most_clipped,
    show,
    sign,
    token_shares,
    verdict,
)
from grid import (
    CLIPS,
    DEFINITIONS,
    GRID,
    LIMITS,
    LONG,
    METHODS,
    PAIR,
    SCALED,
    STEPS,
    TOKEN_LIMITS,
    where,
)
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator
from overview import overview


def pair_effects(rows: Rows, settings, baseline: str, environments, measure=ACCURACY) -> Effects:
    """The effect of each setting on base and on aligned models; environments: a list for each."""
    found = {}
    for series, these in zip((BASE, ALIGNED), environments):
        found[series] = [effect(rows, name, baseline, these, measure) for name in settings]
    return found


# ---- one question each ---------------------------------------------------------------------------


def scale(rows: Rows) -> Figure | None:
    """Rewards {-1, 1} instead of {0, 1}."""
    lines = [effect(rows, f"{name}, -1/1", name, PAIR[:1]) for name in SCALED]
    found = {ONLY: lines}
    if is_empty(found):
        return None
    normalised = [abs(interval(values).mean) for values in lines[:-1] if values]
    largest = f"at most {max(normalised):.2f} points" if normalised else "not run"
    figure = new_figure(f"Effect of the reward scale with normalisation: {largest}", 8, 2.9)
    axes = figure.subplots()
    forest(axes, [label_of(name) for name in SCALED], found)
    axes.set_xlabel(f"rewards {{-1, 1}} against {{0, 1}}: {POINTS}", fontsize=9.5)
    footer(figure, f"{MARKS}; {PAIR[0]}")
    return figure


CONCENTRATED = 0.3  # std of the rewards below which they are called concentrated


def std(rows: Rows) -> Figure | None:
    """The effect of leaving out the std, by how concentrated the rewards are."""
    spreads = {}
    for env in GRID:
        if effect(rows, "no std", "lite_ppo", [env]):
            spreads[env] = statistics.mean(level(rows, "lite_ppo", [env], REWARD_STD))
    concentrated = [env for env, spread in spreads.items() if spread < CONCENTRATED]
    values = effect(rows, "no std", "lite_ppo", concentrated)
    if not values:
        return None
    answer = f"Where rewards are concentrated, leaving out the std {does(values)}"
    figure = new_figure(answer, 8, 4.2)
    axes = figure.subplots()
    for env, spread in spreads.items():
        series = ALIGNED if "aligned" in env else BASE
        mean, low, high = interval(effect(rows, "no std", "lite_ppo", [env]))
        axes.plot([spread, spread], [low, high], color=series.colour, linewidth=1.6)
        axes.plot(spread, mean, series.marker, color=series.colour, markersize=6)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlim(min(spreads.values()) - 0.03, max(spreads.values()) + 0.03)
    axes.axvspan(0, CONCENTRATED, color=GREY, alpha=0.18, linewidth=0)
    note = f"concentrated rewards,\nmean: {show(values)}"
    axes.text(0.02, 0.05, note, transform=axes.transAxes, fontsize=9.5)
    axes.set_xlabel("std of the rewards of a step, mean over the run", fontsize=9.5)
    axes.set_ylabel("effect of no std, points", fontsize=9.5)
    axes.grid(alpha=0.25)
    add_legend(axes, {BASE: [], ALIGNED: []})
    footer(figure, f"{MARKS}, one mark for each environment of the main grid")
    return figure


def relative(values: list[float], baseline: list[float]) -> list[float]:
    """Changes in %, seed by seed."""
    return [100 * (a / b - 1) for a, b in zip(values, baseline)]


def entropy_changes(rows: Rows, settings: list[str]) -> Effects:
    """Entropy against Lite PPO in %, on base and on aligned models."""
    found = {}
    for series, env in zip((BASE, ALIGNED), STEPS):
        plain = level(rows, "lite_ppo", [env], ENTROPY)
        lines = [level(rows, name, [env], ENTROPY) for name in settings]
        found[series] = [relative(values, plain) for values in lines]
    return found


def clip_answer(rows: Rows, accuracy: Effects, entropy: Effects, bounds: list[str]) -> str:
    """The title of the figure on clip-higher."""
    shares = [level(rows, "lite_ppo", [env], CLIP_HIGH) for env in STEPS]
    largest = max(statistics.mean(share) for share in shares if share)
    answer = "Clip-higher: no difference seen in accuracy or entropy"
    if signs(accuracy) | signs(entropy) != {"0"}:
        answer = f"Clip-higher, accuracy: {verdict(named(accuracy, bounds))}"
        answer += f"; entropy: {verdict(named(entropy, bounds), unit='%')}"
    return f"{answer}; at 0.20 at most {largest:.1f} % of the tokens are clipped"


def clip(rows: Rows) -> Figure | None:
    """Accuracy and entropy by the upper clip bound."""
    bounds = [bound for bound in CLIPS if bound != "0.20"]
    settings = [CLIPS[bound] for bound in bounds]
    accuracy = pair_effects(rows, settings, "lite_ppo", [[env] for env in STEPS])
    if is_empty(accuracy):
        return None
    entropy = entropy_changes(rows, settings)
    labels = [f"{bound} instead of 0.20" for bound in bounds]
    figure = new_figure(clip_answer(rows, accuracy, entropy, bounds), 11, 3.9)
    left, right = figure.subplots(1, 2, sharey=True)
    forest(left, labels, accuracy)
    forest(right, labels, entropy)
    left.set_xlabel("accuracy, percentage points", fontsize=9.5)
    right.set_xlabel("entropy in the last quarter of the run, change in %", fontsize=9.5)
    add_legend(left, accuracy)
    footer(figure, f"{MARKS}; 8 optimizer steps per rollout, medium small")
    return figure


def written(token: str) -> str:
    """A token with its line break visible."""
    return token.replace("\n", "\\n")


def percent(share: float, _position) -> str:
    """An axis label without its sign: the low side is drawn to the left."""
    return f"{abs(share):.0f}"


def token_panel(axes, sides: dict[str, Counter], chosen: list[str], name: str) -> None:
    """Bars for the chosen tokens: clipped low to the left, high to the right."""
    total = (sides["low"] + sides["high"]).total()
    low = [-100 * sides["low"][token] / total for token in chosen]
    high = [100 * sides["high"][token] / total for token in chosen]
    axes.barh(range(len(chosen)), low, color=BLUE, label="clipped on the low side")
    axes.barh(range(len(chosen)), high, color=ORANGE, label="on the high side")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_title(f"{name}: {total:,} clipped tokens", fontsize=10.5)
    axes.grid(axis="x", alpha=0.25)
    axes.xaxis.set_major_locator(MultipleLocator(4))
    axes.xaxis.set_major_formatter(percent)
    axes.set_xlabel("% of the clipped tokens", fontsize=9.5)


def tokens(rows: Rows) -> Figure | None:
    """The most clipped tokens, in the same order in both panels."""
    counts = [clipped_counts(rows, env, "lite_ppo") for env in STEPS]
    if not all((sides["low"] + sides["high"]).total() for sides in counts):
        return None
    known, low = token_shares(counts)
    figure = new_figure(
        f"{known:.0f} % of the clipped tokens are digits or \\boxed{{, "
        f"and {low:.0f} % are clipped on the low side",
        10,
        4.6,
    )
    panels = figure.subplots(1, 2, sharey=True, sharex=True)
    chosen = most_clipped(counts, 12)
    for axes, sides, series in zip(panels, counts, (BASE, ALIGNED)):
        token_panel(axes, sides, chosen, series.label)
    panels[0].set_yticks(range(len(chosen)), [written(token) for token in chosen])
    panels[0].invert_yaxis()
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


LEVELS = {
    "sequence level": Series("sequence level", RED, "o"),
    "constant level": Series("constant level", GREEN, "s"),
}
LEVEL_ROWS = {
    "base, equal lengths": where("base"),
    "aligned, equal lengths": where("aligned"),
    "base, some loop": LONG[:1],
    "aligned, some loop": LONG[1:],
}


def level_effects(rows: Rows, measure) -> Effects:
    """The effect of both levels in each row of the figure."""
    found = {}
    for name, series in LEVELS.items():
        lines = [effect(rows, name, "lite_ppo", these, measure) for these in LEVEL_ROWS.values()]
        found[series] = lines
    return found


def level_answer(accuracy: Effects, truncated: Effects) -> str:
    """Sequence level where some responses loop."""
    labels = ["base", "aligned"]
    everywhere = accuracy[LEVELS["sequence level"]]
    found = everywhere[2:]
    stay = truncated[LEVELS["sequence level"]][2:]
    if {sign(values) for values in everywhere} == {"0"}:
        if {sign(values) for values in stay} == {"+"}:
            later = "looping responses disappear later"
            return f"Sequence level: no difference seen in accuracy, but {later}"
    return (
        f"Sequence level where some responses loop: {each(dict(zip(labels, found)))}; "
        f"truncated responses: {each(dict(zip(labels, stay)))}"
    )


def loss_level(rows: Rows) -> Figure | None:
    """Sequence and constant level against token level."""
    accuracy = level_effects(rows, ACCURACY)
    truncated = level_effects(rows, TRUNCATED)
    if is_empty(accuracy):
        return None
    figure = new_figure(level_answer(accuracy, truncated), 11, 4.6)
    left, right = figure.subplots(1, 2, sharey=True)
    forest(left, list(LEVEL_ROWS), accuracy)
    forest(right, list(LEVEL_ROWS), truncated)
    left.set_xlabel("accuracy at the end, percentage points", fontsize=9.5)
    right.set_xlabel("truncated responses over the whole run, percentage points", fontsize=9.5)
    add_legend(left, accuracy)
    footer(
        figure,
        f"{MARKS}, against token level. Looping responses are 5 times as long.\n"
        "Equal lengths: mean of six environments for sequence level, one for constant level",
    )
    return figure


PUNISHED = {
    "overlong filter": Series("overlong filter", RED, "o"),
    "soft punishment": Series("soft punishment", BLUE, "s"),
}


def by_limit(rows: Rows, setting: str, measure=ACCURACY) -> list[list[float]]:
    """The effect of a setting at each length limit."""
    return [effect(rows, setting, "lite_ppo", [env], measure) for env in LIMITS]


def overlong_answer(rows: Rows) -> str:
    """The title of the figure on truncated responses."""
    tight = {name: does(by_limit(rows, name)[0]) for name in PUNISHED}
    costs = ", ".join(f"the {name} {words}" for name, words in tight.items())
    found = {ONLY: by_limit(rows, "overlong filter", TRUNCATED_LATE)}
    answer = "the filter leaves more responses truncated"
    if signs(found) != {"+"}:
        answer = f"truncated with the filter: {verdict(named(found, list(TOKEN_LIMITS)))}"
    return f"Where the limit cuts off correct answers, {costs}; {answer}"


def overlong(rows: Rows) -> Figure | None:
    """Overlong filter and soft punishment at three length limits."""
    accuracy = {series: by_limit(rows, name) for name, series in PUNISHED.items()}
    if is_empty(accuracy):
        return None
    truncated = {}
    for name, series in {"lite_ppo": Series("Lite PPO", BLACK, "D"), **PUNISHED}.items():
        truncated[series] = [level(rows, name, [env], TRUNCATED_LATE) for env in LIMITS]
    figure = new_figure(overlong_answer(rows), 11, 4.6)
    left, right = figure.subplots(1, 2, sharey=True)
    labels = [f"{name}: {limit} tokens" for name, limit in TOKEN_LIMITS.items()]
    forest(left, labels, accuracy)
    forest(right, labels, truncated, signed=False)
    left.set_xlabel("accuracy against Lite PPO, percentage points", fontsize=9.5)
    right.set_xlabel("truncated responses in the last quarter of the run, %", fontsize=9.5)
    add_legend(right, truncated)
    footer(figure, f"{MARKS}. The tight limit cuts off correct answers, the loose one only loops")
    return figure


def parts_answer(found: Effects, labels: list[str]) -> str:
    """The title of the figure on the two tricks."""
    normalisation = {sign(lines[0]) for lines in found.values()}
    token_level = {sign(lines[1]) for lines in found.values()}
    if normalisation == {"-"} and token_level == {"0"}:
        return "On the toy, normalisation costs accuracy; token level shows no difference"
    return f"Against neither trick: {verdict(named(found, labels))}"


def parts(rows: Rows) -> Figure | None:
    """Each trick alone, and both, against neither."""
    settings = ["sequence level", "no normalisation", "lite_ppo"]
    labels = ["normalisation alone", "token level alone", "both: Lite PPO"]
    found = pair_effects(rows, settings, "neither trick", [where("base"), where("aligned")])
    if is_empty(found):
        return None
    figure = new_figure(parts_answer(found, labels), 9, 3.6)
    axes = figure.subplots()
    forest(axes, labels, found)
    axes.set_xlabel(f"{POINTS}, against neither trick", fontsize=9.5)
    add_legend(axes, found)
    footer(figure, f"{MARKS}; mean of the environments of the main grid")
    return figure


def method_effects(rows: Rows) -> dict[str, dict[Series, list[float]]]:
    """Methods at their own rate; those whose rate differs, also at the common rate."""
    found = {}
    for name in METHODS:
        for kind in ("tuned", "common"):
            cells = {}
            for series, env in zip((BASE, ALIGNED), PAIR):
                baseline = "tuned lite_ppo"
                if kind == "common":
                    baseline = at_common_rate(rows, env, "lite_ppo")
                cells[series] = effect(rows, f"{kind} {name}", baseline, [env])
            if any(cells.values()) and name != "lite_ppo":
                found[in_brackets(label_of(f"{kind} {name}"))] = cells
    return found


def methods_answer(found: dict[str, dict[Series, list[float]]]) -> str:
    """The methods that differ from Lite PPO, on base and on aligned models."""
    parts = []
    for series in (BASE, ALIGNED):
        for word, wanted in (("better", "+"), ("worse", "-")):
            names = [name for name, cells in found.items() if sign(cells.get(series, [])) == wanted]
            if names:
                parts.append(f"{word} on {series.label}: {', '.join(names)}")
    if "0" in {sign(values) for cells in found.values() for values in cells.values()}:
        parts.append("otherwise no difference seen" if parts else "no difference seen")
    return f"Against Lite PPO, {'; '.join(parts) or 'one seed, no interval'}"


def methods(rows: Rows) -> Figure | None:
    """Every method against Lite PPO at equal optimizer steps."""
    by_label = method_effects(rows)
    if not by_label:
        return None
    found = {}
    for series in (BASE, ALIGNED):
        found[series] = [cells[series] for cells in by_label.values()]
    figure = new_figure(methods_answer(by_label), 9, 5.2)
    axes = figure.subplots()
    forest(axes, [label.replace(" (", "\n(") for label in by_label], found)
    axes.set_xlabel(f"{POINTS}, against Lite PPO at equal optimizer steps", fontsize=9.5)
    add_legend(axes, found)
    footer(figure, f"{MARKS}; medium small; learning rate of each method from a sweep on base")
    return figure


SAMPLERS = {
    "tuned lite_ppo": Series("Lite PPO", BLACK, "D"),
    "tuned dapo": Series("DAPO", RED, "o"),
    "tuned dapo, no resampling": Series("DAPO, no resampling", SKY, "s"),
}


def cost_panel(axes, rows: Rows, environment: str) -> None:
    """Accuracy by the responses sampled so far; marks are moved aside to stay apart."""
    for i, (name, series) in enumerate(SAMPLERS.items()):
        cell = list(rows[environment, name].values())
        x = np.mean([cost(row) for row in cell], 0) + 25 * (i - 1)
        curves = 100 * np.array([accuracies(row) for row in cell])
        mean, low, high = np.array([interval(list(column)) for column in curves.T]).T
        style = dict(color=series.colour, marker=series.marker, markersize=4)
        axes.errorbar(x, mean, [mean - low, high - mean], label=series.label, **style)
    axes.axvline(BUDGET, color="grey", linewidth=0.9, linestyle=":")
    axes.set_title(environment, fontsize=10.5)
    axes.set_xlabel("responses sampled for training", fontsize=9.5)
    axes.set_ylabel("held-out accuracy, %", fontsize=9.5)
    axes.grid(alpha=0.25)


def responses(rows: Rows) -> Figure | None:
    """Accuracy of DAPO by sampled responses: what resampling costs."""
    environments = [env for env in PAIR if all((env, name) in rows for name in SAMPLERS)]
    if not environments:
        return None
    costs = {}
    for env in environments:
        kind = "aligned" if "aligned" in env else "base"
        costs[kind] = effect(rows, "tuned dapo", "tuned lite_ppo", [env], AT_BUDGET)
    answer = f"DAPO against Lite PPO after {BUDGET:,} sampled responses: {each(costs)}"
    figure = new_figure(answer, 5.2 * len(environments), 4.4)
    panels = figure.subplots(1, len(environments), squeeze=False)[0]
    for env, axes in zip(environments, panels):
        cost_panel(axes, rows, env)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=9.5, frameon=False)
    return figure


def definitions(rows: Rows) -> Figure | None:
    """Other definitions of the batch std."""
    labels = [name.removeprefix("std: ") for name in DEFINITIONS]
    found = {ONLY: [effect(rows, name, "lite_ppo", PAIR[:1]) for name in DEFINITIONS]}
    if is_empty(found):
        return None
    answer = f"Other definitions of the batch std: {verdict(named(found, labels))}"
    figure = new_figure(answer, 8, 3.2)
    axes = figure.subplots()
    forest(axes, labels, found)
    axes.set_xlabel(f"{POINTS}, against Lite PPO", fontsize=9.5)
    footer(figure, f"{MARKS}; {PAIR[0]}")
    return figure


FIGURES: dict[str, Callable[[Rows], Figure | None]] = {
    "overview": overview,
    "scale": scale,
    "std": std,
    "clip": clip,
    "tokens": tokens,
    "level": loss_level,
    "overlong": overlong,
    "parts": parts,
    "methods": methods,
    "responses": responses,
    "definitions": definitions,
}


def draw_figures(rows: Rows, folder) -> None:
    """Save every figure that has results."""
    for name, draw in FIGURES.items():
        if figure := draw(rows):
            figure.savefig(folder / f"{name}.png", dpi=DPI)
