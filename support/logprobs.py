"""Log-probs and entropy from hidden states, without ever holding all logits.

Copy it: it needs `import torch` and nothing else.
"""

import torch


def linear_logprobs(hidden, weight, token_ids, temperature=1.0, chunk=1024, bias=None):
    """Log-prob of each token, and entropy, for logits = (hidden @ weight.T + bias) / temperature.

    The same as `tricks.token_logprobs` and `tricks.entropy`, but the logits never exist in full:
    `chunk` rows exist at a time, and backward computes them again. Memory is chunk x V instead of
    several times T x V, for four matrix products instead of three. Gradients:
    d logprob / d logits = onehot - p, d entropy / d logits_v = -p_v (log p_v + entropy).

    hidden: [T, D], weight: [V, D] (the output embedding), token_ids: [T], bias: [V] or None
    -> (logprobs [T], entropy [T]), nats, differentiable once in hidden, weight and bias. T = 0
    works. Half precision: products are accumulated and kept in float32. Gradients return in the
    dtypes of the inputs.
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
    block = -(-chunk // 8)  # rows with a temporary copy at a time: an eighth of a chunk

    def product(a, b):
        if a.is_cuda and shared in (torch.float16, torch.bfloat16):
            # Sums and result are in float32, without a float32 copy of the weight.
            return torch.mm(a, b, out_dtype=dtype)
        return torch.mm(a.to(dtype), b.to(dtype))

    def scaled_logits(hidden, weight, bias):
        logits = product(hidden, weight.t())
        if bias is not None:
            logits.add_(bias)
        return logits.div_(temperature) if temperature != 1 else logits

    # The class is nested so that the function can be copied alone. Its arguments shadow the names
    # outside on purpose: the class is freed late and must not hold tensors.
    class LinearLogprobs(torch.autograd.Function):
        @staticmethod
        @torch.autocast(hidden.device.type, enabled=False)
        def forward(ctx, hidden, weight, token_ids, bias):
            logprobs, entropy, peaks, totals = (
                hidden.new_empty(len(hidden), dtype=dtype) for _ in range(4)
            )
            for start in range(0, len(hidden), chunk):
                logits = scaled_logits(hidden[start : start + chunk], weight, bias)
                for i, rows in enumerate(logits.split(block)):
                    part = slice(start + i * block, start + i * block + len(rows))
                    peak = rows.amax(dim=-1, keepdim=True)
                    exp = rows.sub_(peak).exp()  # at most 1: no overflow
                    total = exp.sum(dim=-1)
                    chosen = rows.gather(-1, token_ids[part].unsqueeze(-1)).squeeze(-1)
                    logprobs[part] = chosen - total.log()
                    entropy[part] = total.log() - exp.mul_(rows).sum(dim=-1) / total
                    peaks[part] = peak.squeeze(-1)
                    totals[part] = total
                del logits, rows  # free them before the next chunk is computed
            ctx.save_for_backward(hidden, weight, token_ids, bias, peaks, totals, entropy)
            ctx.set_materialize_grads(False)  # an unused output costs nothing in backward
            return logprobs, entropy

        @staticmethod
        @torch.autograd.function.once_differentiable
        @torch.autocast(hidden.device.type, enabled=False)
        def backward(ctx, grad_logprobs, grad_entropy):
            hidden, weight, token_ids, bias, peaks, totals, entropy = ctx.saved_tensors
            need_hidden, need_weight, _, need_bias = ctx.needs_input_grad
            grad_hidden = torch.empty_like(hidden, dtype=dtype) if need_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=dtype) if need_weight else None
            grad_bias = torch.zeros_like(bias, dtype=dtype) if need_bias else None
            if grad_logprobs is None:
                grad_logprobs = torch.zeros_like(entropy)
            for start in range(0, len(hidden), chunk):
                inputs = hidden[start : start + chunk]
                # In turn, the same memory holds the logits, log p, p and the gradient.
                grad = scaled_logits(inputs, weight, bias)
                for i, rows in enumerate(grad.split(block)):
                    part = slice(start + i * block, start + i * block + len(rows))
                    # p = exp(logit - peak) / total. Never subtract peak + log(total) in one: it is
                    # rounded to a part of the peak, and 1 - p can be smaller than that.
                    rows.sub_(peaks[part].unsqueeze(-1))
                    total = totals[part].unsqueeze(-1)
                    g = grad_logprobs[part].unsqueeze(-1) / temperature
                    factor = -g / total
                    if grad_entropy is not None:
                        h = grad_entropy[part].unsqueeze(-1) / temperature
                        shift = entropy[part].unsqueeze(-1) - total.log()
                        factor = (rows + shift).mul_(-h / total).sub_(g / total)
                    rows.exp_().mul_(factor).scatter_add_(-1, token_ids[part].unsqueeze(-1), g)
                del rows
                if need_bias:
                    grad_bias.add_(grad.sum(dim=0))
                if grad.is_cuda:
                    grad = grad.to(shared)  # tensor cores multiply halves; a no-op in float32
                if need_hidden:
                    grad_hidden[start : start + chunk] = product(grad, weight)
                if need_weight and inputs.dtype == dtype:
                    grad_weight.addmm_(grad.t(), inputs)  # no second [V, D]
                elif need_weight:
                    grad_weight.add_(product(grad.t(), inputs))
                del grad
            # autograd casts them to the dtypes of the inputs
            return grad_hidden, grad_weight, None, grad_bias

    return LinearLogprobs.apply(hidden, weight, token_ids.long(), bias)
