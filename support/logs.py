"""The log files of a run: metrics.jsonl, samples.jsonl, clipped.jsonl, TensorBoard, curves.png."""

import dataclasses
import html
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from support.response import Response

MAX_FAILURES = 20  # failed responses per step in samples.jsonl
MOST_CLIPPED = 20  # tokens per side and step in clipped.jsonl

PANELS = {  # title of the panel in curves.png: {metric: label}
    "reward": {"reward/mean": "mean"},
    "response length (tokens)": {"response/length_mean": "mean"},
    "entropy (nats per token)": {"policy/entropy": "mean"},
    "share of clipped tokens": {
        "policy/clip_low": "ratio below 1 - clip_low",
        "policy/clip_high": "ratio above 1 + clip_high",
    },
    "gradient norm": {"policy/grad_norm": "before clipping"},
}
CURVES = {"step"} | {key for panel in PANELS.values() for key in panel}


class Log:
    """The log files of a run, written by rank 0."""

    def __init__(self, folder: Path, cfg, position: Any):
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run repeats the steps after its checkpoint. Remove their lines first.
        last = position.step - (position.pending is not None)  # step of the last line to keep
        self.folder = folder
        self.samples_per_step = cfg.samples_per_step
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=last + 1)
        self.warned: set[str] = set()
        config = json.dumps(dataclasses.asdict(cfg), indent=2)
        (folder / "config.json").write_text(config + "\n")
        rows = self.keep_lines("metrics.jsonl", last, last)
        self.keep_lines("samples.jsonl", position.step, last)
        self.keep_lines("clipped.jsonl", position.step, last)
        self.rows = [*map(for_curves, rows[:-5]), *rows[-5:]]

    def keep_lines(self, name: str, last: int, last_eval: int) -> list[dict]:
        """Drop the lines after step `last` (`last_eval` for lines of an evaluation) of a log."""
        rows = []
        for row in read_jsonl(self.folder / name):
            if row["step"] <= (last_eval if "eval" in row else last):
                rows.append(row)
        partial = self.folder / "partial.jsonl"
        partial.write_text("".join(map(to_line, rows)), encoding="utf-8")
        os.replace(partial, self.folder / name)
        return rows

    def append(self, name: str, rows: Iterable[dict]) -> None:
        """Add lines to a log."""
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.writelines(map(to_line, rows))

    def metrics(self, step: int, values: dict[str, float]) -> list[str]:
        """Write the metrics of a step. Returns warnings, each at most once a run."""
        self.rows.append({"step": step} | values)
        # Only the last five rows stay whole in memory, so that a long run does not grow.
        self.rows[-6:-5] = map(for_curves, self.rows[-6:-5])
        self.append("metrics.jsonl", self.rows[-1:])
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)
        self.tensorboard.flush()  # a killed run must have all events before its checkpoint
        news = {name: text for name, text in warnings(self.rows).items() if name not in self.warned}
        self.warned |= news.keys()
        return [f"{name}: {text}" for name, text in news.items()]

    def samples(self, step: int, responses: list[Response], dropped, rewards, advantages) -> None:
        """Write some responses of the step, evenly spread, and those without a score.

        dropped: responses that dynamic sampling replaced. They have no reward and no advantage.
        """
        failed = [i for i, r in enumerate(responses) if r.failure][:MAX_FAILURES]
        count = min(self.samples_per_step, len(responses))
        spread = np.linspace(0, len(responses) - 1, count, dtype=int).tolist()
        rows = []
        for i in sorted({*spread, *failed}):
            row = {"step": step, "index": i} | sample_row(responses[i])
            row["reward"] = float(rewards.flatten()[i])
            row["advantage"] = float(advantages.flatten()[i])
            rows.append(row)
        lost = [r for r in dropped if r.failure][: MAX_FAILURES - len(failed)]
        rows += [{"step": step, "dropped": True} | sample_row(r) for r in lost]
        if not rows:
            return
        self.append("samples.jsonl", rows)
        # TensorBoard renders Markdown and HTML. A response is shown as plain text.
        text = html.escape(rows[0]["prompt"] + "\n\n" + rows[0]["response"])
        self.tensorboard.add_text("sample", f"<pre>{text}</pre>", step)

    def failures(self, step: int, name: str, responses: list[Response]) -> None:
        """Write the responses of an evaluation that got no score."""
        failed = [r for r in responses if r.failure][:MAX_FAILURES]
        if failed:
            self.append(
                "samples.jsonl", [{"step": step, "eval": name} | sample_row(r) for r in failed]
            )

    def clipped(self, step: int, counts: torch.Tensor, tokenizer) -> None:
        """Write the tokens that were clipped most, by side. counts: [2, V], low and high.

        A step in which no token was clipped has no line.
        """
        row = {"step": step}
        for side, tokens in zip(("low", "high"), counts.cpu()):
            numbers, ids = tokens.topk(min(MOST_CLIPPED, len(tokens)))
            pairs = zip(ids.tolist(), numbers.tolist())
            row[side] = [[tokenizer.decode([i]), int(n)] for i, n in pairs if n]
        if row["low"] or row["high"]:
            self.append("clipped.jsonl", [row])

    def curves(self) -> None:
        """Draw curves.png: held-out accuracy with its interval, and the panels above."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 6))  # fixed margins: a layout engine doubles the time
        figure.subplots_adjust(0.05, 0.08, 0.985, 0.88, wspace=0.22, hspace=0.36)
        figure.suptitle(self.folder.name)
        accuracy, *others = figure.subplots(2, 3).flat
        self.draw_accuracy(accuracy)
        for axes, (title, lines) in zip(others, PANELS.items()):
            for key, label in lines.items():
                steps, values = self.points(key)
                axes.plot(steps, values, label=label)
            axes.set(title=title, xlabel="step")
            axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
            axes.ticklabel_format(axis="y", scilimits=(-3, 5))
            if len(lines) > 1:
                axes.legend()
        figure.savefig(self.folder / "curves.png", dpi=110)

    def draw_accuracy(self, axes) -> None:
        """Draw a line and a band for each evaluation set."""
        keys = sorted({key for row in self.rows for key in row if key.endswith("/accuracy")})
        for key in keys:
            steps, values = self.points(key)
            _, low = self.points(f"{key}_low")
            _, high = self.points(f"{key}_high")
            (line,) = axes.plot(steps, values, marker="o", label=key.split("/")[1])
            axes.fill_between(steps, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
        axes.set(title="held-out accuracy, 95 % interval", xlabel="step", ylim=(0, 1))
        if keys:
            axes.legend(loc="lower right")

    def points(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric."""
        rows = [row for row in self.rows if row.get(key) is not None]
        return [row["step"] for row in rows], [row[key] for row in rows]


