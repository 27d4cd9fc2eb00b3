"""Log-probs and entropy from hidden states, without ever holding all logits.

Copy it: it needs `import torch` and nothing else.
"""

import torch


def linear_logprobs(
    hidden, weight, token_ids, temperature=1.0, chunk=1024, bias=None, compiled=False
):
    """Log-prob of each token, and entropy, for logits = (hidden @ weight.T + bias) / temperature.

    The same as `tricks.token_logprobs` and `tricks.entropy`, but the logits never exist in full:
    `chunk` rows exist at a time, and backward computes them again. Memory is chunk x V instead of
    several times T x V, for four matrix products instead of three. Gradients:
    d logprob / d logits = onehot - p, d entropy / d logits_v = -p_v (log p_v + entropy).

    hidden: [T, D], weight: [V, D] (the output embedding), token_ids: [T], bias: [V] or None
    -> (logprobs [T], entropy [T]), nats, differentiable once in hidden, weight and bias. T = 0
    works. Half precision: products are accumulated and kept in float32. Gradients return in the
    dtypes of the inputs. Logits must be finite: with a bias of -inf the entropy is NaN.
    ValueError: wrong rank, mismatched shapes, temperature <= 0, chunk < 1.
    """
    if (
        hidden.dim() != 2
        or hidden.shape[1:] != weight.shape[1:]
        or hidden.shape[:1] != token_ids.shape
    ):
        raise ValueError(
            f"hidden must be [T, D], weight [V, D] and token_ids [T], got {tuple(hidden.shape)}, "
            f"{tuple(weight.shape)} and {tuple(token_ids.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must be [V] for weight [V, D], got {tuple(bias.shape)} and {tuple(weight.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    shared = torch.promote_types(hidden.dtype, weight.dtype)
    dtype = torch.promote_types(shared, torch.float32)
    grad_dtype = shared if hidden.is_cuda else dtype  # tensor cores multiply halves
    block = -(-chunk // 8)  # rows with a temporary copy at a time
    if not hidden.is_cuda:
        block = max(1, min(block, 2**20 // len(weight)))  # few enough for the cache of a CPU

    def product(a, b):
        if a.is_cuda and shared in (torch.float16, torch.bfloat16):
            # Sums and result are in float32, without a float32 copy of the weight.
            return torch.mm(a, b, out_dtype=dtype)
        return torch.mm(a.to(dtype), b.to(dtype))

    def add_product(total, a, b):
        if b.dtype == dtype:
            total.addmm_(a, b)  # no second [V, D]
        elif b.is_cuda and a.dtype == b.dtype:
            torch.addmm(total, a, b, out_dtype=dtype, out=total)
        else:
            total.add_(product(a, b))

    def scaled(logits, bias):
        logits = logits if bias is None else logits + bias
        return logits / temperature if temperature != 1 else logits

    def statistics(logits, bias, token_ids):
        """Of each row: log-prob, entropy, peak and the sum of exp(logit - peak)."""
        rows = scaled(logits, bias)
        peak = rows.amax(dim=-1, keepdim=True)
        rows = rows - peak
        exp = rows.exp()  # at most 1: no overflow
        total = exp.sum(dim=-1)
        chosen = rows.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
        entropy = total.log() - exp.mul_(rows).sum(dim=-1) / total
        return chosen - total.log(), entropy, peak.squeeze(-1), total

    def gradient(logits, bias, token_ids, entropy, peak, total, g, h):
        """By the logits [rows, V], from g by the log-prob and h (or None) by the entropy."""
        entropy, peak, total, g = (x.unsqueeze(-1) for x in (entropy, peak, total, g / temperature))
        h = None if h is None else h.unsqueeze(-1) / temperature

        def without_onehot(logits, bias):
            # p = exp(logit - peak) / total. Never subtract peak + log(total) in one: it is rounded
            # to a part of the peak, and 1 - p can be smaller than that.
            rows = scaled(logits, bias) - peak
            factor = -g / total
            if h is not None:
                shift = entropy - total.log()
                factor = (rows + shift).mul_(-h / total).sub_(g / total)
            return rows.exp().mul_(factor)

        # The chosen token's entry is rounded to half precision after g is added, not before.
        ids = token_ids.unsqueeze(-1)
        chosen = without_onehot(logits.gather(-1, ids), bias if bias is None else bias[ids]) + g
        result = without_onehot(logits, bias).to(grad_dtype)
        return result.scatter_(-1, ids, chosen.to(grad_dtype))

    if compiled:  # one pass over a chunk instead of ten, without temporary copies
        block = chunk
        statistics = torch.compile(statistics, dynamic=True)
        gradient = torch.compile(gradient, dynamic=True)

    # The class is nested so that the function can be copied alone. Its arguments shadow the names
    # outside on purpose: the class is freed late and must not hold tensors.
    class LinearLogprobs(torch.autograd.Function):
        @staticmethod
        @torch.autocast(hidden.device.type, enabled=False)
        def forward(ctx, hidden, weight, token_ids, bias):
            results = [hidden.new_empty(len(hidden), dtype=dtype) for _ in range(4)]
            for start in range(0, len(hidden), chunk):
                logits = product(hidden[start : start + chunk], weight.t())
                for i, rows in enumerate(logits.split(block)):
                    part = slice(start + i * block, start + i * block + len(rows))
                    for result, found in zip(results, statistics(rows, bias, token_ids[part])):
                        result[part] = found
                del logits, rows  # free them before the next chunk is computed
            logprobs, entropy, peak, total = results
            ctx.save_for_backward(hidden, weight, token_ids, bias, entropy, peak, total)
            ctx.set_materialize_grads(False)  # an unused output costs nothing in backward
            return logprobs, entropy

        @staticmethod
        @torch.autograd.function.once_differentiable
        @torch.autocast(hidden.device.type, enabled=False)
        def backward(ctx, grad_logprobs, grad_entropy):
            hidden, weight, token_ids, bias, entropy, peak, total = ctx.saved_tensors
            need_hidden, need_weight, _, need_bias = ctx.needs_input_grad
            grad_hidden = torch.empty_like(hidden, dtype=dtype) if need_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=dtype) if need_weight else None
            grad_bias = torch.zeros_like(bias, dtype=dtype) if need_bias else None
            if grad_logprobs is None:
                grad_logprobs = torch.zeros_like(entropy)
            of_rows = (token_ids, entropy, peak, total, grad_logprobs, grad_entropy)
            for start in range(0, len(hidden), chunk):
                inputs = hidden[start : start + chunk]
                grad = product(inputs, weight.t())  # the logits, then their gradient
                for i, rows in enumerate(grad.split(block)):
                    part = slice(start + i * block, start + i * block + len(rows))
                    found = gradient(rows, bias, *(x if x is None else x[part] for x in of_rows))
                    if block < chunk:
                        rows.copy_(found)
                    else:
                        grad = found
                grad = grad.to(grad_dtype)
                del rows, found
                if need_bias:
                    grad_bias.add_(grad.sum(dim=0, dtype=dtype))
                if need_hidden:
                    grad_hidden[start : start + chunk] = product(grad, weight)
                if need_weight:
                    add_product(grad_weight, grad.t(), inputs)
                del grad
            # autograd casts them to the dtypes of the inputs
            return grad_hidden, grad_weight, None, grad_bias

    return LinearLogprobs.apply(hidden, weight, token_ids.long(), bias)
