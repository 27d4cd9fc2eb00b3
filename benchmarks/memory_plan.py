"""The memory of a run, per rank and phase, before the run starts; and whether it fits.

    python benchmarks/memory_plan.py qwen3-4b --ranks 8 --device-gib 80
    python benchmarks/memory_plan.py FOLDER --device-gib cpu --check      # measured beside planned

MODEL is a shape (qwen3-0.6b ... qwen3-32b), a folder with a config.json, or a hub id. The flags are
those of lite_ppo.py; --ranks is the number of processes that torchrun starts. `plan` is a pure
function of two dataclasses; each formula is next to the part of the table that it fills. --check
runs the sampler and the trainer of lite_ppo.py (memory_trial.py, in a new process) and compares the
peak of each phase with the plan.

Letters: P parameters of the model, R of its root (embedding, last norm, head), B of one block, V
vocabulary, D hidden size, I width of the MLP, L blocks, H heads and K key/value heads of width d, T
tokens of a micro-batch, S ranks that share the state of the trainer, c bytes of a number in the
compute dtype.
"""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
GIB, MIB = 2**30, 2**20
BOUND = 1.25  # of --check
PHASES = ("load", "rollout", "logprobs", "update", "sync")
MOST_TOKENS = 2**22  # the largest --micro-batch-tokens that is tried

Parts = dict[str, float]  # bytes by name


# ---- models and settings -------------------------------------------------------------------------


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
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def block(self) -> int:
        """B: q and o, k and v, the MLP, two norms, and what some families add."""
        attention = 2 * self.hidden * (self.queries + self.keys)
        mlp = 3 * self.hidden * self.intermediate
        extra = 2 * self.head_dim * self.qk_norm + (self.queries + 2 * self.keys) * self.qkv_bias
        return attention + mlp + 2 * self.hidden + extra

    @property
    def embedding(self) -> int:
        """V D"""
        return self.vocab * self.hidden

    @property
    def root(self) -> int:
        """R"""
        return self.embedding * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """P"""
        return self.layers * self.block + self.root


SHAPES = {  # from the public config.json of each model; the base models have the same numbers
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
    from support.util import mask_broken_packages  # imports torch

    mask_broken_packages()
    config = load_config(name)
    kind = config.model_type
    if kind not in ("qwen2", "qwen3", "llama", "mistral"):
        known = "qwen2, qwen3, llama and mistral"
        raise SystemExit(f"error: {name}: the formulas are for {known}, not for {kind}")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        tied=bool(config.tie_word_embeddings),
        vocab=config.vocab_size,
        head_dim=head_dim,
        qk_norm=kind == "qwen3",
        qkv_bias=kind == "qwen2",
    )


def load_config(name: str):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(name)


