"""tricks.py: numbers derived by hand, laws, gradients, edge cases, and mutants that must fail.

Run: pytest test_tricks.py. Each `check_NAME` takes the function that it tests. So the same check
runs on the function in tricks.py, on a copy cut out of the file, and on deliberately wrong copies.
"""

import math
import statistics
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import tricks
from tests.checks import (
    DTYPES,
    INF,
    NAN,
    T,
    check_error,
    check_precision,
    check_purity,
    close,
    cut_out,
    grad,
    mutate,
    outputs,
    parse_mutants,
    public,
    signatures,
    tensors,
)
from tricks import (
    aggregate_loss,
    clip_masks,
    clipped_surrogate,
    dual_clip_mask,
    entropy,
    informative_groups,
    kl_estimate,
    leave_one_out_advantages,
    loss_weights,
    normalize_advantages,
    overlong_filter,
    soft_overlong_penalty,
    token_logprobs,
    truncated_importance_weights,
)

pytestmark = pytest.mark.filterwarnings("ignore:std")  # torch warns about the std of no groups

PUBLIC = public(tricks)
LEVELS = ("token", "sequence", "constant", "sum")


# ---- numbers by hand, one check per function -----------------------------------------------------


def check_scale_reward(scale_reward):
    correct = torch.tensor([[True, False]])
    close(scale_reward(correct), [[1, 0]])
    close(scale_reward(T(0.25), low=-1, high=3), [0.0])  # -1 + 0.25 * 4
    # both ends are exact: in float32, -1 + 1.3 is not 0.3, and 0.3 - 1.3 is not -1
    assert torch.equal(scale_reward(correct, low=-1, high=0.3), torch.tensor([[0.3, -1]]))


def check_soft_overlong_penalty(soft_overlong_penalty):
    # limit 10, buffer 4: nothing up to 6, then -1/4 per token, -1 from 10 on
    lengths = torch.tensor([0, 5, 6, 7, 8, 10, 15])
    close(soft_overlong_penalty(lengths, 10, 4), [0, 0, 0, -0.25, -0.5, -1, -1])
    # the buffer may be the whole limit
    close(soft_overlong_penalty(torch.tensor([0, 5, 10]), 10, 10), [0, -0.5, -1])
    # DAPO's lengths: one token is 1 / 4096
    lengths = torch.tensor([16_384, 16_385, 18_432, 20_479, 20_480])
    close(soft_overlong_penalty(lengths, 20_480, 4096), [0, -(2**-12), -0.5, 2**-12 - 1, -1])


def check_informative_groups(informative_groups):
    rewards = T([1, 1, 0], [0, 0, 0], [0.1, 0.1, 0.1], [0, 1, 0])
    assert informative_groups(rewards).tolist() == [True, False, False, True]
    assert informative_groups(T([1], [0])).tolist() == [False, False]
    assert not informative_groups(torch.full((1, 9), 0.1)).any()  # their std is 8e-9
    assert informative_groups(T([1, 1 + 1e-12])).all()
    assert informative_groups(torch.zeros(0, 3)).shape == (0,)


REWARDS = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]])


def check_normalize_advantages(normalize_advantages):
    # The batch holds 4 ones in 12: mean 1/3, sum of squares 4 (2/3)^2 + 8 (1/3)^2 = 8/3,
    # variance 8/33, std 0.492366. (1 - 3/4) / std = 0.50775 and (0 - 3/4) / std = -1.52325.
    lite_ppo = [[0.50775] * 3 + [-1.52325], [0] * 4, [1.52325] + [-0.50775] * 3]
    # The group [1, 1, 1, 0] has variance (3/16 + 9/16) / 3 = 1/4, std 0.5.
    grpo = [[0.5] * 3 + [-1.5], [0] * 4, [1.5] + [-0.5] * 3]
    for rewards in (REWARDS, 2 * REWARDS - 1):  # {0, 1} and {-1, 1}
        close(normalize_advantages(rewards), lite_ppo, 2e-5)
        close(normalize_advantages(rewards, "group", "group"), grpo, 1e-5)
        batch = normalize_advantages(rewards, "batch", "batch")
        close(batch[0], [1.354] * 3 + [-0.677], 2e-5)
    close(normalize_advantages(REWARDS, "group", "none")[0], [0.25] * 3 + [-0.75])
    close(normalize_advantages(2 * REWARDS - 1, "group", "none")[0], [0.5] * 3 + [-1.5])
    close(normalize_advantages(REWARDS, "none", "none"), REWARDS)
    close(normalize_advantages(REWARDS, "batch", "none")[0], [2 / 3] * 3 + [-1 / 3])
    # eps is outside the root: 0 and 2e-6 have std sqrt(2) 1e-6, 1 / (sqrt(2) + 1) = sqrt(2) - 1
    close(normalize_advantages(T([0, 2e-6])), [[1 - 2**0.5, 2**0.5 - 1]])
    close(normalize_advantages(T([0, 2]), eps=0), [[-(0.5**0.5), 0.5**0.5]], 1e-12)
    # rewards that differ, however little, are not equal
    close(normalize_advantages(T([1, 1 + 1e-12]), eps=0), [[-(0.5**0.5), 0.5**0.5]], 1e-3)
    assert normalize_advantages(T([1, NAN, 0])).isnan().all()  # it shows
    assert normalize_advantages(torch.zeros(0, 4), std="group").shape == (0, 4)
    for mean in ("none", "group", "batch"):
        for std in ("group", "batch"):
            check_equal_rewards(normalize_advantages, mean, std, eps=0)
            check_equal_rewards(normalize_advantages, mean, std, eps=1e-6)


def check_equal_rewards(normalize_advantages, mean, std, eps):
    """Equal rewards have advantage 0. In float32, eight times 0.1 has another mean than 0.1."""
    flat = torch.full((2, 8), 0.1)
    assert not normalize_advantages(flat, mean, std, eps).any()
    mixed = torch.cat([flat, torch.arange(8.0)[None]])
    advantages = normalize_advantages(mixed, mean, std, eps)
    assert advantages.isfinite().all()
    assert advantages[2].any()
    if "group" in (mean, std):
        assert not advantages[:2].any()
    if (mean, std) == ("batch", "batch"):
        assert advantages[:2].all()


def check_leave_one_out_advantages(leave_one_out_advantages):
    # [1, 1, 1, 0]: 1 - 2/3 and 0 - 3/3
    expected = [[1 / 3] * 3 + [-1], [0] * 4, [1] + [-1 / 3] * 3]
    close(leave_one_out_advantages(REWARDS), expected)
    assert not leave_one_out_advantages(torch.full((1, 8), 0.1)).any()
    close(leave_one_out_advantages(T([3, 1])), [[2, -2]])
    assert leave_one_out_advantages(T([NAN, NAN])).isnan().all()
    close(1e12 * leave_one_out_advantages(T([1 + 1e-12, 1])), [[1, -1]], 1e-3)


def check_token_logprobs(token_logprobs):
    # softmax([0, log 3]) = [1/4, 3/4]; at temperature 1/2 the logits double: [1/10, 9/10]
    logits = T([0, math.log(3)], [0, -INF])
    first = torch.tensor([0, 0])
    close(token_logprobs(logits, torch.tensor([1, 0])), [math.log(3 / 4), 0])
    close(token_logprobs(logits, first, temperature=0.5), [math.log(1 / 10), 0])
    close(token_logprobs(T([[1000, 0]]), torch.tensor([[1]], dtype=torch.int16)), [[-1000]])
    assert token_logprobs(logits, torch.tensor([1, 1]))[1] == -INF  # a banned token
    by_logits = grad(lambda x: token_logprobs(x, first), logits)[0]
    close(by_logits, [[3 / 4, -3 / 4], [0, 0]])  # onehot - p


