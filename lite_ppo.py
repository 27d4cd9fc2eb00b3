"""Lite PPO (arXiv 2508.08221): critic-free PPO for language models with exactly two tricks.

    trick 1    A_i = (r_i - mean of its group) / (std of all rewards of the step + eps)
    trick 2    L   = sum over all response tokens of l_it / number of those tokens
    where      l   = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)    rho = pi_theta / pi_old

There is no critic, no KL term, no overlong filter and no dynamic sampling; each is one flag away.
The formulas are pure functions in tricks.py. This file is everything else that learns, from top to
bottom: config, policy (FSDP2), rollout, advantages, the PPO update, evaluation, the training loop.
What a long run needs besides (data, graders, engines, checkpoints, logs) is in support/.

    torchrun lite_ppo.py                                  # a toy model; any machine, minutes
    torchrun --nproc-per-node 8 lite_ppo.py --model Qwen/Qwen3-4B-Base --train-data medium

One idea carries the whole file: in the loss of a token, everything but rho is a constant. The
advantage and the weight of every response are computed once per step, from all ranks, BEFORE
anything is split. A weighted sum does not care how it is split, so neither the number of ranks nor
the size of a micro-batch can change the gradient.
"""

import functools
import heapq
import math
from dataclasses import dataclass
from typing import Any, Iterator, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

import tricks
from support import guard, launch, models, samplers
from support.clock import clock
from support.data import Problem, load_sets
from support.logprobs import linear_logprobs
from support.metrics import UpdateStats, check_gap, eval_metrics
from support.rewards import Grader
from support.run import Run
from support.samplers import Sampling
from support.util import compute_device, compute_dtype, gather, permutation, seed_for

# ---- 1. config -----------------------------------------------------------------------------------