@dataclass(frozen=True)
class Settings:
    """Flags of lite_ppo.py, with its defaults, and what only a plan needs."""

    ranks: int = 1  # processes that torchrun starts
    shard_ranks: int = 0  # S, ranks that share one copy of the trainer's state; 0: all of them
    prompts_per_step: int = 128
    group_size: int = 8
    minibatches: int = 1
    max_prompt_tokens: int = 1024
    max_new_tokens: int = 8192
    micro_batch_tokens: int = 16384
    max_num_seqs: int = 256
    gpu_memory_utilization: float = 0.6
    dtype: str = "auto"
    activation_checkpointing: bool = True
    cpu_offload: bool = False
    kl_coef: float = 0.0
    sampler: str = "vllm"
    device_gib: float = 80.0
    cpu: bool = False  # no GPU: device_gib is this rank's share of the memory of the machine
    process_bytes: int = 0  # the process before it holds a model; 0: the constants below

    @property
    def bytes(self) -> int:
        """c"""
        float32 = self.dtype == "float32" or (self.dtype == "auto" and self.cpu)
        return 4 if float32 else 2

    @property
    def shards(self) -> int:
        """S"""
        return self.shard_ranks or self.ranks

    @property
    def full_length(self) -> int:
        """Tokens of the longest prompt and response."""
        return self.max_prompt_tokens + self.max_new_tokens

    @property
    def longest(self) -> int:
        """A sequence is never cut, so a micro-batch has room for the longest one."""
        return self.full_length - 1

    @property
    def tokens(self) -> int:
        """T"""
        return max(self.micro_batch_tokens, self.longest)

    @property
    def live(self) -> int:
        """Sequences that one engine decodes at once."""
        return min(self.max_num_seqs, -(-self.prompts_per_step // self.ranks) * self.group_size)

    @property
    def vllm_gpu(self) -> bool:
        return self.sampler == "vllm" and not self.cpu

    @property
    def vllm_cpu(self) -> bool:
        return self.sampler == "vllm" and self.cpu


# ---- constants that no formula gives -------------------------------------------------------------

# CPU: the imports of lite_ppo.py; --check measures them anew
PROCESS = {"transformers": 620 * MIB, "vllm": 1150 * MIB}
# CPU: what an engine holds after its start, beside weights and cache
ENGINE = {"transformers": 0, "vllm": 250 * MIB}
# CPU: code and buffers of the first step
GROWTH = 150 * MIB
# CPU: smaller tensors are in the heap of the C library, which keeps freed memory
MAPPED = 32 * MIB
# CUDA: context, NCCL, kernels; for vLLM also CUDA graphs, which stay while it sleeps
CUDA = {"transformers": 1 * GIB, "vllm": 3 * GIB}
# CUDA: share of the transient tensors that the caching allocator loses to fragments
SLACK = 0.05
# tokens of one vLLM step, on a CPU or not: the width of its prefill
VLLM_BATCHED_TOKENS = {True: 4096, False: 8192}
# [sequences, V] float32 while a token is drawn: logits, log-probs, probs, running sum ...
LOGIT_COPIES = {"transformers": 4, "vllm": 6}
# bytes of a chunk of float32 logits on a CPU, and as a share of a GPU: util.logits_at_a_time()
LOGITS = 256 * MIB
LOGITS_SHARE = 1 / 128


# ---- formulas: per token and per tensor ----------------------------------------------------------


def block_bytes(shape: Shape, s: Settings) -> float:
    """Bytes per token that one block keeps for its backward pass, without its input."""
    c, D = s.bytes, shape.hidden
    # each norm: the input in float32, the scaled input, the output for the projections
    norms = 2 * (8 + c) * D
    # the input in float32, the scaled input
    qk_norms = (4 + c) * (shape.queries + shape.keys) * shape.qk_norm
    # q, k, v and the output; the input of o_proj
    attention = c * (2 * shape.queries + 2 * shape.keys) + c * shape.queries
    # gate, its activation, up, their product
    mlp = 4 * c * shape.intermediate
    return norms + qk_norms + attention + mlp


def forward_bytes(shape: Shape, s: Settings) -> float:
    """Bytes per token of a block that keeps nothing: residual, norm, wider of attention and MLP."""
    attention = 3 * (shape.queries + 2 * shape.keys)
    wide = max(3 * shape.intermediate, attention)
    return s.bytes * (2 * shape.hidden + wide) + 8 * shape.hidden


def logits_bytes(shape: Shape, s: Settings) -> float:
    """A chunk of float32 logits and their gradient in half precision; a CPU adds small blocks."""
    chunk = LOGITS if s.cpu else LOGITS_SHARE * s.device_gib * GIB
    rows = min(max(64, chunk // 4 // shape.vocab), s.tokens)
    return rows * shape.vocab * (4 + (2 if s.bytes == 2 else 0)) + 16 * MIB * s.cpu


def cache_bytes(shape: Shape, s: Settings) -> int:
    """Keys and values of one token."""
    return 2 * s.bytes * shape.layers * shape.keys


def gathered_bytes(shape: Shape, s: Settings) -> float:
    """Whole weights: the root during a pass; a block, and the buffer of the next one."""
    blocks = 2 if s.shards > 1 else 1
    return s.bytes * shape.root + s.bytes * shape.block * blocks


# ---- formulas: the sampler -----------------------------------------------------------------------


def sampling_bytes(shape: Shape, s: Settings) -> float:
    """Logits while a token is drawn, and the activations of the prefill."""
    prefill = min(s.live, s.max_num_seqs) * s.max_prompt_tokens / s.group_size
    if s.sampler == "vllm":
        prefill = VLLM_BATCHED_TOKENS[s.cpu]
    logits = 4 * LOGIT_COPIES[s.sampler] + (2 if s.bytes == 2 else 0)
    return s.live * shape.vocab * logits + prefill * forward_bytes(shape, s)


def engine_parts(shape: Shape, s: Settings, awake: str) -> Parts:
    """The memory of the sampler; awake: "no", "weights", or "all"."""
    weights, sampling = s.bytes * shape.parameters, sampling_bytes(shape, s)
    per_token = cache_bytes(shape, s)
    if s.sampler == "transformers":
        if awake != "all":
            return {"engine: weights": weights}
        # The cache grows with the sequences, to 1 GiB or the responses of one prompt. While it
        # grows, the cache of one block exists twice.
        room = max(s.group_size * s.full_length * per_token, 2**30)
        cache = min(s.live * s.full_length * per_token, room) * (1 + 1 / shape.layers)
        parts = {"engine: weights": weights, "engine: KV cache": cache}
        return parts | {"engine: sampling": sampling}
    if s.cpu:
        # vLLM packs its matrices, and a tied head gets its own pack. The cache always exists.
        parts = {
            "engine: weights": weights + s.bytes * shape.embedding * shape.tied,
            "engine: KV cache": max(256 * MIB, 2 * s.full_length * per_token),
            "engine: rest": ENGINE["vllm"],
        }
        return parts | ({"engine: sampling": sampling} if awake == "all" else {})
    if awake == "no":
        return {}
    if awake == "weights":
        return {"engine: weights": weights}
    # vLLM fills its share of the GPU: all that weights and sampling leave is cache
    whole = s.gpu_memory_utilization * s.device_gib * GIB
    parts = {"engine: weights": weights, "engine: sampling": sampling}
    return parts | {"engine: KV cache": whole - weights - sampling}


# ---- formulas: the trainer -----------------------------------------------------------------------


def resident_parts(shape: Shape, s: Settings) -> Parts:
    """What the trainer always holds: float32 weights, Adam's two moments, perhaps a reference."""
    P, S = shape.parameters, s.shards
    parts = {"master weights": 4 * P / S, "Adam": 8 * P / S}
    if s.kl_coef > 0:
        parts["reference"] = 4 * P / S
    return parts


def update_moments(shape: Shape, s: Settings) -> dict[str, Parts]:
    """What backward holds beside the residents, at the moments that can be the highest."""
    c, S, T, L, D = s.bytes, s.shards, s.tokens, shape.layers, shape.hidden
    P, R, B, VD = shape.parameters, shape.root, shape.block, shape.embedding
    gathered = gathered_bytes(shape, s)
    inputs = T * (L + 1) * D * c  # of each block and of the last norm
    inside = T * block_bytes(shape, s)  # of one block
    attention = T * c * shape.queries  # its output, which checkpointing keeps of each block
    saved = inputs + L * (attention if s.activation_checkpointing else inside)
    recomputed = inside - attention if s.activation_checkpointing else 0
    # last norm, the rows that predict, and the gradient there
    last = T * D * (8 + 3 * c)
    # gradients inside a block: the three of the MLP are the widest
    flow = T * c * (3 * shape.intermediate + 2 * D)
    # of one block: its gradient, and the float32 buffers of this and the previous reduction
    reduce = (c + 4 + 4) * B
    # gradients of earlier micro-batches, where there is more than one
    one_micro_batch = s.minibatches * s.tokens >= (
        s.prompts_per_step * s.group_size * s.longest / s.ranks
    )
    earlier = 0 if one_micro_batch else 4 * P / S
    without_root = max(earlier, 4 * (P - R) / S)
    # the gradient of the head: sum, share of one chunk, and the cast
    head = 4 * VD + (0 if c == 4 else 4 * VD + c * VD)
    # the gradients of embedding and head meet; then the root frees its weights and is reduced
    root = max(c * R + 2 * c * VD, c * R + 4 * R + 4 * R / S)
    return {
        "head": {
            "gradients": earlier,
            "gathered": gathered,
            "activations": saved + last + T * D * 4,
            "logits": logits_bytes(shape, s),
            "head, reduction": head,
        },
        "first block": {
            "gradients": earlier,
            "gathered": gathered,
            "activations": saved + recomputed + flow,
            "head, reduction": c * VD + reduce,
        },
        "last block": {
            "gradients": without_root,
            "gathered": gathered,
            "activations": T * D * c + inside + flow,
            "head, reduction": c * VD + reduce,
        },
        "root": {"gradients": without_root, "head, reduction": root},
        "optimizer": {"gradients": 4 * P / S},
    }


def sync_bytes(shape: Shape, s: Settings) -> float:
    """Of one parameter: its shard in the compute dtype, the whole, and what vLLM collects."""
    c, largest = s.bytes, max(shape.embedding, shape.hidden * shape.intermediate)
    fused = 0  # a fused layer of vLLM
    if s.vllm_gpu:
        fused = c * max(shape.embedding, 2 * shape.hidden * shape.intermediate)
    if s.vllm_cpu:  # a new layer beside the old one: the weight, its pack, a tied head's pack
        fused = c * (2 + shape.tied) * shape.embedding
    shard = c * largest / s.shards if c != 4 else 0
    whole = c * largest if s.shards > 1 else 0
    return shard + whole + fused


def load_bytes(shape: Shape, s: Settings) -> float:
    """While weights are read. A CPU gives memory only when it is first used."""
    if s.cpu:  # vLLM: the tied head, unpacked, until the weights are loaded
        return s.bytes * shape.embedding * (s.sampler == "vllm" and shape.tied)
    largest = max(shape.embedding, shape.hidden * shape.intermediate)
    return 4 * largest / s.shards + s.bytes * largest


# ---- the plan ------------------------------------------------------------------------------------


def add_heap(phases: dict[str, Parts], shape: Shape, s: Settings) -> None:
    """CPU: small tensors of the update stay in the heap, as far as a phase does not reuse them."""
    c = s.bytes
    kept = s.tokens * (block_bytes(shape, s) + shape.layers * shape.hidden * c)
    kept += 2 * c * shape.block
    if 4 * shape.block < MAPPED:
        kept += 4 * shape.layers * shape.block
    reusing = ("engine: KV cache", "engine: sampling", "gathered", "activations", "logits")
    for name in PHASES[1:]:
        parts = phases[name]
        reused = sum(parts.get(part, 0) for part in (*reusing, "head, reduction"))
        parts["process"] += GROWTH
        parts["kept by the heap"] = max(0, kept - reused)


def add_slack(phases: dict[str, Parts]) -> None:
    """CUDA: what the allocator loses to fragments."""
    transient = ("gathered", "activations", "logits", "head, reduction", "transfer")
    for parts in phases.values():
        parts["slack"] = SLACK * sum(parts.get(part, 0) for part in transient)


def plan_phases(shape: Shape, s: Settings, residents: Parts, update: Parts) -> dict[str, Parts]:
    process = {"process": float(CUDA[s.sampler])}
    if s.cpu:
        process = {"process": float(s.process_bytes or PROCESS[s.sampler])}
    base, asleep = process | residents, engine_parts(shape, s, "no")
    loading = {} if s.cpu and s.sampler == "transformers" else asleep
    forward = s.tokens * forward_bytes(shape, s)
    logprobs = {
        "gathered": gathered_bytes(shape, s),
        "activations": forward,
        "logits": s.tokens * shape.hidden * (8 + 2 * s.bytes) + logits_bytes(shape, s),
    }
    if s.minibatches == 1 and not s.kl_coef:
        logprobs = {}  # nothing to compute: the ratio is 1
    phases = {
        "load": process | loading | residents | {"transfer": load_bytes(shape, s)},
        "rollout": base | engine_parts(shape, s, "all"),
        "logprobs": base | asleep | logprobs,
        "update": base | asleep | update,
        "sync": base | engine_parts(shape, s, "weights") | {"transfer": sync_bytes(shape, s)},
    }
    phases["load"].pop("Adam", None)  # the moments appear with the first optimizer step
    if s.vllm_gpu:  # the engine starts first, on an empty GPU
        starting = process | engine_parts(shape, s, "all")
        if sum(starting.values()) > sum(phases["load"].values()):
            phases["load"] = starting
    if s.cpu:
        add_heap(phases, shape, s)
    else:
        add_slack(phases)
    return phases


def plan(shape: Shape, s: Settings) -> dict:
    """Bytes per phase and part, for one rank, with the verdict. It names the peak of the update."""
    residents, moments, host = resident_parts(shape, s), update_moments(shape, s), {}
    if s.cpu_offload and not s.cpu:
        host = residents | {"gradients": 4 * shape.parameters / s.shards}
        residents = {}
        for parts in moments.values():
            parts.pop("gradients")
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    phases = plan_phases(shape, s, residents, moments[moment])
    totals = {name: sum(parts.values()) for name, parts in phases.items()}
    peak_phase = max(totals, key=totals.get)
    peak = totals[peak_phase]
    cache = max(0, phases["rollout"]["engine: KV cache"])
    cache_tokens = int(cache / cache_bytes(shape, s))
    cache_room = cache_tokens >= s.full_length  # at least one sequence of full length
    return {
        "phases": phases,
        "totals": totals,
        "peak": peak,
        "peak_phase": peak_phase,
        "update_moment": moment,
        "host": host,
        "cache_tokens": cache_tokens,
        "cache_room": cache_room,
        "fits": cache_room and peak <= s.device_gib * GIB,
    }


# ---- what would fit ------------------------------------------------------------------------------


def solve_micro_batch(shape: Shape, s: Settings, most: int = MOST_TOKENS) -> int:
    """The largest --micro-batch-tokens that fits, by bisection in the same formulas; 0 if none."""

    def fits(tokens: int) -> bool:
        return plan(shape, dataclasses.replace(s, micro_batch_tokens=tokens))["fits"]

    if not fits(1):
        return 0
    low, high = 1, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


Change = tuple[str, dict]  # a flag, and the same as fields of Settings


def possible_changes(s: Settings) -> list[list[Change]]:
    """Flags that save memory, by kind; the mildest change of a kind comes first."""
    kinds: list[list[Change]] = []
    if not s.activation_checkpointing:
        kinds.append([("--activation-checkpointing", dict(activation_checkpointing=True))])
    if s.vllm_gpu:
        shares = [percent / 100 for percent in range(95, 9, -5)]
        shares.sort(key=lambda share: abs(share - s.gpu_memory_utilization))
        kind = []
        for share in shares:
            if share != s.gpu_memory_utilization:
                change = dict(gpu_memory_utilization=share)
                kind.append((f"--gpu-memory-utilization {share:g}", change))
        kinds.append(kind)
    else:
        sizes = [n for n in (128, 64, 32, 16, 8) if n < s.live]
        kinds.append([(f"--max-num-seqs {n}", dict(max_num_seqs=n)) for n in sizes])
    if s.cpu:
        return kinds
    if s.shard_ranks:
        kinds.append([("--shard-ranks 0", dict(shard_ranks=0))])
    more = [n for n in (2, 4, 8, 16, 32, 64) if n > s.ranks]
    kinds.append([(f"--ranks {n}", dict(ranks=n, shard_ranks=0)) for n in more])
    if not s.cpu_offload:
        kinds.append([("--cpu-offload", dict(cpu_offload=True))])
    return kinds


def settle(shape: Shape, s: Settings) -> list[str] | None:
    """The missing flags: [] if it fits, smaller micro-batches if they fit, else None."""
    if plan(shape, s)["fits"]:
        return []
    tokens = solve_micro_batch(shape, s)
    return [f"--micro-batch-tokens {tokens}"] if tokens else None


def first_way(shape: Shape, s: Settings, combinations) -> list[str] | None:
    """The flags of the first combination of changes that fits."""
    for changes in combinations:
        fields = {}
        for _, change in changes:
            fields |= change
        missing = settle(shape, dataclasses.replace(s, **fields))
        if missing is not None:
            return [flag for flag, _ in changes] + missing
    return None


def remedies(shape: Shape, s: Settings) -> list[list[str]]:
    """Ways to make the run fit, the cheapest first, each a list of flags.

    A way is one change of a kind, perhaps with smaller micro-batches; if none fits, two changes.
    """
    micro_batch = settle(shape, s)
    if micro_batch:
        return [micro_batch]
    kinds = possible_changes(s)
    for number in (1, 2):
        ways = []
        for chosen in itertools.combinations(kinds, number):
            way = first_way(shape, s, itertools.product(*chosen))
            if way:
                ways.append(way)
        if ways:
            return ways
    return []


# ---- report --------------------------------------------------------------------------------------


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def table(result: dict) -> str:
    names = dict.fromkeys(part for phase in PHASES for part in result["phases"][phase])
    lines = [f"{'GiB per rank':<20}" + "".join(f"{phase:>10}" for phase in PHASES)]
    for name in names:
        line = f"{name:<20}"
        for phase in PHASES:
            size = result["phases"][phase].get(name)
            line += f"{'' if size is None else gib(size):>10}"
        lines.append(line)
    total = "".join(f"{gib(result['totals'][phase]):>10}" for phase in PHASES)
    lines.append(f"{'total':<20}{total}")
    return "\n".join(lines)


def describe_run(name: str, shape: Shape, s: Settings) -> str:
    dtype = "float32" if s.bytes == 4 else "bfloat16"
    longest = " (the longest sequence)" if s.tokens > s.micro_batch_tokens else ""
    return (
        f"{name}: {shape.parameters:,} parameters; {s.ranks} rank(s), state shared by {s.shards}; "
        f"{dtype}; micro-batches of {s.tokens} tokens{longest}"
    )


def verdict(shape: Shape, s: Settings, result: dict) -> str:
    if result["fits"]:
        most = solve_micro_batch(shape, s)
        more = " or more" if most == MOST_TOKENS else ""
        return f"fits; the largest --micro-batch-tokens that fits: {most}{more}"
    text = "does not fit"
    if not result["cache_room"]:
        text += " (the share of the sampler has no room for the cache of one sequence)"
    ways = [" ".join(way) for way in remedies(shape, s)]
    if not ways:
        return f"{text}; none of these flags is enough"
    return f"{text}; these flags would fit: " + "; or ".join(ways)


def report(name: str, shape: Shape, s: Settings) -> tuple[str, dict]:
    result = plan(shape, s)
    device = "machine" if s.cpu else "GPU"
    sequences = result["cache_tokens"] / s.full_length
    lines = [
        describe_run(name, shape, s),
        table(result),
        "",
        f"peak: {gib(result['peak'])} GiB in {result['peak_phase']}, of {s.device_gib:g} GiB "
        f"on this {device}; highest moment of the update: {result['update_moment']}",
        f"KV cache: room for {result['cache_tokens']:,} tokens = {sequences:.1f} sequences "
        "of full length",
    ]
    if result["host"]:
        host = ", ".join(f"{part} {gib(size)} GiB" for part, size in result["host"].items())
        lines.append(f"host memory per rank: {host}")
    save = gib((4 + s.bytes) * shape.parameters)
    lines.append(f"saving: rank 0 gathers the model in host memory, up to {save} GiB more")
    lines.append(verdict(shape, s, result))
    return "\n".join(lines), result


# ---- measured beside planned ---------------------------------------------------------------------


def config_fields(shape: Shape) -> dict:
    """The shape as the fields of a Qwen3 config, for common.make_model."""
    if not shape.qk_norm or shape.qkv_bias:
        raise SystemExit("error: a random model is a Qwen3; give a folder to check another family")
    return dict(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        vocab_size=shape.vocab,
        max_position_embeddings=32768,
    )


def trial_flags(s: Settings) -> list[str]:
    """The settings as flags of lite_ppo.py."""
    flags = []
    for name, value in dataclasses.asdict(s).items():
        flag = name.replace("_", "-")
        if name in ("ranks", "shard_ranks", "device_gib", "cpu", "process_bytes"):
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag}={value}")
    return flags


def run_trial(path: str, s: Settings, threads: int) -> dict:
    """Two real steps in a new process; what they took."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "measured.json")
        command = [sys.executable, str(HERE / "memory_trial.py"), path, str(output)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run([*command, *trial_flags(s)], check=True, env=environment)
        return json.loads(output.read_text())


def compare(result: dict, peaks: dict[str, float], s: Settings) -> dict[str, dict]:
    """Planned and measured bytes of each phase, and of the highest one."""
    rows = {}
    for phase in PHASES:
        planned, measured = result["totals"][phase], peaks[phase]
        if not s.cpu:
            # The allocator counts neither the context nor, beside the trainer, the engine.
            if phase in ("load", "rollout", "sync"):
                continue
            for part, size in result["phases"][phase].items():
                if part.startswith("engine") or part in ("process", "slack"):
                    planned -= size
        rows[phase] = dict(planned=planned, measured=measured, ratio=planned / measured)
    planned = max(row["planned"] for row in rows.values())
    measured = max(row["measured"] for row in rows.values())
    rows["peak"] = dict(planned=planned, measured=measured, ratio=planned / measured)
    return rows


def check(name: str, path: str, shape: Shape, s: Settings, threads: int) -> dict:
    """Measure a run and plan the same run. Imports and tokens of the plan are those of the run."""
    measured = run_trial(path, s, threads)
    peaks = measured["peaks"]
    s = dataclasses.replace(
        s,
        micro_batch_tokens=min(s.micro_batch_tokens, measured["tokens"]),
        process_bytes=peaks["process"] if s.cpu else 0,
    )
    text, result = report(name, shape, s)
    print(text + "\n")
    print(f"{'GiB':<20}{'planned':>10}{'measured':>10}{'ratio':>10}")
    rows = compare(result, peaks, s)
    for phase, row in rows.items():
        sizes = f"{gib(row['planned']):>10}{gib(row['measured']):>10}"
        print(f"{phase:<20}{sizes}{row['ratio']:>10.2f}")
    resident = ", ".join(gib(peaks[key]) for key in ("process", "engine", "policy"))
    seconds = ", ".join(f"{phase} {value:.0f} s" for phase, value in measured["seconds"].items())
    print(f"resident after imports, sampler, policy: {resident} GiB; {seconds}")
    ratio = rows["peak"]["ratio"]
    word = "PASS" if max(ratio, 1 / ratio) <= BOUND else "FAIL"
    print(f"{word}  planned / measured peak: {ratio:.2f} (within a factor of {BOUND})")
    return dict(phases=rows, seconds=measured["seconds"])


def check_model(name: str, shape: Shape, s: Settings, threads: int) -> dict:
    """Check a folder as it is, or a random model of a shape."""
    if s.ranks > 1:
        raise SystemExit("error: --check takes one rank")
    if name.lower() not in SHAPES:
        return check(name, name, shape, s, threads)
    with tempfile.TemporaryDirectory() as folder:
        # in a new process, so that its memory is not counted
        make = f"common.make_model({config_fields(shape)!r}, Path({folder!r}), torch.bfloat16)"
        code = f"import common, torch\nfrom pathlib import Path\n{make}"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE)
        return check(name, folder, shape, s, threads)


def import_bytes(sampler: str) -> int:
    """Resident memory of a new process after the imports of a run."""
    code = f"""
import lite_ppo, torch._dynamo, transformers.models.qwen3.modeling_qwen3
from support import samplers
samplers.choose_sampler({sampler!r})
for line in open("/proc/self/status"):
    if line.startswith("VmRSS"):
        print(line.split()[1])
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) * 1024 if done.returncode == 0 else PROCESS[sampler]


# ---- command line --------------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a shape, a folder with a config.json, or a hub id")
    flags = []
    for field in dataclasses.fields(Settings):
        if field.name in ("cpu", "process_bytes", "device_gib"):
            continue
        flags.append(field.name)
        kind: dict = dict(type=type(field.default))
        if isinstance(field.default, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, **kind)
    parser.add_argument("--device-gib", default="80", help="of a GPU; or cpu: this machine")
    parser.add_argument("--check", action="store_true", help="run two steps here and compare")
    parser.add_argument("--threads", type=int, default=2, help="of --check")
    parser.add_argument("--output", help="JSON file")
    args = parser.parse_args(arguments)
    settings = {name: getattr(args, name) for name in flags}
    if args.device_gib == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / args.ranks
        return args, Settings(**settings, cpu=True, device_gib=round(total / GIB, 1))
    return args, Settings(**settings, device_gib=float(args.device_gib))


def main() -> None:
    args, s = parse()
    shape = read_shape(args.model)
    if args.check:
        result = check_model(args.model, shape, s, args.threads)
    else:
        if s.cpu:
            s = dataclasses.replace(s, process_bytes=import_bytes(s.sampler))
        text, result = report(args.model, shape, s)
        print(text)
    if args.output:
        record = dict(
            model=Path(args.model).name,
            date=f"{datetime.now():%Y-%m-%d %H:%M}",
            shape=dataclasses.asdict(shape),
            settings=dataclasses.asdict(s),
            result=result,
            command=" ".join(["python", "benchmarks/memory_plan.py", *sys.argv[1:]]),
        )
        Path(args.output).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
