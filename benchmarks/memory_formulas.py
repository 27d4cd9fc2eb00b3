"""The formulas of memory_plan.py: bytes of each part of a run, per rank and phase.

plan() is a pure function of a Shape and the Settings. Each formula is next to the part of the table
that it fills.

Letters: P parameters of the model, R of its root (embedding, last norm, head), B of one block, V
vocabulary, D hidden size, I width of the MLP, L blocks, H heads and K key/value heads of width d, T
tokens of a micro-batch, S ranks that share the state of the trainer, c bytes of a number in the
compute dtype.
"""

from dataclasses import dataclass

GIB, MIB = 2**30, 2**20
PHASES = ("load", "rollout", "logprobs", "update", "sync")

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
