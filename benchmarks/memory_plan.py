"""What a run will hold in memory, per rank and phase, before anything is started; and whether it fits.

    python benchmarks/memory_plan.py qwen3-4b --ranks 8 --device-gib 80
    python benchmarks/memory_plan.py FOLDER --device-gib cpu --check             # measured beside planned

MODEL is a shape (qwen3-0.6b ... qwen3-32b), a folder with a config.json, or a hub id. The flags are those of lite_ppo.py;
--ranks is the number of processes that torchrun starts. `plan` is a pure function of two dataclasses; each formula stands
beside the part of the table that it fills. --check runs the sampler and the trainer of lite_ppo.py in a process of their
own and compares the peak of each phase with the plan.

Letters: P parameters of the model, R of its root (embedding, last norm, head), B of one block, V vocabulary, D hidden size,
I width of the MLP, L blocks, H heads and K key/value heads of width d, T tokens of a micro-batch, S ranks that share the
trainer's state, c bytes of a number in the compute dtype.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
GIB, MIB = 2**30, 2**20
BOUND = 1.25  # of --check
PHASES = ("load", "rollout", "logprobs", "update", "sync")


# ---- models and settings ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A dense decoder with a gated MLP and RMS norms: Qwen2, Qwen3, Llama, Mistral."""

    hidden: int  # D
    intermediate: int  # I
    layers: int  # L
    heads: int  # H
    kv_heads: int  # K
    tied: bool  # the head is the embedding
    vocab: int = 151936  # V
    head_dim: int = 128  # d
    qk_norm: bool = True  # Qwen3
    qkv_bias: bool = False  # Qwen2

    @property
    def block(self) -> int:  # B: q and o, k and v, the MLP, two norms, and what some families add
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        extra = 2 * self.head_dim * self.qk_norm + (queries + 2 * keys) * self.qkv_bias
        return 2 * self.hidden * (queries + keys) + 3 * self.hidden * self.intermediate + 2 * self.hidden + extra

    @property
    def embedding(self) -> int:  # V D
        return self.vocab * self.hidden

    @property
    def root(self) -> int:  # R
        return self.embedding * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:  # P
        return self.layers * self.block + self.root


SHAPES = {  # the public config.json of each model; the base models have the same numbers
    "qwen3-0.6b": Shape(1024, 3072, 28, 16, 8, True),
    "qwen3-1.7b": Shape(2048, 6144, 28, 16, 8, True),
    "qwen3-4b": Shape(2560, 9728, 36, 32, 8, True),
    "qwen3-8b": Shape(4096, 12288, 36, 32, 8, False),
    "qwen3-14b": Shape(5120, 17408, 40, 40, 8, False),
    "qwen3-32b": Shape(5120, 25600, 64, 64, 8, False),
}


