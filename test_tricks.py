"""tricks.py: numbers derived by hand, laws, gradients, edge cases, and mutants that must be noticed.

Run: pytest test_tricks.py. Each `check_*` takes the module (or one cut-out function) that it tests, so that the same check
runs on tricks.py, on a function copied out of it, and on deliberately broken versions of it.
"""

import inspect
import math
import os
import statistics
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import tricks

settings.register_profile("repeatable", max_examples=int(os.environ.get("EXAMPLES", 60)), deadline=None, derandomize=True,
                          database=None)
settings.load_profile("repeatable")
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:std")  # torch warns about the std of no groups at all

INF, NAN = float("inf"), float("nan")
PUBLIC = [name for name, value in vars(tricks).items() if inspect.isfunction(value)]
CUTS = {name: inspect.getsource(getattr(tricks, name)) for name in PUBLIC}


def T(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def close(actual, expected, tol=1e-6):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert torch.allclose(actual.detach().double(), expected, rtol=tol, atol=tol, equal_nan=False), (actual, expected)


def grad(function, *inputs):
    """Gradients of the summed result in copies of the inputs."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*inputs).sum(), inputs)


# ---- numbers by hand; one check per public function -----------------------------------------------------------------


def check_scale_reward(m):
    correct = torch.tensor([[True, False]])
    close(m.scale_reward(correct), [[1, 0]])
    assert m.scale_reward(correct, low=-0.1, high=0.3).tolist() == torch.tensor([[0.3, -0.1]]).tolist()  # exact at both ends
    close(m.scale_reward(T(0.25), low=-1, high=3), [0.0])  # -1 + .25 * 4


def check_soft_overlong_penalty(m):
    # Lmax 10, buffer 4: free up to 6, then -1/4 per token, -1 from 10 on
    close(m.soft_overlong_penalty(torch.tensor([0, 5, 6, 7, 8, 10, 15]), 10, 4), [0, 0, 0, -0.25, -0.5, -1, -1])
    close(m.soft_overlong_penalty(torch.tensor([0, 5, 10]), 10, 10), [0, -0.5, -1])  # buffer = Lmax is legal


def check_informative_groups(m):
    rewards = T([1, 1, 0], [0, 0, 0], [0.1, 0.1, 0.1], [0, 1, 0])
    assert m.informative_groups(rewards).tolist() == [True, False, False, True]
    assert m.informative_groups(T([1], [0])).tolist() == [False, False]
    assert m.informative_groups(torch.zeros(0, 3)).shape == (0,)


REWARDS = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]])


def check_normalize_advantages(m):
    # Raw batch: 4 ones in 12, mean 1/3, sum of squares 4 * (2/3)^2 + 8 * (1/3)^2 = 8/3, var 8/33, std .492366.
    # A = (1 - 3/4) / std = .50775 and (0 - 3/4) / std = -1.52325; the third group is the mirror image.
    lite = [[0.50775] * 3 + [-1.52325], [0] * 4, [1.52325] + [-0.50775] * 3]
    for rewards in (REWARDS, 2 * REWARDS - 1):  # {0, 1} and {-1, 1}
        close(m.normalize_advantages(rewards), lite, 2e-5)
        # group std of [1, 1, 1, 0]: var (3/16 + 9/16) / 3 = 1/4, std .5
        close(m.normalize_advantages(rewards, "group", "group"), [[0.5] * 3 + [-1.5], [0] * 4, [1.5] + [-0.5] * 3], 1e-5)
        close(m.normalize_advantages(rewards, "batch", "batch")[0], [1.354] * 3 + [-0.677], 2e-5)
    close(m.normalize_advantages(REWARDS, "group", "none")[0], [0.25] * 3 + [-0.75])
    close(m.normalize_advantages(2 * REWARDS - 1, "group", "none")[0], [0.5] * 3 + [-1.5])
    close(m.normalize_advantages(REWARDS, "none", "none"), REWARDS)
    close(m.normalize_advantages(REWARDS, "batch", "none")[0], [2 / 3] * 3 + [-1 / 3])
    # eps outside the root: rewards 0 and 2e-6 have std sqrt(2) 1e-6, so A = 1 / (sqrt(2) + 1) = sqrt(2) - 1
    close(m.normalize_advantages(T([0, 2e-6])), [[1 - 2**0.5, 2**0.5 - 1]])
    close(m.normalize_advantages(T([0, 2]), eps=0), [[-(0.5**0.5), 0.5**0.5]], 1e-12)
    # eight times 0.1 has a float32 mean other than 0.1: the residue must not be divided by eps
    flat = torch.full((2, 8), 0.1)
    for mean in ("none", "group", "batch"):
        for std in ("group", "batch"):
            for eps in (0, 1e-6):
                assert not m.normalize_advantages(flat, mean, std, eps).any()
                mixed = m.normalize_advantages(torch.cat([flat, torch.arange(8.0)[None]]), mean, std, eps)
                assert mixed.isfinite().all() and mixed[2].any()
                assert "group" not in (mean, std) or not mixed[:2].any()
                assert (mean, std) != ("batch", "batch") or mixed[:2].all()
    assert m.normalize_advantages(torch.zeros(0, 4), std="group").shape == (0, 4)


def check_leave_one_out_advantages(m):
    # [1, 1, 1, 0]: 1 - 2/3 and 0 - 3/3
    close(m.leave_one_out_advantages(REWARDS), [[1 / 3] * 3 + [-1], [0] * 4, [1] + [-1 / 3] * 3])
    assert not m.leave_one_out_advantages(torch.full((1, 8), 0.1)).any()
    close(m.leave_one_out_advantages(T([3, 1])), [[2, -2]])


def check_token_logprobs(m):
    # softmax([0, log 3]) = [1/4, 3/4]; at temperature 1/2 the logits double: [1/10, 9/10]
    logits = T([0, math.log(3)], [0, -INF])
    close(m.token_logprobs(logits, torch.tensor([1, 0])), [math.log(3 / 4), 0])
    close(m.token_logprobs(logits, torch.tensor([0, 0]), temperature=0.5), [math.log(1 / 10), 0])
    close(m.token_logprobs(T([[1000, 0]]), torch.tensor([[1]], dtype=torch.int16)), [[-1000]])
    close(grad(lambda x: m.token_logprobs(x, torch.tensor([0, 0])), logits)[0], [[3 / 4, -3 / 4], [0, 0]])  # onehot - p


def check_entropy(m):
    p = [1 / 4, 3 / 4]
    h = -sum(q * math.log(q) for q in p)  # .562335
    logits = T([0, math.log(3), -INF], [-INF, 5, -INF], [1000, 1000, 0])
    close(m.entropy(logits), [h, 0, math.log(2)])
    close(m.entropy(T(0, math.log(3)), temperature=0.5), -0.1 * math.log(0.1) - 0.9 * math.log(0.9))
    expected = [[-q * (math.log(q) + h) for q in p] + [0], [0] * 3, [0] * 3]
    close(grad(m.entropy, logits)[0], expected)
    assert m.entropy(torch.randn(3, 2, 1)).shape == (3, 2) and not m.entropy(torch.randn(3, 2, 1)).any()  # V = 1 is certain


def check_linear_logprobs(m):
    # weight = identity: the logits are hidden, so the gradients are the formulas of the docstring over the temperature
    hidden, weight, ids = T([0, math.log(3)], [0, 0], [1, 1]), torch.eye(2, dtype=torch.float64), torch.tensor([0, 1, 1])
    h = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    logprobs, entropy = m.linear_logprobs(hidden, weight, ids, chunk=2)
    close(logprobs, [math.log(1 / 4), -math.log(2), -math.log(2)])
    close(entropy, [h, math.log(2), math.log(2)])
    close(m.linear_logprobs(hidden, weight, ids, temperature=0.5)[0][:1], [math.log(1 / 10)])
    d_logprob = [[3 / 4, -3 / 4], [-1 / 2, 1 / 2], [-1 / 2, 1 / 2]]
    d_entropy = [[-0.25 * (math.log(0.25) + h), -0.75 * (math.log(0.75) + h)], [0, 0], [0, 0]]
    close(m.linear_logprobs(hidden, weight, ids.short())[0], logprobs)
    for chunk in (1, 2, 3, 9):
        close(grad(lambda x: m.linear_logprobs(x, weight, ids, chunk=chunk)[0], hidden)[0], d_logprob)
        close(grad(lambda x: m.linear_logprobs(x, weight, ids, chunk=chunk)[1], hidden)[0], d_entropy)
        by_weight = grad(lambda w: m.linear_logprobs(hidden, w, ids, chunk=chunk)[0], weight)[0]
        close(by_weight, T(*d_logprob).t() @ hidden)  # logits = hidden @ weight.T
    # temperature t: both gradients are 1 / t times those at hidden / t
    for i in (0, 1):
        scaled = grad(lambda x: m.linear_logprobs(x, weight, ids, temperature=2.0)[i], 2 * hidden)[0]
        close(scaled, T(*(d_logprob, d_entropy)[i]) / 2)


LOG2 = math.log(2)  # a gap of log 2 is a ratio of 2


def check_clipped_surrogate(m):
    # ratio 2 or 1/2 against [.8, 1.2] (or [.4, 3]); loss = -min(ratio A, clipped A)
    new, old, a = T(LOG2, LOG2, 0, 0, 0), T(0, 0, LOG2, LOG2, 0), T(3, -3, 3, -3, 3)
    close(m.clipped_surrogate(new, old, a), [-3.6, 6, -1.5, 2.4, -3])
    close(grad(lambda x: m.clipped_surrogate(x, old, a), new)[0], [0, 6, -1.5, 0, -3])  # -ratio A where not clipped
    close(m.clipped_surrogate(new, old, a, clip_low=0.6, clip_high=2.0), [-6, 6, -1.5, 1.5, -3])
    close(m.clipped_surrogate(new, old, a, dual_clip=1.5), [-3.6, 4.5, -1.5, 2.4, -3])  # at least c A where A < 0
    close(grad(lambda x: m.clipped_surrogate(x, old, a, dual_clip=1.5), new)[0], [0, 0, -1.5, 0, -3])
    close(m.clipped_surrogate(new, old, a, clip_low=0, clip_high=0), [-3, 6, -1.5, 3, -3])
    close(m.clipped_surrogate(new, old, a, clip_low=1), [-3.6, 6, -1.5, 1.5, -3])
    # a gap beyond 20 counts as 20, with no gradient from there on
    new, old, a = T(100, -100, 100, -100, 100, 19), torch.zeros(6, dtype=torch.float64), T(1, 1, -1, -1, 0, -1)
    loss = m.clipped_surrogate(new, old, a)
    close(loss, [-1.2, 0, math.exp(20), 0.8, 0, math.exp(19)])
    close((-loss[1]).log(), -20)
    close(grad(lambda x: m.clipped_surrogate(x, old, a), new)[0], [0, 0, 0, 0, 0, math.exp(19)])
    close(m.clipped_surrogate(torch.zeros(2, 2), torch.zeros(2, 2), T([1], [2])), [[-1, -1], [-2, -2]])
    close(m.clipped_surrogate(torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor(2)), [[-2, -2], [-2, -2]])


def check_clip_masks(m):
    new, old, a = T(LOG2, LOG2, 0, 0, 0, LOG2, 0), T(0, 0, LOG2, LOG2, 0, 0, LOG2), T(3, -3, 3, -3, 3, 0, 0)
    low, high = m.clip_masks(new.requires_grad_(), old, a)
    assert low.tolist() == [False, False, False, True, False, False, False]
    assert high.tolist() == [True, False, False, False, False, False, False]
    low, high = m.clip_masks(new, old, a, clip_low=0.6, clip_high=1.01)
    assert not low.any() and not high.any()
    assert m.clip_masks(new, old, a, 0.6, 0.99)[1].any() and m.clip_masks(new, old, a, 0.49, 2.0)[0].any()
    assert m.clip_masks(new, old, a, 0, 0)[0][3] and not m.clip_masks(new, old, a, 1, 0)[0].any()
    assert not any(mask.any() for mask in m.clip_masks(T(0, 0), T(0, 0), T(1, -1), 0, 0))  # at the bound it does not bind
    low, high = m.clip_masks(T(100, -100), T(0, 0), T(1, -1))
    assert low.tolist() == [False, True] and high.tolist() == [True, False]
    _, high = m.clip_masks(torch.ones(2, 2), torch.zeros(2, 2), T([1], [-1]))
    assert high.tolist() == [[True, True], [False, False]]
    assert m.clip_masks(torch.ones(2, 2), torch.zeros(2, 2), torch.tensor(1))[1].all()
    # 1 + 2^-9 is 1 in bfloat16: the difference of two halves is taken in float32
    assert m.clip_masks(T(1, dtype=torch.bfloat16), T(-2**-9, dtype=torch.bfloat16), T(1), 0, math.e - 1)[1].all()


def check_kl_estimate(m):
    new, ref = T(0, LOG2, 0), T(LOG2, 0, 0)  # d = log 2, -log 2, 0
    close(m.kl_estimate(new, ref, "k1"), [-LOG2, LOG2, 0])
    close(m.kl_estimate(new, ref, "k2"), [LOG2**2 / 2, LOG2**2 / 2, 0])
    close(m.kl_estimate(new, ref), [1 - LOG2, -0.5 + LOG2, 0])
    close(grad(lambda x: m.kl_estimate(x, ref), new)[0], [-1, 0.5, 0])  # 1 - exp(d)
    close(m.kl_estimate(T(0, 100), T(100, 0)), [math.exp(20) - 21, 99])
    close(grad(lambda x: m.kl_estimate(x, T(100, 0)), T(0, 100))[0], [0, 1])
    close(m.kl_estimate(torch.zeros(1), torch.full((1,), 1e-4)) * 1e8, [0.5 + 1e-4 / 6], 1e-3)  # d^2/2 + d^3/6, in float32


def check_truncated_importance_weights(m):
    new = T(0, LOG2, 0, 100, -100).requires_grad_()
    weights = m.truncated_importance_weights(new, T(0, 0, LOG2, 0, 0).requires_grad_(), cap=1.5)
    close(weights, [1, 1.5, 0.5, 1.5, 0])
    assert not weights.requires_grad
    close(m.truncated_importance_weights(T(5, LOG2 / 2), T(0, 0)), [2, 2**0.5])
    close(m.truncated_importance_weights(T(5), T(0), cap=0.5), [0.5])


def check_overlong_filter(m):
    for dtype in (torch.bool, torch.int64, torch.float32):
        out = m.overlong_filter(torch.tensor([[1, 1, 0], [1] * 3, [1] * 3], dtype=dtype), torch.tensor([False, True, False]))
        assert out.tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]] and out.dtype == dtype
    assert m.overlong_filter(torch.ones(0, 3), torch.ones(0, dtype=torch.bool)).shape == (0, 3)


def check_loss_weights(m):
    lengths, keep = torch.tensor([2, 4, 0, 10]), torch.tensor([True, True, True, False])
    close(m.loss_weights(lengths[:2]), [1 / 6, 1 / 6])
    close(m.loss_weights(lengths), [1 / 16, 1 / 16, 0, 1 / 16])
    close(m.loss_weights(lengths, "token", keep), [1 / 6, 1 / 6, 0, 0])
    close(m.loss_weights(lengths, "sequence"), [1 / 6, 1 / 12, 0, 1 / 30])
    close(m.loss_weights(lengths, "sequence", keep), [1 / 4, 1 / 8, 0, 0])
    close(m.loss_weights(lengths, "constant", keep, max_length=10), [1 / 20, 1 / 20, 0, 0])
    close(m.loss_weights(lengths, "constant", max_length=0.5), [2 / 3, 2 / 3, 0, 2 / 3])
    for level in ("token", "sequence", "constant"):
        assert m.loss_weights(torch.tensor([0, 3]), level, torch.tensor([True, False]), 8).tolist() == [0, 0]
        assert m.loss_weights(torch.zeros(0), level, None, 8).shape == (0,)
        assert m.loss_weights(torch.tensor([1]), level, max_length=1).tolist() == [1]
    close(m.loss_weights(torch.full((40,), 10_000, dtype=torch.float16)), [1 / 400_000] * 40, 1e-9)


def check_aggregate_loss(m):
    # lengths 2 and 4, loss 1 on the first and 0 on the second: sequence 1/2, token 2/6, constant (of 5) 2/10
    loss = T([1, 1, INF, NAN], [0, 0, 0, 0], [7, 7, 7, 7], [NAN] * 4)
    mask, keep = torch.tensor([[1, 1, 0, 0], [1] * 4, [1] * 4, [0] * 4]), torch.tensor([True, True, False, True])
    for level, value, slope in (("token", 1 / 3, [1 / 6] * 2), ("sequence", 1 / 2, [1 / 4, 1 / 8]), ("constant", 0.2, [0.1] * 2)):
        close(m.aggregate_loss(loss, mask, level, keep, 5), value)
        close(m.aggregate_loss(loss[:2], mask[:2].bool(), level, max_length=5), value)
        by_loss = grad(lambda x: m.aggregate_loss(x, mask, level, keep, 5), loss)[0]
        close(by_loss, [[slope[0]] * 2 + [0] * 2, [slope[1]] * 4, [0] * 4, [0] * 4])
        nothing = m.aggregate_loss(loss.clone().requires_grad_(), 0 * mask, level, max_length=5)
        assert nothing.item() == 0 and nothing.requires_grad
        for shape in ((0, 3), (3, 0)):
            assert m.aggregate_loss(torch.ones(shape), torch.ones(shape), level, max_length=5).item() == 0
        close(m.aggregate_loss(T([3]), torch.ones(1, 1), level, max_length=1), 3)
    close(m.aggregate_loss(T([1, 1] + [0] * 8), torch.ones(1, 10)), 0.2)  # averaging two micro-batch means says 0.5


def check_pass_at_k(m):
    close(m.pass_at_k(10, 3, 5), 1 - 21 / 252)  # C(7, 5) = 21, C(10, 5) = 252
    close(m.pass_at_k(torch.tensor([4, 4, 4, 2]), torch.tensor([0, 1, 4, 1]), 2), [0, 0.5, 1, 1])
    close(m.pass_at_k(4, torch.tensor([[1], [2]]), 1), [[0.25], [0.5]])
    close(m.pass_at_k(T(1000), T(1), 500), [0.5], 1e-12)
    close(m.pass_at_k(torch.tensor([2, 4]), 1, 1), [0.5, 0.25])


def check_bootstrap_interval(m):
    low, high = m.bootstrap_interval(T(*[0, 1] * 200))
    close(low, 0.5 - 1.96 * 0.025, 0.01), close(high, 0.5 + 1.96 * 0.025, 0.01)  # the mean's standard error is (.5 * .5 / 400)^.5 = .025
    low, high = m.bootstrap_interval(T(*[0, 1] * 200), level=0.5)
    close(low, 0.5 - 0.6745 * 0.025, 0.006), close(high, 0.5 + 0.6745 * 0.025, 0.006)
    low, high = m.bootstrap_interval(T(0, 1), draws=4000)  # means 0, .5, .5, 1 in a quarter of the cases each
    close(low, 0.0), close(high, 1.0)
    low, high = m.bootstrap_interval(T(0, 1), level=0.4, draws=4000)
    close(low, 0.5), close(high, 0.5)
    for P in (1, 7):
        assert [x.item() for x in m.bootstrap_interval(torch.full((P,), 0.25))] == [0.25, 0.25]
    skewed = [x.item() for x in m.bootstrap_interval(T(*[0] * 19, 1))]
    assert skewed[0] == 0 and 0.12 <= skewed[1] <= 0.18  # binomial(20, 1/20): P(at most 2) = .925, P(at most 3) = .984


def check_is_looping(m):
    loops, story = m.is_looping, list(range(100, 300))
    assert loops(story + [1, 2, 3] * 30) and loops(torch.tensor(story + [1, 2, 3] * 30 + [1]))
    assert not loops(story) and not loops(story + [1, 2, 3] * 30 + [4]) and not loops([])
    assert loops([7] * 64) and loops([8] + [7] * 64) and not loops([7] * 63) and not loops(story + [7] * 63)  # 64 tokens at least
    assert loops(story * 4) and not loops(story * 4 + story[:7], max_period=199) and not loops(story[1:] + story * 3)
    assert loops(story[1:] + story * 3, min_repeats=3) and not loops([1, 2] * 20) and loops([1, 2] * 20, min_tokens=40)
    assert loops(list(range(512)) * 4) and not loops(list(range(513)) * 4)
    assert loops([1, 1], 1, 2, 1) and not loops([1], 1, 2, 1) and not loops([1, 2], 1, 2, 1)
    assert not loops([1, 2] * 20, 1, 2, 40) and loops([1, 2] * 20, 2, 2, 40)
    assert loops([1] * 9, max_period=4) is False and isinstance(loops([7] * 64), bool)


CHECKS = {name.removeprefix("check_"): value for name, value in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("name", PUBLIC)
def test_numbers_by_hand(name):
    CHECKS[name](tricks)


@pytest.mark.parametrize("name", PUBLIC)
def test_stands_alone(name):
    """Cut out of the file, with nothing but `import torch` around it, the function passes its check."""
    scope = {}
    exec("import torch\n" + CUTS[name], scope)
    CHECKS[name](SimpleNamespace(**{name: scope[name]}))


def test_public_surface():
    lines = [f"{name}{inspect.signature(getattr(tricks, name))}" for name in PUBLIC]
    assert sorted(lines) == sorted(SIGNATURES.split("\n"))
    for name in PUBLIC:
        assert len(getattr(tricks, name).__doc__) > 200 and getattr(tricks, name).__doc__.count("\n") <= 12


SIGNATURES = """\
scale_reward(correct, low=0.0, high=1.0)
soft_overlong_penalty(lengths, max_length, buffer)
normalize_advantages(rewards, mean='group', std='batch', eps=1e-06)
leave_one_out_advantages(rewards)
informative_groups(rewards)
loss_weights(lengths, level='token', keep=None, max_length=None)
aggregate_loss(token_loss, mask, level='token', keep=None, max_length=None)
overlong_filter(mask, truncated)
clipped_surrogate(logprobs, old_logprobs, advantages, clip_low=0.2, clip_high=0.2, dual_clip=None)
clip_masks(logprobs, old_logprobs, advantages, clip_low=0.2, clip_high=0.2)
kl_estimate(logprobs, ref_logprobs, kind='k3')
truncated_importance_weights(logprobs, rollout_logprobs, cap=2.0)
token_logprobs(logits, token_ids, temperature=1.0)
entropy(logits, temperature=1.0)
linear_logprobs(hidden, weight, token_ids, temperature=1.0, chunk=1024)
pass_at_k(num_samples, num_correct, k)
bootstrap_interval(values, level=0.95, draws=1000, seed=0)
is_looping(token_ids, max_period=512, min_repeats=4, min_tokens=64)"""


# ---- laws -----------------------------------------------------------------------------------------------------------

values = st.floats(-5, 5).map(lambda x: round(x, 2))


@st.composite
def tensors(draw, *sizes, elements=values):
    """A float64 tensor; each size is an int or a (low, high) range."""
    shape = [draw(st.integers(*size)) if isinstance(size, tuple) else size for size in sizes]
    return torch.tensor(draw(st.lists(elements, min_size=math.prod(shape), max_size=math.prod(shape))),
                        dtype=torch.float64).reshape(shape)


def triples(n=12):
    """logprobs, old_logprobs, advantages that stay off the edges of the clip interval, where the gradient jumps."""
    return tensors(n, 3, elements=st.floats(-2, 2).map(lambda x: round(x, 1) + 0.0123)).map(lambda x: x.t().clone())


@given(tensors((1, 4), (2, 5)), st.sampled_from(["none", "group", "batch"]), st.sampled_from(["none", "group", "batch"]))
def test_advantages_equal_a_loop(rewards, mean, std):
    everything = [r for row in rewards.tolist() for r in row]
    expected = []
    for row in rewards.tolist():
        sets = {"group": row, "batch": everything}
        flat = any(len(set(sets[name])) == 1 for name in (mean, std) if name != "none")
        centre = statistics.fmean(sets[mean]) if mean != "none" else 0
        scale = statistics.stdev(sets[std]) + 1e-6 if std != "none" else 1
        expected.append([0 if flat else (r - centre) / scale for r in row])
    close(tricks.normalize_advantages(rewards, mean, std), expected, 1e-9)


@given(tensors((1, 4), (2, 5)), st.floats(0.1, 10), st.floats(-5, 5), st.randoms(use_true_random=False))
def test_advantages_invariances(rewards, a, b, random):
    for mean, std, factor in (("group", "batch", 1), ("group", "group", 1), ("batch", "batch", 1), ("group", "none", a)):
        def advantages(r, eps=0):
            return tricks.normalize_advantages(r, mean, std, eps)
        if rewards.std() > 0:
            assume(all(row.std() == 0 or len(set((a * row + b).tolist())) == len(set(row.tolist())) for row in rewards))
            close(advantages(a * rewards + b), factor * advantages(rewards), 1e-7)
        rows, columns = (random.sample(range(n), n) for n in rewards.shape)
        close(advantages(rewards[rows][:, columns], 1e-6), advantages(rewards, 1e-6)[rows][:, columns], 1e-9)
        total = advantages(rewards, 1e-6).sum(dim=1)
        close(total if mean == "group" else total.sum()[None], torch.zeros(len(total) if mean == "group" else 1), 1e-6)


@given(tensors((1, 4), (2, 5)))
def test_leave_one_out_equals_a_loop(rewards):
    rows = rewards.tolist()
    expected = [[r - statistics.fmean(row[:i] + row[i + 1:]) for i, r in enumerate(row)] for row in rows]
    close(tricks.leave_one_out_advantages(rewards), expected, 1e-9)
    k = rewards.shape[1]
    close(tricks.leave_one_out_advantages(rewards), k / (k - 1) * tricks.normalize_advantages(rewards, std="none"), 1e-9)
    assert tricks.informative_groups(rewards).tolist() == [len(set(row)) > 1 for row in rows]


@given(st.integers(1, 50), st.integers(1, 50), st.lists(st.integers(0, 99), min_size=1))
def test_overlong_penalty_is_continuous_and_monotone(max_length, buffer, lengths):
    buffer = min(buffer, max_length)
    penalty = tricks.soft_overlong_penalty(torch.tensor(sorted(lengths)), max_length, buffer)
    expected = [0 if n <= max_length - buffer else -1 if n > max_length else Fraction(max_length - buffer - n, buffer)
                for n in sorted(lengths)]
    close(penalty, [float(x) for x in expected])
    assert (penalty.diff() <= 0).all()


@given(tensors((1, 5), 6), st.data(), st.sampled_from(["token", "sequence", "constant"]))
def test_aggregation_equals_a_loop_and_does_not_see_the_split(loss, data, level):
    count = len(loss)
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, 6), min_size=count, max_size=count)))
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    mask = torch.arange(6) < lengths[:, None]
    used = [row[:n] for row, n, k in zip(loss.tolist(), lengths.tolist(), keep.tolist()) if k and n]
    expected = 0.0
    if used:
        expected = {"token": sum(map(sum, used)) / sum(map(len, used)),
                    "sequence": statistics.fmean(sum(row) / len(row) for row in used),
                    "constant": sum(map(sum, used)) / len(used) / 9}[level]
    poisoned = torch.where(mask, loss, NAN)
    wider = torch.cat([poisoned, torch.full((count, 2), INF)], dim=1)
    wide_mask = torch.cat([mask, torch.zeros(count, 2, dtype=torch.bool)], dim=1)
    for x, m in ((loss, mask), (poisoned, mask), (wider, wide_mask)):
        close(tricks.aggregate_loss(x, m, level, keep, 9), expected, 1e-9)
    # one weight per response, computed once: any split into micro-batches has the same loss and the same gradient
    weights = tricks.loss_weights(lengths.double(), level, keep, 9)
    cut = data.draw(st.integers(0, count))
    summed = sum((weights[part, None] * torch.where(mask[part], loss[part], 0)).sum() for part in (slice(cut), slice(cut, count)))
    close(summed, expected, 1e-9)
    close(grad(lambda x: tricks.aggregate_loss(x, mask, level, keep, 9), poisoned)[0], weights[:, None] * mask, 1e-9)
    # dropping a response through keep, or its mask, is the same as never having had it
    close(tricks.loss_weights(lengths[keep].double(), level, None, 9), weights[keep], 1e-9)
    close(tricks.aggregate_loss(loss, tricks.overlong_filter(mask, ~keep), level, None, 9), expected, 1e-9)


@given(triples(), st.floats(0, 1).map(lambda x: round(x, 1)), st.floats(0, 2).map(lambda x: round(x, 1)),
       st.sampled_from([None, 1.5, 3.0]))
def test_clip_equals_a_loop_and_its_gradient(abc, clip_low, clip_high, dual_clip):
    new, old, advantages = abc
    expected, slope, low, high = [], [], [], []
    for x, y, a in zip(*(v.tolist() for v in abc)):
        ratio = math.exp(x - y)
        low.append(a < 0 and ratio < 1 - clip_low)
        high.append(a > 0 and ratio > 1 + clip_high)
        bound = 1 - clip_low if low[-1] else 1 + clip_high if high[-1] else ratio
        capped = dual_clip is not None and a < 0 and bound > dual_clip
        expected.append(-a * (dual_clip if capped else bound))
        slope.append(0 if low[-1] or high[-1] or capped else -a * ratio)
    close(tricks.clipped_surrogate(new, old, advantages, clip_low, clip_high, dual_clip), expected, 1e-9)
    by_new, by_old, _ = grad(lambda *v: tricks.clipped_surrogate(*v, clip_low, clip_high, dual_clip), new, old, advantages)
    close(by_new, slope, 1e-9)
    close(by_old, [-s for s in slope], 1e-9)
    assert [mask.tolist() for mask in tricks.clip_masks(new, old, advantages, clip_low, clip_high)] == [low, high]
    # on policy: the loss is -A and its gradient the policy gradient, whatever the clip
    close(tricks.clipped_surrogate(new, new, advantages, clip_low, clip_high, dual_clip), -advantages, 1e-9)
    close(grad(lambda x: tricks.clipped_surrogate(x, new, advantages, clip_low, clip_high, dual_clip), new)[0], -advantages, 1e-9)


@given(tensors(2, (2, 6)))
def test_kl_estimates_are_right_on_average(logits):
    policy, reference = logits.log_softmax(dim=-1)
    kl = float((policy.exp() * (policy - reference)).sum())
    for kind in ("k1", "k3"):  # exact expectation under the policy
        close((policy.exp() * tricks.kl_estimate(policy, reference, kind)).sum(), kl, 1e-9)
    for kind in ("k2", "k3"):
        estimate = tricks.kl_estimate(policy, reference, kind)
        assert (estimate >= 0).all() and ((estimate > 1e-12) == ((policy - reference).abs() > 1e-6)).all()
    close(grad(lambda x: tricks.kl_estimate(x, reference), policy)[0], 1 - (reference - policy).exp(), 1e-9)
    close(grad(lambda x: tricks.kl_estimate(x, reference, "k2"), policy)[0], policy - reference, 1e-9)
    close(tricks.truncated_importance_weights(policy, reference, 1.5),
          [min(math.exp(a - b), 1.5) for a, b in zip(policy.tolist(), reference.tolist())], 1e-9)


@given(tensors((1, 3), (2, 6)), st.data(), st.floats(0.2, 3))
def test_logprobs_and_entropy_equal_a_loop(logits, data, temperature):
    rows, size = logits.shape
    ids = data.draw(st.lists(st.integers(0, size - 1), min_size=rows, max_size=rows))
    banned = [data.draw(st.sampled_from([None] + [v for v in range(size) if v != i])) for i in ids]
    for row, v in zip(logits, banned):
        if v is not None:
            row[v] = -INF
    expected, entropies = [], []
    for row, i in zip(logits.tolist(), ids):
        total = sum(math.exp(x / temperature) for x in row)
        p = [math.exp(x / temperature) / total for x in row]
        expected.append(math.log(p[i]))
        entropies.append(-sum(q * math.log(q) for q in p if q > 0))
    close(tricks.token_logprobs(logits, torch.tensor(ids), temperature), expected, 1e-9)
    close(tricks.entropy(logits, temperature), entropies, 1e-9)
    for gradient in (grad(lambda x: tricks.token_logprobs(x, torch.tensor(ids), temperature), logits)[0],
                     grad(lambda x: tricks.entropy(x, temperature), logits)[0]):
        assert gradient.isfinite().all() and not gradient[logits == -INF].any()
        close(gradient.sum(dim=-1), [0] * rows, 1e-9)


def draw_linear(data, tokens=(0, 9), vocab=(2, 7), dim=(1, 4)):
    t, v, d = (data.draw(st.integers(*bounds)) for bounds in (tokens, vocab, dim))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    hidden, weight = (torch.randn(n, d, dtype=torch.float64, generator=generator) for n in (t, v))
    return hidden, weight, torch.randint(0, v, (t,), generator=generator)


@given(st.data(), st.floats(0.3, 3), st.integers(1, 11), values)
def test_linear_logprobs_equals_the_whole_logits(data, temperature, chunk, mix):
    hidden, weight, ids = draw_linear(data)

    def naive(hidden, weight):
        logits = hidden @ weight.t()
        return tricks.token_logprobs(logits, ids, temperature), tricks.entropy(logits, temperature)

    def chunked(hidden, weight):
        return tricks.linear_logprobs(hidden, weight, ids, temperature, chunk)
    for a, b in zip(chunked(hidden, weight), naive(hidden, weight)):
        close(a, b, 1e-9)
    g = torch.linspace(-1, 2, len(hidden), dtype=torch.float64)  # a different gradient for each token
    for pick in (lambda lp, h: g * lp, lambda lp, h: g * h, lambda lp, h: g * lp + mix * g.flip(0) * h):
        expected = grad(lambda *x: pick(*naive(*x)), hidden, weight)
        for a, b in zip(grad(lambda *x: pick(*chunked(*x)), hidden, weight), expected):
            close(a, b, 1e-9)
        close(grad(lambda x: pick(*chunked(x, weight)), hidden)[0], expected[0], 1e-9)  # only one of the two needs a gradient
        close(grad(lambda x: pick(*chunked(hidden, x)), weight)[0], expected[1], 1e-9)


@given(tensors((1, 9)), st.floats(-2, 2), st.floats(0.1, 2), st.integers(0, 9))
def test_laws_of_the_bootstrap_interval(x, b, a, seed):
    low, high = tricks.bootstrap_interval(x, draws=200, seed=seed)
    assert x.min() - 1e-9 <= low <= high <= x.max() + 1e-9
    for moved, end in zip(tricks.bootstrap_interval(a * x + b, draws=200, seed=seed), (low, high)):
        close(moved, a * end + b, 1e-6)
    narrow = tricks.bootstrap_interval(x, 0.5, 200, seed)
    assert low <= narrow[0] <= narrow[1] <= high


@given(st.integers(1, 60), st.data())
def test_pass_at_k_equals_the_binomials(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    expected = float(1 - Fraction(math.comb(n - c, k), math.comb(n, k)))
    close(tricks.pass_at_k(n, c, k), expected, 1e-5)
    close(tricks.pass_at_k(T(n), T(c), k), [expected], 1e-12)


@given(st.lists(st.integers(0, 1), max_size=20), st.integers(1, 5), st.integers(2, 4), st.integers(1, 12))
def test_is_looping_equals_a_loop(ids, max_period, min_repeats, min_tokens):
    spans = {p: max(min_tokens, p * min_repeats) for p in range(1, max_period + 1)}
    expected = any(span <= len(ids) and all(ids[-i] == ids[-i - p] for i in range(1, span - p + 1)) for p, span in spans.items())
    assert tricks.is_looping(ids, max_period, min_repeats, min_tokens) == expected
    assert tricks.is_looping(torch.tensor(ids, dtype=torch.long), max_period, min_repeats, min_tokens) == expected


# ---- linear_logprobs: gradients, memory, precision --------------------------------------------------------------------


def example(tokens=20, vocab=9, dim=3, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (scale * torch.randn(n, dim, dtype=torch.float64, generator=generator) for n in (tokens, vocab))
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), torch.randint(0, vocab, (tokens,))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_linear_logprobs_gradcheck(temperature):
    hidden, weight, ids = example(tokens=7)
    assert torch.autograd.gradcheck(lambda h, w: tricks.linear_logprobs(h, w, ids, temperature, chunk=3), (hidden, weight))
    first, = torch.autograd.grad(tricks.linear_logprobs(hidden, weight, ids)[0].sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad|differentiat"):  # an error, not a wrong number
        first.sum().backward()


def test_linear_logprobs_of_nothing_stays_attached():
    hidden, weight, ids = example(tokens=0)
    logprobs, entropy = tricks.linear_logprobs(hidden, weight, ids)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad.shape == (0, 3) and not weight.grad.any() and weight.grad.shape == (9, 3)


def test_linear_logprobs_with_huge_logits():
    hidden, weight, ids = example(dtype=torch.float32, scale=30.0)  # logits in the thousands: exp alone overflows
    logits = hidden.detach() @ weight.detach().t()
    assert logits.abs().max() > 1000
    logprobs, entropy = tricks.linear_logprobs(hidden, weight, ids, chunk=7)
    close(logprobs, tricks.token_logprobs(logits, ids), 1e-3)
    close(entropy, tricks.entropy(logits), 1e-3)
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
@pytest.mark.parametrize("kinds", [(torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float32, torch.bfloat16)])
def test_linear_logprobs_in_half_precision(kinds, device):
    hidden, weight, ids = (x.detach().to(device) for x in example())
    hidden, weight = hidden.to(kinds[0]), weight.to(kinds[1])

    def run(*x):
        logprobs, entropy = tricks.linear_logprobs(*x, ids, chunk=6)
        assert logprobs.dtype == entropy.dtype == torch.float32
        return logprobs + 2 * entropy

    def check(tol):
        close(run(hidden, weight).cpu(), run(hidden.float(), weight.float()).cpu(), 1e-9 if device == "cpu" else 1e-5)
        for a, b, kind in zip(grad(run, hidden, weight), grad(run, hidden.float(), weight.float()), kinds):
            assert a.dtype == kind
            close(a.cpu(), b.to(kind).cpu(), tol)
    check(1e-9 if device == "cpu" else 3e-2)  # on a CPU rounded once, at the end
    with torch.autocast(device, torch.bfloat16):  # a surrounding autocast region changes nothing
        check(1e-9 if device == "cpu" else 3e-2)


class Allocations(TorchDispatchMode):
    """Watches every tensor that is made, also in backward: the largest, who makes large ones, how many live at a time."""

    def __init__(self, large):
        super().__init__()
        self.large, self.largest, self.makers, self.held, self.most_held = large, 0, set(), [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in args if torch.is_tensor(x)}
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(x) and x.untyped_storage()._cdata not in given:  # not a view, not in place
                size = x.untyped_storage().nbytes() // x.element_size()
                self.largest = max(self.largest, size)
                if size >= self.large:
                    self.makers.add(function.name().removeprefix("aten::").split(".")[0])
                    self.held = [s for s in self.held if not s.expired()] + [StorageWeakRef(x.untyped_storage())]
                    self.most_held = max(self.most_held, len(self.held))
        return out


@pytest.mark.parametrize("chunk,kind", [(16, torch.float32), (16, torch.float64), (24, torch.float32), (1, torch.float32)])
def test_linear_logprobs_holds_one_chunk(chunk, kind):
    tokens, vocab = 64, 512
    hidden, weight, ids = example(tokens, vocab, dim=1, dtype=kind)
    block = math.ceil(chunk / 8)
    watch = Allocations(large=block * vocab + 1)
    with watch:
        logprobs, entropy = tricks.linear_logprobs(hidden, weight, ids, 0.9, chunk)
        (logprobs.sum() + entropy.sum()).backward()
    assert watch.largest == chunk * vocab < tokens * vocab  # never the [T, V] logits, nor anything like them
    if chunk > 1:
        assert watch.most_held == 1  # one buffer of a chunk; all else is at most an eighth of it
        assert watch.makers == {"mm"}


def test_linear_logprobs_computes_only_what_is_asked_for():
    hidden, weight, ids = example(64, 512, dim=1)
    logprobs, _ = tricks.linear_logprobs(hidden, weight, ids, 1.0, 16)
    with Allocations(large=513) as watch:  # without a gradient of the entropy, backward makes no temporary at all
        logprobs.sum().backward()
    assert watch.makers == {"mm"}
    hidden, weight, ids = example(64, 8, dim=50)
    with Allocations(large=8 * 50) as watch:  # no [V, D] if only hidden needs a gradient
        tricks.linear_logprobs(hidden, weight.detach(), ids, 1.0, 2)[0].sum().backward()
    assert watch.makers == {"empty_like"}  # the [T, D] gradient
    with Allocations(large=8 * 50) as watch:  # one [V, D] and no [T, D] if only weight does
        tricks.linear_logprobs(hidden.detach(), weight, ids, 1.0, 2)[0].sum().backward()
    assert watch.makers == {"zeros_like"} and watch.largest == 8 * 50 == 400


# ---- every function -------------------------------------------------------------------------------------------------

lp, ids = torch.linspace(-3, 0, 6).reshape(2, 3), torch.tensor([[0, 1, 2], [2, 1, 0]])
logits, flags = torch.linspace(-2, 3, 24).reshape(2, 3, 4).sin(), torch.tensor([True, False])
CALLS = {
    "scale_reward": (lp.exp(), -1.0, 1.0),
    "soft_overlong_penalty": (torch.tensor([3.0, 7.0, 12.0]), 10, 4),
    "normalize_advantages": (lp,),
    "leave_one_out_advantages": (lp,),
    "informative_groups": (lp,),
    "token_logprobs": (logits, ids),
    "entropy": (logits,),
    "linear_logprobs": (lp, logits[0].t().contiguous(), torch.tensor([3, 0])),
    "clipped_surrogate": (lp, lp.flip(1), lp + 1, 0.2, 0.2, 3.0),
    "clip_masks": (lp, lp.flip(1), lp + 1),
    "kl_estimate": (lp, lp.flip(1)),
    "truncated_importance_weights": (lp, lp.flip(1)),
    "overlong_filter": (torch.ones(2, 3), flags),
    "loss_weights": (torch.tensor([3.0, 2.0]), "sequence", flags),
    "aggregate_loss": (lp, torch.ones(2, 3, dtype=torch.bool), "sequence", flags),
    "pass_at_k": (torch.tensor([4.0, 5.0]), torch.tensor([1.0, 2.0]), 2),
    "bootstrap_interval": (lp.flatten(), 0.9, 50),
    "is_looping": (ids[0],),
}


def call(name, convert=lambda x: x):
    args = [convert(x) if isinstance(x, torch.Tensor) else x for x in CALLS[name]]
    out = getattr(tricks, name)(*args)
    return args, list(out) if isinstance(out, tuple) else [out]


@pytest.mark.parametrize("name", PUBLIC)
def test_dtypes_and_purity(name):
    """Half precision is computed in float32; float32 and float64 stay; arguments are not written to."""
    if name not in ("is_looping", "overlong_filter", "informative_groups", "clip_masks"):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            args, out = call(name, lambda x: x.to(dtype) if x.is_floating_point() else x)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            expected = getattr(tricks, name)(*[x.to(wide) if torch.is_tensor(x) and x.is_floating_point() else x for x in args])
            for a, b in zip(out, expected if isinstance(expected, tuple) else [expected]):
                assert a.dtype == wide
                close(a, b, 1e-9)
    args, _ = call(name, torch.clone)
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(args, CALLS[name]))


@pytest.mark.parametrize("name", [n for n in PUBLIC if n not in ("linear_logprobs", "pass_at_k", "bootstrap_interval", "is_looping")])
def test_no_value_is_read_back(name):
    """On the meta device there are no values: a function that waits for one, or that makes a CPU tensor, fails."""
    _, out = call(name, lambda x: x.to("meta"))
    assert all(x.device.type == "meta" for x in out)


@pytest.mark.parametrize("name", ["scale_reward", "normalize_advantages", "leave_one_out_advantages", "soft_overlong_penalty",
                                  "loss_weights"])
def test_integers_and_bools_become_float32(name):
    for dtype in (torch.int64, torch.bool) if "length" not in str(inspect.signature(getattr(tricks, name))) else (torch.int64,):
        _, out = call(name, lambda x: x if x.dtype == torch.bool else (x > -2).to(dtype))
        assert out[0].dtype == torch.float32


@pytest.mark.parametrize("gap", [100.0, -100.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_a_huge_logprob_gap_stays_finite(gap, advantage):
    old = torch.zeros(2)
    for function in (lambda x: tricks.clipped_surrogate(x, old, torch.full((2,), advantage)),
                     lambda x: tricks.clipped_surrogate(x, old, torch.full((2,), advantage), dual_clip=3.0),
                     lambda x: tricks.kl_estimate(x, old)):
        x = torch.full((2,), gap, requires_grad=True)
        value = function(x)
        value.sum().backward()
        assert value.isfinite().all() and x.grad.isfinite().all()


def test_what_padding_holds_never_matters():
    """From log-probs to loss: the same value and gradient whether padding holds zeros, inf or NaN."""
    mask, old = torch.tensor([[True, True, False], [True, False, False]]), lp.flip(0)
    results = []
    for junk in (0.0, INF, -INF, NAN):
        x = torch.where(mask, lp, junk).requires_grad_()
        behind = torch.where(mask, old, junk)
        loss = tricks.clipped_surrogate(x, behind, T([1], [-1]), dual_clip=3.0) + 0.1 * tricks.kl_estimate(x, behind)
        loss = tricks.aggregate_loss(loss * tricks.truncated_importance_weights(behind, lp), mask)
        loss.backward()
        results.append(torch.cat([loss.detach()[None], x.grad.flatten()]))
        assert not x.grad[~mask].any() and torch.equal(results[0], results[-1])


x2, x3, b2 = torch.zeros(2), torch.zeros(3), torch.zeros(2, 2)
i2, clip_errors = x2.long(), [
    ((x2, x3, x2), "old_logprobs.*(3,)"), ((x2, x2, x3), "advantages.*(3,)"), ((b2, b2, x2), "advantages.*(2,)"),
    ((x2, x2, b2), "advantages.*(2, 2)"), ((x2, x2, x2, -0.1), "clip_low.*-0.1"), ((x2, x2, x2, 1.1), "clip_low.*1.1"),
    ((x2, x2, x2, 0.2, -0.1), "clip_high.*-0.1"), ((x2, x2, x2, 0.2, NAN), "clip_high.*nan")]
level_errors = [(("tokens",), "level.*'tokens'"), (("constant",), "max_length.*None"), (("constant", None, 0), "max_length.*0"),
                (("token", x3.bool()), "keep.*(3,)"), (("token", i2), "keep.*int64")]
ERRORS = {  # function: (arguments, what the message names)
    "scale_reward": [((x2, 1, 1), "low=1.*high=1"), ((x2, 2, 1), "low=2"), ((x2, NAN, 1), "low=nan")],
    "soft_overlong_penalty": [((x2, 10, 0), "buffer.*got 0"), ((x2, 10, 11), "buffer.*max_length=10.*got 11")],
    "informative_groups": [((x2,), "rewards.*(2,)")],
    "normalize_advantages": [
        ((x2,), "rewards.*(2,)"), ((b2, "group", "batch", -1), "eps.*-1"), ((b2, "group", "batch", NAN), "eps.*nan"),
        ((b2, "grp"), "mean.*'grp'"), ((b2, "group", "grp"), "std.*'grp'"), ((b2[:, :1],), "mean='group'.*(2, 1)"),
        ((b2[:, :1], "none", "group"), "std='group'.*(2, 1)"), ((b2[:1, :1], "none"), "std='batch'.*(1, 1)"),
        ((b2[:1, :1], "batch", "none"), "mean='batch'.*(1, 1)"), ((torch.zeros(0, 4),), "std='batch'.*(0, 4)")],
    "leave_one_out_advantages": [((x2,), "rewards.*(2,)"), ((b2[:, :1],), "(2, 1)"), ((b2[None],), "(1, 2, 2)")],
    "token_logprobs": [((b2, x3), "token_ids.*(3,)"), ((x2[0], x2[0]), "token_ids.*()"), ((b2, i2, 0), "temperature.*0"),
                       ((b2, i2, NAN), "temperature.*nan")],
    "entropy": [((x2[0],), "logits.*()"), ((b2, 0), "temperature.*0"), ((b2, NAN), "temperature.*nan")],
    "linear_logprobs": [
        ((x2, b2, i2), "hidden.*(2,)"), ((b2, torch.zeros(2, 3), i2), "weight.*(2, 3)"), ((b2, x2, i2), "weight.*(2,)"),
        ((b2, b2, x3.long()), "token_ids.*(3,)"), ((torch.zeros(2, 3, 4), torch.zeros(5, 3, 4), i2), "hidden.*(2, 3, 4)"),
        ((b2, b2, i2, 0), "temperature.*0"), ((b2, b2, i2, -1), "temperature.*-1"), ((b2, b2, i2, 1.0, 0), "chunk.*0")],
    "clipped_surrogate": [*clip_errors, *[((x2, x2, x2, 0.2, 0.2, c), f"dual_clip.*{c}") for c in (1, NAN)]],
    "clip_masks": clip_errors,
    "kl_estimate": [((x2, x3), "ref_logprobs.*(3,)"), ((x2, x2, "k4"), "kind.*'k4'")],
    "truncated_importance_weights": [((x2, x3), "rollout_logprobs.*(3,)"), ((x2, x2, 0), "cap.*0"), ((x2, x2, NAN), "cap.*nan")],
    "overlong_filter": [((x2, flags), "mask.*(2,)"), ((b2, x3.bool()), "truncated.*(3,)"), ((b2, x2), "truncated.*float32")],
    "loss_weights": [((b2,), "lengths.*(2, 2)"), *[((x2, *rest), message) for rest, message in level_errors],
                     ((x2, "constant", None, NAN), "max_length.*nan")],
    "aggregate_loss": [((x2, x2), "token_loss.*(2,)"), ((b2, torch.zeros(2, 3)), "mask.*(2, 3)"),
                       *[((b2, b2, *rest), message) for rest, message in level_errors],
                       ((b2, b2, "constant", None, NAN), "max_length.*nan")],
    "pass_at_k": [((x3, x2, 1), "num_correct.*(2,)"), ((2, 3, 1), "num_correct.*3"), ((2, -1, 1), "num_correct.*-1"),
                  ((2, 1, 3), "k must.*3"), ((2, 1, 0), "k must.*0"), ((torch.tensor([2, 3]), 1, 3), "k must.*3"),
                  ((torch.tensor([2, 3]), 3, 1), "num_correct.*3"), ((2, torch.tensor([0, -1]), 1), "num_correct.*-1")],
    "bootstrap_interval": [((b2,), "values.*(2, 2)"), ((torch.zeros(0),), "values.*(0,)"), ((x2, 1.0), "level.*1.0"), ((x2, 0), "level.*0"),
                           ((x2, NAN), "level.*nan"), ((x2, 0.95, 0), "draws.*0")],
    "is_looping": [((b2,), "token_ids.*(2, 2)"), ((x2, 0), "max_period.*0"), ((x2, 1, 1), "min_repeats.*1"),
                   ((x2, 1, 2, 0), "min_tokens.*0")],
}


@pytest.mark.parametrize("name", PUBLIC)
def test_errors_name_the_argument_and_its_value(name):
    for arguments, message in ERRORS[name]:
        with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
            getattr(tricks, name)(*arguments)


# ---- named mutants: the checks notice the classic mistakes ----------------------------------------------------------

MUTANTS = {  # function: (mistake, right, wrong)
    "scale_reward": [("sign swapped", "low * (1 - correct) + high * correct", "high * (1 - correct) + low * correct")],
    "soft_overlong_penalty": [("counted from max_length", "max_length - buffer - lengths", "max_length - lengths"),
                              ("reward for being short", ".clamp(-1, 0)", ".clamp(min=-1)")],
    "informative_groups": [("all instead of any", ".any(", ".all(")],
    "normalize_advantages": [
        ("std of the centred rewards", "levels[std].std(",
         "{'group': groups, 'batch': (groups - groups.mean(1, keepdim=True)).flatten()}[std].std("),
        ("biased std", "correction=1", "correction=0"),
        ("eps inside the root", "(levels[std].std(dim=-1, correction=1, keepdim=True) + eps)",
         "(levels[std].var(dim=-1, correction=1, keepdim=True) + eps).sqrt()"),
        ("normaliser of a part of the batch", "rewards.flatten()", "rewards[: len(rewards) // 2 + 1].flatten()"),
        ("group std in the batch branch", '"batch": batch', '"batch": groups'),
        ("whitened twice", "return advantages", "return (advantages - advantages.mean()) / (advantages.std() + eps)"),
        ("rounding residue over eps", "advantages.masked_fill(constant, 0)", "advantages"),
        ("statistics over prompts", "mean(dim=-1", "mean(dim=0")],
    "leave_one_out_advantages": [
        ("own reward in the baseline", "group_size / (group_size - 1) * ", ""),
        ("rounding residue", ".masked_fill((rewards == rewards[:, :1]).all(dim=1, keepdim=True), 0)", "")],
    "token_logprobs": [("temperature multiplies", "/ temperature", "* temperature"), ("raw", ".log_softmax(dim=-1)", "")],
    "entropy": [("sign", "return -(", "return ("), ("0 log 0", ".clamp(min=torch.finfo(logprobs.dtype).min)", "")],
    "linear_logprobs": [
        ("temperature forgotten in backward", "g = grad_logprobs[part].unsqueeze(-1) / temperature",
         "g = grad_logprobs[part].unsqueeze(-1)"),
        ("entropy missing from its gradient", "(rows + entropy[part].unsqueeze(-1))", "rows.clone()"),
        ("weight gradient of the last chunk only", "addmm_(grad.t(), inputs)", "copy_(grad.t() @ inputs)"),
        ("token of another chunk", "start + i * block", "i * block")],
    "clipped_surrogate": [
        ("max for min", "torch.min(", "torch.max("),
        ("sides swapped", "clamp(1 - clip_low, 1 + clip_high)", "clamp(1 - clip_high, 1 + clip_low)"),
        ("clipped on both sides", "torch.min(ratio * advantages, ratio.clamp(", "(ratio.clamp("),
        ("reward instead of loss", "return -objective", "return objective"),
        ("ratio upside down", "(logprobs.to(dtype) - old_logprobs)", "(old_logprobs - logprobs.to(dtype))"),
        ("dual clip on good tokens", "advantages < 0", "advantages > 0"),
        ("unbounded ratio", ".clamp(-20, 20)", "")],
    "clip_masks": [("sign of A ignored", "(advantages > 0) & ", ""), ("sides swapped", "1 - clip_low)", "1 - clip_high)")],
    "kl_estimate": [
        ("the other KL", "ref_logprobs.to(dtype) - logprobs", "logprobs.to(dtype) - ref_logprobs"),
        ("k3 sign", "d.expm1() - d", "d.expm1() + d"), ("cancellation", "d.expm1()", "(d.exp() - 1)")],
    "truncated_importance_weights": [("with gradient", "logprobs.detach()", "logprobs"), ("min for max", "max=cap", "min=cap")],
    "overlong_filter": [("keeps the truncated", "truncated.unsqueeze(1)", "~truncated.unsqueeze(1)"),
                        ("judged by length", "truncated.unsqueeze(1)", "mask.bool().all(1, keepdim=True)")],
    "loss_weights": [
        ("filtered tokens stay in the denominator", "torch.where(kept, lengths, 0)", "lengths"),
        ("filtered responses stay in B", "responses = kept.sum()", "responses = torch.tensor(len(kept))"),
        ("local count", "denominator = lengths.sum()", "denominator = lengths[: len(lengths) // 2].sum()")],
    "aggregate_loss": [
        ("mask dropped", "torch.where(mask, token_loss, 0)", "token_loss"),
        ("multiplied by the mask", "torch.where(mask, token_loss, 0)", "(token_loss * mask)"),
        ("mean of the micro-batch", "loss.sum() / lengths.sum().clamp(min=1)", "(loss / lengths.clamp(min=1)).mean()"),
        ("keep ignored", "mask.bool() & keep.unsqueeze(1)", "mask.bool()"),
        ("empty responses counted", "(lengths > 0).sum()", "torch.tensor(len(lengths))")],
    "pass_at_k": [("plug-in estimate", "((n - c - j) / (n - j))", "((n - c + 0 * j) / (n + 0 * j))")],
    "bootstrap_interval": [("one tail", "(1 - level) / 2", "(1 - level)"), ("spread of the values", "values[picks.to(values.device)].mean(1)", "values"),
                           ("without replacement", "values[picks.to(values.device)]", "values.expand(draws, -1)")],
    "is_looping": [
        ("at the start", "tail[-1] == tail[-1 - period] and tail[-span:-period] == tail[period - span:]",
         "tail[:span - period] == tail[period:span]"),
        ("the cut must close a round", "span > len(tail)", "span > len(tail) or len(tail) % period")],
}


@pytest.mark.parametrize("name,mistake,right,wrong", [(name, *mutant) for name in PUBLIC for mutant in MUTANTS[name]])
def test_named_mutants_are_noticed(name, mistake, right, wrong):
    assert right in CUTS[name]
    scope = {"torch": torch}
    exec(CUTS[name].replace(right, wrong), scope)
    with pytest.raises(AssertionError):
        CHECKS[name](SimpleNamespace(**{name: scope[name]}))
