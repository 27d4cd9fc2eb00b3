"""The transformers sampler: batched decoding without vLLM, on any device that torch supports.

transformers is imported inside functions, because the import takes seconds.
"""

import functools

import torch
import torch.nn.functional as F

from support.clock import clock
from support.models import build_model
from support.sampling import Sample, Sampling, Weights, cache_bytes

MAX_CACHE_BYTES = 2**30  # keys and values of one batch

# ---- the model: a cache with spare room, and attention -------------------------------------------


class RoomyUpdate:
    """The update() of a cache layer that keeps spare room for further tokens.

    The layer of transformers copies all keys and values for each new token. This one writes into a
    buffer; `keys` and `values` are views of its filled part.
    """

    def __init__(self):
        super().__init__()
        self.buffers: dict[str, torch.Tensor] = {}

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs):
        """Append keys and values [B, H_kv, new tokens, D]. Returns all of them."""
        if not self.is_initialized:
            return super().update(keys, values)
        self.keys = self.append("keys", self.keys, keys)
        self.values = self.append("values", self.values, values)
        return self.keys, self.values

    def append(self, name: str, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Write `new` behind `old` in the buffer. Returns a view of both."""
        start = old.shape[2]
        end = start + new.shape[2]
        buffer = self.buffers.get(name)
        # A new buffer at the start, after rows were selected, and when the old one is full.
        if buffer is None or len(buffer) != len(old) or buffer.shape[2] < end:
            spare = max(32, start // 2)
            buffer = old.new_empty(*old.shape[:2], end + spare, old.shape[3])
            buffer[:, :, :start] = old
            self.buffers[name] = buffer
        buffer[:, :, start:end] = new
        return buffer[:, :, :end]


@functools.cache
def roomy_layer_class() -> type:
    """The cache layer of transformers with RoomyUpdate.

    A class statement at the top of the file would import transformers.
    """
    from transformers.cache_utils import DynamicLayer

    return type("RoomyLayer", (RoomyUpdate, DynamicLayer), {})


def roomy_cache(config):
    """An empty cache with spare room, for any model of transformers."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    cache.layers = [roomy_layer_class()() for _ in range(config.num_hidden_layers)]
    return cache


def grouped_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention with grouped heads, as transformers calls it.

    query [B, H, T, D], key and value [B, H_kv, S, D], attention_mask None or [B, 1, T, S] ->
    [B, T, H, D]. With a mask, transformers' own function would copy keys and values for each head.
    """
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        is_causal=attention_mask is None and query.shape[2] > 1,
        scale=scaling,
        enable_gqa=True,
    )
    return out.transpose(1, 2), None


# ---- decoding ------------------------------------------------------------------------------------


class DecoderState:
    """The model's state in the middle of a batch: cache, mask, positions and next logits.

    B is the number of responses in the batch; T is the number of tokens so far.
    """

    def __init__(self, model, prompts: list[list[int]], n: int):
        """Read the prompts once, then repeat the state for the n responses of each prompt."""
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(p)) + p for p in prompts]  # on the left, masked
        valid = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        self.model = model
        self.cache = roomy_cache(model.config)
        self.mask = torch.tensor(valid, device=model.device)  # [B, T]
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.forward(torch.tensor(padded, device=model.device))
        self.cache.batch_repeat_interleave(n)
        self.mask = self.mask.repeat_interleave(n, 0)
        self.positions = self.positions[:, -1:].repeat_interleave(n, 0)  # [B, 1]
        self.logits = self.logits.repeat_interleave(n, 0)  # [B, V]

    def forward(self, token_ids: torch.Tensor) -> None:
        """Read tokens [B, new tokens]. Sets the logits of the next token."""
        out = self.model(
            input_ids=token_ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits = out.logits[:, -1]

    def append(self, token_ids: torch.Tensor) -> None:
        """Read one more token per response, [B]."""
        self.mask = F.pad(self.mask, (0, 1), value=1)
        self.positions = self.positions + 1
        self.forward(token_ids[:, None])

    def keep(self, chosen: torch.Tensor) -> None:
        """Drop all responses but those that are chosen, [B] bool. Copies the cache."""
        self.cache.batch_select_indices(chosen.nonzero()[:, 0])
        self.mask = self.mask[chosen]
        self.positions = self.positions[chosen]


class TransformersSampler:
    """Batched decoding with a key-value cache and an own copy of the weights.

    Each response draws from its own random stream. So it does not depend on the other responses
    of its batch.
    """

    def __init__(
        self, cfg, path: str, eos_ids: list[int], device: torch.device, dtype: torch.dtype
    ):
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register("grouped", grouped_attention)
        AttentionMaskInterface.register("grouped", sdpa_mask)
        self.model = build_model(path, dtype, "grouped", device).eval()
        self.eos_ids = torch.tensor(eos_ids, device=device)
        self.max_num_seqs = cfg.max_num_seqs

    def load_weights(self, weights: Weights) -> None:
        """Copy the trainer's weights."""
        own = self.model.state_dict()
        for name, tensor in weights:
            own[name].copy_(tensor)

    def sleep(self) -> None:
        """Free memory for the update. Nothing to do: the next rollout needs the copy."""

    def close(self) -> None:
        """Nothing to end."""

    def generate(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling
    ) -> list[list[Sample]]:
        """sampling.n samples for each prompt, in order. seeds: one per prompt."""
        # Prompts of similar lengths share a batch: less padding.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        results: list[list[Sample]] = [[] for _ in prompts]
        while order:
            size = self.batch_size(len(prompts[order[0]]), sampling)
            batch = order[:size]
            order = order[size:]
            groups = self.decode([prompts[i] for i in batch], [seeds[i] for i in batch], sampling)
            for i, samples in zip(batch, groups):
                results[i] = samples
        return results

    def batch_size(self, longest: int, sampling: Sampling) -> int:
        """The number of prompts in a batch, at least 1. longest: the longest prompt in tokens."""
        tokens = sampling.n * (longest + sampling.max_new_tokens)
        bytes_per_prompt = tokens * cache_bytes(self.model.config, self.model.dtype)
        by_count = self.max_num_seqs // sampling.n
        return max(1, min(by_count, MAX_CACHE_BYTES // bytes_per_prompt))

    @torch.inference_mode()
    def decode(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling
    ) -> list[list[Sample]]:
        """generate() for one batch."""
        state = DecoderState(self.model, prompts, sampling.n)
        limit = sampling.max_new_tokens
        uniform = uniform_numbers(seeds, sampling.n, limit).to(self.model.device)  # [B, limit]
        tokens = torch.zeros_like(uniform, dtype=torch.int32)
        logprobs = torch.zeros_like(uniform)
        lengths = torch.zeros(len(uniform), dtype=torch.long)
        truncated = torch.ones(len(uniform), dtype=torch.bool)
        rows = torch.arange(len(uniform), device=uniform.device)  # responses in `state`
        running = torch.ones_like(rows, dtype=torch.bool)  # those that have not ended
        for t in range(limit):
            clock.alive()
            token, logprob = draw(state.logits, uniform[rows, t], sampling)
            tokens[rows, t] = token.int()
            logprobs[rows, t] = logprob
            lengths[rows[running].cpu()] = t + 1
            running = running & ~torch.isin(token, self.eos_ids)
            truncated[rows.cpu()] = running.cpu()
            if t + 1 == limit or not running.any():
                break
            if running.sum() < 0.75 * len(rows):  # rarely, because it copies the cache
                state.keep(running)
                rows = rows[running]
                token = token[running]
                running = running[running]
            state.append(token)
        return to_samples(tokens, logprobs, lengths, truncated, sampling.n)


def uniform_numbers(seeds: list[int], n: int, limit: int) -> torch.Tensor:
    """A number in [0, 1) for each token that may be drawn, [prompts * n, limit]."""
    streams = []
    for seed in seeds:
        for k in range(n):
            generator = torch.Generator().manual_seed(seed + k)
            streams.append(torch.rand(limit, generator=generator))
    return torch.stack(streams)


def to_samples(tokens, logprobs, lengths, truncated, n: int) -> list[list[Sample]]:
    """Samples in groups of n. tokens, logprobs: [B, limit]; lengths, truncated: [B]."""
    tokens = tokens.cpu().numpy()
    logprobs = logprobs.cpu().numpy()
    samples = []
    for i, length in enumerate(lengths.tolist()):
        ids = tokens[i, :length].copy()
        samples.append(Sample(ids, logprobs[i, :length].copy(), bool(truncated[i])))
    return [samples[i : i + n] for i in range(0, len(samples), n)]


# ---- one token -----------------------------------------------------------------------------------


def draw(
    logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row, by inverting the distribution function.

    logits [B, V], uniform [B] in [0, 1) -> token ids [B], their log-probs [B]. At temperature 0:
    the most likely token, with log-prob 0.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1), torch.zeros_like(uniform)
    logprobs = torch.log_softmax(logits.float() / sampling.temperature, -1)
    if sampling.top_k or sampling.top_p < 1:
        logprobs = keep_top(logprobs, sampling.top_k, sampling.top_p)
    mass = logprobs.exp().cumsum(-1)  # [B, V]; the last entry is 1, up to rounding
    token = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True)
    token = token.clamp(max=mass.shape[-1] - 1)  # [B, 1]
    return token[:, 0], logprobs.gather(-1, token)[:, 0]


def keep_top(logprobs: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Log-probs [B, V] after top-k, then top-p of the remaining tokens, as in vLLM.

    The most likely token always remains. Removed tokens have -inf.
    """
    ranked, ids = logprobs.sort(-1, descending=True)
    if top_k:
        ranked[:, top_k:] = -torch.inf
    probabilities = ranked.softmax(-1)
    mass_before = probabilities.cumsum(-1) - probabilities
    ranked = ranked.masked_fill(mass_before > top_p, -torch.inf)
    kept = torch.empty_like(ranked).scatter(-1, ids, ranked)
    return torch.log_softmax(kept, -1)