def read_shape(name: str) -> Shape:
    """A shape by name, or from the config of a folder or of a model on the hub."""
    if name.lower() in SHAPES:
        return SHAPES[name.lower()]
    import samplers  # noqa: F401  puts broken companions of torch out of the way
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name)
    if config.model_type not in ("qwen2", "qwen3", "llama", "mistral"):
        raise SystemExit(f"error: {name}: the formulas are for qwen2, qwen3, llama and mistral, not for {config.model_type}")
    return Shape(
        config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads,
        bool(config.tie_word_embeddings), config.vocab_size, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        config.model_type == "qwen3", config.model_type == "qwen2",
    )  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Flags of lite_ppo.py, with its defaults, and what only a plan needs to be told."""

    ranks: int = 1  # processes that torchrun starts
    shard_ranks: int = 0  # S, ranks that share one copy of the trainer's state; 0 = all of them, as lite_ppo.py does
    prompts_per_step: int = 128
    group_size: int = 8
    minibatches: int = 1
    max_prompt_tokens: int = 1024
    max_new_tokens: int = 8192
    micro_batch_tokens: int = 16384
    max_num_seqs: int = 256
    gpu_memory_utilization: float = 0.6
    tensor_parallel_size: int = 1
    dtype: str = "auto"
    activation_checkpointing: bool = True
    cpu_offload: bool = False
    kl_coef: float = 0.0
    sampler: str = "vllm"
    device_gib: float = 80.0
    cpu: bool = False  # no GPU: device_gib is the memory of the machine's share of this rank
    process_bytes: int = 0  # the process before it holds a model; 0 = the constants below

    @property
    def bytes(self) -> int:  # c
        return 4 if self.dtype == "float32" or (self.dtype == "auto" and self.cpu) else 2

    @property
    def shards(self) -> int:  # S
        return self.shard_ranks or self.ranks

    @property
    def longest(self) -> int:  # a sequence is never cut, so a micro-batch has room for the longest one
        return self.max_prompt_tokens + self.max_new_tokens - 1

    @property
    def tokens(self) -> int:  # T
        return max(self.micro_batch_tokens, self.longest)

    @property
    def live(self) -> int:  # sequences that one engine decodes at once
        engines = max(1, self.ranks // self.tensor_parallel_size)
        return min(self.max_num_seqs, -(-self.prompts_per_step // engines) * self.group_size)


# ---- constants that no formula gives ---------------------------------------------------------------------------------

PROCESS = {"transformers": 620 * MIB, "vllm": 1150 * MIB}  # CPU: the imports of lite_ppo.py; --check measures them anew
ENGINE = {"transformers": 0, "vllm": 250 * MIB}  # CPU: what an engine holds beside weights and cache, after its start
GROWTH = 150 * MIB  # CPU: code and buffers that the first step touches
MAPPED = 32 * MIB  # CPU: smaller tensors come from the C library's heap, which keeps what they leave
CUDA = {"transformers": 1 * GIB, "vllm": 3 * GIB}  # context, NCCL, kernels; with vLLM also its CUDA graphs, which stay while it sleeps
SLACK = 0.05  # CUDA: share of the trainer's transient tensors that its caching allocator loses to fragments
VLLM_BATCHED_TOKENS = {True: 4096, False: 8192}  # tokens of one vLLM step, on a CPU or not: the width of its prefill
LOGIT_COPIES = {"transformers": 4, "vllm": 6}  # [sequences, V] float32 while a token is drawn: logits, log-probs, probs, running sum ...
LOGITS = 2**26  # numbers in the chunk of logits of lite_ppo.response_logprobs


# ---- the formulas ----------------------------------------------------------------------------------------------------


def block_bytes(shape: Shape, s: Settings) -> float:
    """Bytes per token that one block keeps for its backward pass, its input not counted."""
    c, D, queries, keys = s.bytes, shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 2 * (8 + c) * D  # each: the input in float32, what is scaled, and the output that the projections take
    qk_norms = (4 + c) * (queries + keys) * shape.qk_norm  # input in float32, what is scaled
    attention = c * (2 * queries + 2 * keys) + c * queries  # q, k, v and output; the input of o_proj
    return norms + qk_norms + attention + 4 * c * shape.intermediate  # MLP: gate, its activation, up, their product


def forward_bytes(shape: Shape, s: Settings) -> float:
    """Bytes per token of a block that keeps nothing: residual, norm in float32, and the widest of attention and MLP."""
    wide = max(3 * shape.intermediate, 3 * (shape.heads + 2 * shape.kv_heads) * shape.head_dim)
    return s.bytes * (2 * shape.hidden + wide) + 8 * shape.hidden


def logits_bytes(shape: Shape, s: Settings) -> float:
    """One chunk of logits in float32; an eighth of it once more as a temporary; its half precision copy in backward."""
    rows = min(max(64, LOGITS // shape.vocab), s.tokens)
    return rows * shape.vocab * (4 + 0.5 + (2 if s.bytes == 2 else 0))


def engine_parts(shape: Shape, s: Settings, awake: str) -> dict[str, float]:
    """The sampler's memory; awake: "no", "weights", or "all"."""
    c, V = s.bytes, shape.vocab
    weights = c * shape.parameters / s.tensor_parallel_size
    cache = 2 * c * shape.layers * shape.kv_heads * shape.head_dim / s.tensor_parallel_size  # per token: keys and values
    prefill = min(s.live, s.max_num_seqs) * s.max_prompt_tokens / s.group_size
    if s.sampler == "vllm":
        prefill = VLLM_BATCHED_TOKENS[s.cpu]
    sampling = s.live * V * (4 * LOGIT_COPIES[s.sampler] + (c if c == 2 else 0)) + prefill * forward_bytes(shape, s)
    if s.sampler == "transformers":  # its cache grows with the sequences, and one block's is copied while it grows
        room = s.group_size * (s.max_prompt_tokens + s.max_new_tokens) * cache  # one prompt's responses; more as far as 1 GiB holds them
        grown = min(s.live * (s.max_prompt_tokens + s.max_new_tokens) * cache, max(room, 2**30)) * (1 + 1 / shape.layers)
        return {"engine: weights": weights} | ({"engine: KV cache": grown, "engine: sampling": sampling} if awake == "all" else {})
    if s.cpu:  # vLLM packs its matrices, and a tied head gets a pack of its own; the cache is fixed and always there
        packed = weights + c * shape.embedding * shape.tied
        always = {"engine: weights": packed, "engine: KV cache": max(256 * MIB, 2 * (s.max_prompt_tokens + s.max_new_tokens) * cache), "engine: rest": ENGINE["vllm"]}
        return always | ({"engine: sampling": sampling} if awake == "all" else {})
    if awake == "no":
        return {}
    if awake == "weights":
        return {"engine: weights": weights}
    whole = s.gpu_memory_utilization * s.device_gib * GIB  # vLLM fills its share: what weights and sampling leave is cache
    return {"engine: weights": weights, "engine: sampling": sampling, "engine: KV cache": whole - weights - sampling}


