"""results.md: every cell of every question as tables."""

from dataclasses import dataclass, field
from pathlib import Path

from effects import (
    ACCURACY,
    AT_BUDGET,
    CLIP_HIGH,
    CLIP_LOW,
    ENTROPY,
    GAIN,
    LENGTH,
    PASS_AT_4,
    REWARD,
    SAMPLED,
    TRUNCATED_LATE,
    Rows,
    at_common_rate,
    by_cell,
    interval,
    label_of,
    level,
    show,
    show_effect,
    show_level,
)
from grid import (
    CLIPS,
    DEFINITIONS,
    GRID,
    ISOLATED,
    LIMITS,
    LONG,
    METHODS,
    PAIR,
    RATES,
    SCALED,
    STEPS,
    best_rate,
    where,
)

MEANS = ((), ("base",), ("aligned",), ("easy",), ("medium",), ("hard",), ("tiny",), ("small",))
COLUMNS = {
    "accuracy": ACCURACY,
    "since step 0": GAIN,
    "pass@4": PASS_AT_4,
    "shaped reward over all steps": REWARD,
    "entropy, last quarter": ENTROPY,
    "length": LENGTH,
    "clipped high, %": CLIP_HIGH,
    "clipped low, %": CLIP_LOW,
    "truncated, %": TRUNCATED_LATE,
}
USUAL = ["reward", "entropy", "length", "clip_high", "clip_low"]


@dataclass
class Results:
    """The runs of one results file, and the main grid from other base models."""

    source: str
    lines: list[dict]
    other_lines: list[dict] = field(default_factory=list)

    def __post_init__(self):
        self.rows: Rows = by_cell(self.lines)
        self.other: Rows = by_cell(self.other_lines)


@dataclass
class Question:
    """One part of the grid: a table in results.md and a figure of curves in its appendix."""

    title: str
    environments: list[str]
    settings: list[str]
    panels: list[str] = field(default_factory=USUAL.copy)


QUESTIONS = {
    "normalisation": Question(
        "Normalisation of the reward",
        [*PAIR, "hard small base"],
        ["lite_ppo", "group std", "batch mean", "no std", "no normalisation"],
    ),
    "scale": Question(
        "Rewards {0, 1} and {-1, 1}",
        PAIR[:1],
        [setting for name in SCALED for setting in (name, f"{name}, -1/1")],
    ),
    "std": Question(
        "With and without a standard deviation",
        ["easy small aligned", "hard small base"],
        ["lite_ppo", "group std", "no std"],
        ["spread", "entropy", "length", "clip_high", "clip_low"],
    ),
    "clip": Question("Clip-higher, 8 optimizer steps per rollout", STEPS, list(CLIPS.values())),
    "level": Question(
        "Level of the loss",
        [*PAIR, *LONG],
        ["lite_ppo", "sequence level", "constant level"],
        ["reward", "entropy", "length", "truncated", "clip_low"],
    ),
    "overlong": Question(
        "Truncated responses",
        LIMITS,
        ["lite_ppo", "overlong filter", "soft punishment"],
        ["shaped", "entropy", "length", "truncated", "looping"],
    ),
    "parts": Question(
        "The two tricks apart",
        PAIR,
        ["lite_ppo", "sequence level", "no normalisation", "neither trick"],
    ),
    "definitions": Question(
        "Other definitions of the batch std", PAIR[:1], ["lite_ppo", *DEFINITIONS]
    ),
    "methods": Question(
        "Methods, each at its own learning rate",
        PAIR,
        [*(f"tuned {name}" for name in METHODS), "common lite_ppo"],
    ),
}


# ---- parts of the page ---------------------------------------------------------------------------


