"""Lite PPO (arXiv 2508.08221): critic-free PPO with exactly two tricks.

    1. advantage     A_i = (r_i - mean of its group) / (std of the raw rewards of the whole step + eps)
    2. aggregation   L   = sum over all response tokens of l(rho_it, A_i) / number of those tokens
       with          l   = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A),   rho = pi_theta / pi_old

Absent on purpose: critic, KL term, overlong filter, dynamic sampling, length penalty. Each is one flag away (tricks.py).

Everything in the objective but rho is a constant per token, computed once, before anything is split over micro-batches
and ranks: the advantage from all rewards of the step, the loss weight of a response from all lengths of its mini-batch.
A weighted sum does not care how it is split, so every split gives the same gradient.

    python lite_ppo.py                                             # a toy, on any machine, in minutes
    torchrun --nproc-per-node 8 lite_ppo.py --model Qwen/Qwen3-4B-Base --train-data train.jsonl --eval-data math500.jsonl
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 lite_ppo.py ...

Map:  1 config   2 policy (FSDP2, packed forward)   3 rollout   4 PPO step   5 evaluation   6 the loop
      tricks.py: every formula   data.py: problems   rewards.py: graders   samplers.py: vLLM and transformers
      rundir.py: logs, checkpoints   guard.py: clock, watchdog, signals   toy.py: the toy
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import heapq
import inspect
import math
import os
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Iterator, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import tyro
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method
from tqdm import tqdm

import samplers  # first: it puts broken companions of torch out of the way
import guard
import toy
import tricks
from data import Problem, UserError, load_problems
from guard import Clock, RunError, Signals, Stopped
from rewards import Grader, load_reward, reward_id
from rundir import Checkpoints, Log, Position, check_space, find_checkpoint, load_checkpoint, open_folder, rollout_metrics, save_model
from samplers import Sampling, build_model


# ---- 1. config -------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Lite PPO: critic-free PPO with group-mean / batch-std advantages and a token-level loss (arXiv 2508.08221).

    Without --model it trains an embedded toy model in minutes. A flag wins over the preset, the preset over the defaults.
    """

    # model and data
    preset: Literal["lite_ppo", "paper", "reinforce", "grpo", "dapo", "dr_grpo", "rloo"] = "lite_ppo"  # a bundle of flags
    model: str = "toy"  # folder or hub id of a Hugging Face causal language model; toy[:SIZE][:VARIANT] = the embedded one, see toy.py
    train_data: str = ""  # JSONL or Parquet file, hub set OWNER/NAME[:CONFIG][@SPLIT], the paper's easy|medium|hard, or toy[:easy|medium|hard]
    eval_data: tuple[str, ...] = ()  # held-out sets, any number: as above, math500 aime24 aime25 amc23 minerva olympiadbench gsm8k, or NAME=SET
    system_prompt: str = r"Please reason step by step, and put your final answer within \boxed{}."  # the paper's; "" = none
    reward: str = "math"  # math (last \boxed{}, checked by math-verify), exact (last \boxed{} or last line), or FILE.py:FUNCTION
    reward_timeout: float = 10.0  # seconds for one response; then its worker is killed and replaced, and the reward is 0
    reward_workers: int = 0  # worker processes per rank; 0 = CPU cores / ranks of this machine, at most 8
    reward_memory_gib: float = 4.0  # memory of one worker beyond what it starts with; 0 = no limit
    max_failed_rewards: float = 0.5  # a step in which a larger share of the responses gets no verdict ends the run
    reward_low: float = 0.0  # reward of a wrong response; {-1, 1} gives the same advantages unless both mean and std are off
    reward_high: float = 1.0  # reward of a correct response
    # rollout
    prompts_per_step: int = 128  # N, over all ranks; the paper: 128
    group_size: int = 8  # K responses per prompt; the paper: 8
    max_prompt_tokens: int = 1024  # longer training prompts are left out, and counted on the console
    max_new_tokens: int = 8192  # response limit; a response that hits it is "truncated", and still trained on by default
    temperature: float = 1.0  # of sampling AND of the trained log-probs
    top_p: float = 1.0  # below 1 the samples come from another distribution than the trained one (bias; a warning says so)
    top_k: int = 0  # 0 = off; else the same bias as top_p
    # advantage: trick 1
    advantage_mean: Literal["group", "batch", "none", "leave_one_out"] = "group"  # what is subtracted from a reward
    advantage_std: Literal["group", "batch", "none"] = "batch"  # what it is divided by: std (ddof 1) of the raw rewards
    advantage_eps: float = 1e-6  # added to the std
    # loss: trick 2, and the options that the paper isolates
    loss_level: Literal["token", "sequence", "constant"] = "token"  # mean over tokens, over responses, or sum / max_new_tokens
    clip_low: float = 0.2  # the ratio may fall to 1 - clip_low
    clip_high: float = 0.2  # the ratio may rise to 1 + clip_high; above clip_low = "clip-higher" (DAPO: 0.28)
    dual_clip: float = 0.0  # bound of the loss where the advantage is negative, as a ratio above 1; 0 = off
    kl_coef: float = 0.0  # weight of the k3 KL to the initial model, per token; 0 = no reference model in memory
    tis_cap: float = 0.0  # truncated importance sampling: weight min(pi_trainer / pi_sampler, cap); 0 = off
    overlong_filter: bool = False  # truncated responses leave the loss (their reward still counts in mean and std)
    overlong_buffer: float = 0.0  # soft overlong punishment: the last share of max_new_tokens costs up to 1; DAPO: 0.2
    dynamic_sampling: bool = False  # groups that are all right or all wrong are replaced by further prompts (DAPO)
    dynamic_rounds: int = 4  # at most so many rollouts per step for that; then such groups fill up the step
    # optimizer
    steps: int = 500  # rollouts
    minibatches: int = 1  # optimizer steps per rollout; with 1 the ratio is 1 and nothing can clip
    lr: float = 1e-6  # AdamW; constant after the warm-up
    warmup_steps: int = 50  # rollouts over which lr rises linearly from 0
    weight_decay: float = 0.0  # AdamW, decoupled
    max_grad_norm: float = 1.0  # the gradient norm over all ranks is clipped to this
    max_skipped_steps: int = 3  # so many rollouts in a row with an optimizer step skipped for a non-finite gradient end the run
    # system
    seed: int = 42  # prompts, samples and shuffles are functions of (seed, step, prompt)
    sampler: Literal["auto", "vllm", "transformers"] = "auto"  # auto: vllm where it runs, else transformers; the reason is printed
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of compute and sampler; auto: bfloat16 on GPUs, float32 on CPUs
    micro_batch_tokens: int = 16384  # tokens of one forward/backward per rank; changes memory and speed, never the gradient
    activation_checkpointing: bool = True  # recompute each block in the backward pass: less memory, about a third more time
    shard_ranks: int = 0  # ranks that hold one copy of the model between them; 0 = all; 8 = one per machine of 8 (hybrid sharding)
    cpu_offload: bool = False  # parameters, gradients and optimizer state live in host memory
    max_num_seqs: int = 256  # sequences that the sampler decodes at once, per rank
    gpu_memory_utilization: float = 0.6  # share of the GPU's memory that vLLM takes while it samples
    tensor_parallel_size: int = 1  # ranks that share one vLLM engine; must divide the number of ranks
    max_logprob_gap: float = 0.0  # stop when sampler and trainer differ by more nats per token on average; 0 = 1e-3 (float32), 0.1 (bfloat16)
    timeout_minutes: float = 30.0  # a phase without progress for so long ends the run, naming rank and phase
    # evaluation and logs
    eval_every: int = 20  # steps; also before the first and after the last one; 0 = only those two
    eval_samples: int = 4  # responses per problem; accuracy is their mean
    eval_pass_k: int = 4  # k of pass@k, estimated without bias from eval_samples responses
    eval_size: int = 0  # only the first so many problems of each set; 0 = all
    eval_temperature: float = 1.0  # 0 = greedy
    output_dir: str = ""  # default: runs/MODEL-PRESET-seedSEED-TIME
    resume: str = "auto"  # auto: from the newest checkpoint in --output-dir, if any; never; or the folder of a checkpoint
    save_every: int = 0  # steps between checkpoints; 0 = the final model, and a checkpoint when SIGTERM or SIGINT ends the run
    background_save: bool = True  # train on while a checkpoint is written; takes its size in host memory
    keep_checkpoints: int = 2  # older ones are deleted
    samples_per_step: int = 8  # responses per step written to samples.jsonl


