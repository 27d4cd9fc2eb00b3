"""Lite PPO (arXiv 2508.08221): critic-free PPO for language models with exactly two tricks.

    trick 1    A_i = (r_i - mean of its group) / (std of all rewards of the step + eps)
    trick 2    L   = sum over all response tokens of l_it / number of those tokens
    where      l   = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)   rho = pi_theta / pi_old

There is no critic. A KL term, the overlong filter, dynamic sampling and other tricks are flags.
The formulas are pure functions in tricks.py. This file is everything else that learns:
config, policy, rollout, PPO step, evaluation, loop. What a long run needs besides is in support/:
data, graders, samplers, checkpoints, logs.

    torchrun lite_ppo.py                                  # a toy model; any machine, minutes
    torchrun --nproc-per-node 8 lite_ppo.py --model Qwen/Qwen3-4B-Base --train-data medium

The advantage and the weight of every token are computed once per step, from the responses of all
ranks, BEFORE anything is split. In the loss they are constants. A weighted sum does not depend on
how it is split. So neither the number of ranks nor the size of a micro-batch changes the gradient,
except for rounding.

Start reading at train(), at the end. Then search for "LITE PPO, TRICK".
Letters: N prompts, K responses to each, T tokens and R response tokens of a micro-batch.
"""

import functools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # for shared CPUs: see docs/operating.md

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor

import tricks
from support import launch, models, packed, samplers
from support.actor import Actor
from support.clock import clock
from support.data import Problem, load_sets
from support.grader import Grader
from support.logprobs import linear_logprobs
from support.metrics import UpdateStats, check_gap, eval_metrics
from support.packing import concatenate, plan_micro_batches
from support.response import Response
from support.run import Run
from support.sampling import Sampling
from support.util import compute_device, compute_dtype, logits_at_a_time, permutation, seed_for

# ---- 1. config -----------------------------------------------------------------------------------

Preset = Literal["lite_ppo", "paper", "reinforce", "grpo", "dapo", "dr_grpo", "rloo"]


@dataclass
class Model:
    """Model, data and reward."""

    preset: Preset = "lite_ppo"  # a bundle of flags, see docs/tricks.md
    model: str = "toy"  # folder or hub id; toy[:SIZE][:VARIANT] is embedded, see support/toy.py
    train_data: str = ""  # FILE.jsonl, FILE.parquet, hub OWNER/NAME, or easy, medium, hard
    eval_data: tuple[str, ...] = ()  # held-out sets: as above, or math500 aime24 ...; NAME=SET
    problem_column: str = ""  # column with the problem; A.B: field B of object A; "": detect
    answer_column: str = ""  # the same for the answer, such as reward_model.ground_truth
    # the system message of every prompt that has none; "" for none
    system_prompt: str = r"Please reason step by step, and put your final answer within \boxed{}."
    chat_template_kwargs: str = ""  # a JSON object, such as '{"enable_thinking": false}'
    reward: str = "math"  # math, exact, or FILE.py:FUNCTION
    reward_timeout: float = 10.0  # seconds per response; a slower reward is killed and counts 0
    reward_workers: int = 0  # processes per rank; 0: CPU cores / ranks, at most 8
    reward_memory_gib: float = 4.0  # memory of one worker; 0: no limit
    reward_low: float = 0.0  # reward of a wrong response; a correct one gets 1


@dataclass
class Rollout:
    """Each step samples N x K responses."""

    prompts_per_step: int = 128  # N, over all ranks
    group_size: int = 8  # K responses to each prompt
    max_prompt_tokens: int = 1024  # longer training prompts are left out and counted
    max_new_tokens: int = 8192  # a response that hits this limit is "truncated"
    temperature: float = 1.0  # of sampling and of the trained log-probs
    top_p: float = 1.0  # below 1 the samples do not follow the trained distribution (biased)
    top_k: int = 0  # 0: off; any other value biases like top_p