def check_entropy(entropy):
    p = [1 / 4, 3 / 4]
    h = -sum(q * math.log(q) for q in p)  # 0.562335
    logits = T([0, math.log(3), -INF], [-INF, 5, -INF], [1000, 1000, 0])
    close(entropy(logits), [h, 0, math.log(2)])
    cold = -0.1 * math.log(0.1) - 0.9 * math.log(0.9)
    close(entropy(T(0, math.log(3)), temperature=0.5), cold)
    slope = [-q * (math.log(q) + h) for q in p]
    close(grad(entropy, logits)[0], [[*slope, 0], [0] * 3, [0] * 3])
    # with one word in the vocabulary, everything is certain
    certain = entropy(torch.randn(3, 2, 1))
    assert certain.shape == (3, 2)
    assert not certain.any()


LOG2 = math.log(2)  # a gap of log 2 is a ratio of 2
# Two log-probs in bfloat16 whose difference is none: 1 - 2^-9 is rounded to 1.
NEAR_0, MINUS_1 = T(-(2**-9), dtype=torch.bfloat16), T(-1, dtype=torch.bfloat16)
RATIO = math.exp(1 - 2**-9)


def check_clipped_surrogate(clipped_surrogate):
    # ratio 2, 2, 1/2, 1/2, 1 against [0.8, 1.2]; loss = -min(ratio A, clipped A)
    new, old, a = T(LOG2, LOG2, 0, 0, 0), T(0, 0, LOG2, LOG2, 0), T(3, -3, 3, -3, 3)
    close(clipped_surrogate(new, old, a), [-3.6, 6, -1.5, 2.4, -3])
    by_new = grad(lambda x: clipped_surrogate(x, old, a), new)[0]
    close(by_new, [0, 6, -1.5, 0, -3])  # -ratio A where nothing is clipped
    # against [0.4, 3], [1, 1] and [0, 1.2]
    close(clipped_surrogate(new, old, a, clip_low=0.6, clip_high=2.0), [-6, 6, -1.5, 1.5, -3])
    close(clipped_surrogate(new, old, a, clip_low=0, clip_high=0), [-3, 6, -1.5, 3, -3])
    close(clipped_surrogate(new, old, a, clip_low=1), [-3.6, 6, -1.5, 1.5, -3])
    # the dual clip: the objective is at least 1.5 A where A < 0
    close(clipped_surrogate(new, old, a, dual_clip=1.5), [-3.6, 4.5, -1.5, 2.4, -3])
    by_new = grad(lambda x: clipped_surrogate(x, old, a, dual_clip=1.5), new)[0]
    close(by_new, [0, 0, -1.5, 0, -3])
    # 1.9 times an advantage in bfloat16 is not rounded to bfloat16
    half = T(-1.0078125, dtype=torch.bfloat16)
    close(clipped_surrogate(T(LOG2), T(0), half, dual_clip=1.9), [1.9 * 1.0078125])
    # advantages broadcast
    zeros = torch.zeros(2, 2)
    close(clipped_surrogate(zeros, zeros, T([1], [2])), [[-1, -1], [-2, -2]])
    close(clipped_surrogate(zeros, zeros, torch.tensor(2)), [[-2, -2], [-2, -2]])
    # without detach the gradients of both log-probs cancel
    close(grad(lambda x: clipped_surrogate(x, x, a), new)[0], [0] * 5)
    close(clipped_surrogate(NEAR_0, MINUS_1, T(-1)), [RATIO])
    check_bounded_gap(clipped_surrogate)


def check_bounded_gap(clipped_surrogate):
    """A gap beyond 20 counts as 20, and has no gradient."""
    new, old, a = T(100, -100, 100, -100, 100, 19), T(0, 0, 0, 0, 0, 0), T(1, 1, -1, -1, 0, -1)
    loss = clipped_surrogate(new, old, a)
    close(loss, [-1.2, 0, math.exp(20), 0.8, 0, math.exp(19)])
    close((-loss[1]).log(), -20)
    by_new = grad(lambda x: clipped_surrogate(x, old, a), new)[0]
    close(by_new, [0, 0, 0, 0, 0, math.exp(19)])


def check_clip_masks(clip_masks):
    new = T(LOG2, LOG2, 0, 0, 0, LOG2, 0).requires_grad_()
    old, a = T(0, 0, LOG2, LOG2, 0, 0, LOG2), T(3, -3, 3, -3, 3, 0, 0)
    low, high = clip_masks(new, old, a)
    assert low.tolist() == [False, False, False, True, False, False, False]
    assert high.tolist() == [True, False, False, False, False, False, False]
    # ratios 2 and 1/2 against other bounds
    low, high = clip_masks(new, old, a, clip_low=0.6, clip_high=1.01)
    assert not low.any() and not high.any()
    assert clip_masks(new, old, a, 0.6, 0.99)[1].any()
    assert clip_masks(new, old, a, 0.49, 2.0)[0].any()
    assert clip_masks(new, old, a, 0, 0)[0][3]
    assert not clip_masks(new, old, a, 1, 0)[0].any()
    # at the bound, the clip does not bind
    low, high = clip_masks(T(0, 0), T(0, 0), T(1, -1), 0, 0)
    assert not low.any() and not high.any()
    low, high = clip_masks(T(100, -100), T(0, 0), T(1, -1))
    assert low.tolist() == [False, True] and high.tolist() == [True, False]
    # advantages broadcast
    ones, zeros = torch.ones(2, 2), torch.zeros(2, 2)
    assert clip_masks(ones, zeros, T([1], [-1]))[1].tolist() == [[True, True], [False, False]]
    assert clip_masks(ones, zeros, torch.tensor(1))[1].all()
    # a gap beyond 20 counts as 20
    assert not clip_masks(T(100), T(0), T(1), clip_high=math.exp(20.1))[1].any()
    assert clip_masks(T(100), T(0), T(1), clip_high=math.exp(19.9))[1].all()
    assert not clip_masks(T(-100), T(0), T(-1), clip_low=1 - math.exp(-20.1))[0].any()
    assert clip_masks(T(-100), T(0), T(-1), clip_low=1 - math.exp(-19.9))[0].all()
    assert not clip_masks(NEAR_0, MINUS_1, T(1), 0, RATIO - 1 + 1e-4)[1].any()
    assert clip_masks(NEAR_0, MINUS_1, T(1), 0, RATIO - 1 - 1e-4)[1].all()


def check_dual_clip_mask(dual_clip_mask):
    # ratio 2, 2, 2, 1/2, 1, e^20
    new, old, a = T(LOG2, LOG2, LOG2, 0, 0, 100), T(0, 0, 0, LOG2, 0, 0), T(-3, 3, 0, -3, -3, -1)
    assert dual_clip_mask(new, old, a, 1.9).tolist() == [True, False, False, False, False, True]
    assert dual_clip_mask(new, old, a, 2.1).tolist() == [False] * 5 + [True]
    assert not dual_clip_mask(new, old, a, math.exp(20.1)).any()
    assert dual_clip_mask(new, old, a, math.exp(19.9))[5]
    assert not dual_clip_mask(T(LOG2), T(0), T(-1), 2).any()  # at the bound it does not bind
    ones, zeros = torch.ones(2, 2), torch.zeros(2, 2)
    assert dual_clip_mask(ones, zeros, T([1], [-1]), 2).tolist() == [[False] * 2, [True] * 2]
    assert dual_clip_mask(ones, zeros, torch.tensor(-1), 2).all()
    assert not dual_clip_mask(NEAR_0, MINUS_1, T(-1), RATIO + 1e-4).any()
    assert dual_clip_mask(NEAR_0, MINUS_1, T(-1), RATIO - 1e-4).all()


