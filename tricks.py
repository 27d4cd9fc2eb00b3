"""Every trick of Lite PPO (arXiv 2508.08221), and those it was compared with, as small pure functions.

Copy any function: it stands alone, given `import torch`. Tensors in, tensors out; no argument is written to, nothing is
logged, nothing is communicated: what is global (all ranks, the whole step) is computed from what you pass in.
The file reads in the order of the training loop: rewards, advantages, log-probabilities, ratio and clip, aggregation,
diagnostics. Lite PPO itself is `normalize_advantages` + `clipped_surrogate` + `loss_weights`, all with their defaults.

Notation: N prompts per step, K responses to each (a group), B responses, T tokens, V vocabulary, D hidden size.
logprobs are natural logarithms under the policy that is trained, old_logprobs under the one that starts the update,
rollout_logprobs under the inference engine; ratio = exp(logprobs - old_logprobs).
float16 / bfloat16 / integer / bool input gives float32 results, float64 stays float64.
"""

import torch

# ---- rewards ------------------------------------------------------------------------------------------------------


def scale_reward(correct, low=0.0, high=1.0):
    """Reward of a verified answer: `high` where correct, `low` where not.

    reward = low (1 - correct) + high correct. Group, batch and mixed normalisation cancel the scale; a raw or only
    centred advantage keeps it.
    correct: any shape, bool or in [0, 1] (partial credit is interpolated). ValueError unless low < high.
    Source: the reward-scale study of arXiv 2508.08221, {0, 1} against {-1, 1}.
    """
    if not low < high:
        raise ValueError(f"low must be below high, got low={low}, high={high}")
    correct = correct.to(torch.promote_types(correct.dtype, torch.float32))
    return low * (1 - correct) + high * correct


def soft_overlong_penalty(lengths, max_length, buffer):
    """A penalty that grows over the last `buffer` tokens before `max_length`; add it to the reward before normalising.

    0 up to max_length - buffer, then (max_length - buffer - length) / buffer, -1 from max_length on.
    lengths: response lengths in tokens, [B] or any shape -> same shape, in [-1, 0].
    ValueError unless 0 < buffer <= max_length. Judge "solved" on accuracy, not on the penalised reward.
    Source: DAPO, arXiv 2503.14476 Eq. 13 (there max_length 20480, buffer 4096).
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer must be in (0, max_length={max_length}], got {buffer}")
    lengths = lengths.to(torch.promote_types(lengths.dtype, torch.float32))
    return ((max_length - buffer - lengths) / buffer).clamp(-1, 0)


# ---- advantages ---------------------------------------------------------------------------------------------------


def informative_groups(rewards):
    """Groups with something to learn from: not all rewards equal. DAPO trains on these only (dynamic sampling).

    rewards: [N, K] -> bool [N]. Pass accuracies, not penalised rewards. A group of one is never informative.
    Source: DAPO, arXiv 2503.14476 Eq. 11.
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be [N, K], got shape {tuple(rewards.shape)}")
    return (rewards != rewards[:, :1]).any(dim=1)