PRESETS: dict[str, dict[str, Any]] = {
    "lite_ppo": {},
    "paper": dict(temperature=0.99, top_p=0.99, top_k=100),  # the paper's sampling, with the bias that top-p and top-k bring
    "reinforce": dict(advantage_mean="none", advantage_std="none", loss_level="sequence"),
    "grpo": dict(advantage_std="group", loss_level="sequence", kl_coef=0.04),
    "dapo": dict(advantage_std="group", clip_high=0.28, dynamic_sampling=True, overlong_filter=True, overlong_buffer=0.2),
    "dr_grpo": dict(advantage_std="none", loss_level="constant"),
    "rloo": dict(advantage_mean="leave_one_out", advantage_std="none", loss_level="sequence"),
}

# What suits a model of half a million parameters; replaces the defaults above when --model is a toy.
TOY: dict[str, Any] = dict(
    train_data="toy:medium", eval_data=("toy:medium:test",), prompts_per_step=32, max_prompt_tokens=64, max_new_tokens=96, steps=60, minibatches=2,
    lr=5e-4, warmup_steps=5, eval_size=200, activation_checkpointing=False, samples_per_step=2,
)  # fmt: skip

AT_LEAST = {  # lowest legal value of each number
    1: "prompts_per_step max_prompt_tokens max_new_tokens steps minibatches micro_batch_tokens max_num_seqs eval_samples eval_pass_k dynamic_rounds "
       "tensor_parallel_size keep_checkpoints group_size max_skipped_steps",
    0: "seed top_k lr warmup_steps weight_decay kl_coef tis_cap clip_low clip_high advantage_eps eval_every eval_size save_every samples_per_step "
       "reward_workers eval_temperature max_logprob_gap overlong_buffer shard_ranks reward_memory_gib max_failed_rewards dual_clip",
    1e-9: "temperature top_p max_grad_norm reward_timeout timeout_minutes gpu_memory_utilization",
}  # fmt: skip


