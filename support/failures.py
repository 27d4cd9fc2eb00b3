"""Messages for a process that fails: where, what, and the remedy or the stack."""

import traceback

import torch

from support.clock import clock

REMEDIES = {  # phase: what reduces its memory
    "start": "more ranks, --cpu-offload, or a lower --gpu-memory-utilization",
    "rollout": "a lower --max-num-seqs or --gpu-memory-utilization",
    "logprobs": "a lower --micro-batch-tokens",
    "update": "a lower --micro-batch-tokens, --activation-checkpointing, more ranks, "
    "or --cpu-offload",
    "sync": "a lower --gpu-memory-utilization, more ranks, or --cpu-offload",
    "save": "more free host memory, or more machines",
}
OUT_OF_MEMORY = (  # parts of messages, from torch, the operating system and vLLM
    "out of memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "No available memory for the cache blocks",
    "desired GPU memory utilization",
)
GPU_IS_SHARED = (  # parts of messages of vLLM, which expects that it is alone on the GPU
    "Error in memory profiling",
    "Memory usage increased after sleeping",
)
RANK_HAS_ENDED = (  # parts of messages, from gloo and nccl
    "onnection closed by peer",
    "onnection reset by peer",
    "Broken pipe",
    "remote process exited",
    "communicator was aborted",
)


def out_of_memory(error: BaseException) -> str:
    """A message with the remedy if this error means that memory ran out; otherwise ""."""
    is_memory_error = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if not is_memory_error and not any(part in str(error) for part in OUT_OF_MEMORY):
        return ""
    remedy = REMEDIES.get(clock.phase, "a lower --micro-batch-tokens")
    detail = (str(error).strip() or "MemoryError").splitlines()[0]
    return f"out of memory; {remedy} helps. benchmarks/memory_plan.py shows what fits. ({detail})"


def rank_has_ended(error: BaseException) -> bool:
    """Whether this error means that another rank has died."""
    return any(part in str(error) for part in RANK_HAS_ENDED)


def describe(error: BaseException, rank: int) -> str:
    """One message for a failure: where, what, and the remedy or the stack."""
    where = f"error: rank {rank}, {clock.where()}"
    text = f"{type(error).__name__}: {error}"
    if memory := out_of_memory(error):
        return f"{where}: {memory}"
    if any(part in str(error) for part in GPU_IS_SHARED):
        return (
            f"{where}: another process on this GPU changed its memory while vLLM measured it; "
            f"LITE_PPO_KV_CACHE_GIB lets runs share a GPU ({text.splitlines()[0][:200]})"
        )
    if rank_has_ended(error):
        return f"{where}: another rank has ended ({text.splitlines()[0][:200]})"
    if isinstance(error, OSError):  # a full disk, a lost mount
        return (
            f"{where}: {text}; checkpoints are unchanged, "
            "and the same command resumes from the newest one"
        )
    stack = "".join(traceback.format_exception(error))
    if "torch._dynamo" in type(error).__module__ or "torch._inductor" in type(error).__module__:
        return f"{stack}{where}: {text}; --compile off trains without compilation, slower on GPUs"
    return f"{stack}{where}: {text}"