@dataclass
class Config:
    """Lite PPO. A flag wins over the preset, the preset over the defaults.

    Without --model it trains an embedded toy model.
    """

    # model and data
    preset: Literal["lite_ppo", "paper", "reinforce", "grpo", "dapo", "dr_grpo", "rloo"] = "lite_ppo"
    model: str = "toy"  # folder or hub id; toy[:SIZE][:VARIANT] is the embedded one (support/toy.py)
    train_data: str = ""  # FILE.jsonl, FILE.parquet, OWNER/NAME, the paper's easy|medium|hard, or toy
    eval_data: tuple[str, ...] = ()  # held-out sets: as above, or math500 aime24 aime25 amc23 ...
    system_prompt: str = r"Please reason step by step, and put your final answer within \boxed{}."
    reward: str = "math"  # math, exact, or FILE.py:FUNCTION
    reward_timeout: float = 10.0  # seconds per response, then its worker is killed: reward 0
    reward_workers: int = 0  # processes per rank; 0: CPU cores / ranks, at most 8
    reward_memory_gib: float = 4.0  # of one worker; 0: no limit
    max_failed_rewards: float = 0.5  # a larger share of responses without a verdict ends the run
    reward_low: float = 0.0  # reward of a wrong response
    reward_high: float = 1.0  # reward of a correct response
    # rollout
    prompts_per_step: int = 128  # N, over all ranks
    group_size: int = 8  # K responses to each prompt
    max_prompt_tokens: int = 1024  # longer training prompts are left out
    max_new_tokens: int = 8192  # a response that hits this limit is "truncated"
    temperature: float = 1.0  # of sampling and of the trained log-probs
    top_p: float = 1.0  # below 1, samples come from another distribution than the trained one
    top_k: int = 0  # 0: off; else the same bias
    # advantage: trick 1
    advantage_mean: Literal["group", "batch", "none", "leave_one_out"] = "group"
    advantage_std: Literal["group", "batch", "none"] = "batch"
    advantage_eps: float = 1e-6
    # loss: trick 2, and the options that the paper isolates
    loss_level: Literal["token", "sequence", "constant"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2  # above clip_low: "clip-higher" (DAPO: 0.28)
    dual_clip: float = 0.0  # 0: off
    kl_coef: float = 0.0  # weight of the k3 KL to the initial model; 0: no reference model in memory
    tis_cap: float = 0.0  # truncated importance sampling; 0: off
    overlong_filter: bool = False  # truncated responses leave the loss
    overlong_buffer: float = 0.0  # soft overlong punishment over this last share of max_new_tokens
    dynamic_sampling: bool = False  # replace groups that are all right or all wrong
    dynamic_rounds: int = 4  # rollouts per step for that, at most
    # optimizer
    steps: int = 500  # rollouts
    minibatches: int = 1  # optimizer steps per rollout; with 1 the ratio is 1 and nothing can clip
    lr: float = 1e-6  # AdamW; constant after the warm-up
    warmup_steps: int = 50
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_skipped_steps: int = 3  # rollouts in a row with a non-finite gradient that end the run
    # system
    seed: int = 42  # prompts, samples and shuffles are functions of (seed, step, prompt)
    sampler: Literal["auto", "vllm", "transformers"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 on GPUs
    micro_batch_tokens: int = 16384  # per rank; changes memory and speed, never the gradient
    activation_checkpointing: bool = True
    shard_ranks: int = 0  # ranks that share one copy of the model; 0: all
    cpu_offload: bool = False  # parameters, gradients and optimizer state live in host memory
    max_num_seqs: int = 256  # sequences that the sampler decodes at once, per rank
    gpu_memory_utilization: float = 0.6  # share of the GPU that vLLM takes while it samples
    max_logprob_gap: float = 0.0  # nats between sampler and trainer; 0: 1e-3 (float32), 0.1 (bf16)
    timeout_minutes: float = 30.0  # a phase without progress for so long ends the run
    # evaluation and logs
    eval_every: int = 20  # steps; also before the first and after the last one; 0: only those two
    eval_samples: int = 4  # responses per problem
    eval_pass_k: int = 4
    eval_size: int = 0  # only the first problems of each set; 0: all
    eval_temperature: float = 1.0
    output_dir: str = ""  # default: runs/MODEL-PRESET-seedSEED-TIME
    resume: str = "auto"  # from the newest checkpoint in --output-dir; never; or a checkpoint folder
    save_every: int = 0  # steps between checkpoints; 0: only the final model
    background_save: bool = True  # train on while a checkpoint is written
    keep_checkpoints: int = 2
    samples_per_step: int = 8  # responses per step written to samples.jsonl


PRESETS: dict[str, dict[str, Any]] = {
    "lite_ppo": {},
    "paper": dict(temperature=0.99, top_p=0.99, top_k=100),
    "reinforce": dict(advantage_mean="none", advantage_std="none", loss_level="sequence"),
    "grpo": dict(advantage_std="group", loss_level="sequence", kl_coef=0.04),
    "dapo": dict(advantage_std="group", clip_high=0.28, dynamic_sampling=True,
                 overlong_filter=True, overlong_buffer=0.2),
    "dr_grpo": dict(advantage_std="none", loss_level="constant"),
    "rloo": dict(advantage_mean="leave_one_out", advantage_std="none", loss_level="sequence"),
}  # fmt: skip


# ---- 2. policy: FSDP2, packed forward ------------------------------------------------------------


@dataclass
class Response:
    problem: Problem
    token_ids: np.ndarray
    logprobs: np.ndarray  # the sampler's
    truncated: bool
    text: str
    score: float  # what the reward function said
    failure: str = ""  # why it said nothing
    seconds: float = 0.0  # that the verdict took


@dataclass
class MicroBatch:
    """Sequences laid end to end in one row of T tokens, without padding.

    R of the tokens are response tokens; every field of the loss has one value for each of them.
    """

    token_ids: torch.Tensor  # [T] prompt and response, without the last token
    position_ids: torch.Tensor  # [T] restart at 0 with each sequence
    cu_seqlens: torch.Tensor  # [sequences + 1] int32, where each sequence starts
    lengths: list[int]  # of the sequences
    predict: torch.Tensor  # [R] positions in the row whose hidden state predicts a response token
    targets: torch.Tensor  # [R] the response tokens
    owner: torch.Tensor  # [R] index of the response in the step; -1 in a stand-in
    advantages: torch.Tensor  # [R]
    weights: torch.Tensor  # [R] of the token in the loss
    rollout_logprobs: torch.Tensor  # [R] the sampler's
    old_logprobs: torch.Tensor | None = None  # [R] the trainer's, before the update
    ref_logprobs: torch.Tensor | None = None  # [R] the initial model's


def make_micro_batch(responses, indices, advantages, weights, device) -> MicroBatch:
    """Pack some responses. Without any: a stand-in of one token and weight 0, since a rank that
    skips a backward pass would leave the others waiting."""
    parts = [(responses[i].problem.prompt_ids, responses[i].token_ids) for i in indices]
    logprobs = [responses[i].logprobs for i in indices]
    if not indices:
        indices, parts, logprobs = [-1], [([0], [0])], [[0.0]]
        advantages, weights = torch.zeros(1), torch.zeros(1)
    lengths = [len(prompt) + len(response) - 1 for prompt, response in parts]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    first = [start + len(prompt) - 1 for start, (prompt, _) in zip(starts, parts)]

    def tensor(arrays, dtype):
        return torch.from_numpy(np.concatenate(arrays).astype(dtype)).to(device)

    owner = tensor([np.full(len(response), i) for i, (_, response) in zip(indices, parts)], np.int64)
    return MicroBatch(
        token_ids=tensor([[*prompt, *response[:-1]] for prompt, response in parts], np.int64),
        position_ids=tensor([np.arange(n) for n in lengths], np.int64),
        cu_seqlens=tensor([starts], np.int32),
        lengths=lengths,
        predict=tensor([np.arange(a, b) for a, b in zip(first, starts[1:])], np.int64),
        targets=tensor([response for _, response in parts], np.int64),
        owner=owner,
        advantages=advantages.to(device)[owner],
        weights=weights.to(device)[owner],
        rollout_logprobs=tensor(logprobs, np.float32),
    )


def response_logprobs(model, batch: MicroBatch, temperature: float):
    """(log-prob, entropy) of each response token, both [R]."""
    hidden = model.base_model(
        input_ids=batch.token_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        pack=batch,  # reaches models.packed_attention
    ).last_hidden_state[0, batch.predict]
    head = model.get_output_embeddings().weight
    chunk = max(64, 2**26 // model.config.vocab_size)  # logits of 256 MiB exist at a time
    return linear_logprobs(hidden, head, batch.targets, temperature, chunk)


@clock("start")  # a phase tells the watchdog that start-up makes progress
def build_policy(cfg: Config, path: str, device: torch.device, trainable: bool = True):
    """The sharded model: float32 weights that compute in cfg.dtype."""
    world, copy = dist.get_world_size(), cfg.shard_ranks or dist.get_world_size()
    if copy < world:  # hybrid sharding: each row of the mesh holds one copy of the model
        mesh = dist.init_device_mesh(
            device.type, (world // copy, copy), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = dist.init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))

    def shard(model):
        if cfg.activation_checkpointing and trainable:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.response_logprobs = functools.partial(response_logprobs, model)
        options = dict(
            mesh=mesh,
            mp_policy=MixedPrecisionPolicy(compute_dtype(cfg), reduce_dtype=torch.float32),
            offload_policy=CPUOffloadPolicy() if cfg.cpu_offload else OffloadPolicy(),
            reshard_after_forward=True,
        )
        for block in model.base_model.layers:
            fully_shard(block, **options)
        fully_shard(model, **options)
        register_fsdp_forward_method(model, "response_logprobs")  # its hooks gather the weights

    home = torch.device("cpu") if cfg.cpu_offload else device
    model = models.build_model(path, torch.float32, "packed", home, shard)
    for module in model.modules():  # buffers are never offloaded
        module._buffers.update({name: b.to(device) for name, b in module._buffers.items()})
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(path))  # each rank reads its slices
    return model.train(trainable).requires_grad_(trainable)


def full_weights(model, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Stream the parameters, each gathered from its shards in turn. Every rank must exhaust it."""
    for name, parameter in model.state_dict().items():
        yield name, parameter.detach().to(dtype).full_tensor()


# ---- 3. rollout ----------------------------------------------------------------------------------


@clock("sync")
def sync_weights(sampler, policy, dtype: torch.dtype) -> None:
    sampler.load_weights(full_weights(policy, dtype))


def nth_problem(position: int, seed: int, size: int) -> int:
    """The stream of prompts: endless, and each epoch is a new shuffle."""
    epoch, offset = divmod(position, size)
    return permutation(size, seed, "epoch", epoch)[offset]


def sample(sampler, grader, tokenizer, problems, seeds, sampling, cfg) -> list[Response]:
    """sampling.n graded responses to each problem, in order: the same list on every rank."""
    mine = range(dist.get_rank(), len(problems), dist.get_world_size())
    prompts = [problems[i].prompt_ids for i in mine]
    with clock("rollout"):
        groups = guard.interruptible(sampler.generate, prompts, [seeds[i] for i in mine], sampling)
    with clock("reward"):
        drafts = [(i, draft) for i, group in zip(mine, groups or []) for draft in group]
        rows = [problems[i].row for i, _ in drafts]
        texts = [tokenizer.decode(d.token_ids.tolist(), skip_special_tokens=True) for _, d in drafts]
        verdicts = guard.interruptible(grader, texts, rows)
        guard.leave_together()  # a signal to any rank ends the step here, on all of them
        graded = gather([(i, *d, t, *v) for (i, d), t, v in zip(drafts, texts, verdicts)])
        graded.sort(key=lambda item: item[0])
        responses = [Response(problems[i], *rest) for i, *rest in graded]
    guard.check_failures(responses, cfg.max_failed_rewards)
    return responses


def rollout(sampler, grader, tokenizer, train_set, cursor, cfg) -> tuple[list[Response], int]:
    """The N * K responses of a step, group by group, and the new place in the stream of prompts."""
    N, K = cfg.prompts_per_step, cfg.group_size
    sampling = Sampling(K, cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.top_k)
    kept, spare = [], []  # groups of K responses
    for _ in range(cfg.dynamic_rounds if cfg.dynamic_sampling else 1):
        places = range(cursor, cursor + N)
        problems = [train_set[nth_problem(i, cfg.seed, len(train_set))] for i in places]
        seeds = [seed_for(cfg.seed, "sample", i) for i in places]
        responses = sample(sampler, grader, tokenizer, problems, seeds, sampling, cfg)
        cursor += N
        scores = torch.tensor([r.score for r in responses]).view(N, K)
        for i, informative in enumerate(tricks.informative_groups(scores)):
            group = responses[i * K : (i + 1) * K]
            (kept if informative or not cfg.dynamic_sampling else spare).append(group)
        if len(kept) >= N:
            break
    return [r for group in (kept + spare)[:N] for r in group], cursor


# ---- 4. the PPO step -----------------------------------------------------------------------------


def shape_rewards(responses: list[Response], cfg: Config) -> torch.Tensor:
    """Scores -> rewards [N, K]; all shaping happens before any normalisation."""
    scores = torch.tensor([r.score for r in responses])
    rewards = tricks.scale_reward(scores, cfg.reward_low, cfg.reward_high)
    if cfg.overlong_buffer:
        lengths = torch.tensor([len(r.token_ids) for r in responses])
        buffer = math.ceil(cfg.overlong_buffer * cfg.max_new_tokens)
        rewards = rewards + tricks.soft_overlong_penalty(lengths, cfg.max_new_tokens, buffer)
    return rewards.view(-1, cfg.group_size)


def compute_advantages(rewards: torch.Tensor, cfg: Config) -> torch.Tensor:
    """Rewards [N, K] of the whole step, all ranks -> advantages [N, K]."""
    if cfg.advantage_mean == "leave_one_out":
        return tricks.leave_one_out_advantages(rewards)
    # LITE PPO, TRICK 1: the mean of the group, the standard deviation of the batch
    return tricks.normalize_advantages(
        rewards, mean=cfg.advantage_mean, std=cfg.advantage_std, eps=cfg.advantage_eps)


def plan_micro_batches(lengths: list[int], budget: int, world: int) -> list[list[list[int]]]:
    """Split sequences into micro-batches of at most `budget` tokens: plan[rank][i] = indices.

    Longest first, each into the emptiest micro-batch. Every rank gets the same number of them,
    some possibly empty; a sequence above the budget is a micro-batch of its own.
    """
    count = max(1, math.ceil(min(sum(lengths) / budget, len(lengths)) / world))
    while True:
        heap = [(0, i) for i in range(count * world)]
        bins: list[list[int]] = [[] for _ in heap]
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            load, b = heapq.heappop(heap)
            bins[b].append(i)
            heapq.heappush(heap, (load + lengths[i], b))
        if max(heap)[0] <= max([budget, *lengths]):
            return [bins[rank::world] for rank in range(world)]
        count += 1


def make_minibatches(responses, advantages, step: int, cfg: Config) -> list[list[MicroBatch]]:
    """Shuffle the step, split it into optimizer steps, and each into this rank's micro-batches.

    Weights are fixed here, from the lengths of the whole mini-batch on all ranks.
    """
    advantages = advantages.flatten()
    order = torch.tensor(permutation(len(responses), cfg.seed, "minibatches", step))
    minibatches = []
    for members in order.tensor_split(cfg.minibatches):
        chosen = [responses[i] for i in members]
        lengths = torch.tensor([len(r.token_ids) for r in chosen])
        keep = ~torch.tensor([r.truncated for r in chosen]) if cfg.overlong_filter else None
        # LITE PPO, TRICK 2: every token of the mini-batch weighs the same, whoever holds it
        weights = torch.zeros(len(responses))
        weights[members] = tricks.loss_weights(lengths, cfg.loss_level, keep, cfg.max_new_tokens)

        sizes = [len(r.problem.prompt_ids) + len(r.token_ids) - 1 for r in chosen]
        plan = plan_micro_batches(sizes, cfg.micro_batch_tokens, dist.get_world_size())
        minibatches.append([
            make_micro_batch(responses, members[indices].tolist(), advantages, weights, compute_device())
            for indices in plan[dist.get_rank()]
        ])  # fmt: skip
    return minibatches


def token_losses(logprobs: torch.Tensor, batch: MicroBatch, cfg: Config) -> torch.Tensor:
    """The PPO loss of each response token, [R]; the plain one and three options."""
    losses = tricks.clipped_surrogate(
        logprobs, batch.old_logprobs, batch.advantages, cfg.clip_low, cfg.clip_high, cfg.dual_clip or None)
    if cfg.tis_cap:
        losses = losses * tricks.truncated_importance_weights(
            batch.old_logprobs, batch.rollout_logprobs, cfg.tis_cap)
    if cfg.kl_coef:
        losses = losses + cfg.kl_coef * tricks.kl_estimate(logprobs, batch.ref_logprobs)
    return losses


@clock("logprobs")
@torch.no_grad()
def add_logprobs(policy, reference, minibatches, cfg: Config) -> None:
    """Old log-probs, and the reference model's where there is a KL term.

    The first mini-batch needs no pass for its old ones: its weights are still those that sampled,
    so update() takes them from its own forward pass.
    """
    for m, micro_batches in enumerate(minibatches):
        for batch in micro_batches:
            if m > 0:
                batch.old_logprobs, _ = policy.response_logprobs(batch, cfg.temperature)
            if cfg.kl_coef:
                batch.ref_logprobs, _ = reference.response_logprobs(batch, cfg.temperature)


@clock("update")
def update(policy, optimizer, minibatches, step: int, cfg: Config) -> UpdateStats:
    """One pass over a rollout: an optimizer step per mini-batch."""
    world, stats = dist.get_world_size(), UpdateStats(cfg, policy.config.vocab_size)
    for group in optimizer.param_groups:
        group["lr"] = cfg.lr * min(1.0, step / max(1, cfg.warmup_steps))

    for m, micro_batches in enumerate(minibatches):
        for batch in micro_batches:
            # Hybrid sharding: the copies exchange the sum of all micro-batches, not every term.
            policy.set_requires_all_reduce(batch is micro_batches[-1])
            logprobs, entropy = policy.response_logprobs(batch, cfg.temperature)
            if batch.old_logprobs is None:
                batch.old_logprobs = logprobs.detach()
            losses = token_losses(logprobs, batch, cfg)
            loss = (batch.weights * losses).sum()
            (loss * world).backward()  # FSDP averages over ranks; the objective is their sum
            stats.add(batch, logprobs, entropy, losses, loss)
            clock.tick()
        if m == 0:  # the weights have not moved yet: were the responses sampled from them?
            stats.metrics |= check_gap([b for part in minibatches for b in part], cfg)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm).full_tensor()
        if norm.isfinite():  # of all ranks, so that they skip together
            optimizer.step()
        optimizer.zero_grad()
        stats.norms.append(norm)
    return stats


# ---- 5. evaluation -------------------------------------------------------------------------------


def evaluate(sampler, grader, tokenizer, sets, cfg: Config, run=None) -> dict[str, float]:
    """Accuracy with its interval, and pass@k, for each held-out set.

    The seeds are the same at every evaluation: differences come from the model.
    """
    metrics = {}
    for name, problems in sets.items():
        seeds = [seed_for(cfg.seed, "eval", name, i) for i in range(len(problems))]
        sampling = Sampling(cfg.eval_samples, cfg.max_new_tokens, cfg.eval_temperature)
        responses = sample(sampler, grader, tokenizer, problems, seeds, sampling, cfg)
        found = eval_metrics(responses, len(problems), cfg.eval_pass_k)
        metrics |= {f"eval/{name}/{key}": value for key, value in found.items()}
        if run:
            run.tell_evaluation(name, found, responses)
    return metrics


# ---- 6. the loop ---------------------------------------------------------------------------------


def train(cfg: Config) -> dict[str, float]:
    """The whole run. Returns the metrics of the last step."""
    device, dtype = compute_device(), compute_dtype(cfg)
    path = models.resolve_model(cfg.model)
    tokenizer, eos_ids = models.load_tokenizer(path, cfg.max_prompt_tokens + cfg.max_new_tokens)
    train_set, eval_sets, left_out = load_sets(tokenizer, cfg)

    with Run(cfg, path, train_set, left_out) as run:  # folder, logs, checkpoints, signals
        grader = run.close_at_end(Grader(cfg))
        # The sampler before the policy: vLLM measures the GPU's free memory when it starts.
        sampler = samplers.make(run.sampler, cfg, path, eos_ids, device, dtype)
        policy = build_policy(cfg, path, device)
        reference = build_policy(cfg, path, device, trainable=False) if cfg.kl_coef else None
        optimizer = torch.optim.AdamW(
            policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
        run.restore(policy, optimizer, sampler)
        sync_weights(sampler, policy, dtype)

        for step in run.steps():  # step 0 is the model as it came: only evaluated
            if step > run.step:
                with clock("step"):
                    responses, cursor = rollout(sampler, grader, tokenizer, train_set, run.cursor, cfg)
                    sampler.sleep()
                    rewards = shape_rewards(responses, cfg)
                    advantages = compute_advantages(rewards, cfg)  # TRICK 1
                    minibatches = make_minibatches(responses, advantages, step, cfg)  # TRICK 2
                    add_logprobs(policy, reference, minibatches, cfg)
                    stats = update(policy, optimizer, minibatches, step, cfg)
                    sync_weights(sampler, policy, dtype)
                run.end_step(step, cursor, responses, rewards, advantages, stats, tokenizer)
            metrics = dict(run.pending)
            if run.is_due(step, cfg.eval_every):
                metrics |= evaluate(sampler, grader, tokenizer, eval_sets, cfg, run)
            run.log_step(step, metrics)
            if cfg.save_every and step and run.is_due(step, cfg.save_every):
                run.save()
        run.finish(tokenizer, eval_sets)
    return metrics


def main() -> int:
    return launch.main(Config, PRESETS, train)


if __name__ == "__main__":
    raise SystemExit(main())
