"""support/stats.py: pass@k, the bootstrap interval and loops, by hand, by law and by mutant."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support import stats
from support.stats import bootstrap_interval, is_looping, pass_at_k
from tests.checks import (
    DTYPES,
    NAN,
    T,
    check_error,
    check_precision,
    check_purity,
    close,
    cut_out,
    mutate,
    parse_mutants,
    public,
    signatures,
    tensors,
)

PUBLIC = public(stats)


# ---- numbers by hand, one check per function -----------------------------------------------------


def check_pass_at_k(pass_at_k):
    close(pass_at_k(10, 3, 5), 1 - 21 / 252)  # C(7, 5) = 21, C(10, 5) = 252
    n, c = torch.tensor([4, 4, 4, 2]), torch.tensor([0, 1, 4, 1])
    close(pass_at_k(n, c, 2), [0, 0.5, 1, 1])
    close(pass_at_k(4, torch.tensor([[1], [2]]), 1), [[0.25], [0.5]])
    close(pass_at_k(torch.tensor([2, 4]), 1, 1), [0.5, 0.25])
    close(pass_at_k(T(1000), T(1), 500), [0.5], 1e-12)
    close(pass_at_k(np.int64(4), torch.tensor([True, False]), np.int64(2)), [0.5, 0])
    close(pass_at_k(4.0, 1.0, 2.0), 0.5)


def check_bootstrap_interval(bootstrap_interval):
    # 400 values with variance 1/4: the standard error of the mean is sqrt(1/4 / 400) = 0.025
    values = T(*[0, 1] * 200)
    low, high = bootstrap_interval(values)
    close(low, 0.5 - 1.96 * 0.025, 0.01)
    close(high, 0.5 + 1.96 * 0.025, 0.01)
    low, high = bootstrap_interval(values, level=0.5)
    close(low, 0.5 - 0.6745 * 0.025, 0.006)
    close(high, 0.5 + 0.6745 * 0.025, 0.006)
    # the means of two draws from {0, 1} are 0, 0.5, 0.5, 1, each in a quarter of the cases
    low, high = bootstrap_interval(T(0, 1), draws=4000)
    close(low, 0.0)
    close(high, 1.0)
    low, high = bootstrap_interval(values, draws=1)  # one mean is both ends
    assert low == high
    with torch.device("meta"):  # torch's default device changes nothing
        assert bootstrap_interval(values, draws=1) == (low, high)
    low, high = bootstrap_interval(T(0, 1), level=0.4, draws=4000)
    close(low, 0.5)
    close(high, 0.5)
    for count in (1, 7, 8):  # in float32, the mean of eight times 0.1 is not 0.1
        for value in torch.tensor([0.25, 0.1, -0.1]):
            ends = bootstrap_interval(value.expand(count))
            assert [end.item() for end in ends] == [value.item()] * 2
    # binomial(20, 1/20): P(at most 2) = 0.925, P(at most 3) = 0.984
    low, high = bootstrap_interval(T(*[0] * 19, 1))
    assert low == 0
    assert 0.12 <= high <= 0.18
    # each seed has its own draws, and torch's generator does not move
    state = torch.get_rng_state()
    values = torch.linspace(0, 1, 50).square()
    ends = [bootstrap_interval(values, draws=100, seed=seed) for seed in (0, 0, 1, 2)]
    assert ends[0] == ends[1]
    assert len({low.item() for low, _ in ends}) == len({high.item() for _, high in ends}) == 3
    assert torch.equal(torch.get_rng_state(), state)


def check_is_looping(is_looping):
    story = list(range(100, 300))  # 200 tokens without a repetition
    loop = [1, 2, 3] * 30
    assert is_looping(story + loop)
    assert is_looping(torch.tensor(story + loop + [1]))  # the cut falls into a round
    assert not is_looping(story)
    assert not is_looping([])
    assert not is_looping(story + loop + [4])  # it does not end in the loop
    # 64 tokens at least
    assert is_looping([7] * 64)
    assert is_looping([8] + [7] * 64)
    assert not is_looping([7] * 63)
    assert not is_looping(story + [7] * 63)
    assert not is_looping([1, 2] * 20)
    assert is_looping([1, 2] * 20, min_tokens=40)
    # four rounds at least
    assert is_looping(story * 4)
    assert not is_looping(story[1:] + story * 3)
    assert is_looping(story[1:] + story * 3, min_repeats=3)
    # periods up to max_period
    assert is_looping(list(range(512)) * 4)
    assert not is_looping(list(range(513)) * 4)
    assert not is_looping(story * 4 + story[:7], max_period=199)
    assert not is_looping([1, 2] * 20, 1, 2, 40)
    assert is_looping([1, 2] * 20, 2, 2, 40)
    # the shortest loop
    assert is_looping([1, 1], 1, 2, 1)
    assert not is_looping([1], 1, 2, 1)
    assert not is_looping([1, 2], 1, 2, 1)
    # the result is a bool
    assert is_looping([1] * 9, max_period=4) is False
    assert is_looping([7] * 64) is True


CHECKS = {name: globals()[f"check_{name}"] for name in PUBLIC}


@pytest.mark.parametrize("name", PUBLIC)
def test_numbers_by_hand(name):
    CHECKS[name](getattr(stats, name))


@pytest.mark.parametrize("name", PUBLIC)
def test_function_stands_alone(name):
    """Cut out of the file, with nothing but `import torch`, the function passes its check."""
    CHECKS[name](cut_out(getattr(stats, name)))


SIGNATURES = """
bootstrap_interval(values, level=0.95, draws=1000, seed=0)
is_looping(token_ids, max_period=512, min_repeats=4, min_tokens=64)
pass_at_k(num_samples, num_correct, k)
"""


def test_public_names_and_defaults():
    assert signatures(stats) == SIGNATURES.strip()


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_is_complete_and_short(name):
    text = getattr(stats, name).__doc__
    assert len(text) > 200
    assert text.count("\n") <= 15


# ---- laws ----------------------------------------------------------------------------------------

samples, seeds = tensors((1, 9)), st.integers(0, 9)


@given(samples, seeds)
def test_interval_lies_within_the_values(x, seed):
    low, high = bootstrap_interval(x, draws=200, seed=seed)
    assert x.min() - 1e-9 <= low <= high <= x.max() + 1e-9


@given(samples, st.floats(-2, 2), st.floats(0.1, 2), seeds)
def test_interval_moves_with_the_values(x, b, a, seed):
    ends = bootstrap_interval(x, draws=200, seed=seed)
    moved = bootstrap_interval(a * x + b, draws=200, seed=seed)
    for end, moved_end in zip(ends, moved, strict=True):
        close(moved_end, a * end + b, 1e-6)


@given(samples, seeds)
def test_interval_of_a_lower_level_is_narrower(x, seed):
    low, high = bootstrap_interval(x, 0.95, 200, seed)
    inner_low, inner_high = bootstrap_interval(x, 0.5, 200, seed)
    assert low <= inner_low <= inner_high <= high


@given(st.integers(1, 60), st.data())
def test_pass_at_k_equals_the_binomials(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    expected = float(1 - Fraction(math.comb(n - c, k), math.comb(n, k)))
    close(pass_at_k(n, c, k), expected, 1e-5)
    close(pass_at_k(T(n), T(c), k), [expected], 1e-12)


def ends_in_a_loop(ids, period, length):
    """Whether the last `length` tokens repeat with this period."""
    if length > len(ids):
        return False
    return all(ids[-i] == ids[-i - period] for i in range(1, length - period + 1))


@given(
    st.lists(st.integers(0, 1), max_size=20),
    st.integers(1, 5),
    st.integers(2, 4),
    st.integers(1, 12),
)
def test_is_looping_equals_a_loop(ids, max_period, min_repeats, min_tokens):
    expected = False
    for period in range(1, max_period + 1):
        length = max(min_tokens, period * min_repeats)
        expected = expected or ends_in_a_loop(ids, period, length)
    assert is_looping(ids, max_period, min_repeats, min_tokens) == expected
    tensor = torch.tensor(ids, dtype=torch.long)
    assert is_looping(tensor, max_period, min_repeats, min_tokens) == expected


# ---- what holds for every function ---------------------------------------------------------------

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_may_stand_beside_tensors_of_any_device(device):
    correct = torch.tensor([1, 2], device=device)
    close(pass_at_k(4, correct, 2).cpu(), [0.5, 5 / 6])
    close(pass_at_k(correct + 3, 1, 2).cpu(), [0.5, 0.4])


ARGUMENTS = {
    "pass_at_k": (torch.tensor([4.0, 5.0]), torch.tensor([1.0, 2.0]), 2),
    "bootstrap_interval": (torch.linspace(-3, 0, 6), 0.9, 50),
    "is_looping": (torch.tensor([0, 1, 2]),),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["pass_at_k", "bootstrap_interval"])
def test_half_precision_is_computed_in_float32(name, dtype):
    check_precision(getattr(stats, name), ARGUMENTS[name], dtype)


@pytest.mark.parametrize("name", PUBLIC)
def test_arguments_are_not_written_to(name):
    check_purity(getattr(stats, name), ARGUMENTS[name])


# ---- errors --------------------------------------------------------------------------------------

x2, x3, b2 = torch.zeros(2), torch.zeros(3), torch.zeros(2, 2)
two_three, zero_minus = torch.tensor([2, 3]), torch.tensor([0, -1])
ERRORS = [  # function, arguments, what the message says
    ("pass_at_k", (x3, x2, 1), "num_correct.*(2,)"),
    ("pass_at_k", (2, 3, 1), "num_correct.*3"),
    ("pass_at_k", (2, -1, 1), "num_correct.*-1"),
    ("pass_at_k", (two_three, 3, 1), "num_correct.*3"),
    ("pass_at_k", (2, zero_minus, 1), "num_correct.*-1"),
    ("pass_at_k", (2, 1, 3), "k must.*3"),
    ("pass_at_k", (2, 1, 0), "k must.*0"),
    ("pass_at_k", (two_three, 1, 3), "k must.*3"),
    ("pass_at_k", (10, 3, 2.5), "k must.*2.5"),
    ("pass_at_k", (10, 3, NAN), "k must.*nan"),
    ("pass_at_k", (2.5, 1, 1), "num_samples.*2.5"),
    ("pass_at_k", (2, torch.tensor([1, 0.5]), 1), "num_correct.*0.5"),
    ("pass_at_k", (2, NAN, 1), "num_correct.*nan"),
    ("bootstrap_interval", (b2,), "values.*(2, 2)"),
    ("bootstrap_interval", (torch.zeros(0),), "values.*(0,)"),
    ("bootstrap_interval", (x2, 1.0), "level.*1.0"),
    ("bootstrap_interval", (x2, 0), "level.*0"),
    ("bootstrap_interval", (x2, NAN), "level.*nan"),
    ("bootstrap_interval", (x2, 0.95, 0), "draws.*0"),
    ("is_looping", (b2,), "token_ids.*(2, 2)"),
    ("is_looping", (x2, 0), "max_period.*0"),
    ("is_looping", (x2, 1, 1), "min_repeats.*1"),
    ("is_looping", (x2, 1, 2, 0), "min_tokens.*0"),
]


@pytest.mark.parametrize("name,arguments,message", ERRORS)
def test_error_names_the_argument_and_its_value(name, arguments, message):
    check_error(getattr(stats, name), arguments, message)


def test_every_function_has_errors_and_mutants():
    assert {name for name, *_ in ERRORS} == set(PUBLIC)
    assert {mutant.values[0] for mutant in MUTANTS} == set(PUBLIC)


# ---- named mutants -------------------------------------------------------------------------------

MUTANTS = parse_mutants("""
pass_at_k: share of correct samples instead of draws without replacement
- ((n - c - j) / (n - j))
+ ((n - c + 0 * j) / (n + 0 * j))

bootstrap_interval: one tail
- (1 - level) / 2
+ (1 - level)

bootstrap_interval: quantiles of the values instead of the means
- values[picks.to(values.device)].mean(1)
+ values

bootstrap_interval: torch's generator seeded anew
- torch.Generator().manual_seed(seed)
+ torch.manual_seed(seed)

bootstrap_interval: always the same seed
- manual_seed(seed)
+ manual_seed(0)

bootstrap_interval: without replacement
- values[picks.to(values.device)]
+ values.expand(draws, -1)

is_looping: loop at the start
- tail[-1] == tail[-1 - period] and tail[-span:-period] == tail[period - span:]
+ tail[:span - period] == tail[period:span]

is_looping: the cut must close a round
- span > len(tail)
+ span > len(tail) or len(tail) % period
""")


@pytest.mark.parametrize("name,right,wrong", MUTANTS)
def test_named_mutant_fails_its_check(name, right, wrong):
    mutant = mutate(getattr(stats, name), right, wrong)
    with pytest.raises(AssertionError):
        CHECKS[name](mutant)