def check_kl_estimate(kl_estimate):
    new, ref = T(0, LOG2, 0), T(LOG2, 0, 0)  # d = log 2, -log 2, 0
    close(kl_estimate(new, ref, "k1"), [-LOG2, LOG2, 0])
    close(kl_estimate(new, ref, "k2"), [LOG2**2 / 2, LOG2**2 / 2, 0])
    close(kl_estimate(new, ref), [1 - LOG2, -0.5 + LOG2, 0])
    close(grad(lambda x: kl_estimate(x, ref), new)[0], [-1, 0.5, 0])  # 1 - exp(d)
    # d is bounded to 20 from above
    far = T(100, 0)
    close(kl_estimate(T(0, 100), far), [math.exp(20) - 21, 99])
    close(grad(lambda x: kl_estimate(x, far), T(0, 100))[0], [0, 1])
    # k1 and k2 have no bound
    close(kl_estimate(T(0, 100), far, "k1"), [-100, 100])
    close(kl_estimate(T(0, 100), far, "k2"), [5000, 5000])
    close(kl_estimate(NEAR_0, MINUS_1, "k1"), [1 - 2**-9], 1e-9)
    # a small d keeps its digits in float32: d^2/2 + d^3/6
    small = kl_estimate(torch.zeros(1), torch.full((1,), 1e-4))
    close(small * 1e8, [0.5 + 1e-4 / 6], 1e-3)


def check_truncated_importance_weights(truncated_importance_weights):
    new = T(0, LOG2, 0, 100, -100).requires_grad_()
    rollout = T(0, 0, LOG2, 0, 0).requires_grad_()
    weights = truncated_importance_weights(new, rollout, cap=1.5)
    close(weights, [1, 1.5, 0.5, 1.5, 0])
    assert not weights.requires_grad
    close(truncated_importance_weights(T(5, LOG2 / 2), T(0, 0)), [2, 2**0.5])
    close(truncated_importance_weights(T(5), T(0), cap=0.5), [0.5])
    close(truncated_importance_weights(T(-100), T(0)).log(), [-100])
    close(truncated_importance_weights(NEAR_0, MINUS_1, cap=3), [RATIO])


def check_overlong_filter(overlong_filter):
    truncated = torch.tensor([False, True, False])
    for dtype in (torch.bool, torch.int64, torch.float32):
        mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1]], dtype=dtype)
        kept = overlong_filter(mask, truncated)
        assert kept.tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]
        assert kept.dtype == dtype
    nothing = torch.zeros(0, dtype=torch.bool)
    assert overlong_filter(torch.ones(0, 3), nothing).shape == (0, 3)


def check_loss_weights(loss_weights):
    lengths, keep = torch.tensor([2, 4, 0, 10]), torch.tensor([True, True, True, False])
    close(loss_weights(lengths[:2]), [1 / 6, 1 / 6])
    close(loss_weights(lengths), [1 / 16, 1 / 16, 0, 1 / 16])
    close(loss_weights(lengths, "token", keep), [1 / 6, 1 / 6, 0, 0])
    close(loss_weights(lengths, "sequence"), [1 / 6, 1 / 12, 0, 1 / 30])
    close(loss_weights(lengths, "sequence", keep), [1 / 4, 1 / 8, 0, 0])
    close(loss_weights(lengths, "constant", keep, max_length=10), [1 / 20, 1 / 20, 0, 0])
    close(loss_weights(lengths, "constant", max_length=0.5), [2 / 3, 2 / 3, 0, 2 / 3])
    close(loss_weights(lengths, "sum"), [1 / 3, 1 / 3, 0, 1 / 3])
    close(loss_weights(lengths, "sum", keep), [1 / 2, 1 / 2, 0, 0])
    only_empty = torch.tensor([True, False])
    for level in LEVELS:
        assert loss_weights(torch.tensor([0, 3]), level, only_empty, 8).tolist() == [0, 0]
        assert loss_weights(torch.zeros(0), level, None, 8).shape == (0,)
        assert loss_weights(torch.tensor([1]), level, max_length=1).tolist() == [1]
    # lengths as they are in training
    long = torch.tensor([500, 8192, 20_480])
    close(1e6 * loss_weights(long), [1e6 / 29_172] * 3)
    close(1e6 * loss_weights(long, "sequence"), [1e6 / 1500, 1e6 / 24_576, 1e6 / 61_440])
    close(1e6 * loss_weights(long, "constant", None, 20_480), [1e6 / 61_440] * 3)
    # the sum, 400,000, is above the largest float16
    many = torch.full((40,), 10_000, dtype=torch.float16)
    close(loss_weights(many), [1 / 400_000] * 40, 1e-9)


def check_aggregate_loss(aggregate_loss):
    # lengths 2 and 4, loss 1 on the first and 0 on the second response; the others do not count
    # level: value, gradient on the tokens of the first and of the second response
    expected = {
        "token": (1 / 3, 1 / 6, 1 / 6),  # 2 / 6
        "sequence": (1 / 2, 1 / 4, 1 / 8),
        "constant": (1 / 5, 1 / 10, 1 / 10),  # 2 / (2 * 5)
        "sum": (1, 1 / 2, 1 / 2),  # (2 + 0) / 2
    }
    loss = T([1, 1, INF, NAN], [0, 0, 0, 0], [7, 7, 7, 7], [NAN] * 4)
    mask = torch.tensor([[1, 1, 0, 0], [1] * 4, [1] * 4, [0] * 4])
    keep = torch.tensor([True, True, False, True])
    for level, (value, first, second) in expected.items():
        close(aggregate_loss(loss, mask, level, keep, 5), value)
        close(aggregate_loss(loss[:2], mask[:2].bool(), level, max_length=5), value)
        by_loss = grad(lambda x: aggregate_loss(x, mask, level, keep, 5), loss)[0]
        close(by_loss, [[first, first, 0, 0], [second] * 4, [0] * 4, [0] * 4])
        close(aggregate_loss(T([3]), torch.ones(1, 1), level, max_length=1), 3)
        nothing = aggregate_loss(loss.clone().requires_grad_(), 0 * mask, level, max_length=5)
        assert nothing.item() == 0 and nothing.requires_grad
        for shape in ((0, 3), (3, 0)):
            empty = torch.ones(shape)
            assert aggregate_loss(empty, empty, level, max_length=5).item() == 0
        # a loss that is not finite shows
        for bad in (NAN, INF):
            found = aggregate_loss(T([1, bad]), torch.ones(1, 2), level, max_length=5)
            assert str(found.item()) == str(bad)
    # 3000 tokens of loss 1, and 1 of loss 3
    loss, mask = torch.ones(2, 3000), torch.ones(2, 3000)
    loss[1], mask[1, 1:] = 3, 0
    for level, value in (("token", 3003 / 3001), ("sequence", 2), ("sum", 3003 / 2)):
        close(aggregate_loss(loss, mask, level), value)
        close(aggregate_loss(loss.bfloat16(), mask, level), value)  # a sum in bfloat16 is 3008
    # the mean of two micro-batch means would be 0.5
    close(aggregate_loss(T([1, 1] + [0] * 8), torch.ones(1, 10)), 0.2)