def resident_parts(shape: Shape, s: Settings, adam: bool = True) -> dict[str, float]:
    """What the trainer always holds: float32 weights, Adam's two moments, perhaps a reference, each shared by S ranks."""
    P, S = shape.parameters, s.shards
    parts = {"master weights": 4 * P / S, "Adam": 8 * P / S * adam, "reference": 4 * P / S * (s.kl_coef > 0)}
    return {name: size for name, size in parts.items() if size}


def update_moments(shape: Shape, s: Settings) -> dict[str, dict[str, float]]:
    """What backward holds beside the residents, at the moments that can be the highest."""
    c, S, T, L, D = s.bytes, s.shards, s.tokens, shape.layers, shape.hidden
    P, R, B, VD = shape.parameters, shape.root, shape.block, shape.embedding
    gathered = c * R + c * B * (2 if S > 1 else 1)  # the root for the whole pass; a block, and the buffer of the next one
    inputs = T * (L + 1) * D * c  # of each block and of the last norm
    inside = T * block_bytes(shape, s)
    saved = inputs + (0 if s.activation_checkpointing else L * inside)
    now = inside if s.activation_checkpointing else 0  # the block that is computed again
    last = T * D * (8 + 3 * c)  # last norm, the rows that predict, and the gradient there
    flow = T * c * (3 * shape.intermediate + 2 * D)  # gradients inside a block: the MLP's three are the widest
    reduce = (c + 4 + 4) * B  # of one block: its gradient, and the float32 buffers of this and the previous reduction
    earlier = 4 * P / S if s.minibatches * s.tokens < s.prompts_per_step * s.group_size * s.longest / s.ranks else 0  # earlier micro-batches'
    head = 4 * VD + (0 if c == 4 else 4 * VD + c * VD)  # the head's gradient: sum, one chunk's share, and the cast
    return {
        "head": {"gradients": earlier, "gathered": gathered, "activations": saved + last + T * D * 4, "logits": logits_bytes(shape, s), "head, reduction": head},
        "first block": {"gradients": earlier, "gathered": gathered, "activations": saved + now + flow, "head, reduction": c * VD + reduce},
        "last block": {"gradients": max(earlier, 4 * (P - R) / S), "gathered": gathered, "activations": T * D * c + inside + flow, "head, reduction": c * VD + reduce},
        # The embedding's gradient meets the head's; then the root gives its weights back and is reduced.
        "root": {"gradients": max(earlier, 4 * (P - R) / S), "head, reduction": max(c * R + 2 * c * VD, c * R + 4 * R + 4 * R / S)},
        "optimizer": {"gradients": 4 * P / S},
    }  # fmt: skip