@dataclass
class Tricks:
    """Lite PPO's two tricks are the defaults; the others are options (docs/tricks.md)."""

    advantage_mean: Literal["group", "batch", "none", "leave_one_out"] = "group"  # mean to subtract
    advantage_std: Literal["group", "batch", "none"] = "batch"  # std to divide by
    loss_level: Literal["token", "sequence", "constant", "sum"] = "token"  # weight of each token
    clip_low: float = 0.2  # the ratio may fall to 1 - clip_low
    clip_high: float = 0.2  # the ratio may rise to 1 + clip_high; "clip-higher" is 0.28
    dual_clip: float = 0.0  # if A < 0, the loss of a token is at most dual_clip * |A|; 0: off
    kl_coef: float = 0.0  # weight of the k3 KL to the initial model; 0: no reference model
    tis_cap: float = 0.0  # truncated importance sampling, trainer over sampler; 0: off
    overlong_filter: bool = False  # truncated responses weigh 0; their rewards stay in mean and std
    overlong_buffer: float = 0.0  # soft penalty over this last share of max_new_tokens; DAPO: 0.2
    dynamic_sampling: bool = False  # replace groups whose scores are all equal (DAPO)


@dataclass
class Optimizer:
    """AdamW."""

    steps: int = 500  # training steps: a rollout and `minibatches` optimizer steps each
    minibatches: int = 1  # optimizer steps per rollout; with 1 the ratio is 1 and nothing clips
    lr: float = 1e-6  # constant after the warm-up
    warmup_steps: int = 50  # steps over which lr rises linearly from 0
    max_grad_norm: float = 1.0  # the gradient norm over all ranks is clipped to this


@dataclass
class System:
    """Where, how fast and how safely it runs."""

    seed: int = 42  # prompts, samples and shuffles are functions of (seed, step, prompt)
    sampler: Literal["auto", "vllm", "transformers"] = "auto"  # auto: vllm where it runs
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 on GPUs
    micro_batch_tokens: int = 16384  # tokens of one forward and backward pass per rank
    compile: Literal["auto", "on", "off"] = "auto"  # compile the blocks; auto: on GPUs
    activation_checkpointing: bool = True  # recompute blocks in the backward pass: less memory
    shard_ranks: int = 0  # ranks that share one copy of the model; 0: all; 8: a copy per 8 ranks
    cpu_offload: bool = False  # parameters, gradients and optimizer state live in host memory
    max_num_seqs: int = 256  # sequences that the sampler decodes at once, per rank
    gpu_memory_utilization: float = 0.6  # share of the GPU that vLLM takes while it samples
    # largest mean difference of the log-probs of sampler and trainer, nats; a larger one ends the
    # run; 0: 1e-3 in float32, 0.03 in bfloat16
    max_logprob_gap: float = 0.0
    timeout_minutes: float = 30.0  # the run ends when a rank makes no progress for so long


@dataclass
class Evaluation:
    """Evaluation, logs and checkpoints."""

    eval_every: int = 20  # steps; also before the first and after the last; 0: only those two
    eval_samples: int = 4  # responses per problem: accuracy is their mean, pass@k has this k
    eval_size: int = 0  # only the first problems of each set; 0: all
    eval_temperature: float = 1.0  # 0: greedy
    output_dir: str = ""  # default: runs/MODEL-PRESET-seedSEED-TIME
    resume: str = "auto"  # the newest checkpoint in output_dir, if any; or a checkpoint folder
    save_every: int = 0  # steps between checkpoints; 0: only the final model
    samples_per_step: int = 8  # responses of each step in samples.jsonl


@dataclass
class Config(Model, Rollout, Tricks, Optimizer, System, Evaluation):
    """Lite PPO: group-mean, batch-std advantages and a token-level loss (arXiv 2508.08221)."""


PRESETS: dict[str, dict[str, Any]] = {
    "lite_ppo": {},
    "paper": dict(temperature=0.99, top_p=0.99, top_k=100),
    "reinforce": dict(advantage_mean="none", advantage_std="none", loss_level="sequence"),
    "grpo": dict(advantage_std="group", loss_level="sequence", kl_coef=0.04, minibatches=1),
    "dapo": dict(
        advantage_std="group",
        clip_high=0.28,
        dynamic_sampling=True,
        overlong_buffer=0.2,
        reward_low=-1.0,
        minibatches=16,
    ),
    "dr_grpo": dict(advantage_std="none", loss_level="constant"),
    "rloo": dict(
        advantage_mean="leave_one_out", advantage_std="none", loss_level="sum", minibatches=1
    ),
}

