"""Measurements of responses and evaluations.

Copy any function: each needs `import torch` and nothing else.
"""

import torch


def pass_at_k(num_samples, num_correct, k):
    """Unbiased estimate of the probability that at least one of k samples is correct.

    1 - C(n - c, k) / C(n, k), for n samples of which c are correct. It is computed as the product
    of (n - c - j) / (n - j) over j < k, which cannot overflow.

    num_samples, num_correct: ints or tensors of one shape (either may be a scalar)
    -> tensor of that shape. k: an int.
    ValueError: mismatched shapes, k < 1, k > n, c outside [0, n], a number that is not whole. The
    check reads values, so it waits for a GPU tensor.
    Source: Chen et al., arXiv 2107.03374 Eq. 1.
    """
    n, c = torch.as_tensor(num_samples), torch.as_tensor(num_correct)
    if n.dim() and c.dim() and n.shape != c.shape:
        raise ValueError(
            f"num_correct must have the shape of num_samples, {tuple(n.shape)}, "
            f"got {tuple(c.shape)}"
        )
    n, c = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (n, c))
    for name, x in (("num_samples", n), ("num_correct", c)):
        if (x % 1 != 0).any():
            raise ValueError(f"{name} must be whole, got {x}")
    if (c < 0).any() or (c > n).any():
        raise ValueError(
            f"num_correct must be in [0, num_samples={num_samples}], got {num_correct}"
        )
    if k % 1 != 0 or k < 1 or (n < k).any():
        raise ValueError(f"k must be whole and in [1, num_samples={num_samples}], got {k}")
    n, c = n + torch.zeros_like(c), c + torch.zeros_like(n)  # one shape, on one device
    n, c = n.unsqueeze(-1), c.unsqueeze(-1)
    j = torch.arange(k, device=n.device)
    # One factor is 0 if fewer than k samples are wrong.
    return 1 - ((n - c - j) / (n - j)).prod(dim=-1)


def bootstrap_interval(values, level=0.95, draws=1000, seed=0):
    """Percentile bootstrap interval (low, high) of a mean over problems.

    It says how far the mean would move with other problems of the same kind. low and high are the
    (1 - level) / 2 and (1 + level) / 2 quantiles of `draws` means, each over P values drawn with
    replacement.

    values: [P], one number per problem, such as its accuracy over several samples (problems are
    independent, samples of one problem are not) -> two scalars.
    The draws have their own generator: equal arguments give equal intervals. If all values are
    equal, both ends are that value.
    ValueError: values not [P] with P > 0, level outside (0, 1), draws < 1.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.
    """
    if values.dim() != 1 or len(values) == 0:
        raise ValueError(f"values must be [P] with P > 0, got {tuple(values.shape)}")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    generator = torch.Generator().manual_seed(seed)
    shape = (draws, len(values))
    picks = torch.randint(len(values), shape, generator=generator, device=generator.device)
    means = values[picks.to(values.device)].mean(1)
    means = means.clamp(values.min(), values.max())  # the mean of eight times 0.1 is not 0.1
    return torch.quantile(means, (1 - level) / 2), torch.quantile(means, (1 + level) / 2)


def is_looping(token_ids, max_period=512, min_repeats=4, min_tokens=64):
    """Whether a response ends in an exact loop. Most responses that never stop do.

    True if, for some period p <= max_period, the last max(min_tokens, min_repeats p) tokens repeat
    with period p: at least min_repeats rounds, and the cut may fall anywhere in a round. A loop
    that contains a counter is not exact. min_tokens keeps short runs (a table rule, 000...) from
    counting.

    token_ids: [T], a tensor or a sequence of ints -> bool; False if it is too short. Only the last
    max(min_tokens, min_repeats max_period) tokens are read (2048 by default).
    ValueError: wrong rank, max_period < 1, min_repeats < 2, min_tokens < 1.
    """
    if isinstance(token_ids, torch.Tensor) and token_ids.dim() != 1:
        raise ValueError(f"token_ids must be [T], got shape {tuple(token_ids.shape)}")
    if max_period < 1:
        raise ValueError(f"max_period must be at least 1, got {max_period}")
    if min_repeats < 2:
        raise ValueError(f"min_repeats must be at least 2, got {min_repeats}")
    if min_tokens < 1:
        raise ValueError(f"min_tokens must be at least 1, got {min_tokens}")
    tail = token_ids[-max(min_tokens, min_repeats * max_period) :]
    tail = torch.as_tensor(tail).tolist()
    for period in range(1, max_period + 1):
        span = max(min_tokens, min_repeats * period)
        if span > len(tail):
            return False
        # The first comparison rejects most periods. Comparing list slices runs in C.
        if tail[-1] == tail[-1 - period] and tail[-span:-period] == tail[period - span :]:
            return True
    return False
