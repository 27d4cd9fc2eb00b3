"""The numbers of metrics.jsonl: from a rollout, an update and an evaluation."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

import tricks
from support.clock import Clock
from support.errors import RunError
from support.response import Response
from support.stats import bootstrap_interval, is_looping, pass_at_k
from support.util import compute_device, compute_dtype

NOT_FINITE = "its loss is not finite"
MAX_FAILED = 0.5  # a larger share of responses without a score ends the run
PHASES = ("rollout", "reward", "logprobs", "update", "sync", "step")
PEAK_FLOPS = {  # dense bfloat16, from the data sheets
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


# ---- rollout -------------------------------------------------------------------------------------


def check_failures(responses: list[Response]) -> None:
    """RunError if too many responses got no score."""
    failures = [r.failure for r in responses if r.failure]
    if len(failures) <= MAX_FAILED * len(responses):
        return
    most_frequent = max(set(failures), key=failures.count)
    raise RunError(
        f"the reward function gave no score for {len(failures)} of {len(responses)} responses "
        f"(the limit is {MAX_FAILED:.0%}). The most frequent reason: {most_frequent}"
    )


def rollout_metrics(
    responses: list[Response], dropped: list[Response], rewards: torch.Tensor
) -> dict[str, float]:
    """Metrics of the rewards [N, K] and of the responses.

    dropped: responses that dynamic sampling replaced. Only reward/failed counts them too: a group
    without any score scores 0 throughout, so it is replaced.
    solve_all and solve_none come from the scores, whatever normalises the rewards.
    """
    correct = torch.tensor([r.score >= 1 for r in responses]).view(rewards.shape)
    lengths = [len(r.token_ids) for r in responses]
    truncated = [r for r in responses if r.truncated]
    looping = [r for r in truncated if is_looping(torch.from_numpy(r.token_ids))]
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/std_within": float(
            (rewards - rewards.mean(1, keepdim=True)).square().mean().sqrt()
        ),
        "reward/correct": float(correct.float().mean()),
        "reward/solve_all": float(correct.all(1).float().mean()),
        "reward/solve_none": float((~correct.any(1)).float().mean()),
        "reward/failed": mean([r.failure != "" for r in responses + dropped]),
        "response/length_mean": mean(lengths),
        "response/length_max": max(lengths),
        "response/truncated": len(truncated) / len(responses),
        "response/looping": len(looping) / max(1, len(truncated)),
    }


def speed_metrics(
    responses: list[Response], dropped: list[Response], clock: Clock, model_config: Any
) -> dict[str, float]:
    """Seconds, tokens per second and peak memory of the step.

    Sampling and grading include the dropped responses; the training does not.
    """
    sampled = responses + dropped
    lengths = [len(r.token_ids) for r in responses]
    sizes = [len(r.problem.prompt_ids) + len(r.token_ids) for r in responses]
    seconds = clock.seconds
    train_seconds = seconds["logprobs"] + seconds["update"]
    metrics = {
        "perf/rollout_tokens_per_s": sum(len(r.token_ids) for r in sampled) / seconds["rollout"],
        "perf/train_tokens_per_s": sum(sizes) / train_seconds,
        "perf/peak_memory_gib": max(clock.memory.values()),
    }
    metrics |= {f"time/{phase}": seconds[phase] for phase in PHASES}
    metrics["time/slowest_reward"] = max(r.seconds for r in sampled)
    for phase in ("rollout", "logprobs", "update", "sync"):
        metrics[f"memory/{phase}_gib"] = clock.memory[phase]
    peak = peak_flops()
    if peak:
        flops = sum(train_flops(model_config, n, m) for n, m in zip(sizes, lengths))
        metrics["perf/mfu"] = flops / (seconds["update"] * peak * dist.get_world_size())
    return metrics


def peak_flops() -> float:
    """Peak operations per second of this GPU in bfloat16; 0 for a CPU or an unknown GPU."""
    if not torch.cuda.is_available():
        return 0
    device = torch.cuda.get_device_name()
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device), 0)


def train_flops(config, length: int, predicted: int) -> float:
    """Operations of forward and backward over one sequence (dense models such as Qwen and Llama).

    length: tokens of the sequence; predicted: those of them with a log-prob.
    6 per token and weight of the blocks, 6 per predicted token and weight of the head, and causal
    attention: 2 products of length^2 / 2 * width multiplications each, 2 operations each, three
    times (forward, and twice that in backward). Recomputation is not counted.
    """
    hidden = config.hidden_size
    layers = config.num_hidden_layers
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    attention = 2 * hidden * head_dim * (heads + kv_heads)
    block = attention + 3 * hidden * config.intermediate_size
    products = 6 * (layers * block * length + config.vocab_size * hidden * predicted)
    return products + 6 * layers * heads * head_dim * length**2


# ---- update --------------------------------------------------------------------------------------


class UpdateStats:
    """Sums over the response tokens of one update; reduce() turns them into metrics."""

    NAMES = ("tokens", "entropy", "clip_low", "clip_high", "clip_dual", "approx_kl", "reference_kl")

    def __init__(self, cfg, vocab_size: int):
        responses = cfg.prompts_per_step * cfg.group_size
        device = compute_device()
        self.cfg = cfg
        self.metrics: dict[str, float] = {}
        self.norms: list[torch.Tensor] = []  # gradient norm of each optimizer step
        self.sums = torch.zeros(len(self.NAMES), device=device)
        self.loss = torch.zeros((), device=device)
        self.not_finite = torch.zeros(responses + 1, device=device)  # tokens; last entry: dummies
        self.clipped = torch.zeros(2, vocab_size, device=device)  # low and high, by token id

    @torch.no_grad()
    def add(self, batch, logprobs, entropy, losses, loss) -> None:
        """Add one micro-batch. logprobs, entropy, losses: [R]; loss: their weighted sum."""
        cfg = self.cfg
        old = batch.old_logprobs
        real = (batch.response_index >= 0).float()  # a dummy counts as nothing
        low, high = tricks.clip_masks(logprobs, old, batch.advantages, cfg.clip_low, cfg.clip_high)
        dual = reference_kl = torch.zeros_like(real)
        if cfg.dual_clip:
            dual = tricks.dual_clip_mask(logprobs, old, batch.advantages, cfg.dual_clip)
        if cfg.kl_coef:
            reference_kl = tricks.kl_estimate(logprobs, batch.ref_logprobs)
        approx_kl = tricks.kl_estimate(old, logprobs)
        columns = (real, entropy, low, high, dual, approx_kl, reference_kl)
        self.sums += torch.stack([(real * column).sum() for column in columns])
        self.loss += loss
        bad = (~losses.isfinite()).float()
        self.not_finite.index_add_(0, batch.response_index % len(self.not_finite), bad)
        for side, mask in zip(self.clipped, (low, high)):
            side.index_add_(0, batch.targets, mask.float())

    def reduce(self, responses: list[Response]) -> dict[str, float]:
        """Metrics over all ranks. Marks the responses whose loss is not finite as failed."""
        total = torch.cat([self.sums, self.loss[None], self.not_finite[:-1]])
        dist.all_reduce(total)
        dist.all_reduce(self.clipped)
        columns = len(self.NAMES)
        tokens, *sums = total[:columns].tolist()
        loss = total[columns].item()
        for i in total[columns + 1 :].nonzero()[:, 0].tolist():
            responses[i].failure = responses[i].failure or NOT_FINITE
        norms = torch.stack(self.norms)
        means = {f"policy/{name}": value / tokens for name, value in zip(self.NAMES[1:], sums)}
        totals = {
            "policy/loss": loss / len(norms),
            "policy/grad_norm": float(norms.mean()),
            "policy/skipped": int((~norms.isfinite()).sum()),
        }
        return means | self.metrics | totals


def check_gap(batches: list, cfg) -> dict[str, float]:
    """Difference between the sampler's and the trainer's log-probs of the same tokens.

    RunError if the mean over all ranks shows that the sampler holds other weights.
    """
    gaps = []
    for batch in batches:
        gap = (batch.rollout_logprobs - batch.old_logprobs).abs()
        gaps.append(gap[(batch.response_index >= 0) & batch.old_logprobs.isfinite()])
    gaps = torch.cat(gaps).detach()
    total = torch.stack([gaps.sum(), torch.full_like(gaps.sum(), gaps.numel())])
    largest = F.pad(gaps, (0, 1)).max()  # 0 if this rank has no tokens
    dist.all_reduce(total)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    mean_gap = float(total[0] / total[1].clamp(min=1))
    bound = cfg.max_logprob_gap
    if not bound:
        # bfloat16: four times the largest mean gap of a sound run (docs/measurements.md, 0.0076).
        # An output bias that the trainer ignored gave 0.086.
        bound = 1e-3 if compute_dtype(cfg.dtype) == torch.float32 else 0.03
    comparable = cfg.top_p == 1 and cfg.top_k == 0  # else the sampler renormalises
    if comparable and not mean_gap <= bound:  # also true for NaN
        raise RunError(
            f"the log-probs of sampler and trainer differ by {mean_gap:.2g} nats per token on "
            f"average (at most {float(largest):.2g}), more than --max-logprob-gap {bound:g}. "
            "The sampler does not hold the trainer's weights, or one of them computes wrongly"
        )
    return {"rollout/logprob_gap_mean": mean_gap, "rollout/logprob_gap_max": float(largest)}


# ---- evaluation ----------------------------------------------------------------------------------


def eval_metrics(responses: list[Response], problems: int) -> dict[str, float]:
    """Metrics of one held-out set. A response is correct if its score is at least 1.

    The interval is a bootstrap over problems. pass@k takes all responses to a problem: k is their
    number.
    """
    samples = len(responses) // problems
    correct = torch.tensor([r.score >= 1 for r in responses]).view(problems, samples).sum(1)
    low, high = bootstrap_interval(correct / samples)
    return {
        "accuracy": float(correct.sum()) / len(responses),
        "accuracy_low": float(low),
        "accuracy_high": float(high),
        "pass_at_k": float(pass_at_k(samples, correct, samples).mean()),
        "length_mean": mean([len(r.token_ids) for r in responses]),
        "truncated": mean([r.truncated for r in responses]),
        "failed": mean([r.failure != "" for r in responses]),
    }


def mean(values: list) -> float:
    """The mean of numbers or bools."""
    return sum(values) / len(values)
