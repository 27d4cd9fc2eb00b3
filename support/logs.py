"""What a run tells: metrics.jsonl, samples.jsonl, clipped.jsonl, TensorBoard, curves.png, warnings."""

import dataclasses
import html
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

PANELS = {"reward": ["reward/mean"], "response length (tokens)": ["response/length_mean"], "entropy (nats per token)": ["policy/entropy"],
          "clipped tokens (share)": ["policy/clip_low", "policy/clip_high"], "gradient norm": ["policy/grad_norm"]}  # fmt: skip


def for_curves(row: dict) -> dict:
    """What curves.png shows of a row; `warnings` needs no more of the first one."""
    return {key: value for key, value in row.items() if key == "step" or key.endswith("/accuracy") or any(key in keys for keys in PANELS.values())}


class Log:
    """metrics.jsonl, samples.jsonl, clipped.jsonl, TensorBoard events and curves.png, written by rank 0."""

    def __init__(self, folder: Path, cfg, position: Any):
        from torch.utils.tensorboard import SummaryWriter

        last = position.step - (position.pending is not None)  # step in the metrics; a resumed run repeats what came after its checkpoint
        self.folder, self.tensorboard = folder, SummaryWriter(str(folder), purge_step=last + 1)
        self.rows, self.warned = [], set()
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")
        for name, end in {"metrics.jsonl": last, "samples.jsonl": position.step, "clipped.jsonl": position.step}.items():
            rows = [row for row in read_jsonl(folder / name) if row["step"] <= (last if "eval" in row else end)]
            (folder / "partial.jsonl").write_text("".join(map(to_line, rows)), encoding="utf-8")
            os.replace(folder / "partial.jsonl", folder / name)
            if name == "metrics.jsonl":
                self.rows = [*map(for_curves, rows[:-5]), *rows[-5:]]

    def metrics(self, step: int, values: dict[str, float]) -> list[str]:
        """Write them down. Returns warnings in words, each of them once a run."""
        self.rows.append({"step": step} | values)
        self.rows[-6:-5] = map(for_curves, self.rows[-6:-5])  # a long run must not grow by all that it has ever measured
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(to_line(self.rows[-1]))
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)
        self.tensorboard.flush()  # its thread may lag behind; a killed run must not lack what came before its checkpoint
        news = [text for text in warnings(self.rows) if text.split(":")[0] not in self.warned]
        self.warned |= {text.split(":")[0] for text in news}
        return news

    def samples(self, step: int, responses: list, rewards: torch.Tensor, advantages: torch.Tensor, count: int) -> None:
        """Some responses of the step, evenly spread, and those whose reward function failed."""
        failed = [i for i, r in enumerate(responses) if r.failure][:20]
        chosen = sorted({*np.linspace(0, len(responses) - 1, min(count, len(responses)), dtype=int).tolist(), *failed})
        rows = [
            dict(step=step, prompt=r.problem.row["problem"], response=r.text, reward=float(rewards.flatten()[i]), gold=r.problem.row["answer"],
                 advantage=float(advantages.flatten()[i]), truncated=r.truncated, length=len(r.token_ids), failure=r.failure, **{"time/reward": r.seconds})
            for i, r in ((i, responses[i]) for i in chosen)
        ]  # fmt: skip
        with open(self.folder / "samples.jsonl", "a", encoding="utf-8") as file:
            file.writelines(map(to_line, rows))
        for row in rows[:1]:  # TensorBoard renders Markdown and HTML: a model's text must be neither
            self.tensorboard.add_text("sample", f"<pre>{html.escape(row['prompt'] + chr(10) * 2 + row['response'])}</pre>", step)

    def failures(self, step: int, name: str, responses: list) -> None:
        """Responses of an evaluation that got no verdict, at most 20."""
        with open(self.folder / "samples.jsonl", "a", encoding="utf-8") as file:
            for r in [r for r in responses if r.failure][:20]:
                file.write(to_line({"step": step, "eval": name, "prompt": r.problem.row["problem"], "response": r.text, "gold": r.problem.row["answer"],
                                    "truncated": r.truncated, "length": len(r.token_ids), "failure": r.failure, "time/reward": r.seconds}))  # fmt: skip

    def clipped(self, step: int, counts: torch.Tensor, tokenizer) -> None:
        """The 20 tokens that were clipped most, by side, with counts [2, V]; no line where nothing was clipped."""
        row = {"step": step}
        for side, of_tokens in zip(("low", "high"), counts.cpu()):
            number, ids = of_tokens.topk(min(20, len(of_tokens)))
            row[side] = [[tokenizer.decode([i]), int(n)] for i, n in zip(ids.tolist(), number.tolist()) if n]
        if row["low"] or row["high"]:
            with open(self.folder / "clipped.jsonl", "a", encoding="utf-8") as file:
                file.write(to_line(row))

    def curves(self) -> None:
        from matplotlib.figure import Figure

        rows = self.rows
        accuracies = sorted({key for row in rows for key in row if key.endswith("/accuracy")})
        panels = {"held-out accuracy": accuracies} | PANELS
        figure = Figure(figsize=(12, 6), layout="constrained")
        for axes, (title, keys) in zip(figure.subplots(2, 3).flat, panels.items()):
            for key in keys:
                points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
                axes.plot([x for x, _ in points], [y for _, y in points], marker="o" if key in accuracies else None, label=key)
            axes.set(title=title, xlabel="step")
            if len(keys) > 1:
                axes.legend()
        figure.savefig(self.folder / "curves.png", dpi=110)


def to_line(row: dict) -> str:
    """A line of JSON, which knows no NaN and no infinity: null."""
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
    return json.dumps(finite, ensure_ascii=False) + "\n"


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a log; a line that was cut off when its run was killed is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def warnings(rows: list[dict[str, float]]) -> list[str]:
    """What the metrics of a run say about its health. Each text begins with its name and a colon."""
    now, first, recent = rows[-1], next((row for row in rows if row.get("policy/entropy") is not None), None), rows[-5:]
    if first is None or "reward/failed" not in now:  # step 0
        return []
    known = lambda key, law: all(row.get(key) is not None and math.isfinite(row[key]) and law(row[key]) for row in recent)  # noqa: E731
    every = lambda key, law: len(recent) == 5 and known(key, law)  # noqa: E731  of the last five steps
    found = {
        "entropy collapse": (every("policy/entropy", lambda x: x < 0.01 and x < 0.1 * first["policy/entropy"]),
                             "below 0.01 nats per token and a tenth of the first step's: samples hardly differ. On a hard task: a lower --lr, or --clip-high"),
        "entropy explosion": (every("policy/entropy", lambda x: x > 3 * first["policy/entropy"] + 0.5),
                              "three times the first step's: the policy is losing its way. A lower --lr or --clip-high, or --kl-coef"),
        "short responses": (every("response/length_mean", lambda x: x < 0.1 * first["response/length_mean"]),
                            "a tenth of the first step's length: look at samples.jsonl; the reward may be had without reasoning"),
        "truncated responses": (every("response/truncated", lambda x: x > 0.5), "more than half hit --max-new-tokens: raise it, or see --overlong-filter"),
        "nothing to learn": (every("reward/std", lambda x: x == 0),
                             "all rewards of the step are equal, so every advantage is 0: other --train-data, or look at samples.jsonl for the reason"),
        "failing rewards": (now["reward/failed"] > 0.05, f"{now['reward/failed']:.0%} of the responses got no verdict: reasons in samples.jsonl"),
    }  # fmt: skip
    return [f"{name}: {text}" for name, (true, text) in found.items() if true]
