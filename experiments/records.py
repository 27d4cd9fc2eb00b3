"""The results file: one line of JSON for each finished run.

A line holds the flags, the changed settings, the curves and the final figures of a run.
"""

import dataclasses
import json
import re
import statistics
import sys
from collections import Counter
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from definitions import DEFINITIONS
from grid import Run, current_flags

import lite_ppo
from support.logs import read_jsonl

HERE = Path(__file__).resolve().parent

CURVES = """
reward/mean reward/std reward/std_within reward/solve_all reward/solve_none
response/length_mean response/truncated response/looping
policy/entropy policy/clip_low policy/clip_high policy/approx_kl policy/grad_norm
rollout/responses rollout/logprob_gap_mean time/step
""".split()
LATE = CURVES[5:]  # the final figures: mean of the last quarter of the run


# ---- a run as one line ---------------------------------------------------------------------------


def three_digits(value):
    """Numbers in the results have three significant digits, enough for every figure."""
    return float(f"{value:.3g}") if isinstance(value, float) else value


def evaluations(log: list[dict]) -> dict[str, list]:
    """The steps that were evaluated, and the metrics of each evaluation."""
    rows = [row for row in log if any(key.startswith("eval/") for key in row)]
    found = {"step": [row["step"] for row in rows]}
    for key in rows[-1]:
        if key.startswith("eval/") and not key.endswith(("_low", "_high")):
            found[key] = [three_digits(row[key]) for row in rows]
    return found


def final_figures(steps: list[dict], evaluation: dict[str, list]) -> dict[str, float]:
    """Accuracy before and after, reward over all steps, the rest over the last quarter."""
    sets = [values for key, values in evaluation.items() if key.endswith("/accuracy")]
    final = {
        "accuracy": statistics.mean(values[-1] for values in sets),
        "accuracy_before": statistics.mean(values[0] for values in sets),
        "reward": statistics.mean(row["reward/mean"] for row in steps),
    }
    late = steps[-max(1, len(steps) // 4) :]
    for key in LATE:
        if key in late[-1]:
            final[key] = statistics.mean(row[key] for row in late)
    return {key: three_digits(float(value)) for key, value in final.items()}


def clipped_tokens(folder: Path) -> dict[str, list]:
    """The 20 tokens that were clipped most, on each side."""
    counts = {"low": Counter(), "high": Counter()}
    for row in read_jsonl(folder / "clipped.jsonl"):
        for side, counter in counts.items():
            counter.update(dict(row[side]))
    return {side: counter.most_common(20) for side, counter in counts.items()}


def without_folders(value):
    """A setting without the folders of this machine: NAME=/a/b.jsonl is NAME=b.jsonl."""
    if isinstance(value, list):
        return [without_folders(part) for part in value]
    return re.sub(r"(^|=)/.*/", r"\1", value) if isinstance(value, str) else value


def changed_settings(folder: Path) -> dict:
    """The settings of a run that differ from the defaults."""
    defaults = json.loads(json.dumps(dataclasses.asdict(lite_ppo.Config())))
    config = json.loads((folder / "config.json").read_text())
    return {
        key: without_folders(value)
        for key, value in config.items()
        if value != defaults.get(key) and key != "output_dir"
    }


def record(run: Run, folder: Path, seconds: float) -> dict:
    """A finished run as one line of the results."""
    log = read_jsonl(folder / "metrics.jsonl")
    steps = [row for row in log if "reward/mean" in row]
    evaluation = evaluations(log)
    line = {
        "environment": run.environment,
        "setting": run.setting,
        "seed": run.seed,
        "seconds": round(seconds, 1),
        "date": f"{date.today()}",
        "flags": run.flags,
        "config": changed_settings(folder),
        "final": final_figures(steps, evaluation),
        "curve": {},
        "evaluation": evaluation,
        "clipped": clipped_tokens(folder),
    }
    for key in CURVES:
        if key in steps[-1]:
            line["curve"][key] = [three_digits(row[key]) for row in steps]
    if run.setting in DEFINITIONS:
        line["advantage"] = run.setting
    return line


# ---- the file ------------------------------------------------------------------------------------


def load(results: Path) -> list[dict]:
    """The newest line of each run, with the flags that exist today."""
    rows = {}
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            raise SystemExit(f"{results}: line {number} is not JSON; remove it") from None
        row["flags"] = current_flags(row["flags"])
        rows[row["environment"], row["setting"], row["seed"]] = row
    return list(rows.values())


def open_results(results: Path) -> None:
    """Make the folder, and remove an incomplete last line. Its run is made again."""
    results.parent.mkdir(parents=True, exist_ok=True)
    if results.exists():
        text = results.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            results.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
