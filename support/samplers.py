"""Which sampler a run uses: vLLM where it runs, because it is faster; transformers elsewhere."""

from collections.abc import Sequence

import torch

from support.clock import clock
from support.errors import UserError
from support.transformers_sampler import TransformersSampler
from support.vllm_sampler import VllmSampler, missing_in_vllm, vllm_problem


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


@clock("start")  # a phase of its own: the watchdog sees that start-up makes progress
def make(name: str, cfg, path: str, eos_ids: list[int], device: torch.device, dtype: torch.dtype):
    """The sampler with this name, without weights. The caller must load them.

    path: the model folder. eos_ids: any of them ends a response. Fields of cfg that are read:
    seed, max_prompt_tokens, max_new_tokens, max_num_seqs, gpu_memory_utilization.
    """
    if name == "vllm":
        return VllmSampler(cfg, path, eos_ids, device, dtype)
    return TransformersSampler(cfg, path, eos_ids, device, dtype)