def plan(shape: Shape, s: Settings) -> dict:
    """Bytes per phase and part, for one rank, with the verdict. The peak of the update names its moment."""
    c, S = s.bytes, s.shards
    vllm_gpu = s.sampler == "vllm" and not s.cpu
    process = {"process": float((s.process_bytes or PROCESS[s.sampler]) if s.cpu else CUDA[s.sampler])}
    residents, host = resident_parts(shape, s), {}
    if s.cpu_offload and not s.cpu:
        host, residents = residents | {"gradients": 4 * shape.parameters / S}, {}
    gathered = {"gathered": c * shape.root + c * shape.block * (2 if S > 1 else 1)}
    asleep = engine_parts(shape, s, "no")
    moments = update_moments(shape, s)
    if s.cpu_offload and not s.cpu:
        moments = {name: {k: v for k, v in parts.items() if k != "gradients"} for name, parts in moments.items()}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    largest = max(shape.embedding, shape.hidden * shape.intermediate)
    # One parameter at a time: its shard in the compute dtype, the whole of it, and what vLLM collects of a fused layer.
    fused = c * max(shape.embedding, 2 * shape.hidden * shape.intermediate) if s.sampler == "vllm" else 0
    if s.sampler == "vllm" and s.cpu:  # it builds a layer anew beside the old one: the weight, its pack, and a tied head's pack
        fused = c * (2 + shape.tied) * shape.embedding
    transfer = (c * largest / S if c != 4 else 0) + (c * largest if S > 1 else 0) + fused
    reading = 4 * largest / S + c * largest  # weights are read a tensor at a time; a CPU gives memory when it is first touched
    starting = c * shape.embedding * (s.sampler == "vllm" and shape.tied)  # the tied head, unpacked, until weights are loaded
    no_grad = s.tokens * (shape.hidden * (8 + 2 * c) + forward_bytes(shape, s)) + logits_bytes(shape, s)
    phases = {
        "load": process | ({} if s.cpu and s.sampler == "transformers" else asleep) | residents | {"transfer": starting if s.cpu else reading},
        "rollout": process | residents | engine_parts(shape, s, "all"),
        "logprobs": process | residents | asleep | gathered | {"activations": s.tokens * forward_bytes(shape, s), "logits": no_grad - s.tokens * forward_bytes(shape, s)},
        "update": process | residents | asleep | moments[moment],
        "sync": process | residents | engine_parts(shape, s, "weights") | {"transfer": transfer},
    }  # fmt: skip
    phases["load"].pop("Adam", None)  # it comes with the first optimizer step
    if vllm_gpu:  # the engine starts first, on an empty GPU
        phases["load"] = max(phases["load"], process | engine_parts(shape, s, "all"), key=lambda parts: sum(parts.values()))
    if s.minibatches == 1 and not s.kl_coef:
        phases["logprobs"] = process | residents | asleep  # nothing to compute: the ratio is 1
    if s.cpu:  # after a step: the update's small tensors, as far as this phase has no use for their place
        kept = s.tokens * (block_bytes(shape, s) + shape.layers * shape.hidden * c) + 2 * c * shape.block + 4 * shape.layers * shape.block * (4 * shape.block < MAPPED)
        for name in PHASES[1:]:
            reused = sum(phases[name].get(k, 0) for k in ("engine: KV cache", "engine: sampling", "gathered", "activations", "logits", "head, reduction"))
            phases[name] = phases[name] | {"process": process["process"] + GROWTH, "kept by the heap": max(0, kept - reused)}
    else:
        for parts in phases.values():
            parts["slack"] = SLACK * sum(parts.get(k, 0) for k in ("gathered", "activations", "logits", "head, reduction", "transfer"))
    totals = {name: sum(parts.values()) for name, parts in phases.items()}
    peak = max(totals, key=totals.get)
    per_token = 2 * c * shape.layers * shape.kv_heads * shape.head_dim / s.tensor_parallel_size
    cache = phases["rollout"]["engine: KV cache"]
    cache_tokens = int(max(0, cache) / per_token)
    room = cache_tokens >= s.max_prompt_tokens + s.max_new_tokens  # one sequence of full length, at least
    return {
        "phases": phases, "totals": totals, "peak": totals[peak], "peak_phase": peak, "update_moment": moment, "host": host,
        "cache_tokens": cache_tokens, "cache_room": room, "fits": room and totals[peak] <= s.device_gib * GIB,
    }  # fmt: skip


