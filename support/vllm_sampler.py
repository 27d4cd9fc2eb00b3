"""The vLLM sampler: vLLM in this process, beside the trainer.

It is written for vLLM 0.32, the version in requirements.txt. vLLM and transformers are
imported inside functions, because the imports take seconds.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from support.clock import clock
from support.errors import UserError
from support.sampling import Sample, Sampling, Weights, cache_bytes

SETTINGS = {  # environment variables, read when vLLM is imported
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
MOST_SEQUENCES = 4096  # that vLLM decodes at once on a CPU
TEMPERATURES = (0.01, 2.0)  # vLLM raises lower ones to 0.01, and refuses higher ones


class VllmSampler:
    """One vLLM engine per rank."""

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
            max_num_seqs=min(cfg.max_num_seqs, MOST_SEQUENCES),
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
    low, high = TEMPERATURES
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


# ---- whether it runs here ------------------------------------------------------------------------


def vllm_problem() -> str:
    """Why vLLM does not run here, or "". Sets SETTINGS, then imports vLLM.

    vLLM's CUDA build can be imported on a machine without a GPU, and fails much later. So its
    platform is checked as well.
    """
    for name, value in SETTINGS.items():
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