CHECKS = {name: globals()[f"check_{name}"] for name in PUBLIC}


@pytest.mark.parametrize("name", PUBLIC)
def test_numbers_by_hand(name):
    CHECKS[name](getattr(tricks, name))


@pytest.mark.parametrize("name", PUBLIC)
def test_function_stands_alone(name):
    """Cut out of the file, with nothing but `import torch`, the function passes its check."""
    CHECKS[name](cut_out(getattr(tricks, name)))


SIGNATURES = """
aggregate_loss(token_loss, mask, level='token', keep=None, max_length=None)
clip_masks(logprobs, old_logprobs, advantages, clip_low=0.2, clip_high=0.2)
clipped_surrogate(logprobs, old_logprobs, advantages, clip_low=0.2, clip_high=0.2, dual_clip=None)
dual_clip_mask(logprobs, old_logprobs, advantages, dual_clip)
entropy(logits, temperature=1.0)
informative_groups(rewards)
kl_estimate(logprobs, ref_logprobs, kind='k3')
leave_one_out_advantages(rewards)
loss_weights(lengths, level='token', keep=None, max_length=None)
normalize_advantages(rewards, mean='group', std='batch', eps=1e-06)
overlong_filter(mask, truncated)
scale_reward(correct, low=0.0, high=1.0)
soft_overlong_penalty(lengths, max_length, buffer)
token_logprobs(logits, token_ids, temperature=1.0)
truncated_importance_weights(logprobs, rollout_logprobs, cap=2.0)
"""


def test_public_names_and_defaults():
    assert signatures(tricks) == SIGNATURES.strip()


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_is_complete_and_short(name):
    text = getattr(tricks, name).__doc__
    assert len(text) > 200
    assert text.count("\n") <= 15


# ---- laws of advantages and rewards --------------------------------------------------------------

rewards_2d = tensors((1, 4), (2, 5))
kinds = st.sampled_from(["none", "group", "batch"])


@given(rewards_2d, kinds, kinds)
def test_advantages_equal_a_loop(rewards, mean, std):
    rows = rewards.tolist()
    everything = [r for row in rows for r in row]
    expected = []
    for row in rows:
        sets = {"group": row, "batch": everything}
        used = [sets[name] for name in (mean, std) if name != "none"]
        flat = any(len(set(numbers)) == 1 for numbers in used)
        centre = 0 if mean == "none" else statistics.fmean(sets[mean])
        scale = 1 if std == "none" else statistics.stdev(sets[std]) + 1e-6
        expected.append([0 if flat else (r - centre) / scale for r in row])
    close(normalize_advantages(rewards, mean, std), expected, 1e-9)


normalisers = pytest.mark.parametrize(
    "mean,std", [("group", "batch"), ("group", "group"), ("batch", "batch"), ("group", "none")]
)


def count_distinct(rewards):
    return [len(set(row)) for row in rewards.tolist()]


@pytest.mark.parametrize("std", ["group", "batch", "none"])
@pytest.mark.parametrize("mean", ["group", "batch"])
@given(rewards_2d, st.floats(0.1, 10), st.floats(-5, 5))
def test_advantages_ignore_shift_and_scale_of_rewards(mean, std, rewards, a, b):
    assume(rewards.std() > 0)
    moved = a * rewards + b
    assume(count_distinct(moved) == count_distinct(rewards))  # no two are rounded to one
    expected = normalize_advantages(rewards, mean, std, eps=0)
    if std == "none":
        expected = a * expected
    close(normalize_advantages(moved, mean, std, eps=0), expected, 1e-7)


@given(rewards_2d, st.floats(0.1, 10), st.floats(-5, 5))
def test_leave_one_out_ignores_a_shift_and_keeps_the_scale(rewards, a, b):
    expected = a * leave_one_out_advantages(rewards)
    close(leave_one_out_advantages(a * rewards + b), expected, 1e-9)


@pytest.mark.parametrize("std", ["none", "group", "batch"])
def test_without_a_mean_the_shift_of_rewards_matters(std):
    found = [normalize_advantages(r, "none", std)[0] for r in (REWARDS, 2 * REWARDS - 1)]
    assert found[0][3] == 0 and found[1][3] < -0.9


@normalisers
@given(rewards_2d, st.randoms(use_true_random=False))
def test_advantages_follow_the_order_of_rewards(mean, std, rewards, random):
    rows, columns = (random.sample(range(n), n) for n in rewards.shape)
    advantages = normalize_advantages(rewards, mean, std)
    shuffled = normalize_advantages(rewards[rows][:, columns], mean, std)
    close(shuffled, advantages[rows][:, columns], 1e-9)


@normalisers
@given(rewards_2d)
def test_advantages_sum_to_zero(mean, std, rewards):
    sums = normalize_advantages(rewards, mean, std).sum(dim=1)
    if mean == "batch":
        sums = sums.sum()
    close(sums, torch.zeros_like(sums), 1e-6)


@given(rewards_2d)
def test_leave_one_out_equals_a_loop(rewards):
    expected = []
    for row in rewards.tolist():
        others = [row[:i] + row[i + 1 :] for i in range(len(row))]
        expected.append([r - statistics.fmean(rest) for r, rest in zip(row, others)])
    close(leave_one_out_advantages(rewards), expected, 1e-9)


@given(rewards_2d)
def test_leave_one_out_is_the_centred_reward_scaled(rewards):
    k = rewards.shape[1]
    centred = normalize_advantages(rewards, std="none")
    close(leave_one_out_advantages(rewards), k / (k - 1) * centred, 1e-9)


@given(rewards_2d)
def test_informative_groups_have_two_rewards_that_differ(rewards):
    assert informative_groups(rewards).tolist() == [n > 1 for n in count_distinct(rewards)]


@given(st.integers(1, 50), st.integers(1, 50), st.lists(st.integers(0, 99), min_size=1))
def test_overlong_penalty_equals_a_loop_and_falls(max_length, buffer, lengths):
    buffer = min(buffer, max_length)
    expected = []
    for n in sorted(lengths):
        slope = Fraction(max_length - buffer - n, buffer)
        expected.append(float(max(-1, min(0, slope))))
    penalty = soft_overlong_penalty(torch.tensor(sorted(lengths)), max_length, buffer)
    close(penalty, expected)
    assert (penalty.diff() <= 0).all()


# ---- laws of the aggregation ---------------------------------------------------------------------

MAX_LENGTH = 9


@st.composite
def batches(draw):
    """(loss [B, 6], lengths [B], keep [B], mask [B, 6])"""
    loss = draw(tensors((1, 5), 6))
    count = len(loss)
    lengths = torch.tensor(draw(st.lists(st.integers(0, 6), min_size=count, max_size=count)))
    keep = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    return loss, lengths, keep, torch.arange(6) < lengths[:, None]


def aggregate_in_a_loop(loss, lengths, keep, level):
    rows = zip(loss.tolist(), lengths.tolist(), keep.tolist())
    used = [row[:n] for row, n, kept in rows if kept and n]
    if not used:
        return 0.0
    total, tokens = sum(map(sum, used)), sum(map(len, used))
    if level == "token":
        return total / tokens
    if level == "sequence":
        return statistics.fmean(sum(row) / len(row) for row in used)
    if level == "sum":
        return statistics.fmean(map(sum, used))
    return total / len(used) / MAX_LENGTH


@pytest.mark.parametrize("level", LEVELS)
@given(batches())
def test_aggregation_equals_a_loop(level, batch):
    loss, lengths, keep, mask = batch
    expected = aggregate_in_a_loop(loss, lengths, keep, level)
    close(aggregate_loss(loss, mask, level, keep, MAX_LENGTH), expected, 1e-9)


