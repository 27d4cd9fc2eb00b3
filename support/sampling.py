"""What both samplers share: how a sampler is asked, and what it answers.

A sampler has the methods generate, load_weights, sleep and close. The weights always come from the
trainer, as a stream of (name, full tensor); no sampler reads them from disk.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

Weights = Iterator[tuple[str, torch.Tensor]]


class Sampling(NamedTuple):
    """How responses are drawn."""

    n: int  # responses per prompt; response k is drawn with the seed of the prompt + k
    max_new_tokens: int
    temperature: float  # 0: always the most likely token
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off


class Sample(NamedTuple):
    """A drawn response."""

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
