"""What a run says of itself and leaves on disk: phases with seconds and memory, metrics, logs, checkpoints, the final model."""

import contextlib
import dataclasses
import json
import resource
import shutil
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict

import tricks


# ---- phases ----------------------------------------------------------------------------------------------------------


class Clock:
    """Adds up the seconds of named phases: `with clock("rollout"): ...`"""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - start


# ---- metrics and logs ------------------------------------------------------------------------------------------------


def rollout_metrics(responses: list, rewards: torch.Tensor, clock: Clock, config, world: int) -> dict[str, float]:
    """What the step's responses and clock say; solve_all and solve_none come from the scores, whatever the normaliser."""
    correct = torch.tensor([r.score >= 1 for r in responses]).view(rewards.shape)
    lengths = [len(r.token_ids) for r in responses]
    cut = [r for r in responses if r.truncated]
    sizes = [len(r.problem.prompt_ids) + n for r, n in zip(responses, lengths)]
    cuda, seconds = torch.cuda.is_available(), clock.seconds
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/solve_all": float(correct.all(1).float().mean()),
        "reward/solve_none": float((~correct.any(1)).float().mean()),
        "reward/failed": float(np.mean([r.failure != "" for r in responses])),
        "response/length_mean": float(np.mean(lengths)),
        "response/length_max": max(lengths),
        "response/truncated": len(cut) / len(responses),
        "response/looping": sum(bool(tricks.is_looping(torch.from_numpy(r.token_ids))) for r in cut) / max(1, len(cut)),  # of the truncated ones
        "perf/rollout_tokens_per_s": sum(lengths) / seconds["rollout"],
        "perf/train_tokens_per_s": sum(sizes) / (seconds["logprobs"] + seconds["update"]),
        "perf/peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    } | {f"time/{phase}": seconds[phase] for phase in ("rollout", "reward", "logprobs", "update", "sync", "step")}
    for peak in [flops for name, flops in PEAK_FLOPS.items() if cuda and name in torch.cuda.get_device_name()]:
        metrics["perf/mfu"] = sum(train_flops(config, n) for n in sizes) / (seconds["update"] * peak * world)
    return metrics


PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}  # dense bfloat16, from the data sheets


def train_flops(config, length: int) -> float:
    """Operations of a forward and backward over one sequence: 6 per weight and token, and causal attention (Qwen, Llama)."""
    width = config.num_attention_heads * config.head_dim
    attention = 2 * config.hidden_size * (width + config.num_key_value_heads * config.head_dim)
    weights = config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size) + config.vocab_size * config.hidden_size
    return 6 * weights * length + 6 * config.num_hidden_layers * width * length**2


class Log:
    """metrics.jsonl, samples.jsonl, TensorBoard events and curves.png, written by rank 0."""

    def __init__(self, folder: Path, cfg, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.tensorboard = folder, SummaryWriter(str(folder), purge_step=start)
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")
        for name in ("metrics.jsonl", "samples.jsonl"):  # a resumed run repeats what came after its checkpoint
            lines = (folder / name).read_text().splitlines(keepends=True) if (folder / name).exists() else []
            (folder / name).write_text("".join(line for line in lines if json.loads(line)["step"] <= start))

    def metrics(self, step: int, values: dict[str, float]) -> None:
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)

    def samples(self, step: int, responses: list, rewards: torch.Tensor, advantages: torch.Tensor, count: int) -> None:
        with open(self.folder / "samples.jsonl", "a", encoding="utf-8") as file:
            for i in np.linspace(0, len(responses) - 1, min(count, len(responses)), dtype=int).tolist():
                r = responses[i]
                row = dict(step=step, prompt=r.problem.row["problem"], response=r.text, reward=float(rewards.flatten()[i]), gold=r.problem.row["answer"],
                           advantage=float(advantages.flatten()[i]), truncated=r.truncated, length=len(r.token_ids), failure=r.failure)  # fmt: skip
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def curves(self) -> None:
        from matplotlib.figure import Figure

        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        accuracies = sorted({key for row in rows for key in row if key.endswith("/accuracy")})
        panels = {"held-out accuracy": accuracies, "reward": ["reward/mean"], "response length (tokens)": ["response/length_mean"],
                  "entropy (nats per token)": ["policy/entropy"], "clipped tokens (share)": ["policy/clip_low", "policy/clip_high"],
                  "gradient norm": ["policy/grad_norm"]}  # fmt: skip
        figure = Figure(figsize=(12, 6), layout="constrained")
        for axes, (title, keys) in zip(figure.subplots(2, 3).flat, panels.items()):
            for key in keys:
                points = [(row["step"], row[key]) for row in rows if key in row]
                axes.plot([x for x, _ in points], [y for _, y in points], marker="o" if key in accuracies else None, label=key)
            axes.set(title=title, xlabel="step")
            if len(keys) > 1:
                axes.legend()
        figure.savefig(self.folder / "curves.png", dpi=110)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def save_checkpoint(folder: Path, step: int, cursor: int, policy, optimizer, cfg) -> None:
    """Sharded weights, optimizer state and position. A rename makes it visible, so that none is ever seen half-written."""
    partial, (model, optim) = folder / f"partial-{step}", get_state_dict(policy, optimizer)
    dcp.save({"model": model, "optimizer": optim}, checkpoint_id=partial)
    if dist.get_rank() == 0:
        (partial / "state.json").write_text(json.dumps({"step": step, "cursor": cursor}))
        partial.rename(folder / f"checkpoint-{step}")
        for old in checkpoints(folder)[: -cfg.keep_checkpoints]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(path: Path, policy, optimizer) -> tuple[int, int]:
    """Restore in place. Returns the steps done and the position in the stream of prompts."""
    model, optim = get_state_dict(policy, optimizer)
    dcp.load({"model": model, "optimizer": optim}, checkpoint_id=path)
    set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim)
    position = json.loads((path / "state.json").read_text())
    return position["step"], position["cursor"]


def save_model(policy, tokenizer, source: str, folder: Path) -> None:
    """An ordinary Hugging Face model folder, in the precision that the model came in."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    state = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        dtype = policy.config.dtype or torch.float32
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(policy.config, dtype=dtype)
        if (Path(source) / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(source)
        model.save_pretrained(folder, state_dict={name: tensor.to(dtype) for name, tensor in state.items()})
        tokenizer.save_pretrained(folder)
    dist.barrier()
