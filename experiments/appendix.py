"""The appendix of results.md: held-out accuracy and training curves of every question."""

import numpy as np
from drawing import COLOURS
from effects import Rows, accuracies, correct_share, curve, interval, label_of
from matplotlib.figure import Figure
from tables import QUESTIONS, Question, drawn

STYLES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (6, 2, 1, 2))]
PANELS = {  # title, key, factor
    "reward": ("training reward, 0 to 1", "reward/mean", 1),
    "shaped": ("reward with punishment", "reward/mean", 1),
    "entropy": ("entropy, nats per token", "policy/entropy", 1),
    "length": ("response length, tokens", "response/length_mean", 1),
    "clip_high": ("clipped high, % of tokens", "policy/clip_high", 100),
    "clip_low": ("clipped low, % of tokens", "policy/clip_low", 100),
    "truncated": ("truncated, % of responses", "response/truncated", 100),
    "looping": ("looping, % of responses", "looping", 100),
    "spread": ("std of the rewards", "reward/std", 1),
    "kl": ("KL to the old policy, 1e-3 nats", "policy/approx_kl", 1000),
    "gap": ("log-prob gap, 1e-3 nats", "rollout/logprob_gap_mean", 1000),
}
DPI = 85
LOOP_LENGTH = 64  # shorter loops are not detected
MOST_BANDS = 3  # more intervals hide each other


def look(i: int, setting: str, settings: list[str]) -> dict:
    """Colour and line of the i-th setting. A pair of reward scales shares its colour."""
    partner = setting.removesuffix(", -1/1")
    if partner != setting and partner in settings:
        colour = COLOURS[settings.index(partner) // 2 % len(COLOURS)]
        return dict(color=colour, linestyle=":", linewidth=2.2)
    if f"{setting}, -1/1" in settings:
        return dict(color=COLOURS[i // 2 % len(COLOURS)], linestyle="-", linewidth=1.2)
    style = STYLES[(i + i // len(COLOURS)) % len(STYLES)]
    width = 1.9 if i == 0 else 1.4
    return dict(color=COLOURS[i % len(COLOURS)], linestyle=style, linewidth=width)


def smooth(values: list[float], width: int = 3) -> np.ndarray:
    """Centred moving average: the mean of a step of 64 responses is noisy."""
    padded = np.pad(np.array(values, float), width // 2, mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def intervals(curves: np.ndarray) -> np.ndarray:
    """[seeds, points] -> mean, low and high of each point, [3, points]."""
    return np.array([interval(list(column)) for column in curves.T]).T


def same_length(cell: dict[int, dict]) -> list[dict]:
    """The seeds of a cell; without runs of another length, which cannot be averaged."""
    runs = list(cell.values())
    return [run for run in runs if run["evaluation"]["step"] == runs[0]["evaluation"]["step"]]


def draw_accuracy(axes, cells: dict[str, list[dict]]) -> None:
    """Points with their intervals, moved aside so that they stand side by side."""
    names = list(cells)
    for i, (setting, cell) in enumerate(cells.items()):
        steps = np.array(cell[0]["evaluation"]["step"], float)
        shift = 0.05 * steps[-1] * (i / max(1, len(names) - 1) - 0.5)
        mean, low, high = intervals(100 * np.array([accuracies(row) for row in cell]))
        line = look(i, setting, names)
        axes.plot(steps + shift, mean, marker="o", markersize=3, label=label_of(setting), **line)
        bars = [mean - low, high - mean]
        axes.errorbar(
            steps + shift, mean, bars, fmt="none", ecolor=line["color"], elinewidth=0.9, alpha=0.8
        )


def draw_curves(axes, cells: dict[str, list[dict]], panel: str) -> None:
    """Means over seeds, and the interval of the first settings."""
    names = list(cells)
    _, key, factor = PANELS[panel]
    for i, (setting, cell) in enumerate(cells.items()):
        values = [curve(row, key) for row in cell]
        shortest = min(map(len, values))  # a run that was stopped has fewer steps
        curves = factor * np.array([smooth(steps[:shortest]) for steps in values])
        if panel == "reward":
            curves = correct_share(cell[0], curves)
        mean, low, high = intervals(curves)
        line = look(i, setting, names)
        steps = np.arange(1, len(mean) + 1)
        axes.plot(steps, mean, **line)
        if i == 0 or len(names) <= MOST_BANDS:
            axes.fill_between(steps, low, high, color=line["color"], alpha=0.13, linewidth=0)
    if panel not in ("reward", "shaped"):
        axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))  # a share is never negative


def draw_panel(axes, cells: dict[str, list[dict]], panel: str | None) -> None:
    title = PANELS[panel][0] if panel else "held-out accuracy, %"
    axes.set_title(title, fontsize=9)
    limit = next(iter(cells.values()))[0]["config"].get("max_new_tokens", LOOP_LENGTH)
    if panel == "looping" and limit < LOOP_LENGTH:
        text = f"loops shorter than\n{LOOP_LENGTH} tokens\nare not detected"
        axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=9, transform=axes.transAxes)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    axes.set_xlabel("step", fontsize=8.5)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    if panel:
        draw_curves(axes, cells, panel)
    else:
        draw_accuracy(axes, cells)


def curves_figure(rows: Rows, question: Question) -> Figure | None:
    """One row for each environment: held-out accuracy, then curves over steps."""
    environments = drawn(rows, question)
    if not environments:
        return None
    panels = [None, *question.panels]
    height = 2.35 * len(environments) + 1.0
    figure = Figure(figsize=(2.15 * len(panels), height), layout="constrained")
    strips = np.ravel(figure.subfigures(len(environments), 1))
    legends = []
    for env, strip in zip(environments, strips):
        cells = {}
        for setting in question.settings:
            if (env, setting) in rows:
                cells[setting] = same_length(rows[env, setting])
        strip.suptitle(env, fontsize=10.5, fontweight="bold")
        row = strip.subplots(1, len(panels))
        for axes, panel in zip(row, panels):
            draw_panel(axes, cells, panel)
        legends.append(row[0].get_legend_handles_labels())
    handles, labels = max(legends, key=lambda legend: len(legend[1]))
    columns = min(len(labels), 5)
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=9.5, frameon=False
    )
    figure.suptitle(f"{question.title}\n{note(rows, question)}", fontsize=10.5)
    return figure


def note(rows: Rows, question: Question) -> str:
    seeds = {
        len(rows[env, setting])
        for env in question.environments
        for setting in question.settings
        if (env, setting) in rows
    }
    number = " or ".join(str(count) for count in sorted(seeds))
    text = f"mean and 95 % interval over {number} seeds; curves: moving average of 3 steps"
    many = len(question.settings) > MOST_BANDS
    return f"{text}, interval of {label_of(question.settings[0])} only" if many else text


def draw_appendix(rows: Rows, folder) -> None:
    """One figure of curves for each question that has results."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, question in QUESTIONS.items():
        if figure := curves_figure(rows, question):
            figure.savefig(folder / f"{name}.png", dpi=DPI)