# ---- what would fit --------------------------------------------------------------------------------------------------


def solve_micro_batch(shape: Shape, s: Settings, most: int = 2**22) -> int:
    """The largest --micro-batch-tokens that fits, found by bisection in the same formulas; 0 if none does."""

    def fits(tokens: int) -> bool:
        return plan(shape, dataclasses.replace(s, micro_batch_tokens=tokens))["fits"]

    if not fits(1):
        return 0
    low, high = 1, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def remedies(shape: Shape, s: Settings) -> list[list[str]]:
    """Ways to make the run fit, the cheapest first, each a list of flags: one of them and perhaps smaller micro-batches, else two."""
    kinds: list[list[tuple[str, dict]]] = []  # of one kind, the mildest change first
    if not s.activation_checkpointing:
        kinds.append([("--activation-checkpointing", dict(activation_checkpointing=True))])
    if s.cpu or s.sampler != "vllm":
        kinds.append([(f"--max-num-seqs {n}", dict(max_num_seqs=n)) for n in (128, 64, 32, 16, 8) if n < s.live])
    else:
        shares = [x / 100 for x in range(95, 9, -5)]
        nearest = sorted(shares, key=lambda x: abs(x - s.gpu_memory_utilization))
        kinds.append([(f"--gpu-memory-utilization {x:g}", dict(gpu_memory_utilization=x)) for x in nearest if x != s.gpu_memory_utilization])
        sizes = [n for n in (2, 4, 8) if s.tensor_parallel_size < n <= s.ranks and s.ranks % n == shape.kv_heads % n == 0]
        kinds.append([(f"--tensor-parallel-size {n}", dict(tensor_parallel_size=n)) for n in sizes])
    if not s.cpu:
        if s.shard_ranks:
            kinds.append([("--shard-ranks 0", dict(shard_ranks=0))])
        kinds.append([(f"--ranks {n}", dict(ranks=n, shard_ranks=0)) for n in (2, 4, 8, 16, 32, 64) if n > s.ranks])
        if not s.cpu_offload:
            kinds.append([("--cpu-offload", dict(cpu_offload=True))])

    def settle(candidate: Settings) -> list[str] | None:
        if plan(shape, candidate)["fits"]:
            return []
        tokens = solve_micro_batch(shape, candidate)
        return [f"--micro-batch-tokens {tokens}"] if tokens else None

    if answer := settle(s):
        return [answer]
    ways = []
    for kind in kinds:
        found = ([name, *answer] for name, change in kind if (answer := settle(dataclasses.replace(s, **change))) is not None)
        ways += [way] if (way := next(found, None)) else []
    if ways:
        return ways
    for first, second in itertools.combinations(kinds, 2):
        pairs = itertools.product(first, second)
        found = ([x, y, *answer] for (x, a), (y, b) in pairs if (answer := settle(dataclasses.replace(s, **a, **b))) is not None)
        ways += [way] if (way := next(found, None)) else []
    return ways


# ---- report ----------------------------------------------------------------------------------------------------------