def normalize_advantages(rewards, mean="group", std="batch", eps=1e-6):
    """Lite PPO's first trick: centre each reward on its group, divide by the spread of the whole batch.

    A = (r - mean) / (std + eps), each of mean and std over "group" (the K responses to a prompt), "batch" (all N K
    *raw* rewards, not the centred ones) or "none" (0 and 1); std with ddof = 1. GRPO: group, group. Dr. GRPO: group,
    none. Batch norm: batch, batch. REINFORCE: none, none.
    rewards: [N, K] of the whole step, all ranks, before anything splits it -> [N, K]. Do not whiten the result again.
    Where the rewards of `mean` or of `std` are all equal, A is exactly 0 (no rounding residue / eps, no NaN).
    ValueError: not [N, K], unknown name, eps < 0, fewer than 2 rewards to take a mean or std of.
    Source: arXiv 2508.08221 Eq. 5-7 and section 5.
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be [N, K], got shape {tuple(rewards.shape)}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    groups, batch = rewards, rewards.flatten()
    levels = {"none": None, "group": groups, "batch": batch}
    for argument, name in (("mean", mean), ("std", std)):
        if name not in levels:
            raise ValueError(f"{argument} must be one of {tuple(levels)}, got {name!r}")
        if name != "none" and levels[name].shape[-1] < 2:
            raise ValueError(f"{argument}={name!r} needs at least 2 rewards, got rewards {tuple(rewards.shape)}")

    advantages = rewards
    if mean != "none":
        advantages = advantages - levels[mean].mean(dim=-1, keepdim=True)
    if std != "none":
        advantages = advantages / (levels[std].std(dim=-1, correction=1, keepdim=True) + eps)
    for name in {mean, std} - {"none"}:
        constant = (levels[name] == levels[name][..., :1]).all(dim=-1, keepdim=True)
        advantages = advantages.masked_fill(constant, 0)
    return advantages


def leave_one_out_advantages(rewards):
    """RLOO: each reward minus the mean of the other K - 1 in its group, an unbiased baseline.

    A = r - (sum of group - r) / (K - 1) = K / (K - 1) (r - mean of group).
    rewards: [N, K] -> [N, K], exactly 0 where a group's rewards are all equal. ValueError: not [N, K], or K < 2.
    Source: Ahmadian et al., arXiv 2402.14740.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [N, K] with K >= 2, got shape {tuple(rewards.shape)}")
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    group_size = rewards.shape[1]
    advantages = group_size / (group_size - 1) * (rewards - rewards.mean(dim=1, keepdim=True))
    return advantages.masked_fill((rewards == rewards[:, :1]).all(dim=1, keepdim=True), 0)


# ---- log-probabilities --------------------------------------------------------------------------------------------


