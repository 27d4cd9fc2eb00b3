"""The main figure: the effect of each switch, in each environment and over all."""

import textwrap

from drawing import ALIGNED, BASE, MARKS, POINTS, footer, mark, new_figure
from effects import Rows, effect, interval, label_of, sign
from grid import GRID, ISOLATED
from matplotlib.figure import Figure


def overview_answer(means: dict[str, list[float]]) -> str:
    """Names the switches with a clear effect above 2 points, and the range of the others."""
    large = {}
    small = {}
    for name, values in means.items():
        mean = interval(values).mean
        clear = sign(values) in "+-" and abs(mean) > 2
        (large if clear else small)[name] = mean
    parts = []
    if large:
        names = " and ".join(f"{name} {mean:+.1f}" for name, mean in large.items())
        parts.append(f"{names[0].upper()}{names[1:]} points")
    if small:
        which = "every other switch" if large else "Every switch"
        parts.append(f"{which} between {min(small.values()):+.1f} and {max(small.values()):+.1f}")
    return "; ".join(parts)


def overview(rows: Rows, environments: list[str] | None = None, settings=ISOLATED) -> Figure | None:
    """The effect of each switch against the first setting, in each environment and over all."""
    environments = environments or GRID
    baseline, *others = settings
    means = {name: effect(rows, name, baseline, environments) for name in others}
    means = {name: values for name, values in means.items() if values}
    if not means:
        return None
    height = 1.9 + 0.26 * len(environments)
    figure = new_figure(overview_answer(means), 2.3 + 1.33 * len(means), height)
    panels = figure.subplots(1, len(means), sharey=True, sharex=True, squeeze=False)[0]
    places = [i + (i // 4) * 0.5 for i in range(len(environments))]
    bottom = places[-1] + 1.6
    for axes, (name, mean) in zip(panels, means.items()):
        for env, y in zip(environments, places):
            if values := effect(rows, name, baseline, [env]):
                mark(axes, values, y, ALIGNED if "aligned" in env else BASE)
        draw_mean(axes, mean, bottom)
        axes.set_title(column_title(name, mean), fontsize=10)
    panels[0].set_yticks([*places, bottom], [*environments, "mean of all"], fontsize=9.5)
    panels[0].set_ylim(bottom + 0.8, -0.7)
    aligned = any("aligned" in env for env in environments)
    kinds = "; circles: base, squares: aligned" if aligned else ""
    footer(
        figure,
        f"{POINTS}, against {label_of(baseline)}\n{MARKS}{kinds}; diamonds: mean of all",
    )
    return figure


def column_title(name: str, values: list[float]) -> str:
    """A switch with its mean effect and interval."""
    mean, low, high = interval(values)
    lines = textwrap.wrap(label_of(name), 13)
    return "\n".join([*lines, f"{mean:+.1f}", f"[{low:+.1f}, {high:+.1f}]"])


def draw_mean(axes, values: list[float], y: float) -> None:
    """The mean over all environments as a diamond, and the lines of the panel."""
    mean, low, high = interval(values)
    axes.fill([low, mean, high, mean], [y, y - 0.35, y, y + 0.35], color="black")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axhline(y - 0.85, color="grey", linewidth=0.6)
    axes.grid(axis="x", alpha=0.25)
    axes.tick_params(labelsize=9)
    axes.tick_params(axis="y", length=0)