@pytest.mark.parametrize("level", LEVELS)
@given(batches())
def test_aggregation_ignores_padding(level, batch):
    loss, lengths, keep, mask = batch
    expected = aggregate_in_a_loop(loss, lengths, keep, level)
    poisoned = torch.where(mask, loss, NAN)
    close(aggregate_loss(poisoned, mask, level, keep, MAX_LENGTH), expected, 1e-9)
    wider = torch.nn.functional.pad(poisoned, (0, 2), value=INF)
    wider_mask = torch.nn.functional.pad(mask, (0, 2))
    close(aggregate_loss(wider, wider_mask, level, keep, MAX_LENGTH), expected, 1e-9)


@pytest.mark.parametrize("level", LEVELS)
@given(batches(), st.integers(0, 5))
def test_weighted_sum_does_not_depend_on_the_split(level, batch, cut):
    """One weight per response, computed once: any split has the same loss and gradient."""
    loss, lengths, keep, mask = batch
    weights = loss_weights(lengths.double(), level, keep, MAX_LENGTH)
    masked = torch.where(mask, loss, 0)
    parts = [(weights[part, None] * masked[part]).sum() for part in (slice(cut), slice(cut, None))]
    close(sum(parts), aggregate_in_a_loop(loss, lengths, keep, level), 1e-9)
    poisoned = torch.where(mask, loss, NAN)
    by_loss = grad(lambda x: aggregate_loss(x, mask, level, keep, MAX_LENGTH), poisoned)[0]
    close(by_loss, weights[:, None] * mask, 1e-9)


@pytest.mark.parametrize("level", LEVELS)
@given(batches())
def test_dropped_response_counts_as_absent(level, batch):
    loss, lengths, keep, mask = batch
    weights = loss_weights(lengths.double(), level, keep, MAX_LENGTH)
    close(loss_weights(lengths[keep].double(), level, None, MAX_LENGTH), weights[keep], 1e-9)
    filtered = overlong_filter(mask, ~keep)
    expected = aggregate_in_a_loop(loss, lengths, keep, level)
    close(aggregate_loss(loss, filtered, level, None, MAX_LENGTH), expected, 1e-9)


@pytest.mark.parametrize(
    "level,value",
    # 4 of 8 responses are right, the std is 0.534522: advantages +-0.5 / 0.534522 = +-0.93541
    [
        ("token", 0.93541 * 7692 / 8692),
        ("sequence", 0),
        ("constant", 0.93541 * 7692 / 16_384),
        ("sum", 0.93541 * 7692 / 2),
    ],
)
def test_loss_at_ratio_1_by_hand(level, value):
    """Right answers of 500 tokens, wrong ones of 8,192: only level sequence starts at 0."""
    advantages = normalize_advantages(T([1, 0] * 4))[0]
    lengths = torch.tensor([500, 8192] * 4)
    weights = loss_weights(lengths, level, None, 8192)
    close(-(weights * lengths * advantages).sum(), value, 1e-5)


# ---- RLOO: the response as one action ------------------------------------------------------------


def test_rloo_by_hand():
    """Every token of a response has its advantage, whatever the length; B = 4."""
    advantages = leave_one_out_advantages(T([1, 0, 0, 1]))[0]
    close(advantages, [2 / 3, -2 / 3, -2 / 3, 2 / 3])
    weights = loss_weights(torch.tensor([2, 4, 8, 16]), "sum")
    close(weights * advantages, [1 / 6, -1 / 6, -1 / 6, 1 / 6])


@given(batches())
def test_level_sum_at_ratio_1_has_the_gradient_of_whole_responses(batch):
    """That of -sum_i A_i prod_t ratio_it / B over responses with tokens."""
    logprobs, lengths, _, mask = batch
    advantages = torch.linspace(-1, 2, len(lengths), dtype=torch.float64)[:, None]
    weights = loss_weights(lengths.double(), "sum")[:, None]

    new = logprobs.clone().requires_grad_()
    of_tokens = (weights * mask * clipped_surrogate(new, logprobs, advantages)).sum()
    ratio = ((new - logprobs) * mask).sum(dim=1, keepdim=True).exp()  # of a whole response
    used = mask.any(dim=1, keepdim=True)
    of_responses = -(used * advantages * ratio).sum() / used.sum().clamp(min=1)
    found, expected = (torch.autograd.grad(loss, new)[0] for loss in (of_tokens, of_responses))
    close(found, expected, 1e-12)


# ---- laws of ratio, clip and KL ------------------------------------------------------------------

# logprobs, old_logprobs, advantages off the edges of the clip interval, where the gradient jumps
off_edge = st.floats(-2, 2).map(lambda x: round(x, 1) + 0.0123)
triples = tensors(3, 12, elements=off_edge)
low_clips = st.floats(0, 1).map(lambda x: round(x, 1))
high_clips = st.floats(0, 2).map(lambda x: round(x, 1))
clips = st.tuples(low_clips, high_clips, st.sampled_from([None, 1.5, 3.0]))


def clip_one_token(new, old, a, clip_low, clip_high, dual_clip):
    """(loss, its gradient, whether the low bound binds, whether the high bound binds)"""
    ratio = math.exp(new - old)
    low = a < 0 and ratio < 1 - clip_low
    high = a > 0 and ratio > 1 + clip_high
    factor, slope = ratio, -a * ratio
    if low:
        factor, slope = 1 - clip_low, 0
    if high:
        factor, slope = 1 + clip_high, 0
    if dual_clip and a < 0 and factor > dual_clip:
        factor, slope = dual_clip, 0
    return -a * factor, slope, low, high


@given(triples, clips)
def test_clip_equals_a_loop(triple, clip):
    results = [clip_one_token(*token, *clip) for token in zip(*triple.tolist())]
    loss, slope, low, high = T(*results).unbind(1)
    close(clipped_surrogate(*triple, *clip), loss, 1e-9)
    by_new, by_old, _ = grad(lambda *x: clipped_surrogate(*x, *clip), *triple)
    close(by_new, slope, 1e-9)
    close(by_old, -slope, 1e-9)
    low_mask, high_mask = clip_masks(*triple, *clip[:2])
    close(low_mask, low)
    close(high_mask, high)


far_or_near = st.one_of(off_edge, st.sampled_from([25.5, -25.5]))
any_triples = st.tuples(tensors(12, elements=far_or_near), tensors(12, elements=off_edge))
any_advantages = tensors(12, elements=st.one_of(off_edge, st.just(0.0)))


@given(any_triples, any_advantages, clips)
def test_masks_are_where_the_clip_changes_the_loss(pair, advantages, clip):
    """There the gradient is 0. Elsewhere it is that without a clip; with A = 0 nothing clips."""
    new, old = pair
    loss = clipped_surrogate(new, old, advantages, *clip)
    free = clipped_surrogate(new, old, advantages, 1, math.exp(21))
    low, high = clip_masks(new, old, advantages, *clip[:2])
    clipped = low | high
    if clip[2]:
        dual = dual_clip_mask(new, old, advantages, clip[2])
        assert not (dual & clipped).any()
        clipped = clipped | dual
    assert torch.equal(clipped, loss != free)
    by_new = grad(lambda x: clipped_surrogate(x, old, advantages, *clip), new)[0]
    by_free = grad(lambda x: clipped_surrogate(x, old, advantages, 1, math.exp(21)), new)[0]
    close(by_new, torch.where(clipped, 0, by_free), 1e-12)