def table(result: dict, s: Settings) -> str:
    rows = list(dict.fromkeys(part for phase in PHASES for part in result["phases"][phase]))
    lines = [f"{'GiB per rank':<20}" + "".join(f"{phase:>10}" for phase in PHASES)]
    for part in rows:
        cells = (result["phases"][phase].get(part) for phase in PHASES)
        lines.append(f"{part:<20}" + "".join(f"{'' if x is None else f'{x / GIB:.2f}':>10}" for x in cells))
    lines.append(f"{'total':<20}" + "".join(f"{result['totals'][phase] / GIB:>10.2f}" for phase in PHASES))
    return "\n".join(lines)


def report(name: str, shape: Shape, s: Settings) -> tuple[str, dict]:
    result = plan(shape, s)
    lines = [
        f"{name}: {shape.parameters:,} parameters; {s.ranks} rank(s), state shared by {s.shards}; {'float32' if s.bytes == 4 else 'bfloat16'}; "
        f"micro-batches of {s.tokens} tokens" + (" (the longest sequence)" if s.tokens > s.micro_batch_tokens else ""),
        table(result, s), "",
        f"peak: {result['peak'] / GIB:.2f} GiB in {result['peak_phase']}, of {s.device_gib:g} GiB on this {'machine' if s.cpu else 'GPU'}; "
        f"highest moment of the update: {result['update_moment']}",
        f"KV cache: room for {result['cache_tokens']:,} tokens = {result['cache_tokens'] / (s.max_prompt_tokens + s.max_new_tokens):.1f} sequences of full length",
    ]  # fmt: skip
    if result["host"]:
        lines.append("host memory per rank: " + ", ".join(f"{k} {v / GIB:.2f} GiB" for k, v in result["host"].items()))
    save = (4 + s.bytes) * shape.parameters
    lines.append(f"saving: rank 0 gathers the whole model in host memory, up to {save / GIB:.2f} GiB more")
    if result["fits"]:
        most = solve_micro_batch(shape, s)
        lines.append(f"fits; the largest --micro-batch-tokens that does: {most}" + (" or more" if most == 2**22 else ""))
    else:
        why = "" if result["cache_room"] else " (its share leaves no room for the cache of one sequence)"
        answer = remedies(shape, s)
        lines.append(f"does not fit{why}; " + ("what would: " + "; or ".join(" ".join(way) for way in answer) if answer else "nothing in reach of these flags"))
    return "\n".join(lines), result


# ---- measured beside planned -----------------------------------------------------------------------------------------


def fields(shape: Shape) -> dict:
    """The shape as the fields of a Qwen3 config: what `common.make_model` takes."""
    if not shape.qk_norm or shape.qkv_bias:
        raise SystemExit("error: a model with random weights is a Qwen3; give a folder to check another family")
    return dict(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, tie_word_embeddings=shape.tied, vocab_size=shape.vocab, max_position_embeddings=32768,
    )  # fmt: skip


class Memory:
    """The clock of lite_ppo.update, and of the other phases: `with memory("update")` keeps the highest memory of each, in bytes.

    CPU: the peak of the resident set, which the kernel keeps and resets on demand. CUDA: what torch's allocator gave out
    beside the engine.
    """

    def __init__(self, measure):
        self.measure, self.peaks, self.engine = measure, defaultdict(int), 0

    @contextlib.contextmanager
    def __call__(self, phase: str):
        self.measure(reset=True)
        yield
        self.peaks[phase] = max(self.peaks[phase], self.measure()[1] - self.engine)


