"""Two engines that sample responses: vLLM and transformers.

    vllm           in this process, beside the trainer; fast
    transformers   batched decoding without vLLM, on any device that torch supports

Both have the methods generate, load_weights, sleep and close. The weights always come from the
trainer, as a stream of (name, full tensor); no engine reads them from disk.

transformers and vLLM are imported inside functions, because the imports take seconds.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from support.clock import clock
from support.errors import UserError
from support.models import build_model

Weights = Iterator[tuple[str, torch.Tensor]]


class Sampling(NamedTuple):
    n: int  # responses per prompt; response k is drawn with the seed of the prompt + k
    max_new_tokens: int
    temperature: float  # 0: always the most likely token
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off


class Sample(NamedTuple):
    token_ids: np.ndarray  # [length] int32, with the end-of-sequence token
    logprobs: np.ndarray  # [length] float32, after temperature, top-p and top-k
    truncated: bool  # ended by the length limit


def cache_bytes(config, dtype: torch.dtype) -> int:
    """Bytes of keys and values per token."""
    head_dim = getattr(config, "head_dim", None)
    if not head_dim:
        head_dim = config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    numbers = 2 * config.num_hidden_layers * heads * head_dim
    return numbers * dtype.itemsize


# ---- transformers --------------------------------------------------------------------------------

MAX_CACHE_BYTES = 2**30  # keys and values of one batch


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


# ---- vLLM ----------------------------------------------------------------------------------------

VLLM_SETTINGS = {  # read when vLLM is imported
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
VLLM_MOST_SEQUENCES = 4096  # that it decodes at once on a CPU
VLLM_TEMPERATURES = (0.01, 2.0)  # vLLM raises lower ones to 0.01, and refuses higher ones


class VllmSampler:
    """vLLM in this process, beside the trainer: one engine per rank.

    Every call that depends on the version of vLLM is in this class (0.32).
    """

    def __init__(
        self, cfg, path: str, eos_ids: list[int], device: torch.device, dtype: torch.dtype
    ):
        from transformers import AutoConfig
        from vllm import LLM

        self.cuda = device.type == "cuda"
        self.eos_ids = eos_ids
        config = AutoConfig.from_pretrained(path)
        max_model_len = cfg.max_prompt_tokens + cfg.max_new_tokens
        if not self.cuda:
            register_models(config.architectures)
        two_responses = 2 * max_model_len * cache_bytes(config, dtype)
        options = device_options(cfg, device, two_responses)
        self.sleeps = "enable_sleep_mode" in options
        ranks = os.environ["LOCAL_WORLD_SIZE"]
        self.llm = LLM(
            model=path,
            load_format="dummy",  # the weights come from the trainer
            dtype=str(dtype).removeprefix("torch."),
            distributed_executor_backend="external_launcher",  # one engine per torchrun rank
            seed=cfg.seed,
            max_model_len=max_model_len,
            max_num_seqs=min(cfg.max_num_seqs, VLLM_MOST_SEQUENCES),
            logprobs_mode="processed_logprobs",  # after temperature, top-p and top-k
            **options,
        )
        os.environ["LOCAL_WORLD_SIZE"] = ranks  # vLLM for CPUs sets it to 1
        self.sleep()

    def load_weights(self, weights: Weights) -> None:
        """Wake up and copy the trainer's weights. RuntimeError if old cache entries remain."""
        if self.sleeps:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        with torch.no_grad():
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.cuda:
            torch.cuda.empty_cache()
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        if not self.llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM kept cached keys and values of the old weights; "
                "install the version of requirements.txt"
            )

    def sleep(self) -> None:
        """Free memory for the update: drop weights and cache, until load_weights()."""
        if self.sleeps:
            self.llm.sleep(level=2)

    def generate(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling
    ) -> list[list[Sample]]:
        """sampling.n samples for each prompt, in order. seeds: one per prompt."""
        from vllm import SamplingParams, TokensPrompt

        # vLLM allows one greedy response per prompt. Copies of it are the others.
        n = sampling.n if sampling.temperature else 1
        options = dict(
            n=n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=self.eos_ids,
            ignore_eos=True,  # else vLLM would also end at the ids of the model's files
            logprobs=0,  # of the drawn token only
            flat_logprobs=True,
            detokenize=False,
        )
        inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        params = [SamplingParams(seed=seed, **options) for seed in seeds]
        results = []
        for output in self.run_engine(inputs, params):
            outputs = sorted(output.outputs, key=lambda o: o.index)
            results.append([self.to_sample(o) for o in outputs] * (sampling.n // n))
        return results

    def run_engine(self, inputs: list, params: list) -> list:
        """vLLM's RequestOutput of each input, in order: LLM.generate() with signs of life."""
        self.llm.enqueue(inputs, params, use_tqdm=False)
        engine = self.llm.llm_engine
        finished = []
        while engine.has_unfinished_requests():
            finished += [output for output in engine.step() if output.finished]
            clock.alive()
        return sorted(finished, key=lambda output: int(output.request_id))

    def to_sample(self, output: Any) -> Sample:
        """A Sample from vLLM's CompletionOutput."""
        token_ids = np.array(output.token_ids, np.int32)
        logprobs = np.array(output.logprobs.logprobs, np.float32)
        return Sample(token_ids, logprobs, output.finish_reason == "length")

    def close(self) -> None:
        """End the engine. This also ends torch.distributed."""
        self.llm.llm_engine.engine_core.shutdown()


def device_options(cfg, device: torch.device, two_responses: int) -> dict[str, Any]:
    """How vLLM gets its memory, and what a CPU needs.

    two_responses: bytes of keys and values of two long responses.

    From a share of the GPU, vLLM measures how much the model leaves, and it checks the free memory
    of the whole GPU when it starts and when it sleeps. Both fail if another process changes its
    own memory at that moment. With a fixed cache vLLM measures nothing and keeps its memory.
    """
    fixed = fixed_cache()
    if device.type != "cuda":
        return dict(
            kv_cache_memory_bytes=fixed or max(2**28, two_responses),
            enforce_eager=True,
            enable_chunked_prefill=False,  # vLLM for CPUs cannot split a prompt with a seed
        )
    if not fixed:
        return dict(gpu_memory_utilization=cfg.gpu_memory_utilization, enable_sleep_mode=True)
    # vLLM does not start unless this share of the GPU is free.
    share = min(1.0, fixed / torch.cuda.get_device_properties(device).total_memory)
    return dict(kv_cache_memory_bytes=fixed, gpu_memory_utilization=share)


def fixed_cache() -> int:
    """Bytes of the cache that LITE_PPO_KV_CACHE_GIB asks for; 0: none."""
    text = os.environ.get("LITE_PPO_KV_CACHE_GIB", "0")
    try:
        size = int(float(text) * 2**30)
    except (ValueError, OverflowError):  # also for "nan" and "inf"
        size = -1
    if size < 0:
        raise UserError(f"LITE_PPO_KV_CACHE_GIB={text}: must be a number of GiB, such as 1.25")
    return size


def check_temperatures(cfg) -> None:
    """UserError for a temperature that vLLM does not sample with."""
    low, high = VLLM_TEMPERATURES
    for flag in ("temperature", "eval_temperature"):
        value = getattr(cfg, flag)
        if value and not low <= value <= high:  # 0 is greedy
            raise UserError(
                f"--{flag.replace('_', '-')} {value}: vLLM takes {low} to {high}; choose such a "
                "value, or --sampler transformers"
            )


def register_models(architectures: list[str]) -> None:
    """Import the model classes in this process. For CPUs only.

    vLLM would inspect them in another process, to keep CUDA out of this one. That is slow, and it
    fails if torchvision is broken.
    """
    from vllm import ModelRegistry

    for name in architectures:
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


# ---- choice --------------------------------------------------------------------------------------


def choose_sampler(wanted: str, architectures: Sequence[str] = ()) -> tuple[str, str]:
    """The sampler for --sampler, and the reason, to be shown as "NAME (REASON)".

    architectures: the class names of config.json.
    "auto" is vllm where it runs, else transformers. UserError if "vllm" does not run here.
    """
    if wanted == "transformers":
        return "transformers", "chosen by --sampler"
    problem = vllm_problem() or missing_in_vllm(architectures)
    if not problem:
        return "vllm", "installed, and it supports this machine"
    if wanted == "vllm":
        raise UserError(
            f"--sampler vllm: {problem}; install a vLLM that fits, or use --sampler transformers"
        )
    advice = "fine on a CPU"
    if torch.cuda.is_available():
        advice = "a vLLM that fits would sample faster"
    return "transformers", f"{problem}; {advice}"


def vllm_problem() -> str:
    """Why vLLM does not run here, or "". Sets VLLM_SETTINGS, then imports vLLM.

    vLLM's CUDA build can be imported on a machine without a GPU, and fails much later. So its
    platform is checked as well.
    """
    for name, value in VLLM_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        from vllm.platforms import current_platform

        if current_platform.device_type not in ("cpu", "cuda"):
            return "the installed vLLM is a GPU build, and this machine has no GPU"
        from vllm import LLM  # noqa: F401  the rest of vLLM may be broken
    except ModuleNotFoundError as error:
        if error.name in ("vllm", "vllm.platforms"):
            return "vLLM is not installed"
        return f"vLLM does not import: {error}"
    except Exception as error:  # a broken installation can raise an exception of any type
        return f"vLLM does not import: {type(error).__name__}: {error}"
    return ""


def missing_in_vllm(architectures: Sequence[str]) -> str:
    """Why vLLM cannot sample from these classes, or "".

    For a class that it does not implement, vLLM changes that of transformers in this process. The
    trainer could then not use it any more.
    """
    if not architectures:
        return ""
    from vllm import ModelRegistry

    for name in architectures:
        entry = ModelRegistry.models.get(name)
        module = getattr(entry, "module_name", "")
        if entry is None or module == "vllm.model_executor.models.transformers":
            return f"vLLM has no implementation of its own of {name}"
    return ""


@clock("start")  # a phase of its own: the watchdog sees that start-up makes progress
def make(name: str, cfg, path: str, eos_ids: list[int], device: torch.device, dtype: torch.dtype):
    """The sampler with this name, without weights. The caller must load them.

    path: the model folder. eos_ids: any of them ends a response. Fields of cfg that are read:
    seed, max_prompt_tokens, max_new_tokens, max_num_seqs, gpu_memory_utilization.
    """
    if name == "vllm":
        return VllmSampler(cfg, path, eos_ids, device, dtype)
    return TransformersSampler(cfg, path, eos_ids, device, dtype)