def token_logprobs(logits, token_ids, temperature=1.0):
    """Log-probability of each token under softmax(logits / temperature).

    logits: [..., V], those that *predict* token_ids [...] (the caller shifts) -> [...], nats.
    Use the sampling temperature. Logits of -inf (a masked vocabulary) are fine, one finite logit per row is needed.
    ValueError: mismatched shapes, temperature <= 0.
    """
    if logits.shape[:-1] != token_ids.shape or logits.dim() == 0:
        raise ValueError(f"token_ids must have shape {tuple(logits.shape[:-1])} for logits of shape "
                         f"{tuple(logits.shape)}, got {tuple(token_ids.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return logits.log_softmax(dim=-1).gather(-1, token_ids.long().unsqueeze(-1)).squeeze(-1)


def entropy(logits, temperature=1.0):
    """Entropy of softmax(logits / temperature): -sum_v p_v log p_v, with 0 log 0 = 0.

    logits: [..., V] -> [...], nats, from 0 to log V. Logits of -inf are fine, one finite logit per row is needed.
    ValueError: a scalar, temperature <= 0.
    """
    if logits.dim() == 0:
        raise ValueError(f"logits must be [..., V], got shape {tuple(logits.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    logprobs = logits.log_softmax(dim=-1)
    # 0 * -inf would be NaN, here and in the gradient: the lowest finite number in place of -inf gives 0 in both.
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(dim=-1)


def linear_logprobs(hidden, weight, token_ids, temperature=1.0, chunk=1024):
    """`token_logprobs` and `entropy` of logits = hidden @ weight.T, which are never held in full, forward or backward.

    hidden: [T, D], weight: [V, D] (the output embedding), token_ids: [T] -> (logprobs [T], entropy [T]), both
    differentiable once, in hidden and weight. The logits live `chunk` rows at a time and are computed again in
    backward: memory chunk x V instead of several times T x V, for four matrix products instead of three. T = 0 works.
    The gradients: d logprob / d logits = onehot - p, d entropy / d logits_v = -p_v (log p_v + entropy).
    Half precision: products are accumulated and kept in float32, gradients return in the dtypes of the input.
    ValueError: wrong rank, mismatched shapes, temperature <= 0, chunk < 1.
    """
    if hidden.dim() != 2 or hidden.shape[1:] != weight.shape[1:] or hidden.shape[:1] != token_ids.shape:
        raise ValueError(f"hidden must be [T, D], weight [V, D] and token_ids [T], got {tuple(hidden.shape)}, "
                         f"{tuple(weight.shape)} and {tuple(token_ids.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    shared = torch.promote_types(hidden.dtype, weight.dtype)
    dtype = torch.promote_types(shared, torch.float32)
    block = -(-chunk // 8)  # rows that need a temporary copy at a time: an eighth of a chunk

    def product(a, b):
        if a.is_cuda and shared in (torch.float16, torch.bfloat16):
            return torch.mm(a, b, out_dtype=dtype)  # sums and result in float32, no float32 copy of the weight
        return torch.mm(a.to(dtype), b.to(dtype))

    def scaled_logits(hidden, weight):
        logits = product(hidden, weight.t())
        return logits.div_(temperature) if temperature != 1 else logits

    # Arguments shadow the names outside on purpose: a nested class is freed late, and must not hold on to tensors.
    class LinearLogprobs(torch.autograd.Function):
        @staticmethod
        @torch.autocast(hidden.device.type, enabled=False)
        def forward(ctx, hidden, weight, token_ids):
            logprobs, entropy, normalizer = (hidden.new_empty(len(hidden), dtype=dtype) for _ in range(3))
            for start in range(0, len(hidden), chunk):
                logits = scaled_logits(hidden[start:start + chunk], weight)
                for i, rows in enumerate(logits.split(block)):
                    part = slice(start + i * block, start + i * block + len(rows))
                    peak = rows.amax(dim=-1, keepdim=True)
                    exp = rows.sub_(peak).exp()  # at most 1: no overflow
                    total = exp.sum(dim=-1)
                    logprobs[part] = rows.gather(-1, token_ids[part].unsqueeze(-1)).squeeze(-1) - total.log()
                    entropy[part] = total.log() - exp.mul_(rows).sum(dim=-1) / total
                    normalizer[part] = peak.squeeze(-1) + total.log()
                del logits, rows  # or the next chunk would be made while this one is held
            ctx.save_for_backward(hidden, weight, token_ids, normalizer, entropy)
            ctx.set_materialize_grads(False)  # an output that is not used costs nothing in backward
            return logprobs, entropy

        @staticmethod
        @torch.autograd.function.once_differentiable
        @torch.autocast(hidden.device.type, enabled=False)
        def backward(ctx, grad_logprobs, grad_entropy):
            hidden, weight, token_ids, normalizer, entropy = ctx.saved_tensors
            need_hidden, need_weight, _ = ctx.needs_input_grad
            grad_hidden = torch.empty_like(hidden, dtype=dtype) if need_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=dtype) if need_weight else None
            if grad_logprobs is None:
                grad_logprobs = torch.zeros_like(normalizer)
            for start in range(0, len(hidden), chunk):
                inputs = hidden[start:start + chunk]
                grad = scaled_logits(inputs, weight)  # holds the logits, then log p, then p, then the gradient
                for i, rows in enumerate(grad.split(block)):
                    part = slice(start + i * block, start + i * block + len(rows))
                    rows.sub_(normalizer[part].unsqueeze(-1))
                    g = grad_logprobs[part].unsqueeze(-1) / temperature
                    factor = -g
                    if grad_entropy is not None:
                        h = grad_entropy[part].unsqueeze(-1) / temperature
                        factor = (rows + entropy[part].unsqueeze(-1)).mul_(-h).sub_(g)
                    rows.exp_().mul_(factor).scatter_add_(-1, token_ids[part].unsqueeze(-1), g)
                del rows
                if grad.is_cuda:
                    grad = grad.to(shared)  # tensor cores multiply halves; a no-op in float32
                if need_hidden:
                    grad_hidden[start:start + chunk] = product(grad, weight)
                if need_weight and inputs.dtype == dtype:
                    grad_weight.addmm_(grad.t(), inputs)  # no second [V, D]
                elif need_weight:
                    grad_weight.add_(product(grad.t(), inputs))
                del grad
            return grad_hidden, grad_weight, None  # autograd casts them to the dtypes of the inputs

    return LinearLogprobs.apply(hidden, weight, token_ids.long())


# ---- ratio and clip -----------------------------------------------------------------------------------------------


def clipped_surrogate(logprobs, old_logprobs, advantages, clip_low=0.2, clip_high=0.2, dual_clip=None):
    """PPO's clipped objective per token, as a loss to minimise; clip_high > clip_low is DAPO's clip-higher.

    -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), and with dual_clip = c the objective is at least c A
    where A < 0. No gradient where the clip binds; the other side is unbounded (but for the dual clip).
    logprobs, old_logprobs: same shape, any; advantages: a scalar or as many dimensions, broadcast to it ([B, 1] on
    [B, T]). The log-ratio is bounded to +-20, also in the gradient, so that a gap of 100 gives no inf and no NaN.
    ValueError: shapes, clip_low outside [0, 1], clip_high < 0, dual_clip <= 1.
    Source: PPO, arXiv 1707.06347 Eq. 7; clip-higher arXiv 2503.14476 Eq. 10; dual clip arXiv 1912.09729.
    """
    shape, of_advantages = tuple(logprobs.shape), tuple(advantages.shape)
    fits = len(of_advantages) in (0, len(shape)) and all(a in (1, n) for a, n in zip(of_advantages, shape))
    if old_logprobs.shape != shape or not fits:
        raise ValueError(f"old_logprobs must have the shape of logprobs, advantages must broadcast to it: got logprobs "
                         f"{shape}, old_logprobs {tuple(old_logprobs.shape)}, advantages {of_advantages}")
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ValueError(f"clip_low must be in [0, 1], clip_high >= 0: got clip_low={clip_low}, clip_high={clip_high}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    ratio = (logprobs.to(dtype) - old_logprobs).clamp(-20, 20).exp()
    advantages = advantages.to(torch.promote_types(advantages.dtype, torch.float32))
    objective = torch.min(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.max(objective, dual_clip * advantages), objective)
    return -objective


def clip_masks(logprobs, old_logprobs, advantages, clip_low=0.2, clip_high=0.2):
    """Where the clip binds, that is where `clipped_surrogate` has no gradient: (low, high), two bool tensors.

    low: A < 0 and ratio < 1 - clip_low;  high: A > 0 and ratio > 1 + clip_high. Average over response tokens for the
    two clip fractions; all False when there is one optimizer step per rollout (ratio = 1). Shapes and errors as there.
    """
    shape, of_advantages = tuple(logprobs.shape), tuple(advantages.shape)
    fits = len(of_advantages) in (0, len(shape)) and all(a in (1, n) for a, n in zip(of_advantages, shape))
    if old_logprobs.shape != shape or not fits:
        raise ValueError(f"old_logprobs must have the shape of logprobs, advantages must broadcast to it: got logprobs "
                         f"{shape}, old_logprobs {tuple(old_logprobs.shape)}, advantages {of_advantages}")
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ValueError(f"clip_low must be in [0, 1], clip_high >= 0: got clip_low={clip_low}, clip_high={clip_high}")
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    ratio = (logprobs.to(dtype) - old_logprobs).exp()
    return (advantages < 0) & (ratio < 1 - clip_low), (advantages > 0) & (ratio > 1 + clip_high)


def kl_estimate(logprobs, ref_logprobs, kind="k3"):
    """Per-token estimates of KL(policy || reference) from tokens that the policy sampled, with d = ref - policy.

    k1 = -d (unbiased, any sign), k2 = d^2 / 2 (biased, low variance), k3 = exp(d) - d - 1 (unbiased, >= 0; GRPO's).
    logprobs, ref_logprobs: same shape -> that shape, nats. In k3, d is bounded to 20 from above, also in the gradient:
    beyond it exp(d) overflows. ValueError: mismatched shapes, unknown kind.
    Source: Schulman, "Approximating KL divergence" (2020); k3 in GRPO: arXiv 2402.03300 Eq. 4.
    """
    if ref_logprobs.shape != logprobs.shape:
        raise ValueError(f"ref_logprobs must have the shape of logprobs, {tuple(logprobs.shape)}, "
                         f"got {tuple(ref_logprobs.shape)}")
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    d = ref_logprobs.to(dtype) - logprobs
    if kind == "k1":
        return -d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        d = d.clamp(max=20)
        return d.expm1() - d  # expm1: exp(d) - 1 loses all digits of a small d
    raise ValueError(f"kind must be one of ('k1', 'k2', 'k3'), got {kind!r}")


def truncated_importance_weights(logprobs, rollout_logprobs, cap=2.0):
    """Weights that correct for sampling by an engine whose log-probs differ from the trainer's: multiply the loss.

    w = min(exp(logprobs - rollout_logprobs), cap), without gradient; 1 where the two agree.
    logprobs: the trainer's for the weights that sampled (the old ones). Same shape, any -> that shape, in [0, cap].
    ValueError: mismatched shapes, cap <= 0.
    Source: Yao et al., "Your efficient RL framework secretly brings you off-policy RL training" (2025); Ionides (2008).
    """
    if rollout_logprobs.shape != logprobs.shape:
        raise ValueError(f"rollout_logprobs must have the shape of logprobs, {tuple(logprobs.shape)}, "
                         f"got {tuple(rollout_logprobs.shape)}")
    if not cap > 0:
        raise ValueError(f"cap must be positive, got {cap}")
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    return (logprobs.detach().to(dtype) - rollout_logprobs.detach()).exp().clamp(max=cap)


# ---- aggregation --------------------------------------------------------------------------------------------------


def overlong_filter(mask, truncated):
    """Takes responses that were cut by the length limit out of the loss; their rewards still count in mean and std.

    mask: [B, T], truncated: bool [B] (the engine's finish reason, not length == limit) -> mask with those rows 0.
    With `loss_weights` the same thing is keep=~truncated. ValueError: wrong rank or shape, truncated not bool.
    Source: arXiv 2508.08221 section 4.4; DAPO, arXiv 2503.14476 section 3.4.
    """
    if mask.dim() != 2 or truncated.shape != mask.shape[:1] or truncated.dtype != torch.bool:
        raise ValueError(f"mask must be [B, T] and truncated bool [B], got mask {tuple(mask.shape)}, truncated "
                         f"{truncated.dtype} {tuple(truncated.shape)}")
    return mask.masked_fill(truncated.unsqueeze(1), 0)


def loss_weights(lengths, level="token", keep=None, max_length=None):
    """Lite PPO's second trick as one weight per response: loss = sum_i w_i sum_t loss_it, however the batch is split.

    token: 1 / sum_j |o_j| (Lite PPO, DAPO); sequence: 1 / (B |o_i|) (GRPO); constant: 1 / (B max_length) (Dr. GRPO).
    lengths: [B] response tokens of one optimizer mini-batch, *all* micro-batches and ranks -> [B], zero or positive.
    Responses with keep False (bool [B]) or without tokens get 0 and leave B and the sum; nothing left: all 0, no NaN.
    ValueError: wrong rank or shape, keep not bool, unknown level, constant without max_length > 0.
    Source: arXiv 2508.08221 section 4.3; Dr. GRPO, arXiv 2503.20783.
    """
    if lengths.dim() != 1:
        raise ValueError(f"lengths must be [B], got shape {tuple(lengths.shape)}")
    if keep is not None and (keep.shape != lengths.shape or keep.dtype != torch.bool):
        raise ValueError(f"keep must be bool [B={len(lengths)}], got {keep.dtype} {tuple(keep.shape)}")
    if level not in ("token", "sequence", "constant"):
        raise ValueError(f"level must be one of ('token', 'sequence', 'constant'), got {level!r}")
    if level == "constant" and (max_length is None or not max_length > 0):
        raise ValueError(f"max_length must be positive for level='constant', got {max_length}")
    kept = lengths > 0 if keep is None else (lengths > 0) & keep
    lengths = torch.where(kept, lengths, 0).to(torch.promote_types(lengths.dtype, torch.float32))
    responses = kept.sum().to(lengths.dtype)
    if level == "token":
        denominator = lengths.sum()
    elif level == "sequence":
        denominator = responses * lengths
    else:
        denominator = responses * max_length
    return torch.where(kept, 1 / denominator, 0)  # 1 / 0 only where nothing is kept; lengths carry no gradient


def aggregate_loss(token_loss, mask, level="token", keep=None, max_length=None):
    """The padded counterpart of `loss_weights`: one scalar from per-token losses, by the same three rules.

    token: sum / tokens; sequence: mean over responses of their token mean; constant: sum / (B max_length).
    token_loss: [B, T], mask: [B, T] with 0 on padding -> scalar, attached to the graph even if it is 0. Padding may
    hold inf or NaN: neither reaches value or gradient. Rows without tokens or with keep False leave every denominator.
    Local by nature: micro-batches and ranks need `loss_weights`, or their gradients depend on the split.
    ValueError and source: as `loss_weights`.
    """
    if token_loss.dim() != 2 or mask.shape != token_loss.shape:
        raise ValueError(f"token_loss and mask must be [B, T], got {tuple(token_loss.shape)} and {tuple(mask.shape)}")
    if keep is not None and (keep.shape != mask.shape[:1] or keep.dtype != torch.bool):
        raise ValueError(f"keep must be bool [B={len(mask)}], got {keep.dtype} {tuple(keep.shape)}")
    if level not in ("token", "sequence", "constant"):
        raise ValueError(f"level must be one of ('token', 'sequence', 'constant'), got {level!r}")
    if level == "constant" and (max_length is None or not max_length > 0):
        raise ValueError(f"max_length must be positive for level='constant', got {max_length}")
    mask = mask.bool() if keep is None else mask.bool() & keep.unsqueeze(1)
    token_loss = token_loss.to(torch.promote_types(token_loss.dtype, torch.float32))
    loss = torch.where(mask, token_loss, 0).sum(dim=1)  # not loss * mask: NaN * 0 = NaN
    lengths = mask.sum(dim=1)
    if level == "token":
        return loss.sum() / lengths.sum().clamp(min=1)
    responses = (lengths > 0).sum().clamp(min=1)
    if level == "sequence":
        return (loss / lengths.clamp(min=1)).sum() / responses
    return loss.sum() / (responses * max_length)


# ---- diagnostics --------------------------------------------------------------------------------------------------


def pass_at_k(num_samples, num_correct, k):
    """Unbiased estimate of the probability that at least one of k samples is correct, from n samples with c correct.

    1 - C(n - c, k) / C(n, k), as the product of (n - c - j) / (n - j) over j < k, which cannot overflow.
    num_samples, num_correct: ints or tensors of one shape (either may be a scalar) -> tensor of that shape; k: an int.
    ValueError: mismatched shapes, k < 1, k > n, c outside [0, n]. Values are checked, so a GPU tensor is waited for.
    Source: Chen et al., arXiv 2107.03374 Eq. 1.
    """
    n, c = torch.as_tensor(num_samples), torch.as_tensor(num_correct)
    if n.dim() and c.dim() and n.shape != c.shape:
        raise ValueError(f"num_correct must have the shape of num_samples, {tuple(n.shape)}, got {tuple(c.shape)}")
    if (c < 0).any() or (c > n).any():
        raise ValueError(f"num_correct must be in [0, num_samples={num_samples}], got {num_correct}")
    if k < 1 or (n < k).any():
        raise ValueError(f"k must be in [1, num_samples={num_samples}], got {k}")
    n, c = (x.to(torch.promote_types(x.dtype, torch.float32)).unsqueeze(-1) for x in (n, c))
    j = torch.arange(k, device=n.device)
    return 1 - ((n - c - j) / (n - j)).prod(dim=-1)  # one factor is 0 if fewer than k samples are wrong


def bootstrap_interval(values: torch.Tensor, level: float = 0.95, draws: int = 1000, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Percentile bootstrap interval of a mean: how far it would move if other problems like these had been drawn.

    (low, high) = the (1 - level) / 2 and (1 + level) / 2 quantiles of `draws` means, each over P values drawn with replacement

    values: [P], one number per problem (its accuracy over several samples): problems are independent, samples of one are not.
    Deterministic: the draws come from a generator of their own with this seed. One value, or equal ones: both ends are it.
    Raises ValueError for values that are not one-dimensional or empty, level outside (0, 1), or draws below 1.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, section 13.3.
    """
    if values.ndim != 1 or values.numel() == 0:
        raise ValueError(f"values must be one-dimensional and not empty, got shape {tuple(values.shape)}")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    picks = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(seed))
    means = values.float()[picks.to(values.device)].mean(1)
    return torch.quantile(means, (1 - level) / 2), torch.quantile(means, (1 + level) / 2)


def is_looping(token_ids, max_period=512, min_repeats=4, min_tokens=64):
    """Does a response end in an exact loop? Call it on truncated responses: most of those that never stop repeat.

    True if for some period p <= max_period the last max(min_tokens, min_repeats p) tokens repeat with period p: at
    least min_repeats rounds, the cut may fall anywhere in a round. A loop with a counter in it is not exact.
    token_ids: [T], a tensor or a sequence of ints -> bool. Looks at the last max(min_tokens, min_repeats max_period)
    tokens only (2048 by default). 64 tokens keep short runs (a table rule, 000...) from counting; too short: False.
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
    tail = token_ids[-max(min_tokens, min_repeats * max_period):]
    tail = torch.as_tensor(tail).tolist()
    for period in range(1, max_period + 1):
        span = max(min_tokens, min_repeats * period)
        if span > len(tail):
            return False
        # One comparison rejects most periods; slices of a list compare at the speed of C, up to the first difference.
        if tail[-1] == tail[-1 - period] and tail[-span:-period] == tail[period - span:]:
            return True
    return False