@given(triples, clips)
def test_on_policy_loss_is_the_policy_gradient(triple, clip):
    """At ratio 1 the loss and its gradient are -A, whatever the clip."""
    new, _, advantages = triple
    close(clipped_surrogate(new, new, advantages, *clip), -advantages, 1e-9)
    by_new = grad(lambda x: clipped_surrogate(x, new, advantages, *clip), new)[0]
    close(by_new, -advantages, 1e-9)


@pytest.mark.parametrize("gap", [100.0, -100.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("loss", ["clip", "dual clip", "KL"])
def test_huge_logprob_gap_stays_finite(loss, gap, advantage):
    new = torch.full((2,), gap, requires_grad=True)
    old, advantages = torch.zeros(2), torch.full((2,), advantage)
    if loss == "KL":
        value = kl_estimate(new, old)
    else:
        dual_clip = 3.0 if loss == "dual clip" else None
        value = clipped_surrogate(new, old, advantages, dual_clip=dual_clip)
    value.sum().backward()
    assert value.isfinite().all()
    assert new.grad.isfinite().all()


@st.composite
def distributions(draw):
    """Log-probs of a policy and of a reference, over the same few tokens."""
    return draw(tensors(2, (2, 6))).log_softmax(dim=-1)


@pytest.mark.parametrize("kind", ["k1", "k3"])
@given(distributions())
def test_k1_and_k3_have_the_kl_as_expectation(kind, pair):
    policy, reference = pair
    expected = (policy.exp() * (policy - reference)).sum()
    close((policy.exp() * kl_estimate(policy, reference, kind)).sum(), expected, 1e-9)


@pytest.mark.parametrize("kind", ["k2", "k3"])
@given(distributions())
def test_k2_and_k3_are_positive_where_the_two_differ(kind, pair):
    policy, reference = pair
    estimate = kl_estimate(policy, reference, kind)
    assert (estimate >= 0).all()
    assert torch.equal(estimate > 1e-12, (policy - reference).abs() > 1e-6)


@given(distributions())
def test_gradients_of_k2_and_k3(pair):
    policy, reference = pair
    k3 = grad(lambda x: kl_estimate(x, reference), policy)[0]
    close(k3, 1 - (reference - policy).exp(), 1e-9)
    k2 = grad(lambda x: kl_estimate(x, reference, "k2"), policy)[0]
    close(k2, policy - reference, 1e-9)


@given(distributions())
def test_importance_weights_equal_a_loop(pair):
    expected = [min(math.exp(a - b), 1.5) for a, b in zip(*pair.tolist())]
    close(truncated_importance_weights(*pair, 1.5), expected, 1e-9)


# ---- laws of log-probs and entropy ---------------------------------------------------------------


@st.composite
def token_choices(draw):
    """Logits [T, V] with some tokens banned, and the chosen tokens [T], which are not."""
    logits = draw(tensors((1, 3), (2, 6)))
    count, vocabulary = logits.shape
    ids = draw(st.lists(st.integers(0, vocabulary - 1), min_size=count, max_size=count))
    for row, i in zip(logits, ids):
        others = [v for v in range(vocabulary) if v != i]
        banned = draw(st.sampled_from([None, *others]))
        if banned is not None:
            row[banned] = -INF
    return logits, torch.tensor(ids)


def softmax_in_a_loop(logits, temperature):
    rows = []
    for row in logits.tolist():
        weights = [math.exp(x / temperature) for x in row]
        rows.append([weight / sum(weights) for weight in weights])
    return rows


temperatures = st.floats(0.2, 3)


@given(token_choices(), temperatures)
def test_token_logprobs_equal_a_loop(choice, temperature):
    logits, ids = choice
    rows = softmax_in_a_loop(logits, temperature)
    expected = [math.log(p[i]) for p, i in zip(rows, ids)]
    close(token_logprobs(logits, ids, temperature), expected, 1e-9)


@given(token_choices(), temperatures)
def test_entropy_equals_a_loop(choice, temperature):
    logits, _ = choice
    rows = softmax_in_a_loop(logits, temperature)
    expected = [-sum(q * math.log(q) for q in p if q > 0) for p in rows]
    close(entropy(logits, temperature), expected, 1e-9)


@given(token_choices(), temperatures)
def test_gradients_by_logits_sum_to_zero(choice, temperature):
    logits, ids = choice
    of_logprobs = grad(lambda x: token_logprobs(x, ids, temperature), logits)[0]
    of_entropy = grad(lambda x: entropy(x, temperature), logits)[0]
    for gradient in (of_logprobs, of_entropy):
        assert gradient.isfinite().all()
        assert not gradient[logits == -INF].any()
        close(gradient.sum(dim=-1), [0] * len(ids), 1e-9)


# ---- what holds for every function ---------------------------------------------------------------

# log-probs as they are: their differences are no numbers of half precision
lp = -torch.tensor([[3e-4, 0.0431, 0.61], [0.871, 1.37, 1.93]])
logits = torch.linspace(-2, 3, 24).reshape(2, 3, 4).sin()
ids = torch.tensor([[0, 1, 2], [2, 1, 0]])
flags = torch.tensor([True, False])
ARGUMENTS = {
    "scale_reward": (lp.exp(), -1.0, 1.0),
    "soft_overlong_penalty": (T(3, 7, 12, dtype=torch.float32), 10, 7),
    "normalize_advantages": (lp,),
    "leave_one_out_advantages": (lp,),
    "informative_groups": (lp,),
    "token_logprobs": (logits, ids),
    "entropy": (logits,),
    "clipped_surrogate": (lp, lp.flip(1), lp + 1, 0.2, 0.2, 3.0),
    "clip_masks": (lp, lp.flip(1), lp + 1),
    "dual_clip_mask": (lp, lp.flip(1), -lp, 1.1),
    "kl_estimate": (lp, lp.flip(1)),
    "truncated_importance_weights": (lp, lp.flip(1)),
    "overlong_filter": (torch.ones(2, 3), flags),
    "loss_weights": (T(3, 2, dtype=torch.float32), "sequence", flags),
    "aggregate_loss": (lp, torch.ones(2, 3, dtype=torch.bool), "sequence", flags),
}
RETURN_MASKS = ("overlong_filter", "informative_groups", "clip_masks", "dual_clip_mask")
TAKE_LENGTHS = ("soft_overlong_penalty", "loss_weights")
TAKE_REWARDS = ("scale_reward", "normalize_advantages", "leave_one_out_advantages")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in RETURN_MASKS])
def test_half_precision_is_computed_in_float32(name, dtype):
    check_precision(getattr(tricks, name), ARGUMENTS[name], dtype)


@pytest.mark.parametrize("name", PUBLIC)
def test_arguments_are_not_written_to(name):
    check_purity(getattr(tricks, name), ARGUMENTS[name])


@pytest.mark.parametrize("name", PUBLIC)
def test_no_value_is_read_back(name):
    """Tensors on the meta device have no values: reading one, or making a CPU tensor, fails."""
    arguments = [x.to("meta") if torch.is_tensor(x) else x for x in ARGUMENTS[name]]
    assert all(x.device.type == "meta" for x in outputs(getattr(tricks, name), arguments))


@pytest.mark.parametrize("name", TAKE_LENGTHS + TAKE_REWARDS)
def test_integers_become_float32(name):
    first, *rest = ARGUMENTS[name]
    result = getattr(tricks, name)((first > -2).to(torch.int64), *rest)
    assert result.dtype == torch.float32


