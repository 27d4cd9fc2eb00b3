"""Attention kernels for packed rows on GPUs.

    FlashAttention 4   from the installed vLLM, on Hopper GPUs (H100, H200), heads of 64 and 128
    FlashAttention 2   otherwise: torch.nn.attention.varlen, half as fast on Hopper

Version 4 may also run on other GPUs and widths. It has not been compared with the formula there, so
it is not used.

The kernels of version 4 are called here, because torch's own switch
(torch.nn.attention.activate_flash_attention_impl) fails: it expects two results of the forward
kernel, and this version returns four.
"""

import functools
import importlib
import inspect
import os
import warnings

import torch

from support.host import cache_folder

HOPPER = 9  # CUDA capability 9.x
WIDTHS = (64, 128)  # of a head
MODULE = "vllm.vllm_flash_attn.cute.interface"


@functools.cache
def choose(device: torch.device, width: int) -> str:
    """The name of the attention kernels on this GPU. width: of a head."""
    hopper = torch.cuda.get_device_capability(device)[0] == HOPPER
    if hopper and width in WIDTHS and flash_attention_4():
        return "FlashAttention 4"
    return "FlashAttention 2"


@functools.cache
def flash_attention_4():
    """The module with the kernels, or None if it does not import.

    It compiles a kernel for each width of a head, which takes seconds, and keeps it on the disk.
    """
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(cache_folder() / "attention"))
    warnings.filterwarnings("ignore", "Argument aux_data")  # of its compiler, once per kernel
    try:
        return importlib.import_module(MODULE)
    except (ImportError, OSError, RuntimeError):  # no vLLM, or a part of it is missing
        return None


def attention(query, key, value, cu_seqlens, longest: int, scale, window: int | None):
    """Causal attention within each sequence of a packed row, on a GPU, in half precision.

    query [T, H, D], key and value [T, H_kv, D] -> [T, H, D]. cu_seqlens [sequences + 1] int32:
    where each sequence starts. longest: length of the longest. scale: of the scores; None: D^-0.5.
    window: the number of tokens that a token sees, itself included; None: all before it.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    before = -1 if window is None else window - 1  # earlier tokens that a token sees; -1: all
    if choose(query.device, query.shape[-1]) == "FlashAttention 4":
        return flash_attention(query, key, value, cu_seqlens, longest, scale, before)[0]
    from torch.nn.attention.varlen import varlen_attn  # the import takes seconds

    options = dict(scale=scale, window_size=(before, 0))
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    else:  # torch 2.11 has no grouped heads here
        repeats = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(repeats, 1)
        value = value.repeat_interleave(repeats, 1)
    return varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **options)


def saved_operators() -> list:
    """The operators whose output is kept for the backward pass, on this machine."""
    operators = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.lite_ppo.flash_attention.default,
    ]
    if torch.cuda.is_available():
        from torch.nn.attention import varlen  # noqa: F401  it registers the operator

        operators.append(torch.ops.torch_attn._varlen_attn.default)
    return operators


# ---- FlashAttention 4 as an operator -------------------------------------------------------------


def mask_arguments(before: int) -> dict:
    """The arguments of the kernels for a causal mask; before: the window, see attention()."""
    if before < 0:
        return dict(causal=True)
    return dict(window_size_left=before, window_size_right=0)


@torch.library.custom_op("lite_ppo::flash_attention", mutates_args=())
def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    scale: float,
    before: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """attention() and the logarithm of each softmax's denominator [H, T], for the backward pass."""
    out, denominators, *_ = flash_attention_4()._flash_attn_fwd(
        query,
        key,
        value,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        return_lse=True,
        **mask_arguments(before),
    )
    return out, denominators


def keep_for_backward(ctx, inputs, output) -> None:
    """Store what flash_attention_backward() needs."""
    query, key, value, cu_seqlens, ctx.longest, ctx.scale, ctx.before = inputs
    ctx.save_for_backward(query, key, value, cu_seqlens, *output)


def flash_attention_backward(ctx, grad, _):
    """The gradient of each argument of flash_attention()."""
    query, key, value, cu_seqlens, out, denominators = ctx.saved_tensors
    grads = flash_attention_4()._flash_attn_bwd(
        query,
        key,
        value,
        out,
        grad,
        denominators,
        softmax_scale=ctx.scale,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=ctx.longest,
        max_seqlen_k=ctx.longest,
        **mask_arguments(ctx.before),
    )
    return *grads[:3], None, None, None, None


flash_attention.register_autograd(flash_attention_backward, setup_context=keep_for_backward)