def parse_config(args: list[str] | None = None) -> Config:
    """Command line -> Config: defaults < settings of the toy (if --model is one) < preset < flags."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--model", nargs="?", default="toy")
    early.add_argument("--preset", nargs="?", default="lite_ppo")
    known, _ = early.parse_known_args(args)
    settings = (TOY if is_toy(known.model or "") else {}) | PRESETS.get(known.preset, {})
    # Rank 0 speaks for all of them.
    cfg = tyro.cli(Config, args=args, default=Config(**settings), prog="lite_ppo.py", console_outputs=env("RANK", 0) == 0)
    check_config(cfg, env("WORLD_SIZE", 1))
    return cfg


def check_config(cfg: Config, world: int) -> None:
    """Impossible values and contradictions end here, before anything is loaded."""

    def need(ok: bool, flag: str, remedy: str) -> None:
        if not ok:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(cfg, flag)}: {remedy}")

    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        need(not isinstance(value, (int, float)) or abs(value) <= 2**31, field.name, "must be a finite number, at most 2^31 in size")
    for bound, flags in AT_LEAST.items():
        for flag in flags.split():
            need(getattr(cfg, flag) >= bound, flag, "must be positive" if 0 < bound < 1 else f"must be at least {bound}")
    for flag in ("top_p", "clip_low", "overlong_buffer", "gpu_memory_utilization"):
        need(getattr(cfg, flag) <= 1, flag, "must be at most 1")
    need(cfg.dual_clip == 0 or cfg.dual_clip > 1, "dual_clip", "must be above 1, or 0 = off")
    need(cfg.reward_high > cfg.reward_low, "reward_high", f"must be above --reward-low {cfg.reward_low}")
    grouped = cfg.advantage_mean in ("group", "leave_one_out") or cfg.advantage_std == "group"
    need(cfg.group_size > 1 or not grouped, "group_size", "a group mean or std needs at least 2 responses per prompt")
    need(cfg.advantage_mean != "leave_one_out" or cfg.advantage_std == "none", "advantage_std", "--advantage-mean leave_one_out takes none")
    need(cfg.prompts_per_step * cfg.group_size >= max(2, cfg.minibatches), "minibatches", "more of them than responses per step")
    need(cfg.eval_pass_k <= cfg.eval_samples, "eval_pass_k", f"needs at least as many --eval-samples (now {cfg.eval_samples})")
    need(world % cfg.tensor_parallel_size == 0, "tensor_parallel_size", f"must divide the number of ranks, {world}")
    need(cfg.shard_ranks == 0 or world % cfg.shard_ranks == 0, "shard_ranks", f"must divide the number of ranks, {world}")
    need(cfg.prompts_per_step * cfg.group_size <= 2**20, "prompts_per_step", f"times --group-size {cfg.group_size} is more than 2^20 responses per step")
    need(torch.cuda.is_available() or not cfg.cpu_offload, "cpu_offload", "there is no GPU to unload; leave it out")
    need(cfg.train_data != "", "train_data", "missing; give a JSONL file with a problem and an answer per line, easy, medium, hard, or a hub set")
    load_reward(cfg.reward)


def env(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def is_toy(name: str) -> bool:
    return name.split(":")[0] == "toy"


def seed_for(*key: Any) -> int:
    """A 48-bit seed that depends on the key alone: a resumed run needs no state of a random generator."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=6).digest(), "big")


@functools.lru_cache(maxsize=2)
def permutation(size: int, *key: Any) -> list[int]:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed_for(*key))).tolist()


# ---- 2. policy: FSDP2, packed forward --------------------------------------------------------------------------------


@dataclass
class Pack:
    """A micro-batch: sequences laid end to end in one row of T tokens, no padding; R of them predict a response token."""

    token_ids: torch.Tensor  # [T] prompt and response, without the last token, which predicts nothing
    position_ids: torch.Tensor  # [T] restart at 0 with each sequence
    cu_seqlens: torch.Tensor  # [sequences + 1] int32, where each sequence starts
    max_seqlen: int
    lengths: list[int]  # of the sequences
    predict: torch.Tensor  # [R] where in the row the hidden states that predict response tokens are
    targets: torch.Tensor  # [R] the response tokens
    owner: torch.Tensor  # [R] index of the response in the step; -1 = stand-in
    rollout_logprobs: torch.Tensor  # [R] the sampler's
    old_logprobs: torch.Tensor | None = None  # [R] the trainer's, under the weights that sampled
    ref_logprobs: torch.Tensor | None = None  # [R] the initial model's


def make_pack(responses: list["Response"], indices: list[int], device: torch.device) -> Pack:
    """Pack the named responses. Without any, a stand-in of one token: a rank that skips a backward would hang the others."""
    parts = [(responses[i].problem.prompt_ids, responses[i].token_ids, responses[i].logprobs) for i in indices] or [([0], [0], [0.0])]
    lengths = [len(prompt) + len(tokens) - 1 for prompt, tokens, _ in parts]
    starts, longest = np.concatenate([[0], np.cumsum(lengths)]), max(lengths)
    position_ids = np.concatenate([np.arange(n) for n in lengths])

    def tensor(arrays, dtype):
        return torch.from_numpy(np.concatenate(arrays).astype(dtype)).to(device)

    return Pack(
        token_ids=tensor([[*prompt, *tokens[:-1]] for prompt, tokens, _ in parts], np.int64),
        position_ids=tensor([position_ids], np.int64),
        cu_seqlens=tensor([starts], np.int32),
        max_seqlen=longest,
        lengths=lengths,
        predict=tensor([np.arange(s + len(prompt) - 1, s + n) for s, n, (prompt, _, _) in zip(starts, lengths, parts)], np.int64),
        targets=tensor([tokens for _, tokens, _ in parts], np.int64),
        owner=tensor([np.full(len(tokens), i) for i, (_, tokens, _) in zip(indices or [-1], parts)], np.int64),
        rollout_logprobs=tensor([logprobs for _, _, logprobs in parts], np.float32),
    )


def packed_attention(module, query, key, value, attention_mask, scaling=None, pack: Pack | None = None, **kwargs):
    """Causal attention within each sequence of a pack: query [1, H, T, D], key and value [1, H_kv, T, D] -> [1, T, H, D].

    On GPUs one kernel takes the lengths (not yet run on one). On CPUs each sequence has a call of its own, which is faster than padding them here
    and calling once (benchmarks/packing.py).
    """
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, D]
        cu, longest = pack.cu_seqlens, pack.max_seqlen
        grouped = dict(enable_gqa=True) if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
        if not grouped:  # torch 2.11
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        return varlen_attn(query, key, value, cu, cu, longest, longest, scale=scaling, window_size=(-1, 0), **grouped)[None], None
    each = zip(*(x.split(pack.lengths, 2) for x in (query, key, value)))
    out = [F.scaled_dot_product_attention(*qkv, is_causal=True, scale=scaling, enable_gqa=True) for qkv in each]
    return torch.cat(out, 2).transpose(1, 2), None