DYNAMIC_ROUNDS = 4  # rollouts per step, at most, in search of informative groups


# ---- 2. policy: FSDP2, packed forward ------------------------------------------------------------


@dataclass
class MicroBatch:
    """Sequences laid end to end in one row of T tokens, without padding.

    R of the tokens are response tokens. Every field of the loss has one value for each of them.
    """

    token_ids: torch.Tensor  # [T] prompt and response, without the last token
    position_ids: torch.Tensor  # [T] restart at 0 with each sequence
    cu_seqlens: torch.Tensor  # [sequences + 1] int32, where each sequence starts
    lengths: list[int]  # of the sequences
    predict: torch.Tensor  # [R] positions whose hidden state predicts a response token
    targets: torch.Tensor  # [R] the response tokens
    response_index: torch.Tensor  # [R] place of the response in the step; -1 in a dummy
    advantages: torch.Tensor  # [R] TRICK 1
    weights: torch.Tensor  # [R] TRICK 2
    rollout_logprobs: torch.Tensor  # [R] the sampler's
    old_logprobs: torch.Tensor | None = None  # [R] the trainer's, before the update
    ref_logprobs: torch.Tensor | None = None  # [R] the initial model's


DUMMY = Response(Problem({}, [0, 0]), np.zeros(1), np.zeros(1), False, text="", score=0.0)


def make_micro_batch(responses, indices, advantages, weights, device) -> MicroBatch:
    """Pack the responses of these indices into one row.

    Without any, pack a dummy: FSDP waits for every rank, so every rank must run the pass.
    advantages, weights: one per response of the step, then a 0 for the dummy (index -1).
    """
    chosen = [responses[i] for i in indices] or [DUMMY]
    prompts = [r.problem.prompt_ids for r in chosen]
    targets = [r.token_ids for r in chosen]
    lengths = [len(p) + len(t) - 1 for p, t in zip(prompts, targets)]
    starts = np.cumsum([0, *lengths])
    first = [start + len(p) - 1 for start, p in zip(starts, prompts)]
    response_index = np.repeat(indices or [-1], [len(t) for t in targets])

    return MicroBatch(
        token_ids=concatenate([[*p, *t[:-1]] for p, t in zip(prompts, targets)], device),
        position_ids=concatenate([np.arange(n) for n in lengths], device),
        cu_seqlens=concatenate([starts], device, np.int32),
        lengths=lengths,
        predict=concatenate([np.arange(a, b) for a, b in zip(first, starts[1:])], device),
        targets=concatenate(targets, device),
        response_index=concatenate([response_index], device),
        advantages=advantages[response_index].to(device),
        weights=weights[response_index].to(device),
        rollout_logprobs=concatenate([r.logprobs for r in chosen], device, np.float32),
    )