@pytest.mark.parametrize("name", TAKE_REWARDS)
def test_bools_become_float32(name):
    first, *rest = ARGUMENTS[name]
    assert getattr(tricks, name)(first > -2, *rest).dtype == torch.float32


def test_padding_never_matters():
    """From log-probs to loss: equal value and gradient for padding of zeros, inf or NaN."""
    mask, old = torch.tensor([[True, True, False], [True, False, False]]), lp.flip(0)
    results = []
    for junk in (0.0, INF, -INF, NAN):
        new = torch.where(mask, lp, junk).requires_grad_()
        behind = torch.where(mask, old, junk)
        loss = clipped_surrogate(new, behind, T([1], [-1]), dual_clip=3.0)
        loss = loss + 0.1 * kl_estimate(new, behind)
        loss = aggregate_loss(loss * truncated_importance_weights(behind, lp), mask)
        loss.backward()
        assert not new.grad[~mask].any()
        results.append(torch.cat([loss.detach()[None], new.grad.flatten()]))
    assert all(torch.equal(result, results[0]) for result in results)


# ---- errors --------------------------------------------------------------------------------------

x2, x3, i2 = torch.zeros(2), torch.zeros(3), torch.zeros(2, dtype=torch.int64)
b2, b3 = torch.zeros(2, 2), torch.zeros(2, 3)
one_each, one, none = torch.zeros(2, 1), torch.zeros(1, 1), torch.zeros(0, 4)
bool3 = x3.bool()
SHAPE_ERRORS = [
    ((x2, x3, x2), "old_logprobs.*(3,)"),
    ((x2, x2, x3), "advantages.*(3,)"),
    ((b2, b2, x2), "advantages.*(2,)"),
    ((x2, x2, b2), "advantages.*(2, 2)"),
]
CLIP_ERRORS = [
    *SHAPE_ERRORS,
    ((x2, x2, x2, -0.1), "clip_low.*-0.1"),
    ((x2, x2, x2, 1.1), "clip_low.*1.1"),
    ((x2, x2, x2, 0.2, -0.1), "clip_high.*-0.1"),
    ((x2, x2, x2, 0.2, NAN), "clip_high.*nan"),
]
LEVEL_ERRORS = [  # after the first arguments
    (("tokens",), "level.*'tokens'"),
    (("constant",), "max_length.*None"),
    (("constant", None, 0), "max_length.*0"),
    (("constant", None, NAN), "max_length.*nan"),
    (("token", bool3), "keep.*(3,)"),
    (("token", i2), "keep.*int64"),
]
ERRORS = [  # function, arguments, what the message says
    ("scale_reward", (x2, 1, 1), "low=1.*high=1"),
    ("scale_reward", (x2, 2, 1), "low=2"),
    ("scale_reward", (x2, NAN, 1), "low=nan"),
    ("scale_reward", (x2, -INF, 1), "low=-inf"),
    ("scale_reward", (x2, 0, INF), "high=inf"),
    ("soft_overlong_penalty", (x2, 10, 0), "buffer.*got 0"),
    ("soft_overlong_penalty", (x2, 10, 11), "buffer.*max_length=10.*got 11"),
    ("informative_groups", (x2,), "rewards.*(2,)"),
    ("normalize_advantages", (x2,), "rewards.*(2,)"),
    ("normalize_advantages", (b2, "group", "batch", -1), "eps.*-1"),
    ("normalize_advantages", (b2, "group", "batch", NAN), "eps.*nan"),
    ("normalize_advantages", (b2, "grp"), "mean.*'grp'"),
    ("normalize_advantages", (b2, "group", "grp"), "std.*'grp'"),
    ("normalize_advantages", (one_each,), "mean='group'.*(2, 1)"),
    ("normalize_advantages", (one_each, "none", "group"), "std='group'.*(2, 1)"),
    ("normalize_advantages", (one, "none"), "std='batch'.*(1, 1)"),
    ("normalize_advantages", (one, "batch", "none"), "mean='batch'.*(1, 1)"),
    ("normalize_advantages", (none,), "std='batch'.*(0, 4)"),
    ("leave_one_out_advantages", (x2,), "rewards.*(2,)"),
    ("leave_one_out_advantages", (one_each,), "(2, 1)"),
    ("leave_one_out_advantages", (b2[None],), "(1, 2, 2)"),
    ("token_logprobs", (b2, x3), "token_ids.*(3,)"),
    ("token_logprobs", (x2[0], x2[0]), "token_ids.*()"),
    ("token_logprobs", (b2, i2, 0), "temperature.*0"),
    ("token_logprobs", (b2, i2, NAN), "temperature.*nan"),
    ("entropy", (x2[0],), "logits.*()"),
    ("entropy", (b2, 0), "temperature.*0"),
    ("entropy", (b2, NAN), "temperature.*nan"),
    *[("clipped_surrogate", arguments, message) for arguments, message in CLIP_ERRORS],
    ("clipped_surrogate", (x2, x2, x2, 0.2, 0.2, 1), "dual_clip.*1"),
    ("clipped_surrogate", (x2, x2, x2, 0.2, 0.2, NAN), "dual_clip.*nan"),
    *[("clip_masks", arguments, message) for arguments, message in CLIP_ERRORS],
    *[("dual_clip_mask", (*shapes, 3), message) for shapes, message in SHAPE_ERRORS],
    ("dual_clip_mask", (x2, x2, x2, 1), "dual_clip.*1"),
    ("dual_clip_mask", (x2, x2, x2, NAN), "dual_clip.*nan"),
    ("kl_estimate", (x2, x3), "ref_logprobs.*(3,)"),
    ("kl_estimate", (x2, x2, "k4"), "kind.*'k4'"),
    ("truncated_importance_weights", (x2, x3), "rollout_logprobs.*(3,)"),
    ("truncated_importance_weights", (x2, x2, 0), "cap.*0"),
    ("truncated_importance_weights", (x2, x2, NAN), "cap.*nan"),
    ("overlong_filter", (x2, flags), "mask.*(2,)"),
    ("overlong_filter", (b2, bool3), "truncated.*(3,)"),
    ("overlong_filter", (b2, x2), "truncated.*float32"),
    ("loss_weights", (b2,), "lengths.*(2, 2)"),
    *[("loss_weights", (x2, *rest), message) for rest, message in LEVEL_ERRORS],
    ("aggregate_loss", (x2, x2), "token_loss.*(2,)"),
    ("aggregate_loss", (b2, b3), "mask.*(2, 3)"),
    *[("aggregate_loss", (b2, b2, *rest), message) for rest, message in LEVEL_ERRORS],
]


@pytest.mark.parametrize("name,arguments,message", ERRORS)
def test_error_names_the_argument_and_its_value(name, arguments, message):
    check_error(getattr(tricks, name), arguments, message)


def test_every_function_has_errors_and_mutants():
    assert {name for name, *_ in ERRORS} == set(PUBLIC)
    assert {mutant.values[0] for mutant in MUTANTS} == set(PUBLIC)


# ---- named mutants: the checks notice the classic mistakes ---------------------------------------