def response_logprobs(model, pack: Pack, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob and entropy [R] of the response tokens. A method of the model, so that FSDP's hooks gather its weights."""
    out = model.base_model(input_ids=pack.token_ids[None], position_ids=pack.position_ids[None], use_cache=False, pack=pack)
    chunk = max(64, 2**26 // model.config.vocab_size)  # tokens whose logits exist at a time: 256 MiB in float32
    head = model.get_output_embeddings().weight
    return tricks.linear_logprobs(out.last_hidden_state[0, pack.predict], head, pack.targets, temperature, chunk)


def build_policy(cfg: Config, path: str, device: torch.device, trainable: bool = True):
    """The sharded model, float32 weights computing in cfg.dtype, with a method response_logprobs(pack, temperature)."""
    from transformers import AttentionInterface

    AttentionInterface.register("packed", packed_attention)
    # Hybrid sharding: a row of the mesh holds one copy of the model; gradients are averaged over rows and columns.
    columns, world = cfg.shard_ranks or dist.get_world_size(), dist.get_world_size()
    shape, names = ((world // columns, columns), ("replicate", "shard")) if columns < world else ((world,), ("shard",))
    mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=names)

    def shard(model):
        if cfg.activation_checkpointing and trainable:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.response_logprobs = functools.partial(response_logprobs, model)
        options = dict(
            mesh=mesh,
            mp_policy=MixedPrecisionPolicy(param_dtype=compute_dtype(cfg), reduce_dtype=torch.float32),
            offload_policy=CPUOffloadPolicy() if cfg.cpu_offload else OffloadPolicy(),
            reshard_after_forward=True,  # on the root too: else its parameters stay gathered after a forward without backward
        )
        for block in model.base_model.layers:
            fully_shard(block, **options)
        fully_shard(model, **options)
        register_fsdp_forward_method(model, "response_logprobs")

    model = build_model(path, torch.float32, "packed", torch.device("cpu") if cfg.cpu_offload else device, shard)
    for module in model.modules():  # buffers are never offloaded
        module._buffers.update({name: buffer.to(device) for name, buffer in module._buffers.items()})
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(path))  # each rank reads its slices, cast to float32
    return model.train(trainable).requires_grad_(trainable)


def compute_dtype(cfg: Config) -> torch.dtype:
    return getattr(torch, cfg.dtype if cfg.dtype != "auto" else "bfloat16" if torch.cuda.is_available() else "float32")


def full_weights(model, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Stream the parameters by name, each gathered from its shards when its turn comes. Every rank must exhaust it."""
    for name, parameter in model.state_dict().items():  # also lm_head.weight where it is tied: vLLM on CPUs keeps a copy of it
        yield name, parameter.detach().to(dtype).full_tensor()


# ---- 3. rollout ------------------------------------------------------------------------------------------------------


NOT_FINITE = "its loss is not finite"


@dataclass
class Response:
    problem: Problem
    token_ids: np.ndarray  # these three: see Sample
    logprobs: np.ndarray
    truncated: bool
    text: str
    score: float  # what the reward function said
    failure: str  # why it said nothing
    seconds: float = 0.0  # that the verdict took


def nth_problem(position: int, seed: int, size: int) -> int:
    """Index of the `position`-th problem of an endless stream in which each epoch is a new shuffle."""
    epoch, offset = divmod(position, size)
    return permutation(size, seed, "epoch", epoch)[offset]


def gather(items: list[Any]) -> list[Any]:
    """The lists of all ranks, one after the other, the same on every rank."""
    if dist.get_world_size() == 1:
        return items  # gloo would copy them in a thread of its own, whose OpenMP threads then slow down all others on a small CPU
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def sample(sampler, grader, tokenizer, problems: list[Problem], seeds: list[int], sampling: Sampling, cfg: Config, clock) -> list[Response]:
    """n graded responses to each problem, in order; the work is spread over the ranks, the result the same on all."""
    engine, engines = dist.get_rank() // cfg.tensor_parallel_size, dist.get_world_size() // cfg.tensor_parallel_size
    mine = range(engine, len(problems), engines)
    with clock("rollout"):
        work = lambda: sampler.generate([problems[i].prompt_ids for i in mine], [seeds[i] for i in mine], sampling)  # noqa: E731
        alone = cfg.tensor_parallel_size == 1  # else ranks meet in the engine, and none may leave the others there
        samples = (guard.interruptible(work, []) if alone else work()) if mine else []
        if dist.get_rank() % cfg.tensor_parallel_size:
            samples = []  # the first rank of this engine speaks for it
    with clock("reward"):
        pairs = [(i, s, tokenizer.decode(s.token_ids.tolist(), skip_special_tokens=True)) for i, group in zip(mine, samples) for s in group]
        verdicts = guard.interruptible(lambda: grader([text for _, _, text in pairs], [problems[i].row for i, _, _ in pairs]), [])
        graded = [(i, *s, text, *verdict, took) for (i, s, text), verdict, took in zip(pairs, verdicts, grader.seconds)]
        if any(gather([Signals.received])):  # on any rank: all leave here, together
            raise Stopped
        responses = [Response(problems[i], *rest) for i, *rest in sorted(gather(graded), key=lambda r: r[0])]
    failures = [r.failure for r in responses if r.failure]
    if len(failures) > cfg.max_failed_rewards * len(responses):
        raise RunError(
            f"{len(failures)} of {len(responses)} responses got no verdict, more than --max-failed-rewards {cfg.max_failed_rewards:g}; "
            f"most often: {max(set(failures), key=failures.count)}"
        )
    return responses


def rollout(sampler, grader, tokenizer, train_set: list[Problem], cursor: int, cfg: Config, clock) -> tuple[list[Response], int]:
    """The N * K responses of a step, group by group, and where the stream of prompts stands afterwards.

    Dynamic sampling judges a group by what the reward function said, before any scaling or penalty. If too few groups
    are informative after dynamic_rounds rollouts, others fill up the step.
    """
    N, K = cfg.prompts_per_step, cfg.group_size
    sampling = Sampling(K, cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.top_k)
    kept, spare = [], []  # groups of K responses
    for _ in range(cfg.dynamic_rounds if cfg.dynamic_sampling else 1):
        problems = [train_set[nth_problem(i, cfg.seed, len(train_set))] for i in range(cursor, cursor + N)]
        seeds = [seed_for(cfg.seed, "sample", i) for i in range(cursor, cursor + N)]
        responses = sample(sampler, grader, tokenizer, problems, seeds, sampling, cfg, clock)
        cursor += N
        informative = tricks.informative_groups(torch.tensor([r.score for r in responses]).view(N, K))
        for i in range(N):
            (kept if informative[i] or not cfg.dynamic_sampling else spare).append(responses[i * K : i * K + K])
        if len(kept) >= N:
            break
    return [r for group in (kept + spare)[:N] for r in group], cursor


# ---- 4. PPO step -----------------------------------------------------------------------------------------------------


def shape_rewards(responses: list[Response], cfg: Config) -> torch.Tensor:
    """Scores -> rewards [N, K]: scaled, then the soft overlong punishment; all of it before any normalisation."""
    rewards = tricks.scale_reward(torch.tensor([r.score for r in responses]), cfg.reward_low, cfg.reward_high)
    if cfg.overlong_buffer:
        lengths, buffer = torch.tensor([len(r.token_ids) for r in responses]), math.ceil(cfg.overlong_buffer * cfg.max_new_tokens)
        rewards = rewards + tricks.soft_overlong_penalty(lengths, cfg.max_new_tokens, buffer)
    return rewards.view(-1, cfg.group_size)


def compute_advantages(rewards: torch.Tensor, cfg: Config) -> torch.Tensor:
    """Rewards [N, K] of the whole step, all ranks -> advantages [N, K]."""
    if cfg.advantage_mean == "leave_one_out":
        return tricks.leave_one_out_advantages(rewards)
    # LITE PPO, TRICK 1: the mean of the group, the standard deviation of the batch
    return tricks.normalize_advantages(rewards, mean=cfg.advantage_mean, std=cfg.advantage_std, eps=cfg.advantage_eps)


def plan_micro_batches(lengths: list[int], budget: int, world: int) -> list[list[list[int]]]:
    """Split sequences into micro-batches of at most `budget` tokens: plan[rank][micro-batch] is a list of indices.

    Longest first, each into the emptiest micro-batch: loads come out even over ranks and micro-batches. Every rank gets
    the same number of them, some possibly empty. A sequence above the budget makes a micro-batch of its own.
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


def update(
    policy, reference, optimizer, responses: list[Response], advantages: torch.Tensor, step: int, cfg: Config, clock
) -> tuple[dict[str, float], torch.Tensor]:
    """One pass over a rollout in cfg.minibatches optimizer steps. advantages [B].

    Returns metrics and, [2, V], how often each token of the vocabulary was clipped low and high; the same on all ranks.
    """
    rank, world, device = dist.get_rank(), dist.get_world_size(), compute_device()
    lengths = torch.tensor([len(r.token_ids) for r in responses])
    sizes = [len(r.problem.prompt_ids) + len(r.token_ids) - 1 for r in responses]
    keep = ~torch.tensor([r.truncated for r in responses]) if cfg.overlong_filter else torch.ones(len(responses), dtype=torch.bool)
    minibatches = torch.tensor(permutation(len(responses), cfg.seed, "minibatches", step)).tensor_split(cfg.minibatches)
    plans = [plan_micro_batches([sizes[i] for i in m], cfg.micro_batch_tokens, world)[rank] for m in minibatches]
    work = [[make_pack(responses, m[micro].tolist(), device) for micro in plan] for m, plan in zip(minibatches, plans)]  # of this rank

    # The trainer's own old log-probs. The first mini-batch needs no extra pass: its weights are still the old ones. With
    # one optimizer step per rollout nothing needs one.
    with clock("logprobs"), torch.no_grad():
        for m, pack in ((m, pack) for m, packs in enumerate(work) for pack in packs):
            if m > 0:
                pack.old_logprobs, _ = policy.response_logprobs(pack, cfg.temperature)
            if cfg.kl_coef:
                pack.ref_logprobs, _ = reference.response_logprobs(pack, cfg.temperature)

    def per_token(values: torch.Tensor, pack: Pack) -> torch.Tensor:
        return F.pad(values, (0, 1)).to(device)[pack.owner]  # a stand-in, owner -1, takes the zero that is padded on

    names = ("tokens", "entropy", "clip_low", "clip_high", "approx_kl", "reference_kl")
    sums, losses, norms = torch.zeros(len(names), device=device), torch.zeros((), device=device), []
    broken = torch.zeros(len(responses) + 1, device=device)  # non-finite tokens of each response, and of the stand-ins
    clipped = torch.zeros(2, policy.config.vocab_size, device=device)
    lr = cfg.lr * min(1.0, step / max(1, cfg.warmup_steps))  # steps count from 1
    for group in optimizer.param_groups:
        group["lr"] = lr
    for members, packs in zip(minibatches, work):
        with clock("update"):
            # LITE PPO, TRICK 2: a response's weight comes from the token count of the whole mini-batch, all ranks
            weights = torch.zeros(len(responses))
            weights[members] = tricks.loss_weights(lengths[members], cfg.loss_level, keep[members], cfg.max_new_tokens)
            for pack in packs:
                policy.set_requires_all_reduce(pack is packs[-1])  # hybrid sharding: copies exchange the sum, not every term
                logprobs, entropy = policy.response_logprobs(pack, cfg.temperature)
                if pack.old_logprobs is None:
                    pack.old_logprobs = logprobs.detach()
                ratio = (logprobs, pack.old_logprobs, per_token(advantages, pack), cfg.clip_low, cfg.clip_high)
                token_loss = tricks.clipped_surrogate(*ratio, cfg.dual_clip or None)
                if cfg.tis_cap:
                    token_loss = token_loss * tricks.truncated_importance_weights(pack.old_logprobs, pack.rollout_logprobs, cfg.tis_cap)
                kl = tricks.kl_estimate(logprobs, pack.ref_logprobs) if cfg.kl_coef else torch.zeros_like(logprobs)
                token_loss = token_loss + cfg.kl_coef * kl
                loss = (per_token(weights, pack) * token_loss).sum()
                (loss * world).backward()  # FSDP averages gradients over the ranks; the objective is the sum over them
                Clock.tick()
                with torch.no_grad():
                    broken.index_add_(0, pack.owner % len(broken), (~token_loss.isfinite()).float())
                    real = (pack.owner >= 0).float()
                    low, high = tricks.clip_masks(*ratio)  # False where the advantage is 0, as for a stand-in
                    for side, mask in zip(clipped, (low, high)):
                        side.index_add_(0, pack.targets, mask.float())
                    columns = (real, entropy, low, high, tricks.kl_estimate(pack.old_logprobs, logprobs), kl)
                    sums += torch.stack([(real * column).sum() for column in columns])
                    losses += loss.detach()
            if not norms:  # before the weights move: were the responses sampled from these weights?
                gap = check_gap([pack for packs in work for pack in packs], step, cfg)
            norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm).full_tensor())
            if torch.isfinite(norms[-1]):  # over all ranks, so that they skip together
                optimizer.step()
            optimizer.zero_grad()

    total = torch.cat([sums, losses[None], broken[:-1]])
    dist.all_reduce(total)
    dist.all_reduce(clipped)
    (tokens, *means, loss), norms = total[: len(names) + 1].tolist(), torch.stack(norms)
    for i in total[len(names) + 1 :].nonzero()[:, 0].tolist():
        responses[i].failure = responses[i].failure or NOT_FINITE
    return {f"policy/{name}": value / tokens for name, value in zip(names[1:], means)} | gap | {
        "policy/loss": loss / len(norms), "policy/grad_norm": float(norms.mean()), "policy/skipped": int((~norms.isfinite()).sum()), "policy/lr": lr,
    }, clipped  # fmt: skip


def check_gap(packs: list[Pack], step: int, cfg: Config) -> dict[str, float]:
    """Log-prob gap between sampler and trainer over the same tokens; stops the run when it shows other weights.

    Where the trainer's own are not finite, the optimizer step will be skipped, and its responses named.
    """
    gaps = torch.cat([(p.rollout_logprobs - p.old_logprobs).abs()[(p.owner >= 0) & p.old_logprobs.isfinite()] for p in packs]).detach()
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


# ---- 5. evaluation ---------------------------------------------------------------------------------------------------


def evaluate(sampler, grader, tokenizer, sets: dict[str, list[Problem]], cfg: Config, say=lambda text: None, log=None) -> dict[str, float]:
    """Accuracy (mean over eval_samples responses), its interval, and pass@k per set. A response is correct if its score is at least 1.

    The seeds are the same at every evaluation: differences come from the model.
    """
    metrics = {}
    for name, problems in sets.items():
        seeds = [seed_for(cfg.seed, "eval", name, i) for i in range(len(problems))]
        sampling = Sampling(cfg.eval_samples, cfg.max_new_tokens, cfg.eval_temperature)
        responses = sample(sampler, grader, tokenizer, problems, seeds, sampling, cfg, Clock())
        correct = torch.tensor([r.score >= 1 for r in responses]).view(len(problems), -1).sum(1)
        low, high = tricks.bootstrap_interval(correct / cfg.eval_samples)
        found = {
            "accuracy": float(correct.sum()) / len(responses),
            "accuracy_low": float(low),
            "accuracy_high": float(high),
            "pass_at_k": float(tricks.pass_at_k(torch.full_like(correct, cfg.eval_samples), correct, cfg.eval_pass_k).mean()),
            "length_mean": float(np.mean([len(r.token_ids) for r in responses])),
            "truncated": float(np.mean([r.truncated for r in responses])),
            "failed": float(np.mean([r.failure != "" for r in responses])),
        }
        if found["failed"]:
            say(f"warning: step {Clock.step}: {found['failed']:.1%} of the responses to {name} got no verdict and count as wrong: reasons in samples.jsonl")
        if log:
            log.failures(Clock.step, name, responses)
        metrics |= {f"eval/{name}/{key}": value for key, value in found.items()}
        say(f"step {Clock.step:4d}  {name}: accuracy {found['accuracy']:.3f} [{low:.3f}, {high:.3f}]  "
            f"pass@{cfg.eval_pass_k} {found['pass_at_k']:.3f}  length {found['length_mean']:.0f}")  # fmt: skip
    return metrics


# ---- 6. the loop -----------------------------------------------------------------------------------------------------


def compute_device() -> torch.device:
    return torch.device("cuda", env("LOCAL_RANK", 0)) if torch.cuda.is_available() else torch.device("cpu")


def load_sets(tokenizer, cfg: Config) -> tuple[list[Problem], dict[str, list[Problem]], str]:
    """Training problems, the evaluation sets by name, and what was left out of the former, in words."""
    counts: Counter[str] = Counter()

    def load(flag: str, name: str, **options) -> tuple[str, list[Problem], int]:
        try:
            path = toy.resolve_data(name, split=options["split"])
            return path, *load_problems(path, tokenizer, cfg.system_prompt, cfg.max_prompt_tokens, **options)
        except (UserError, ValueError) as error:
            raise UserError(str(error) if str(error).startswith("--") else f"{flag}: {error}") from None

    _, train_set, counts["too long"] = load("--train-data", cfg.train_data, split="train", counts=counts)
    sets = {}
    for item in cfg.eval_data:
        label, _, name = item.partition("=")
        if not name or not re.fullmatch(r"[\w.-]+", label) or os.path.exists(item):  # a path may hold the sign, too
            label, name = "", item
        path, problems, too_long = load("--eval-data", name, split="test", limit=cfg.eval_size or None)
        label = label or ("toy" if is_toy(name) else re.sub("[:@].*", "", Path(path).stem))
        if label in sets:
            raise UserError(f"--eval-data {item}: there are two sets called {label}; name them: NAME={name}")
        if too_long:
            raise UserError(f"--max-prompt-tokens {cfg.max_prompt_tokens}: {too_long} problems of {path} are longer, and accuracy is over all of them")
        sets[label] = problems
    return train_set, sets, ", ".join(f"{n} {reason}" for reason, n in counts.items() if n) or "none"


def train(cfg: Config) -> dict[str, float]:
    """The whole run; torch.distributed must be initialised. Returns the last step's metrics."""
    with contextlib.ExitStack() as held:
        return run(cfg, held)


def run(cfg: Config, held: contextlib.ExitStack) -> dict[str, float]:
    """train() itself; `held` lets go of workers, lock and signals, whatever ends the run."""
    rank, world, device, began = dist.get_rank(), dist.get_world_size(), compute_device(), time.time()
    say = tqdm.write if rank == 0 else lambda text: None
    kind, reason = samplers.choose_sampler(cfg.sampler)
    path = samplers.resolve_model(cfg.model)
    tokenizer, eos_ids = samplers.load_tokenizer(path, cfg.max_prompt_tokens + cfg.max_new_tokens)
    train_set, sets, left_out = load_sets(tokenizer, cfg)
    identity = {"training problems": f"{len(train_set)} problems, {seed_for([(p.prompt_ids, p.row['answer']) for p in train_set]):012x}",
                "sampler in use": kind, "dtype in use": str(compute_dtype(cfg)), "reward file": reward_id(cfg.reward)}  # fmt: skip
    Clock.tick()  # here and below: each of these may take its time, none of them all of it
    folder = open_folder(cfg, gather, held)
    checkpoint = gather([find_checkpoint(folder, cfg, identity)])[0]  # rank 0's, should a network file system show others an older one
    check_space(folder, path, cfg)
    say(f"model {cfg.model}, {len(train_set)} training problems (left out: {left_out}), {world} rank(s), {device.type}, {compute_dtype(cfg)}")
    say(f"sampler {kind}: {reason}")
    if cfg.top_p < 1 or cfg.top_k:
        say("warning: top-p and top-k sample from another distribution than the trained one; ratios and log-prob gaps are off by the mass cut away")
    if cfg.minibatches == 1:
        say("note: with one optimizer step per rollout the ratio is 1 and no clip can bind; --minibatches 2 or more changes that")
    workers = cfg.reward_workers or max(1, min(8, os.cpu_count() // env("LOCAL_WORLD_SIZE", 1)))
    grader = Grader(cfg.reward, cfg.reward_timeout, workers, cfg.reward_memory_gib)
    held.callback(grader.close)
    # The sampler before the policy: vLLM measures the GPU's free memory when it starts.
    sampler = {"vllm": samplers.VllmSampler, "transformers": samplers.TransformersSampler}[kind](cfg, path, eos_ids, device, compute_dtype(cfg))
    Clock.tick()
    policy = build_policy(cfg, path, device)
    Clock.tick()
    reference = build_policy(cfg, path, device, trainable=False) if cfg.kl_coef else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    # A new run begins with the evaluation and the log line of step 0; a resumed one where its checkpoint stands.
    position = load_checkpoint(checkpoint, policy, optimizer) if checkpoint else Position(pending={})
    if position.step > cfg.steps:
        raise UserError(f"--steps {cfg.steps}: {checkpoint} has {position.step} steps behind it")
    if checkpoint:
        say(f"resumed from {checkpoint}, {position.step} of {cfg.steps} steps done")
    Clock.tick()
    saver = Checkpoints(folder, cfg, identity, say)
    saver.newest = position.step if checkpoint and checkpoint.parent == folder else -1
    log = Log(folder, cfg, position) if rank == 0 else None
    bad_steps, metrics = 0, {}

    def sync(clock: Clock) -> None:
        with clock("sync"):
            sampler.load_weights(full_weights(policy, compute_dtype(cfg)))

    sync(Clock())
    guard.install_signals(held)  # until here nothing can be lost, and a signal ends the process at once
    bar = held.enter_context(tqdm(initial=position.step, total=cfg.steps, disable=rank > 0, unit="step", dynamic_ncols=True))
    try:
        for step in range(position.step + (position.pending is None), cfg.steps + 1):
            clock, Clock.step = Clock(), step
            if position.pending is None:
                with clock("step"):
                    responses, cursor = rollout(sampler, grader, tokenizer, train_set, position.cursor, cfg, clock)
                    sampler.sleep()
                    rewards = shape_rewards(responses, cfg)
                    advantages = compute_advantages(rewards, cfg)  # trick 1
                    stats, clipped = update(policy, reference, optimizer, responses, advantages.flatten(), step, cfg, clock)  # trick 2
                    sync(clock)
                stats["rollout/responses"] = (cursor - position.cursor) * cfg.group_size
                position = Position(step, cursor, rollout_metrics(responses, rewards, clock, policy.config, world) | stats)
                saver.finish()  # what is half-written may fill the disk for a while; the logs come after it
                if rank == 0:
                    log.samples(step, responses, rewards, advantages, cfg.samples_per_step)
                    log.clipped(step, clipped, tokenizer)
                bad_steps = bad_steps + 1 if stats["policy/skipped"] else 0
                if bad_steps:
                    say(f"warning: step {step}: {stats['policy/skipped']} optimizer step(s) skipped, the gradient is not finite; " + blame(responses, folder))
                if bad_steps >= cfg.max_skipped_steps:
                    raise RunError(f"no finite gradient in {bad_steps} rollouts in a row (--max-skipped-steps); " + blame(responses, folder))
                bar.update()
            metrics = dict(position.pending)
            if step in (0, cfg.steps) or (cfg.eval_every and step % cfg.eval_every == 0):
                metrics |= evaluate(sampler, grader, tokenizer, sets, cfg, say, log)
            position.pending = None
            if rank == 0:
                for warning in log.metrics(step, metrics):
                    say(f"warning: step {step}: {warning}")
                if (step and step % 20 == 0) or step == cfg.steps:
                    log.curves()
                bar.set_postfix({name: f"{metrics.get(key, 0):.3g}" for name, key in (("reward", "reward/mean"), ("length", "response/length_mean"),
                                ("entropy", "policy/entropy"), ("tok/s", "perf/rollout_tokens_per_s"))})  # fmt: skip
            guard.tidy()
            if cfg.save_every and step and (step % cfg.save_every == 0 or step == cfg.steps):
                saver.save(position, policy, optimizer)
        saver.finish(last=True)
        save_model(policy, tokenizer, path, folder / "final")
        for name, problems in sets.items() if rank == 0 else ():
            before, after = (row.get(f"eval/{name}/accuracy", math.nan) for row in (log.rows[0], log.rows[-1]))
            say(f"{name}: accuracy {before:.3f} -> {after:.3f} ({len(problems)} problems x {cfg.eval_samples} samples, temperature {cfg.eval_temperature:g})")
        say(f"{time.time() - began:.0f} s; final model, metrics.jsonl, samples.jsonl, curves.png and TensorBoard events are in {folder}")
    except Stopped:  # nothing of the step in progress has touched the weights
        saver.finish()
        if position.step and (position.pending is not None or position.step != saver.newest):
            saver.save(position, policy, optimizer)
            saver.finish(last=True)
        say(f"ended by a signal after step {position.step}; the same command with --output-dir {folder} goes on from there")
        sampler.close()
        raise
    sampler.close()  # not after a failure: it would wait for the other ranks
    return metrics


def blame(responses: list[Response], folder: Path) -> str:
    broken = [i for i, r in enumerate(responses) if r.failure == NOT_FINITE]
    return f"responses {broken[:10]} of the step, in {folder}/samples.jsonl" if broken else "every loss is finite, so the backward pass has overflowed"


def connect(cfg: Config) -> None:
    """torch.distributed and the watchdog; a process without a launcher is one rank."""
    for name, value in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1").items():
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        torch.cuda.set_device(compute_device())
    limit, store, rank, world = timedelta(minutes=cfg.timeout_minutes + 2), dist.HashStore(), 0, 1  # the watchdog speaks first
    if "MASTER_ADDR" in os.environ:
        try:
            store, rank, world = guard.fresh_store(*next(dist.rendezvous("env://", timeout=limit)), limit)
        except (dist.DistNetworkError, ValueError) as error:
            where = f"MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT {os.environ.get('MASTER_PORT')}"
            raise UserError(f"{where}: {error}; is another run using the port? torchrun --master-port takes another") from None
    # gloo beside nccl: objects, checkpoints and offloaded gradients travel through host memory.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store, rank=rank, world_size=world, timeout=limit)
    guard.watch(cfg.timeout_minutes, rank, world, store.clone() if world > 1 else None)


def main() -> int:
    """Exit code: 0 done, 1 failed, 2 a mistake of the caller's, 128 + signal stopped."""
    try:
        cfg = parse_config()
        connect(cfg)
        train(cfg)
        code, message = 0, ""
    except Stopped:
        code, message = 128 + (Signals.received or signal.SIGTERM), ""
    except UserError as error:
        code, message = 2, str(error)
    except RunError as error:
        code, message = 1, f"{Clock.where()}: {error}"
    except (Exception, dcp.api.CheckpointException) as error:  # torch's report about all ranks is no Exception
        code, message = 1, ""
        print(guard.describe(error, env("RANK", 0)), file=sys.stderr, flush=True)
    if message and env("LOCAL_RANK", 0) == 0:  # every rank finds the same
        print(f"error: {message}", file=sys.stderr, flush=True)
    if code and env("WORLD_SIZE", 1) > 1:
        sys.stdout.flush()
        os._exit(code)  # other ranks may be waiting in a collective: do not wait for them; the launcher ends them
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends it without a traceback, as SIGTERM does, until the loop wants to know: guard.install_signals
    sys.exit(main())
