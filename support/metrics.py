"""What a rollout, an update and an evaluation looked like, as numbers for the log."""

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import tricks
from support.clock import Clock
from support.errors import RunError
from support.stats import bootstrap_interval, is_looping, pass_at_k
from support.util import compute_device, compute_dtype

NOT_FINITE = "its loss is not finite"


def rollout_metrics(responses: list, rewards: torch.Tensor, clock: Clock, config, world: int) -> dict[str, float]:
    """What the step's responses and clock say; solve_all and solve_none come from the scores, whatever the normaliser."""
    correct = torch.tensor([r.score >= 1 for r in responses]).view(rewards.shape)
    lengths = [len(r.token_ids) for r in responses]
    cut = [r for r in responses if r.truncated]
    sizes = [len(r.problem.prompt_ids) + n for r, n in zip(responses, lengths)]
    seconds = clock.seconds
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/std_within": float((rewards - rewards.mean(1, keepdim=True)).square().mean().sqrt()),
        "reward/solve_all": float(correct.all(1).float().mean()),
        "reward/solve_none": float((~correct.any(1)).float().mean()),
        "reward/failed": float(np.mean([r.failure != "" for r in responses])),
        "response/length_mean": float(np.mean(lengths)),
        "response/length_max": max(lengths),
        "response/truncated": len(cut) / len(responses),
        "response/looping": sum(bool(is_looping(torch.from_numpy(r.token_ids))) for r in cut) / max(1, len(cut)),  # of the truncated ones
        "perf/rollout_tokens_per_s": sum(lengths) / seconds["rollout"],
        "perf/train_tokens_per_s": sum(sizes) / (seconds["logprobs"] + seconds["update"]),
        "perf/peak_memory_gib": max(clock.memory.values()),
    }
    metrics |= {f"time/{phase}": seconds[phase] for phase in ("rollout", "reward", "logprobs", "update", "sync", "step")}
    metrics["time/slowest_reward"] = max(r.seconds for r in responses)
    metrics |= {f"memory/{phase}_gib": clock.memory[phase] for phase in ("rollout", "logprobs", "update", "sync")}
    for peak in [flops for name, flops in PEAK_FLOPS.items() if torch.cuda.is_available() and name in torch.cuda.get_device_name()]:
        metrics["perf/mfu"] = sum(train_flops(config, n, m) for n, m in zip(sizes, lengths)) / (seconds["update"] * peak * world)
    return metrics


PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}  # dense bfloat16, from the data sheets


def train_flops(config, length: int, predicted: int) -> float:
    """Operations of a forward and backward over a sequence of which so many tokens are predicted (Qwen, Llama; dense).

    6 per token and weight of the blocks, 6 per predicted token and weight of the head, and causal attention: 2 products
    of length^2 / 2 * width multiplications each, 2 operations each, three times (forward, and twice that backward).
    Recomputation (activation checkpointing) is not counted.
    """
    hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    block = 2 * hidden * head_dim * (heads + config.num_key_value_heads) + 3 * hidden * config.intermediate_size
    return 6 * (layers * block * length + config.vocab_size * hidden * predicted) + 6 * layers * heads * head_dim * length**2


class UpdateStats:
    """Sums over the response tokens of one update; reduce() makes them the metrics of the step."""

    NAMES = ("tokens", "entropy", "clip_low", "clip_high", "approx_kl", "reference_kl")

    def __init__(self, cfg, vocab_size: int):
        self.cfg, self.metrics, self.norms = cfg, {}, []
        responses, device = cfg.prompts_per_step * cfg.group_size, compute_device()
        self.sums = torch.zeros(len(self.NAMES), device=device)
        self.loss = torch.zeros((), device=device)
        self.broken = torch.zeros(responses + 1, device=device)  # non-finite tokens per response
        self.clipped = torch.zeros(2, vocab_size, device=device)  # low and high, by token

    @torch.no_grad()
    def add(self, batch, logprobs, entropy, losses, loss) -> None:
        old, cfg = batch.old_logprobs, self.cfg
        real = (batch.owner >= 0).float()  # a stand-in counts as nothing
        low, high = tricks.clip_masks(logprobs, old, batch.advantages, cfg.clip_low, cfg.clip_high)
        kl = tricks.kl_estimate(logprobs, batch.ref_logprobs) if cfg.kl_coef else torch.zeros_like(real)
        columns = (real, entropy, low, high, tricks.kl_estimate(old, logprobs), kl)
        self.sums += torch.stack([(real * column).sum() for column in columns])
        self.loss += loss
        self.broken.index_add_(0, batch.owner % len(self.broken), (~losses.isfinite()).float())
        for side, mask in zip(self.clipped, (low, high)):
            side.index_add_(0, batch.targets, mask.float())

    def reduce(self, responses) -> dict[str, float]:
        """Metrics over all ranks; names the responses whose loss was not finite."""
        total = torch.cat([self.sums, self.loss[None], self.broken[:-1]])
        dist.all_reduce(total)
        dist.all_reduce(self.clipped)
        n = len(self.NAMES)
        (tokens, *sums, loss), norms = total[: n + 1].tolist(), torch.stack(self.norms)
        for i in total[n + 1 :].nonzero()[:, 0].tolist():
            responses[i].failure = responses[i].failure or NOT_FINITE
        means = {f"policy/{name}": value / tokens for name, value in zip(self.NAMES[1:], sums)}
        return means | self.metrics | {
            "policy/loss": loss / len(norms),
            "policy/grad_norm": float(norms.mean()),
            "policy/skipped": int((~norms.isfinite()).sum()),
        }  # fmt: skip


def check_gap(batches: list, cfg) -> dict[str, float]:
    """Log-prob gap between sampler and trainer over the same tokens; ends the run when it shows other weights."""
    gaps = torch.cat([(b.rollout_logprobs - b.old_logprobs).abs()[(b.owner >= 0) & b.old_logprobs.isfinite()] for b in batches]).detach()
    total, largest = torch.stack([gaps.sum(), torch.full_like(gaps.sum(), gaps.numel())]), F.pad(gaps, (0, 1)).max()
    dist.all_reduce(total)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    mean, largest = float(total[0] / total[1].clamp(min=1)), float(largest)
    bound = cfg.max_logprob_gap or (1e-3 if compute_dtype(cfg) == torch.float32 else 0.1)
    if not mean <= bound and cfg.top_p == 1 and cfg.top_k == 0:
        raise RunError(
            f"sampler and trainer differ by {mean:.2g} nats per token (at most {largest:.2g}), more than --max-logprob-gap {bound:g}: "
            "the sampler does not hold the trainer's weights (stale or broken sync), or one of them computes wrongly"
        )
    return {"rollout/logprob_gap_mean": mean, "rollout/logprob_gap_max": largest}


def eval_metrics(responses: list, problems: int, k: int) -> dict[str, float]:
    """Of one held-out set. A response is correct if its score is at least 1."""
    correct = torch.tensor([r.score >= 1 for r in responses]).view(problems, -1).sum(1)
    samples = len(responses) // problems
    low, high = bootstrap_interval(correct / samples)
    return {
        "accuracy": float(correct.sum()) / len(responses),
        "accuracy_low": float(low),
        "accuracy_high": float(high),
        "pass_at_k": float(pass_at_k(torch.full_like(correct, samples), correct, k).mean()),
        "length_mean": float(np.mean([len(r.token_ids) for r in responses])),
        "truncated": float(np.mean([r.truncated for r in responses])),
        "failed": float(np.mean([r.failure != "" for r in responses])),
    }