def response_logprobs(model, compiled: bool, batch: MicroBatch, temperature: float):
    """Log-prob and entropy of each response token, both [R]."""
    clock.tick()  # every rank has equally many micro-batches
    hidden = model.base_model(
        input_ids=batch.token_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        micro_batch=batch,  # for packed.packed_attention
    ).last_hidden_state[0, batch.predict]
    head = model.get_output_embeddings()
    chunk = max(64, logits_at_a_time(hidden.device) // model.config.vocab_size)
    options = dict(temperature=temperature, chunk=chunk, bias=head.bias, compiled=compiled)
    return linear_logprobs(hidden, head.weight, batch.targets, **options)


def shard_model(model, cfg: Config, device: torch.device, trainable: bool) -> None:
    """FSDP2: each block is gathered when it computes; gradients are averaged in float32."""
    world = dist.get_world_size()
    shard_size = cfg.shard_ranks or world  # ranks that share one copy of the weights
    if shard_size == world:
        mesh = dist.init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    else:  # hybrid sharding: each row of the mesh holds a whole copy
        shape = (world // shard_size, shard_size)
        mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    options = dict(
        mesh=mesh,
        mp_policy=fsdp.MixedPrecisionPolicy(compute_dtype(cfg.dtype), reduce_dtype=torch.float32),
        offload_policy=fsdp.CPUOffloadPolicy() if cfg.cpu_offload else fsdp.OffloadPolicy(),
        reshard_after_forward=True,
    )
    if cfg.activation_checkpointing and trainable:
        packed.checkpoint_blocks(model)
    compiled = cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda")
    if compiled:
        packed.compile_blocks(model)
    for block in packed.blocks(model):
        fsdp.fully_shard(block, **options)
    fsdp.fully_shard(model, **options)
    model.response_logprobs = functools.partial(response_logprobs, model, compiled)
    # FSDP gathers weights before forward() only, so this method is registered too.
    fsdp.register_fsdp_forward_method(model, "response_logprobs")


@clock("start")  # a phase of its own: the watchdog sees that start-up makes progress
def build_policy(cfg: Config, path: str, device: torch.device, trainable: bool = True):
    """The sharded model: float32 weights that compute in cfg.dtype."""
    weights_device = torch.device("cpu") if cfg.cpu_offload else device
    shard = functools.partial(shard_model, cfg=cfg, device=device, trainable=trainable)
    model = models.build_model(path, torch.float32, "packed", weights_device, shard)
    models.place_buffers(model, compute_dtype(cfg.dtype), device)
    models.load_weights(model, path)
    return model.train(trainable).requires_grad_(trainable)


def full_weights(model, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and full tensor of every parameter. Each rank must read all: gathering is collective.

    A tied lm_head.weight is included, because vLLM's CPU backend keeps its own copy. So are the
    buffers of the state dict, which are whole on every rank.
    """
    for name, tensor in model.state_dict().items():
        tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@clock("sync")
def sync_weights(sampler, policy, dtype: torch.dtype) -> None:
    sampler.load_weights(full_weights(policy, dtype))


# ---- 3. rollout ----------------------------------------------------------------------------------


def nth_problem(position: int, seed: int, size: int) -> int:
    """Index of a problem in the endless stream of prompts; each epoch is a new shuffle."""
    epoch, offset = divmod(position, size)
    return permutation(size, seed, "epoch", epoch)[offset]


def rollout(actor, train_set, cursor: int, cfg: Config) -> tuple[list, list, int]:
    """(N * K responses group by group, dropped responses, next position in the prompt stream).

    With dynamic sampling, more prompts are tried until N groups have scores that are not all equal,
    for at most DYNAMIC_ROUNDS rounds. Uninformative groups fill the remaining places.
    """
    N = cfg.prompts_per_step
    K = cfg.group_size
    sampling = Sampling(K, cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.top_k)
    size = len(train_set.problems)
    kept = []  # groups of K responses
    spare = []
    for _ in range(DYNAMIC_ROUNDS if cfg.dynamic_sampling else 1):
        positions = range(cursor, cursor + N)
        problems = [train_set.problems[nth_problem(i, cfg.seed, size)] for i in positions]
        seeds = [seed_for(cfg.seed, "sample", i) for i in positions]
        responses = actor.sample(problems, seeds, sampling)
        cursor += N
        groups = [responses[i : i + K] for i in range(0, N * K, K)]
        scores = torch.tensor([[r.score for r in group] for group in groups])
        for group, informative in zip(groups, tricks.informative_groups(scores)):
            if informative or not cfg.dynamic_sampling:
                kept.append(group)
            else:
                spare.append(group)
        if len(kept) >= N:
            break
    responses = [r for group in kept + spare for r in group]
    return responses[: N * K], responses[N * K :], cursor


# ---- 4. the PPO step -----------------------------------------------------------------------------


def shape_rewards(responses: list[Response], cfg: Config) -> torch.Tensor:
    """Scores to rewards [N, K]. All shaping happens before any normalisation."""
    scores = torch.tensor([r.score for r in responses])
    rewards = tricks.scale_reward(scores, cfg.reward_low, 1.0)
    if cfg.overlong_buffer:
        lengths = torch.tensor([len(r.token_ids) for r in responses])
        buffer = math.ceil(cfg.overlong_buffer * cfg.max_new_tokens)
        rewards = rewards + tricks.soft_overlong_penalty(lengths, cfg.max_new_tokens, buffer)
    return rewards.view(-1, cfg.group_size)


def compute_advantages(rewards: torch.Tensor, cfg: Config) -> torch.Tensor:
    """Rewards [N, K] of the whole step, all ranks -> advantages [N, K]."""
    if cfg.advantage_mean == "leave_one_out":
        return tricks.leave_one_out_advantages(rewards)
    # LITE PPO, TRICK 1: subtract the mean of the group, divide by the std of the whole batch
    return tricks.normalize_advantages(rewards, mean=cfg.advantage_mean, std=cfg.advantage_std)


def make_minibatches(responses, advantages, step: int, cfg: Config) -> list[list[MicroBatch]]:
    """Shuffle the step, split it into optimizer steps, and each into this rank's micro-batches.

    The weights are computed here, from the lengths of the whole mini-batch on all ranks.
    """
    advantages = F.pad(advantages.flatten(), (0, 1))  # the last entry is the dummy's
    order = torch.tensor(permutation(len(responses), cfg.seed, "minibatches", step))
    minibatches = []
    for members in order.tensor_split(cfg.minibatches):
        chosen = [responses[i] for i in members]
        lengths = torch.tensor([len(r.token_ids) for r in chosen])
        keep = ~torch.tensor([r.truncated for r in chosen]) if cfg.overlong_filter else None
        weights = torch.zeros(len(responses) + 1)
        # LITE PPO, TRICK 2: every token of the mini-batch has the same weight, on all ranks
        weights[members] = tricks.loss_weights(lengths, cfg.loss_level, keep, cfg.max_new_tokens)

        sizes = [len(r.problem.prompt_ids) + len(r.token_ids) - 1 for r in chosen]
        plan = plan_micro_batches(sizes, cfg.micro_batch_tokens, dist.get_world_size())
        mine = [members[indices].tolist() for indices in plan[dist.get_rank()]]
        device = compute_device()
        minibatches.append(
            [make_micro_batch(responses, i, advantages, weights, device) for i in mine]
        )
    return minibatches


def token_losses(logprobs: torch.Tensor, batch: MicroBatch, cfg: Config) -> torch.Tensor:
    """The PPO loss of each response token, [R], with the options of cfg."""
    old = batch.old_logprobs
    clips = (cfg.clip_low, cfg.clip_high, cfg.dual_clip or None)
    losses = tricks.clipped_surrogate(logprobs, old, batch.advantages, *clips)
    if cfg.tis_cap:
        sampled = batch.rollout_logprobs
        losses = losses * tricks.truncated_importance_weights(old, sampled, cfg.tis_cap)
    if cfg.kl_coef:
        losses = losses + cfg.kl_coef * tricks.kl_estimate(logprobs, batch.ref_logprobs)
    return losses


@clock("logprobs")
@torch.no_grad()
def add_logprobs(policy, reference, minibatches, cfg: Config) -> None:
    """Add the old log-probs and, with a KL term, those of the reference model.

    The first mini-batch is left out: update() takes its old log-probs from its own forward pass,
    because the weights have not moved yet.
    """
    for m, micro_batches in enumerate(minibatches):
        for batch in micro_batches:
            if m > 0:
                batch.old_logprobs, _ = policy.response_logprobs(batch, cfg.temperature)
            if cfg.kl_coef:
                batch.ref_logprobs, _ = reference.response_logprobs(batch, cfg.temperature)


@clock("update")
def update(policy, optimizer, minibatches, step: int, cfg: Config) -> UpdateStats:
    """One optimizer step per mini-batch."""
    world = dist.get_world_size()
    stats = UpdateStats(cfg, policy.config.vocab_size)
    for group in optimizer.param_groups:
        group["lr"] = cfg.lr * min(1.0, step / max(1, cfg.warmup_steps))

    for m, micro_batches in enumerate(minibatches):
        for batch in micro_batches:
            policy.set_requires_all_reduce(batch is micro_batches[-1])  # hybrid sharding: once
            logprobs, entropy = policy.response_logprobs(batch, cfg.temperature)
            if batch.old_logprobs is None:
                batch.old_logprobs = logprobs.detach()
            losses = token_losses(logprobs, batch, cfg)
            loss = (batch.weights * losses).sum()
            (loss * world).backward()  # FSDP takes the mean over ranks; we need the sum
            stats.add(batch, logprobs, entropy, losses, loss)
        if m == 0:  # the weights have not moved yet: were the responses sampled from them?
            all_batches = [batch for part in minibatches for batch in part]
            stats.metrics |= check_gap(all_batches, cfg)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm).full_tensor()
        if norm.isfinite():  # the same norm on all ranks, so that they skip together
            optimizer.step()
        optimizer.zero_grad()
        stats.norms.append(norm)
    return stats


# ---- 5. evaluation -------------------------------------------------------------------------------


def evaluate(actor, eval_sets, cfg: Config, run: Run) -> dict[str, float]:
    """Accuracy with its interval, and pass@k, for each held-out set.

    The seeds are the same in every evaluation, so that differences come from the model.
    """
    metrics = {}
    for name, (problems, _) in eval_sets.items():
        seeds = [seed_for(cfg.seed, "eval", name, i) for i in range(len(problems))]
        sampling = Sampling(cfg.eval_samples, cfg.max_new_tokens, cfg.eval_temperature)
        responses = actor.sample(problems, seeds, sampling)
        found = eval_metrics(responses, len(problems))
        metrics |= {f"eval/{name}/{key}": value for key, value in found.items()}
        run.log_evaluation(name, found, responses)
    return metrics


# ---- 6. the loop ---------------------------------------------------------------------------------


def train(cfg: Config) -> dict[str, float]:
    """The whole run. Returns the metrics of the last step."""
    device, dtype = compute_device(), compute_dtype(cfg.dtype)
    path = models.resolve_model(cfg.model)
    tokenizer, eos_ids = models.load_tokenizer(path, cfg.max_prompt_tokens + cfg.max_new_tokens)
    train_set, eval_sets = load_sets(tokenizer, cfg)

    with Run(cfg, path, tokenizer, train_set, eval_sets) as run:  # folder, logs, checkpoints
        run.print_banner()
        grader = run.close_at_end(Grader(cfg, clock.alive))
        # The sampler comes before the policy: vLLM measures the GPU's free memory when it starts.
        sampler = samplers.make(run.sampler_name, cfg, path, eos_ids, device, dtype)
        actor = Actor(sampler, tokenizer, grader)
        policy = build_policy(cfg, path, device)
        reference = build_policy(cfg, path, device, trainable=False) if cfg.kl_coef else None
        optimizer = torch.optim.AdamW(policy.parameters(), cfg.lr, weight_decay=0.0, fused=True)
        run.restore(policy, optimizer, sampler)
        sync_weights(sampler, policy, dtype)
        metrics = {}  # a finished run has no steps left

        for step in run.steps():  # step 0 only evaluates the initial model
            if step > run.step:  # after a resume, it may be trained already, but not evaluated
                with clock("step"):
                    responses, dropped, cursor = rollout(actor, train_set, run.cursor, cfg)
                    sampler.sleep()
                    rewards = shape_rewards(responses, cfg)
                    advantages = compute_advantages(rewards, cfg)  # TRICK 1
                    minibatches = make_minibatches(responses, advantages, step, cfg)  # TRICK 2
                    add_logprobs(policy, reference, minibatches, cfg)
                    stats = update(policy, optimizer, minibatches, step, cfg)
                    sync_weights(sampler, policy, dtype)
                run.end_step(cursor, responses, dropped, rewards, advantages, stats)
            metrics = dict(run.pending)
            if run.is_due(step, cfg.eval_every):
                metrics |= evaluate(actor, eval_sets, cfg, run)
            run.log_step(step, metrics)
            run.save_if_due(step)
        run.finish()
    return metrics


def main() -> int:
    return launch.main(Config, PRESETS, train)


if __name__ == "__main__":
    raise SystemExit(main())
