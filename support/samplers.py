"""Two engines that sample responses, behind one small interface: generate, load_weights, sleep, close.

    vllm           in this process, beside the trainer; the real one
    transformers   plain batched decoding, wherever torch runs; what an installation without vLLM uses

Every call that depends on the version of vLLM stands in VllmSampler (tried with 0.32). Weights always come from the
trainer, as a stream of (name, full tensor); no engine reads them from disk.
"""

import functools
import os
from typing import Iterator, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from support.clock import clock
from support.errors import UserError
from support.models import build_model


class Sampling(NamedTuple):
    n: int  # responses per prompt; response k draws with the prompt's seed + k
    max_new_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = 0


class Sample(NamedTuple):
    token_ids: np.ndarray  # [length] int32, the end-of-sequence token included
    logprobs: np.ndarray  # [length] float32, the sampler's: after temperature, top-p and top-k
    truncated: bool  # ended by the length limit, as the sampler tells it


CPU_CACHE = 2**30  # bytes of keys and values at a time, where no GPU sets the limit


def cache_bytes(config, dtype: torch.dtype) -> int:
    """Bytes of keys and values per token."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * dtype.itemsize


def roomy_cache(config):
    """transformers' growing cache, but with spare room: it would copy all keys and values for each new token."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class RoomyLayer(DynamicLayer):
        spare: dict[str, torch.Tensor] = {}

        def update(self, key, value, *args, **kwargs):
            if not self.is_initialized:
                return super().update(key, value)
            for name, new in (("keys", key), ("values", value)):
                old, buffer = getattr(self, name), self.spare.get(name)
                n, m = old.shape[2], new.shape[2]
                if buffer is None or len(buffer) != len(old) or buffer.shape[2] < n + m:  # full, or rows were dropped
                    buffer = old.new_empty(*old.shape[:2], n + m + max(32, n // 2), old.shape[3])
                    buffer[:, :, :n] = old
                    self.spare = self.spare | {name: buffer}
                buffer[:, :, n : n + m] = new
                setattr(self, name, buffer[:, :, : n + m])
            return self.keys, self.values

    cache = DynamicCache()
    cache.layers = [RoomyLayer() for _ in range(config.num_hidden_layers)]
    return cache


def grouped_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """torch's attention with grouped heads under a mask, too: transformers would repeat keys and values for it."""
    causal = attention_mask is None and query.shape[2] > 1
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, is_causal=causal, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


class TransformersSampler:
    """Batched decoding with a key-value cache, wherever torch runs, on a copy of the weights of its own.

    Each response draws from its own random stream, so that it does not depend on the batch that it is decoded in.
    """

    def __init__(self, cfg, path: str, eos_ids: list[int], device: torch.device, dtype: torch.dtype):
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register("grouped", grouped_attention)
        AttentionMaskInterface.register("grouped", sdpa_mask)
        self.model = build_model(path, dtype, "grouped", device).eval()
        self.eos_ids, self.device, self.max_num_seqs = torch.tensor(eos_ids, device=device), device, cfg.max_num_seqs

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        own = self.model.state_dict()
        for name, tensor in weights:
            own[name].copy_(tensor)

    def sleep(self) -> None:
        """Nothing to free: the next rollout needs the copy."""

    close = sleep

    def generate(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> list[list[Sample]]:
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # similar lengths together: less padding
        results: list[list[Sample]] = [[] for _ in prompts]
        while order:
            tokens = sampling.n * (len(prompts[order[0]]) + sampling.max_new_tokens)  # of the cache, for one prompt of this batch
            fit = max(1, min(self.max_num_seqs // sampling.n, CPU_CACHE // (tokens * cache_bytes(self.model.config, self.model.dtype))))
            batch, order = order[:fit], order[fit:]
            for i, samples in zip(batch, self._decode([prompts[i] for i in batch], [seeds[i] for i in batch], sampling)):
                results[i] = samples
        return results

    @torch.inference_mode()
    def _decode(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> Iterator[list[Sample]]:
        n, limit, longest = sampling.n, sampling.max_new_tokens, max(map(len, prompts))
        full = functools.partial(torch.tensor, device=self.device)
        ids = full([[0] * (longest - len(p)) + p for p in prompts])  # padding on the left, masked
        mask = full([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        place = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = roomy_cache(self.model.config)
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = out.logits[:, -1].repeat_interleave(n, 0)
        cache.batch_repeat_interleave(n)  # one pass over a prompt serves its n responses
        mask, place = mask.repeat_interleave(n, 0), place[:, -1:].repeat_interleave(n, 0)
        uniform = torch.stack([  # a number in [0, 1) for each token that may be drawn
            torch.rand(limit, generator=torch.Generator().manual_seed(seed + k)) for seed in seeds for k in range(n)
        ]).to(self.device)  # fmt: skip
        tokens, logprobs = torch.zeros_like(uniform, dtype=torch.int32), torch.zeros_like(uniform)
        lengths, truncated = torch.zeros(len(uniform), dtype=torch.long), torch.ones(len(uniform), dtype=torch.bool)
        rows = torch.arange(len(uniform), device=self.device)  # responses in the batch
        going = torch.ones_like(rows, dtype=torch.bool)  # those of them that have not ended
        for t in range(limit):
            token, logprob = draw(logits, uniform[rows, t], sampling)
            tokens[rows, t], logprobs[rows, t] = token.int(), logprob
            lengths[rows[going].cpu()] = t + 1
            going = going & ~torch.isin(token, self.eos_ids)
            truncated[rows.cpu()] = going.cpu()
            if t + 1 == limit or not going.any():
                break
            if going.sum() < 0.75 * len(rows):  # not at each end of a response, for it copies the cache
                cache.batch_select_indices(going.nonzero()[:, 0])
                rows, token, mask, place, going = rows[going], token[going], mask[going], place[going], going[going]
            mask, place = F.pad(mask, (0, 1), value=1), place + 1
            out = self.model(input_ids=token[:, None], attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True)
            logits = out.logits[:, -1]
        tokens, logprobs = tokens.cpu().numpy(), logprobs.cpu().numpy()
        samples = [Sample(tokens[i, :k].copy(), logprobs[i, :k].copy(), bool(truncated[i])) for i, k in enumerate(lengths.tolist())]
        return [samples[i : i + n] for i in range(0, len(samples), n)]


def draw(logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row by inverting the distribution function: logits [B, V], uniform [B] -> ids [B], log-probs [B]."""
    if sampling.temperature == 0:
        return logits.argmax(-1), torch.zeros_like(uniform)
    logprobs = torch.log_softmax(logits.float() / sampling.temperature, -1)
    if sampling.top_k or sampling.top_p < 1:  # top-k first, then top-p of what is left, as in vLLM
        ranked, ids = logprobs.sort(-1, descending=True)
        ranked[:, sampling.top_k or ranked.shape[-1] :] = -torch.inf
        mass = ranked.softmax(-1)
        ranked = ranked.masked_fill(mass.cumsum(-1) - mass > sampling.top_p, -torch.inf)  # the likeliest token always stays
        logprobs = torch.log_softmax(torch.empty_like(ranked).scatter(-1, ids, ranked), -1)
    mass = logprobs.exp().cumsum(-1)
    token = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True).clamp(max=mass.shape[-1] - 1)
    return token[:, 0], logprobs.gather(-1, token)[:, 0]


class VllmSampler:
    """vLLM in this process, beside the trainer. Every call that depends on its version stands here.

    Run with 0.32 on CPUs, one engine per rank. Not yet run: anything behind `cuda` (sleep, wake), tensor parallelism.
    """

    def __init__(self, cfg, path: str, eos_ids: list[int], device: torch.device, dtype: torch.dtype):
        from transformers import AutoConfig
        from vllm import LLM, ModelRegistry

        self.cuda, self.eos_ids, config = device.type == "cuda", eos_ids, AutoConfig.from_pretrained(path)
        if not self.cuda:  # vLLM would look at the model class in another process, to keep CUDA out; that is slow and trips over a broken torchvision
            for name in config.architectures:
                ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
        room = cfg.max_prompt_tokens + cfg.max_new_tokens
        gpu = dict(gpu_memory_utilization=cfg.gpu_memory_utilization, enable_sleep_mode=True)
        cpu = dict(enforce_eager=True, kv_cache_memory_bytes=max(2**28, 2 * room * cache_bytes(config, dtype)))  # two responses fit
        self.llm = LLM(
            model=path,
            load_format="dummy",  # the weights come from the trainer
            dtype=str(dtype).removeprefix("torch."),
            distributed_executor_backend="external_launcher",  # torchrun's ranks: an engine each, or one per tensor-parallel group
            seed=cfg.seed,
            max_model_len=room,
            max_num_seqs=cfg.max_num_seqs,
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled from
            **(gpu if self.cuda else cpu),
        )
        self.sleep()

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        if self.cuda:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        with torch.no_grad():
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.cuda:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["kv_cache"])
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept cached keys and values of the old weights")

    def sleep(self) -> None:
        if self.cuda:
            self.llm.sleep(level=2)  # drops weights and cache; load_weights() brings both back

    def generate(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> list[list[Sample]]:
        from vllm import SamplingParams, TokensPrompt

        n = sampling.n if sampling.temperature else 1  # vLLM takes one greedy response, for all are the same
        common = dict(n=n, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, max_tokens=sampling.max_new_tokens,
                      stop_token_ids=self.eos_ids, logprobs=0, flat_logprobs=True, detokenize=False)  # fmt: skip
        outputs = self.llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], [SamplingParams(seed=s, **common) for s in seeds], use_tqdm=False)
        return [
            [Sample(np.array(o.token_ids, np.int32), np.array(o.logprobs.logprobs, np.float32), o.finish_reason == "length")
             for o in sorted(output.outputs, key=lambda o: o.index)] * (sampling.n // n) for output in outputs
        ]  # fmt: skip

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()  # ends torch.distributed, too


def choose_sampler(wanted: str) -> tuple[str, str]:
    """(sampler, reason). vLLM's CUDA build imports on a machine without a GPU and fails much later: ask for its platform."""
    if wanted == "transformers":
        return wanted, "as --sampler says"
    for name, value in dict(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR").items():
        os.environ.setdefault(name, value)  # before its import: the engine lives in this process, and tells nobody about it
    problem = ""
    try:
        from vllm.platforms import current_platform

        if current_platform.device_type not in ("cpu", "cuda"):
            problem = "the installed vLLM is a GPU build, and this machine has no GPU"
        else:
            from vllm import LLM  # noqa: F401  the rest of it may be broken, too
    except ModuleNotFoundError as error:
        problem = f"vLLM is not installed ({error})"
    except Exception as error:  # a broken installation shows itself in many ways
        problem = f"vLLM does not import: {type(error).__name__}: {error}"
    if problem and wanted == "vllm":
        raise UserError(f"--sampler vllm: {problem}; install vLLM for this machine or use --sampler transformers")
    return ("transformers", problem) if problem else ("vllm", "installed, and fit for this machine")


@clock("start")
def make(kind: str, *args):
    return {"vllm": VllmSampler, "transformers": TransformersSampler}[kind](*args)
