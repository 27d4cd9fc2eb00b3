"""Models of transformers that read packed rows: sequences laid end to end, without padding.

build() makes such a model, packed_attention() keeps its sequences apart. transformers is imported
inside functions, because the import takes seconds.
"""

import copy
import functools
import itertools
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from support import flash
from support.clock import clock
from support.host import cache_folder

# Where compiled blocks stay for later runs. It is read when transformers is imported.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))

# ---- build ---------------------------------------------------------------------------------------


def build(
    config,
    dtype: torch.dtype,
    attention: str,
    device: torch.device,
    prepare: Callable[[Any], None] | None = None,
):
    """A model without dropout, with allocated but unset weights. The caller must load them.

    attention: the name of a registered attention function; "packed" is packed_attention.
    prepare: called on the model while it is on the meta device, to shard it before it takes memory.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    # Compiled blocks call it as it is: the number of sequences changes with every micro-batch.
    AttentionInterface.register("packed", torch.compiler.disable(packed_attention))
    config = without_dropout(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if prepare:
        prepare(model)
    model.to_empty(device=device)
    model.tie_weights()
    for module in model.modules():
        for buffer in module.buffers(recurse=False):
            if buffer.is_floating_point():
                buffer.fill_(torch.nan)  # so that a buffer that nothing sets gives NaN
        if module._non_persistent_buffers_set:
            model._init_weights(module)  # rotary frequencies: no checkpoint holds them
    return model


def without_dropout(config):
    """A copy of a config whose dropout probabilities are 0.

    The log-prob of a token must not be random: rho compares two forward passes.
    """
    config = copy.deepcopy(config)
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def blocks(model) -> list[torch.nn.Module]:
    """The layers that sharding gathers one by one; empty if the model has no list of them."""
    return list(getattr(model.base_model, "layers", []))


def checkpoint_blocks(model) -> None:
    """Recompute the blocks in the backward pass, except attention: its output is kept.

    The time of attention grows with the square of the length, its output does not.
    """
    operators = flash.saved_operators()
    contexts = functools.partial(create_selective_checkpoint_contexts, operators)
    options = dict(use_reentrant=False, context_fn=contexts)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    for block in blocks(model):
        separate_last_product(block)


def separate_last_product(block: torch.nn.Module) -> None:
    """Keep the last linear layer of a block, if it has one, out of its compiled pieces.

    The backward pass needs the input of this layer, but not its output, unless a norm follows. The
    recomputation stops when it has all that is needed. It cannot stop inside a compiled piece.
    """
    for layer in [m for m in block.modules() if isinstance(m, torch.nn.Linear)][-1:]:
        layer.forward = torch.compiler.disable(layer.forward)


def compile_blocks(model) -> None:
    """Compile each block for all lengths. Blocks with the same code are compiled once."""
    measure_compilation()
    for block in blocks(model):
        block.compile(dynamic=True)


@functools.cache  # once per process
def measure_compilation() -> None:
    """From now on, add the seconds of every compilation to clock.seconds["compile"]."""
    from torch._dynamo.callback import on_compile_end, on_compile_start

    starts = []

    def end(_):
        clock.seconds["compile"] += time.perf_counter() - starts.pop()

    on_compile_start(lambda _: starts.append(time.perf_counter()))
    on_compile_end(end)


def stored_state(model) -> dict[str, torch.Tensor]:
    """state_dict() without the second names of tied tensors: model files hold them once."""
    state = model.state_dict()
    for name in model.all_tied_weights_keys:
        state.pop(name, None)
    return state


# ---- attention -----------------------------------------------------------------------------------

# Further arguments that transformers passes. They change nothing here: there is no dropout, and
# rotary embeddings are applied before.
WITHOUT_EFFECT = {"dropout", "position_ids", "use_cache", "output_attentions", "cache_position"}


def packed_attention(
    module, query, key, value, attention_mask, scaling=None, micro_batch=None, **kwargs
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence of a packed row, as transformers calls it.

    query [1, H, T, D], key and value [1, H_kv, T, D] -> [1, T, H, D]. H_kv may be smaller than H
    (grouped heads). micro_batch.lengths: sequence lengths, with sum T. micro_batch.cu_seqlens:
    their cumulative sums from 0, int32, on the device. sliding_window: the number of tokens that a
    token sees, itself included; None: all before it.

    GPU: one kernel for sequences of different lengths. CPU: one call for each run of neighbours of
    the same length, which is faster than padding (benchmarks/packing.py). plan_micro_batches()
    sorts by length, so equal lengths are neighbours.

    NotImplementedError if the call has an argument that would change the result in another way.
    """
    if micro_batch is None:
        raise NotImplementedError("its layers do not pass the lengths of the sequences on")
    window = kwargs.pop("sliding_window", None)
    refuse_unknown(module, kwargs, query.shape[-1], value.shape[-1])
    row = [x[0].transpose(0, 1) for x in (query, key, value)]  # [T, H, D]
    if query.is_cuda:
        longest = max(micro_batch.lengths)
        out = flash.attention(*row, micro_batch.cu_seqlens, longest, scaling, window)
        return out[None], None
    runs = [(len(list(run)), length) for length, run in itertools.groupby(micro_batch.lengths)]
    tokens = [count * length for count, length in runs]
    outputs = []
    for run, *parts in zip(runs, *(x.split(tokens) for x in row)):
        heads = [x.unflatten(0, run).transpose(1, 2) for x in parts]  # [count, H, length, D]
        out = causal_attention(*heads, scaling, window)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None], None


def refuse_unknown(module, kwargs: dict[str, Any], width: int, value_width: int) -> None:
    """NotImplementedError if the call needs more than causal attention with a sliding window."""
    if not (kwargs.pop("is_causal", True) and getattr(module, "is_causal", True)):
        raise NotImplementedError("its attention is not causal")
    for name in kwargs.keys() - WITHOUT_EFFECT:
        if kwargs[name] is not None:
            raise NotImplementedError(f"its attention needs {name}")
    if width != value_width:
        raise NotImplementedError("its values have another width than its keys")


def causal_attention(query, key, value, scaling, window: int | None) -> torch.Tensor:
    """Attention within each of B sequences of T tokens, [B, H, T, D].

    With a window, the scores are never T x T.
    """
    options = dict(scale=scaling, enable_gqa=True)
    length = query.shape[2]
    if window is None or length <= window:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    outputs = []
    for start in range(0, length, window):
        end = min(start + window, length)
        first = max(0, start - window + 1)  # the oldest token that the first query sees
        positions = torch.arange(first, end, device=query.device)
        distance = positions[start - first :, None] - positions
        mask = (distance >= 0) & (distance < window)
        keys = key[:, :, first:end]
        values = value[:, :, first:end]
        queries = query[:, :, start:end]
        outputs.append(F.scaled_dot_product_attention(queries, keys, values, mask, **options))
    return torch.cat(outputs, 2)