def markdown(head: list[str], body: list[list[str]]) -> list[str]:
    """A table, followed by an empty line."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(cells)} |" for cells in body]
    return [*lines, ""]


def summary(results: Results) -> list[str]:
    """The beginning of results.md."""
    hours = sum(row["seconds"] for row in results.lines) / 3600
    days = sorted({row["date"] for row in results.lines})
    period = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return [
        "# Results",
        "",
        f"Made by `python experiments/plot.py` from `{results.source}`: "
        f"{len(results.lines)} runs, {hours:.1f} hours of single-threaded runs, {period}.",
        "",
        "- Accuracy is held out, in %, at the last step.",
        "- An effect is in percentage points against Lite PPO: same environment, same seed.",
        "- Intervals are Student's, 95 %, over the seeds. They are not corrected for their number.",
        "- Runs that are compared start from the same base model, and share 100 test problems.",
        "- The training reward of DAPO is that of the groups that it keeps.",
        "",
    ]


def means(rows: Rows) -> list[list[str]]:
    """Rows with the mean effect over groups of environments."""
    body = []
    for words in MEANS:
        cells = [show_effect(rows, name, "lite_ppo", where(*words)) for name in ISOLATED[1:]]
        body.append([f"**mean, {' '.join(words) or 'all'}**", *cells])
    return body


def switches(results: Results) -> list[str]:
    """The main grid, and its means from other base models."""
    head = ["environment", *ISOLATED[1:]]
    body = []
    for env in GRID:
        cells = [show_effect(results.rows, name, "lite_ppo", [env]) for name in ISOLATED[1:]]
        body.append([env, *cells])
    text = ["## Effect of each switch", "", *markdown(head, body + means(results.rows))]
    if results.other:
        text += ["## Effect of each switch from other base models", ""]
        text += markdown(head, means(results.other))
    return text


def other_methods(results: Results) -> list[str]:
    """The methods that were run from another base model."""
    if not results.other:
        return []
    body = []
    for name in METHODS:
        if (PAIR[0], f"tuned {name}") not in results.other:
            continue
        common = at_common_rate(results.other, PAIR[0], name)
        baseline = at_common_rate(results.other, PAIR[0], "lite_ppo")
        body.append(
            [
                label_of(name),
                best_rate(results.other_lines, name),
                show_effect(results.other, f"tuned {name}", "tuned lite_ppo", PAIR[:1]),
                show_effect(results.other, common, baseline, PAIR[:1]),
            ]
        )
    head = ["method", "rate", "against Lite PPO", "both at the common rate"]
    return [f"## Methods from another base model, {PAIR[0]}", "", *markdown(head, body)]


def question_table(rows: Rows, question: Question) -> list[str]:
    """One line for each environment and setting, one column for each measure."""
    body = []
    for env in question.environments:
        for setting in question.settings:
            if (env, setting) in rows:
                cells = [env, label_of(setting), str(len(rows[env, setting]))]
                for measure in COLUMNS.values():
                    values = level(rows, setting, [env], measure)
                    cells.append(show(values, measure.digits, signed=measure is GAIN))
                body.append(cells)
    head = ["environment", "setting", "seeds", *COLUMNS]
    return [f"## {question.title}", "", *markdown(head, body)]


def sweep_table(results: Results) -> list[str]:
    """Accuracy of each method at each learning rate."""
    body = []
    for name in METHODS:
        cells = [show_level(results.rows, f"{name} at {rate}", PAIR[:1]) for rate in RATES]
        body.append([label_of(name), *cells, best_rate(results.lines, name)])
    seeds = sorted({row["seed"] for row in results.lines if " at " in row["setting"]})
    made = f"Accuracy on {PAIR[0]}, seeds {seeds[0]} to {seeds[-1]}." if seeds else "Not run."
    head = ["method", *RATES, "chosen"]
    return ["## Sweep of the learning rate", "", made, "", *markdown(head, body)]


def methods_line(results: Results, environment: str, name: str) -> list[str]:
    """A method against Lite PPO: own rate or common rate, equal steps or equal responses."""
    rows, cell = results.rows, [environment]
    tuned = f"tuned {name}"
    common = at_common_rate(rows, environment, name)
    baseline = at_common_rate(rows, environment, "lite_ppo")
    responses = level(rows, tuned, cell, SAMPLED)
    return [
        label_of(name),
        best_rate(results.lines, name),
        str(len(rows.get((environment, tuned), {}))),
        show_level(rows, tuned, cell),
        show_effect(rows, tuned, "tuned lite_ppo", cell),
        f"{interval(responses).mean:.0f}" if responses else "not run",
        show_level(rows, tuned, cell, AT_BUDGET),
        show_effect(rows, tuned, "tuned lite_ppo", cell, AT_BUDGET),
        show_effect(rows, common, baseline, cell),
        show_effect(rows, common, baseline, cell, AT_BUDGET),
    ]


def methods_tables(results: Results) -> list[str]:
    """A table of methods for each environment."""
    head = [
        "method",
        "rate",
        "seeds",
        "accuracy at equal steps",
        "against Lite PPO",
        "sampled responses",
        "accuracy at 1,280 responses",
        "against Lite PPO",
        "both at the common rate: at equal steps",
        "at 1,280 responses",
    ]
    text = []
    for env in PAIR:
        body = [methods_line(results, env, name) for name in METHODS]
        text += [f"## Methods, {env}", "", *markdown(head, body)]
    return text


def appendix_links(results: Results, curves: str) -> list[str]:
    """Links to the figures of curves; `curves` is their folder, seen from the page."""
    lines = ["## Appendix: curves over steps", ""]
    for name, question in QUESTIONS.items():
        if drawn(results.rows, question):
            lines.append(f"- [{question.title}]({curves}/{name}.png)")
    return [*lines, ""]


def drawn(rows: Rows, question: Question) -> list[str]:
    """The environments of a question that have results."""
    return [e for e in question.environments if any((e, s) in rows for s in question.settings)]


def results_page(results: Results, curves: str = "figures/appendix") -> str:
    """The text of results.md."""
    text = summary(results) + switches(results) + other_methods(results)
    for question in QUESTIONS.values():
        text += question_table(results.rows, question)
    text += sweep_table(results) + methods_tables(results) + appendix_links(results, curves)
    return "\n".join(text)


def write_results(results: Results, path: Path, curves: str) -> None:
    path.write_text(results_page(results, curves), encoding="utf-8")
