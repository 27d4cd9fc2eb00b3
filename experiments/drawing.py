"""Parts of a figure: the page, marks with intervals, and answers in words."""

import math
import textwrap
from dataclasses import dataclass

from effects import interval, show, sign, verdict
from matplotlib.figure import Figure

BLACK, ORANGE, SKY, GREEN, RED, BLUE, PINK, GREY = COLOURS = [
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#D55E00",
    "#0072B2",
    "#CC79A7",
    "#999999",
]  # Okabe and Ito: distinct for colour-blind readers
DPI = 110


@dataclass(frozen=True)
class Series:
    """One kind of mark in a figure."""

    label: str
    colour: str
    marker: str = "o"


BASE = Series("base", BLUE, "o")
ALIGNED = Series("aligned", RED, "s")
ONLY = Series("", BLACK, "o")
Effects = dict[Series, list[list[float]]]  # for each series, the seeds' values of each line


# ---- parts of a figure ---------------------------------------------------------------------------


def new_figure(answer: str, width: float, height: float) -> Figure:
    """An empty figure with the answer as its title. width, height: inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    figure.suptitle("\n".join(balanced(answer, width * 9.5)), fontsize=12, fontweight="bold")
    return figure


def balanced(text: str, width: float) -> list[str]:
    """Lines of about the same length."""
    count = math.ceil(len(text) / width)
    return textwrap.wrap(text, len(text) // count + 8) if count > 1 else [text]


def footer(figure: Figure, text: str) -> None:
    """Small text below the figure."""
    figure.supxlabel(text, fontsize=9, color="#444444")


def mark(axes, values: list[float], y: float, series: Series) -> None:
    """A mean with its interval, as a horizontal bar."""
    mean, low, high = interval(values)
    axes.plot([low, high], [y, y], color=series.colour, linewidth=1.6)
    axes.plot(mean, y, series.marker, color=series.colour, markersize=6)


def forest(axes, labels: list[str], found: Effects, digits: int = 1, signed: bool = True) -> None:
    """A line for each label, a mark for each series, and the numbers at the right."""
    height = 0.62 / len(found)
    for i, (series, lines) in enumerate(found.items()):
        shift = (i - (len(found) - 1) / 2) * height
        for line, values in enumerate(lines):
            if values:
                mark(axes, values, line + shift, series)
                axes.annotate(
                    show(values, digits, signed),
                    (1.02, line + shift),
                    xycoords=("axes fraction", "data"),
                    va="center",
                    fontsize=8.5,
                    color=series.colour,
                )
    axes.set_yticks(range(len(labels)), labels, fontsize=10)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=9)
    axes.grid(axis="x", alpha=0.25)
    if signed:
        axes.axvline(0, color="black", linewidth=0.8)
    for line in range(1, len(labels)):
        axes.axhline(line - 0.5, color="grey", linewidth=0.4, alpha=0.5)


def add_legend(axes, found: Effects) -> None:
    """The marks of all series, above the panel."""
    handles = []
    for series in found:
        style = dict(color=series.colour, marker=series.marker, linewidth=1.6, markersize=6)
        handles += axes.plot([], [], label=series.label, **style)
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(handles),
        fontsize=9.5,
        frameon=False,
    )


POINTS = "effect on held-out accuracy, percentage points"
MARKS = "Mean and 95 % interval over seeds"


# ---- answers in words ----------------------------------------------------------------------------


def named(found: Effects, labels: list[str]) -> dict[str, list[float]]:
    """The effects of all series by name, for a verdict."""
    return {
        f"{label}, {series.label}" if series.label else label: values
        for series, lines in found.items()
        for label, values in zip(labels, lines)
    }


def is_empty(found: Effects) -> bool:
    """Whether no line has results."""
    return not any(values for lines in found.values() for values in lines)


def signs(found: Effects) -> set[str]:
    """The signs of all effects that have results."""
    return {sign(values) for lines in found.values() for values in lines if values}


def does(values: list[float]) -> str:
    """What a switch does to accuracy: a verb phrase."""
    words = {"+": "gains {:.1f} points", "-": "costs {:.1f} points", "0": "shows no difference"}
    if not values:
        return "was not run"
    return words.get(sign(values), "has one seed").format(abs(interval(values).mean))


def each(effects: dict[str, list[float]]) -> str:
    """Every effect by name: its mean, or that no difference is seen."""
    return ", ".join(
        f"{label}: {verdict({'': values}).strip()}" for label, values in effects.items()
    )
