"""Packing: sequences are laid end to end, in micro-batches of a token budget."""

import heapq
import math

import numpy as np
import torch


def plan_micro_batches(lengths: list[int], budget: int, world: int) -> list[list[list[int]]]:
    """Split sequences into micro-batches of at most `budget` tokens: plan[rank][i] = indices.

    The longest sequence goes first, each into the emptiest micro-batch. Every rank gets the same
    number of micro-batches; some may be empty. A sequence longer than the budget has a micro-batch
    of its own.
    """
    tokens = sum(min(length, budget) for length in lengths)
    count = max(1, math.ceil(tokens / budget / world))
    while True:
        heap = [(0, i) for i in range(count * world)]
        bins: list[list[int]] = [[] for _ in heap]
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            load, b = heapq.heappop(heap)
            bins[b].append(i)
            heapq.heappush(heap, (load + lengths[i], b))
        if all(load <= budget or len(bins[b]) == 1 for load, b in heap):
            return [bins[rank::world] for rank in range(world)]
        count += 1


def concatenate(arrays: list, device: torch.device, dtype=np.int64) -> torch.Tensor:
    """One tensor of all arrays, end to end."""
    return torch.from_numpy(np.concatenate(arrays).astype(dtype)).to(device)