MUTANTS = parse_mutants("""
scale_reward: low and high swapped
- low * (1 - correct) + high * correct
+ high * (1 - correct) + low * correct

scale_reward: rounded at the upper end
- low * (1 - correct) + high * correct
+ low + (high - low) * correct

scale_reward: rounded at the lower end
- low * (1 - correct) + high * correct
+ high - (high - low) * (1 - correct)

soft_overlong_penalty: in float16
- lengths.to(torch.promote_types(lengths.dtype, torch.float32))
+ lengths.to(torch.float16)

soft_overlong_penalty: counted from max_length
- max_length - buffer - lengths
+ max_length - lengths

soft_overlong_penalty: short responses are rewarded
- .clamp(-1, 0)
+ .clamp(min=-1)

informative_groups: by the std, which has a rounding error
- (rewards != rewards[:, :1]).any(dim=1)
+ rewards.std(dim=1) > 0

informative_groups: with a tolerance
- rewards != rewards[:, :1]
+ ~torch.isclose(rewards, rewards[:, :1])

informative_groups: all instead of any
- .any(
+ .all(

normalize_advantages: std of the centred rewards
- levels[std].std(
+ {'group': groups, 'batch': (groups - groups.mean(1, keepdim=True)).flatten()}[std].std(

normalize_advantages: biased std
- correction=1
+ correction=0

normalize_advantages: eps inside the root
- (levels[std].std(dim=-1, correction=1, keepdim=True) + eps)
+ (levels[std].var(dim=-1, correction=1, keepdim=True) + eps).sqrt()

normalize_advantages: std of a part of the batch
- rewards.flatten()
+ rewards[: len(rewards) // 2 + 1].flatten()

normalize_advantages: std of the group in place of the batch
- 'batch': batch
+ 'batch': groups

normalize_advantages: whitened twice
- return advantages
+ return (advantages - advantages.mean()) / (advantages.std() + eps)

normalize_advantages: rounding error divided by eps
- advantages.masked_fill(constant, 0)
+ advantages

normalize_advantages: equal up to a tolerance
- levels[name] == levels[name][..., :1]
+ torch.isclose(levels[name], levels[name][..., :1])

normalize_advantages: statistics over prompts
- mean(dim=-1
+ mean(dim=0

leave_one_out_advantages: own reward in the baseline
- group_size / (group_size - 1) * (rewards
+ (rewards

leave_one_out_advantages: rounding error
- .masked_fill((rewards == rewards[:, :1]).all(dim=1, keepdim=True), 0)
+

leave_one_out_advantages: equal up to a tolerance
- rewards == rewards[:, :1]
+ torch.isclose(rewards, rewards[:, :1])

token_logprobs: a banned token is only unlikely
- .log_softmax(dim=-1)
+ .log_softmax(dim=-1).clamp(min=-1e4)

token_logprobs: temperature multiplies
- / temperature
+ * temperature

token_logprobs: logits instead of log-probs
- .log_softmax(dim=-1)
+

entropy: sign
- return -(
+ return (

entropy: 0 log 0 is NaN
- .clamp(min=torch.finfo(logprobs.dtype).min)
+

clipped_surrogate: max for min
- torch.min(
+ torch.max(

clipped_surrogate: low and high swapped
- clamp(1 - clip_low, 1 + clip_high)
+ clamp(1 - clip_high, 1 + clip_low)

clipped_surrogate: clipped on both sides
- torch.min(ratio * advantages, ratio.clamp(
+ (ratio.clamp(

clipped_surrogate: reward instead of loss
- return -objective
+ return objective

clipped_surrogate: ratio upside down
- (logprobs.to(dtype) - old_logprobs)
+ (old_logprobs - logprobs.to(dtype))

clipped_surrogate: dual clip where the advantage is positive
- advantages < 0
+ advantages > 0

clipped_surrogate: difference in bfloat16
- (logprobs.to(dtype) - old_logprobs)
+ (logprobs - old_logprobs).to(dtype)

clipped_surrogate: unbounded ratio
- .clamp(-20, 20)
+

clip_masks: difference in bfloat16
- (logprobs.to(dtype) - old_logprobs)
+ (logprobs - old_logprobs).to(dtype)

clip_masks: unbounded ratio
- .clamp(-20, 20)
+

clip_masks: sign of the advantage ignored
- (advantages > 0) & (ratio > 1 + clip_high)
+ ratio > 1 + clip_high

clip_masks: low and high swapped
- 1 - clip_low)
+ 1 - clip_high)

dual_clip_mask: where the advantage is positive
- advantages < 0
+ advantages > 0

dual_clip_mask: sign of the advantage ignored
- (advantages < 0) & (ratio > dual_clip)
+ ratio > dual_clip

dual_clip_mask: difference in bfloat16
- (logprobs.to(dtype) - old_logprobs)
+ (logprobs - old_logprobs).to(dtype)

dual_clip_mask: unbounded ratio
- .clamp(max=20)
+

kl_estimate: the other KL
- ref_logprobs.to(dtype) - logprobs
+ logprobs.to(dtype) - ref_logprobs

kl_estimate: difference in bfloat16
- ref_logprobs.to(dtype) - logprobs
+ (ref_logprobs - logprobs).to(dtype)

kl_estimate: every kind bounded
- ref_logprobs.to(dtype) - logprobs
+ (ref_logprobs.to(dtype) - logprobs).clamp(-20, 20)

kl_estimate: sign in k3
- d.expm1() - d
+ d.expm1() + d

kl_estimate: cancellation
- d.expm1()
+ (d.exp() - 1)

truncated_importance_weights: with gradient
- logprobs.detach()
+ logprobs

truncated_importance_weights: difference in bfloat16
- (logprobs.detach().to(dtype) - rollout_logprobs.detach())
+ (logprobs.detach() - rollout_logprobs.detach()).to(dtype)

truncated_importance_weights: min for max
- max=cap
+ min=cap

overlong_filter: keeps the truncated
- truncated.unsqueeze(1)
+ ~truncated.unsqueeze(1)

overlong_filter: truncated means of full length
- truncated.unsqueeze(1)
+ mask.bool().all(1, keepdim=True)

loss_weights: filtered tokens stay in the denominator
- torch.where(kept, lengths, 0)
+ lengths

loss_weights: filtered responses stay in B
- responses = kept.sum()
+ responses = torch.tensor(len(kept))

loss_weights: long responses weigh more
- denominator = responses * lengths
+ denominator = responses * lengths.clamp(max=1000)

loss_weights: tokens of a part of the batch
- denominator = lengths.sum()
+ denominator = lengths[: len(lengths) // 2].sum()

aggregate_loss: no mask
- torch.where(mask, token_loss, 0)
+ token_loss

aggregate_loss: NaN hidden
- torch.where(mask, token_loss, 0)
+ torch.where(mask, token_loss, 0).nan_to_num()

aggregate_loss: infinity hidden
- torch.where(mask, token_loss, 0)
+ torch.where(mask & token_loss.isfinite(), token_loss, 0)

aggregate_loss: sum in bfloat16
- token_loss.to(torch.promote_types(token_loss.dtype, torch.float32))
+ token_loss

aggregate_loss: long responses weigh more
- loss / lengths.clamp(min=1)
+ loss / lengths.clamp(1, 1000)

aggregate_loss: multiplied by the mask
- torch.where(mask, token_loss, 0)
+ (token_loss * mask)

aggregate_loss: mean of the micro-batch
- loss.sum() / lengths.sum().clamp(min=1)
+ (loss / lengths.clamp(min=1)).mean()

aggregate_loss: keep ignored
- mask.bool() & keep.unsqueeze(1)
+ mask.bool()

aggregate_loss: empty responses counted
- (lengths > 0).sum()
+ torch.tensor(len(lengths))
""")


@pytest.mark.parametrize("name,right,wrong", MUTANTS)
def test_named_mutant_fails_its_check(name, right, wrong):
    mutant = mutate(getattr(tricks, name), right, wrong)
    with pytest.raises(AssertionError):
        CHECKS[name](mutant)
