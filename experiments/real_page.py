"""The page and the figures of runs on real models: see real.py."""

import re
from functools import partial
from pathlib import Path

import appendix
import overview
from drawing import DPI
from effects import (
    ACCURACY,
    CLIP_HIGH,
    CLIP_LOW,
    ENTROPY,
    GAIN,
    LENGTH,
    REWARD,
    SAMPLED,
    TRUNCATED_LATE,
    Measure,
    Rows,
    final,
    label_of,
    level,
    show,
    show_effect,
)
from grid import METHODS
from tables import Question, Results, markdown

BASELINE = "lite_ppo"
PANELS = ["reward", "entropy", "length", "truncated", "clip_low", "clip_high", "kl", "gap"]
COLUMNS = {
    "accuracy": ACCURACY,
    "since step 0": GAIN,
    "reward over all steps": REWARD,
    "entropy, last quarter": ENTROPY,
    "length": LENGTH,
    "clipped high, %": CLIP_HIGH,
    "clipped low, %": CLIP_LOW,
    "truncated, %": TRUNCATED_LATE,
    "gap, nats": Measure(partial(final, key="rollout/logprob_gap_mean"), 1, 4),
    "sampled responses": SAMPLED,
    "seconds per step": Measure(partial(final, key="time/step"), 1),
}


def questions_of(rows: Rows) -> list[Question]:
    """What has results in each environment: methods, switches, methods at other rates, rates."""
    found = []
    for env in dict.fromkeys(env for env, _ in rows):
        names = sorted((setting for e, setting in rows if e == env), key=place)
        groups = groups_of(names)
        shown = {name for settings in groups.values() if len(settings) > 1 for name in settings}
        for title, settings in groups.items():
            if len(settings) > 1 or not shown.issuperset(settings):  # alone only if nowhere else
                found.append(Question(f"{env}: {title}", [env], settings, PANELS))
                shown.update(settings)
    return found


def groups_of(names: list[str]) -> dict[str, list[str]]:
    """Settings that belong into one table. A setting may be in several."""
    plain = [name for name in names if not swept(name)]
    groups = {
        "methods": [name for name in plain if name in METHODS],
        "switches": [name for name in plain if name == BASELINE or name not in METHODS],
    }
    for rate in sorted({rate_of(name) for name in names if swept(name)}, key=float):
        groups[f"methods at {rate}"] = [name for name in names if rate_of(name) == rate]
    for method in dict.fromkeys(map(method_of, filter(swept, names))):
        title = f"rates of {label_of(method)}"
        groups[title] = [name for name in names if method_of(name) == method]
    return groups


def place(setting: str) -> tuple[int, float]:
    """Methods in the order of METHODS, Lite PPO first, by their rates; then the switches."""
    method = method_of(setting)
    number = list(METHODS).index(method) if method in METHODS else len(METHODS)
    return number, float(rate_of(setting) or 0)


def swept(setting: str) -> bool:
    """Whether the setting names its own learning rate: METHOD at RATE."""
    return " at " in setting


def method_of(setting: str) -> str:
    return setting.partition(" at ")[0]


def rate_of(setting: str) -> str:
    return setting.partition(" at ")[2]


def table(rows: Rows, question: Question) -> list[str]:
    """One line for each setting: its rate, its values, and its effect against Lite PPO."""
    (env,) = question.environments
    body = []
    for setting in question.settings:
        runs = rows[env, setting]
        rate = next(iter(runs.values()))["config"].get("lr", 1e-6)
        cells = [label_of(setting), f"{rate:g}", str(len(runs))]
        baseline = f"{BASELINE} at {rate_of(setting)}" if swept(setting) else BASELINE
        same = setting == baseline or (env, baseline) not in rows
        cells.append("" if same else show_effect(rows, setting, baseline, [env]))
        for measure in COLUMNS.values():
            values = level(rows, setting, [env], measure)
            cells.append(show(values, measure.digits, signed=measure is GAIN))
        body.append(cells)
    head = ["setting", "rate", "seeds", "against Lite PPO", *COLUMNS]
    return markdown(head, body)


def file_name(question: Question) -> str:
    return re.sub("[^A-Za-z0-9.-]+", "_", question.title) + ".png"


def page(results: Results, curves: str) -> str:
    """curves: the folder of the figures, seen from the page."""
    hours = sum(row["seconds"] for row in results.lines) / 3600
    text = [
        "# Results on real models",
        "",
        f"Made by `python experiments/plot.py` from `{results.source}`: "
        f"{len(results.lines)} runs; their times add up to {hours:.1f} hours, many side by side.",
        "",
        "- Accuracy is held out, in %, at the last evaluation.",
        "- An effect is in percentage points against Lite PPO at the same rate. The pairs have the "
        "same seed, so the same prompts.",
        "- Intervals are Student's, 95 %, over the seeds. They are not corrected for their number.",
        "- Seconds depend on how many runs shared the machine.",
        "",
    ]
    for question in questions_of(results.rows):
        text += [f"## {question.title}", "", *table(results.rows, question)]
        text += [f"![curves of {question.title}]({curves}/{file_name(question)})", ""]
    return "\n".join(text)


def draw(results: Results, path: Path, folder: Path) -> None:
    """Write the page to `path` and the figures to `folder`."""
    rows = results.rows
    folder.mkdir(parents=True, exist_ok=True)
    found = questions_of(rows)
    for question in found:
        figure = appendix.curves_figure(rows, question)
        figure.savefig(folder / file_name(question), dpi=appendix.DPI)
    environments = list(dict.fromkeys(env for question in found for env in question.environments))
    settings = dict.fromkeys([BASELINE])
    for question in found:
        settings |= dict.fromkeys(name for name in question.settings if not swept(name))
    if figure := overview.overview(rows, environments, list(settings)):
        figure.savefig(folder / "overview.png", dpi=DPI)
    path.write_text(page(results, folder.relative_to(path.parent).as_posix()), encoding="utf-8")