def sample_row(response: Response) -> dict[str, Any]:
    """A response as a line of samples.jsonl."""
    row = response.problem.row
    return {
        "prompt": row["problem"],
        "response": response.text,
        "gold": row["answer"],
        "score": response.score,
        "length": len(response.token_ids),
        "truncated": response.truncated,
        "failure": response.failure,
        "time/reward": response.seconds,
    }


def sample_text(response: Response, limit: int = 400) -> str:
    """A problem and a response as they are shown on the console, each at most `limit` long."""
    verdict = (
        "correct"
        if response.score >= 1
        else f"wrong, the answer is {response.problem.row['answer']}"
    )
    problem = shorten(response.problem.row["problem"], limit)
    text = shorten(response.text, limit)
    return f"  problem    {problem}\n  response   {text}   ({verdict})"


def shorten(text: str, limit: int) -> str:
    """Text on one line, its middle left out if it is longer than `limit`."""
    text = " / ".join(line.strip() for line in text.splitlines() if line.strip())
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def for_curves(row: dict) -> dict:
    """The keys of a row that curves.png and warnings() need. All others are dropped."""
    return {key: value for key, value in row.items() if key in CURVES or "/accuracy" in key}


def to_line(row: dict) -> str:
    """One line of JSON. NaN and infinity become null, because JSON has neither."""
    finite = {}
    for key, value in row.items():
        bad = isinstance(value, float) and not math.isfinite(value)
        finite[key] = None if bad else value
    return json.dumps(finite, ensure_ascii=False) + "\n"


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a log. A line that was cut off when its run was killed is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


# ---- warnings ------------------------------------------------------------------------------------


WARNINGS = {  # name: text
    "failing rewards": "more than 5 % of the responses got no score. "
    "Read samples.jsonl for the reasons",
    "entropy collapse": "entropy is below 0.01 nats per token and a tenth of its first value, and "
    "less than 80 % of the responses are correct. The responses to a prompt are nearly identical. "
    "Lower --lr or raise --clip-high",
    "entropy explosion": "entropy is more than three times its first value. "
    "Lower --lr or --clip-high, or set --kl-coef",
    "short responses": "responses have less than a tenth of their first length. "
    "Read samples.jsonl: the reward may not need any reasoning",
    "truncated responses": "more than half of the responses hit --max-new-tokens. Raise it, "
    "or see --overlong-filter",
    "nothing to learn": "all rewards of a step are equal, so every advantage is 0. "
    "Read samples.jsonl, or choose other --train-data",
}


def warnings(rows: list[dict[str, float]]) -> dict[str, str]:
    """The warnings that the metrics of the last steps give: name and text of each."""
    now = rows[-1]
    first = next((row for row in rows if row.get("policy/entropy") is not None), None)
    if first is None or "reward/failed" not in now:  # step 0
        return {}
    entropy = last_five(rows, "policy/entropy")
    correct = last_five(rows, "reward/correct")
    lengths = last_five(rows, "response/length_mean")
    truncated = last_five(rows, "response/truncated")
    spread = last_five(rows, "reward/std")
    unsolved = bool(correct) and max(correct) < 0.8  # on a solved task low entropy is no fault
    found = {
        "failing rewards": now["reward/failed"] > 0.05,
        "entropy collapse": unsolved
        and entropy
        and max(entropy) < min(0.01, 0.1 * first["policy/entropy"]),
        "entropy explosion": entropy and min(entropy) > 3 * first["policy/entropy"] + 0.5,
        "short responses": lengths and max(lengths) < 0.1 * first["response/length_mean"],
        "truncated responses": truncated and min(truncated) > 0.5,
        "nothing to learn": spread and max(spread) == 0,
    }
    return {name: WARNINGS[name] for name, holds in found.items() if holds}


def last_five(rows: list[dict], key: str) -> list[float]:
    """A metric in the last five rows; [] if one of them lacks it or has no finite number."""
    values = [row.get(key) for row in rows[-5:]]
    known = [value for value in values if value is not None and math.isfinite(value)]
    return known if len(known) == 5 else []