def worker(path: str, flags: list[str], output: str) -> None:
    """Two steps of the real pieces, in a process of their own: with the second one Adam's moments are there."""
    import common  # first: it imports samplers before transformers
    import lite_ppo
    import numpy as np
    import samplers
    import torch
    import torch._dynamo  # noqa: F401  the optimizer imports it
    import torch.distributed as dist
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401
    from data import Problem

    cfg = lite_ppo.parse_config(["--model", path, "--train-data", "-", *flags])
    common.start_ranks()
    kind, _ = samplers.choose_sampler(cfg.sampler)
    _, eos_ids = samplers.load_tokenizer(path, cfg.max_prompt_tokens + cfg.max_new_tokens)
    memory, device = Memory(common.memory), lite_ppo.compute_device()
    memory.peaks["process"] = common.memory()[0]
    generator, N = np.random.default_rng(0), cfg.prompts_per_step
    vocabulary = 24  # of the toy's tokenizer
    lengths = [max(1, cfg.max_prompt_tokens - i % 4) for i in range(N)]
    problems = [Problem({"problem": "?", "answer": "0"}, generator.integers(6, vocabulary, n).tolist()) for n in lengths]
    seconds = {}
    began = time.perf_counter()
    with memory("load"):
        engine = {"vllm": samplers.VllmSampler, "transformers": samplers.TransformersSampler}[kind](cfg, path, eos_ids, device, lite_ppo.compute_dtype(cfg))
        memory.engine = common.memory()[0] if common.CUDA else 0
        memory.peaks["engine"] = common.memory()[0]
        policy = lite_ppo.build_policy(cfg, path, device)
        reference = lite_ppo.build_policy(cfg, path, device, trainable=False) if cfg.kl_coef else None
        optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
        memory.peaks["policy"] = common.memory()[0]
    seconds["load"] = time.perf_counter() - began
    with memory("sync"):
        engine.load_weights(lite_ppo.full_weights(policy, lite_ppo.compute_dtype(cfg)))
    tokens = 0
    for step in (1, 2):
        began = time.perf_counter()
        sampling = samplers.Sampling(cfg.group_size, cfg.max_new_tokens, cfg.temperature)
        with memory("rollout"):
            groups = engine.generate([p.prompt_ids for p in problems], [lite_ppo.seed_for(step, i) for i in range(N)], sampling)
        responses = [lite_ppo.Response(p, *sample, "", float(k % 2), "") for p, group in zip(problems, groups) for k, sample in enumerate(group)]
        engine.sleep()
        advantages = torch.tensor([1.0 if r.score else -1.0 for r in responses])
        lite_ppo.update(policy, reference, optimizer, responses, advantages, step, cfg, memory)
        with memory("sync"):
            engine.load_weights(lite_ppo.full_weights(policy, lite_ppo.compute_dtype(cfg)))
        seconds[f"step {step}"] = time.perf_counter() - began
        sizes = [len(r.problem.prompt_ids) + len(r.token_ids) - 1 for r in responses]
        packs = lite_ppo.plan_micro_batches(sizes[: -(-len(sizes) // cfg.minibatches)], cfg.micro_batch_tokens, 1)[0]
        tokens = max(sum(sizes[i] for i in m) for m in packs if m)
    Path(output).write_text(json.dumps(dict(peaks=memory.peaks, seconds=seconds, tokens=tokens, kind=kind)))
    engine.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def check(name: str, path: str, shape: Shape, s: Settings, threads: int) -> dict:
    """Run `worker`, plan the same thing, print both. The plan takes from the run what it cannot know: the size of the imports."""
    flags = [f"--{name.replace('_', '-')}={getattr(s, name)}" for name in (
        "prompts_per_step", "group_size", "minibatches", "max_prompt_tokens", "max_new_tokens", "micro_batch_tokens", "max_num_seqs",
        "gpu_memory_utilization", "dtype", "kl_coef", "sampler")]  # fmt: skip
    flags += [f"--{'' if getattr(s, name) else 'no-'}{name.replace('_', '-')}" for name in ("activation_checkpointing", "cpu_offload")]
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder, "measured.json"))
        command = [sys.executable, __file__, path, "--worker", output, "--worker-flags", json.dumps(flags)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        measured = json.loads(Path(output).read_text())
    # A micro-batch of the run holds at most what there is: the plan is told the tokens of the largest one.
    s = dataclasses.replace(s, micro_batch_tokens=min(s.micro_batch_tokens, measured["tokens"]),
                            process_bytes=measured["peaks"]["process"] if s.cpu else 0)  # fmt: skip
    text, result = report(name, shape, s)
    print(text, "", f"{'GiB':<20}{'planned':>10}{'measured':>10}{'ratio':>10}", sep="\n")
    rows = {}
    for phase in PHASES:
        planned, peak = result["totals"][phase], measured["peaks"][phase]
        if not s.cpu:  # the allocator knows neither the context nor, beside the trainer, the engine
            planned -= sum(size for part, size in result["phases"][phase].items() if part.startswith("engine") or part in ("process", "slack"))
            if phase in ("load", "rollout", "sync"):
                continue
        rows[phase] = dict(planned=planned, measured=peak, ratio=planned / peak)
        print(f"{phase:<20}{planned / GIB:>10.2f}{peak / GIB:>10.2f}{planned / peak:>10.2f}")
    rows["peak"] = dict(planned=max(r["planned"] for r in rows.values()), measured=max(r["measured"] for r in rows.values()))
    rows["peak"]["ratio"] = rows["peak"]["planned"] / rows["peak"]["measured"]
    print("{:<20}{:>10.2f}{:>10.2f}{:>10.2f}".format("peak", *(x / y for x, y in zip(rows["peak"].values(), (GIB, GIB, 1)))))
    print("resident after imports, sampler, policy: " + ", ".join(f"{measured['peaks'][k] / GIB:.2f}" for k in ("process", "engine", "policy")) + " GiB; "
          + ", ".join(f"{k} {v:.0f} s" for k, v in measured["seconds"].items()))  # fmt: skip
    close = max(rows["peak"]["ratio"], 1 / rows["peak"]["ratio"]) <= BOUND
    print(f"{'PASS' if close else 'FAIL'}  planned / measured peak: {rows['peak']['ratio']:.2f} (within a factor of {BOUND})")
    return dict(phases=rows, seconds=measured["seconds"])


def import_bytes(sampler: str) -> int:
    """Resident memory of a process that has imported what a run imports, measured now."""
    code = ("import lite_ppo, samplers, torch._dynamo, transformers.models.qwen3.modeling_qwen3; samplers.choose_sampler(%r); "
            "print([l for l in open('/proc/self/status') if l.startswith('VmRSS')][0].split()[1])" % sampler)  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) * 1024 if done.returncode == 0 else PROCESS[sampler]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a shape, a folder with a config.json, or a hub id")
    for field in dataclasses.fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        if field.name in ("cpu", "process_bytes", "device_gib"):
            continue
        if isinstance(field.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default)
    parser.add_argument("--device-gib", default="80", help="memory of a GPU, or cpu: no GPU, this machine's memory")
    parser.add_argument("--check", action="store_true", help="run two steps and compare; on this machine, one rank")
    parser.add_argument("--threads", type=int, default=2, help="of --check")
    parser.add_argument("--output", help="write the numbers to this JSON file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--worker-flags", help=argparse.SUPPRESS)
    args = vars(parser.parse_args())
    name, device, checking, threads, output, job, flags = (args.pop(k) for k in ("model", "device_gib", "check", "threads", "output", "worker", "worker_flags"))
    if job:
        return worker(name, json.loads(flags), job)
    if device == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / args["ranks"]
        args |= dict(cpu=True, device_gib=round(total / GIB, 1))
    else:
        args |= dict(device_gib=float(device))
    shape, s = read_shape(name), Settings(**args)
    if checking and s.ranks == 1:
        with tempfile.TemporaryDirectory() as folder:
            if name.lower() in SHAPES:  # a process of its own: its memory is not the run's
                code = f"import common, pathlib, torch; common.make_model({fields(shape)!r}, pathlib.Path({folder!r}), torch.bfloat16)"
                subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
            result = check(name, folder if name.lower() in SHAPES else name, shape, s, threads)
    elif checking:
        raise SystemExit("error: --check takes one rank")
    else:
        if s.cpu:
            s = dataclasses.replace(s, process_bytes=import_bytes(s.sampler))
        text, result = report(name, shape, s)
        print(text)
    if output:
        record = dict(model=Path(name).name, date=f"{datetime.now():%Y-%m-%d %H:%M}", shape=dataclasses.asdict(shape), settings=dataclasses.asdict(s), result=result, command=" ".join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]))
        Path(output).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
