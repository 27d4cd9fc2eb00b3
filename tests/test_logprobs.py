"""support/logprobs.py: linear_logprobs equals the plain formula, and never holds all logits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import tricks
from support import logprobs as module
from support.logprobs import linear_logprobs
from tests.checks import (
    DTYPES,
    NAN,
    T,
    check_error,
    check_precision,
    check_purity,
    close,
    cut_out,
    grad,
    mutate,
    parse_mutants,
    public,
    signatures,
    values,
)

# ---- numbers by hand -----------------------------------------------------------------------------


def check_linear_logprobs(linear_logprobs):
    # The weight is the identity, so the logits are the hidden states: softmax([0, log 3]) is
    # [1/4, 3/4]. The gradients are the formulas of the docstring.
    hidden, weight = T([0, math.log(3)], [0, 0], [1, 1]), torch.eye(2, dtype=torch.float64)
    ids = torch.tensor([0, 1, 1])
    h = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    logprobs, entropy = linear_logprobs(hidden, weight, ids, chunk=2)
    close(logprobs, [math.log(1 / 4), -math.log(2), -math.log(2)])
    close(entropy, [h, math.log(2), math.log(2)])
    close(linear_logprobs(hidden, weight, ids.short())[0], logprobs)
    # at temperature 1/2: [1/10, 9/10]
    close(linear_logprobs(hidden, weight, ids, temperature=0.5)[0][:1], [math.log(1 / 10)])

    by_logprob = T([3 / 4, -3 / 4], [-1 / 2, 1 / 2], [-1 / 2, 1 / 2])
    slope = [-0.25 * (math.log(0.25) + h), -0.75 * (math.log(0.75) + h)]
    by_entropy = T(slope, [0, 0], [0, 0])
    for chunk in (1, 2, 3, 9):
        of_hidden = grad(lambda x: linear_logprobs(x, weight, ids, chunk=chunk)[0], hidden)
        close(of_hidden[0], by_logprob)
        of_hidden = grad(lambda x: linear_logprobs(x, weight, ids, chunk=chunk)[1], hidden)
        close(of_hidden[0], by_entropy)
        of_weight = grad(lambda x: linear_logprobs(hidden, x, ids, chunk=chunk)[0], weight)
        close(of_weight[0], by_logprob.t() @ hidden)  # logits = hidden @ weight.T
    # at temperature t, the gradients are 1 / t times those at hidden / t
    for i, expected in enumerate((by_logprob, by_entropy)):
        scaled = grad(lambda x: linear_logprobs(x, weight, ids, temperature=2.0)[i], 2 * hidden)
        close(scaled[0], expected / 2)


def test_numbers_by_hand():
    check_linear_logprobs(linear_logprobs)


def test_function_stands_alone():
    """Cut out of the file, with nothing but `import torch`, the function passes its check."""
    check_linear_logprobs(cut_out(linear_logprobs))


def test_public_names_and_defaults():
    expected = "linear_logprobs(hidden, weight, token_ids, temperature=1.0, chunk=1024)"
    assert signatures(module) == expected
    assert public(module) == ["linear_logprobs"]


def test_docstring_is_complete_and_short():
    assert len(linear_logprobs.__doc__) > 200
    assert linear_logprobs.__doc__.count("\n") <= 15


# ---- equal to the plain formula ------------------------------------------------------------------


def plain(hidden, weight, ids, temperature):
    """What linear_logprobs computes, with all logits in memory."""
    logits = hidden @ weight.t()
    return tricks.token_logprobs(logits, ids, temperature), tricks.entropy(logits, temperature)


@st.composite
def cases(draw):
    """(hidden [T, D], weight [V, D], token_ids [T])"""
    t, v, d = draw(st.integers(0, 9)), draw(st.integers(2, 7)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    hidden = torch.randn(t, d, dtype=torch.float64, generator=generator)
    weight = torch.randn(v, d, dtype=torch.float64, generator=generator)
    return hidden, weight, torch.randint(0, v, (t,), generator=generator)


temperatures, chunks = st.floats(0.3, 3), st.integers(1, 11)


@given(cases(), temperatures, chunks)
def test_values_equal_the_plain_formula(case, temperature, chunk):
    expected = plain(*case, temperature)
    for a, b in zip(linear_logprobs(*case, temperature, chunk), expected, strict=True):
        close(a, b, 1e-9)


def objective(output, kind, mix):
    """A sum in which each token has another weight, so that mixed-up tokens show."""
    logprobs, entropy = output
    g = torch.linspace(-1, 2, len(logprobs), dtype=torch.float64)
    if kind == "log-probs":
        return g * logprobs
    if kind == "entropy":
        return g * entropy
    return g * logprobs + mix * g.flip(0) * entropy


@pytest.mark.parametrize("kind", ["log-probs", "entropy", "both"])
@given(cases(), temperatures, chunks, values)
def test_gradients_equal_the_plain_formula(kind, case, temperature, chunk, mix):
    hidden, weight, ids = case

    def chunked(h, w):
        return objective(linear_logprobs(h, w, ids, temperature, chunk), kind, mix)

    by_hidden, by_weight = grad(
        lambda h, w: objective(plain(h, w, ids, temperature), kind, mix), hidden, weight
    )
    both = grad(chunked, hidden, weight)
    close(both[0], by_hidden, 1e-9)
    close(both[1], by_weight, 1e-9)
    # only one of the two needs a gradient
    close(grad(lambda h: chunked(h, weight), hidden)[0], by_hidden, 1e-9)
    close(grad(lambda w: chunked(hidden, w), weight)[0], by_weight, 1e-9)


def example(tokens=20, vocab=9, dim=3, dtype=torch.float64, scale=1.0):
    """Hidden states and weight, which need gradients, and token ids."""
    generator = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(tokens, dim, dtype=torch.float64, generator=generator)
    weight = scale * torch.randn(vocab, dim, dtype=torch.float64, generator=generator)
    ids = torch.randint(0, vocab, (tokens,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), ids


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_numerical_gradients(temperature):
    hidden, weight, ids = example(tokens=7)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprobs(h, w, ids, temperature, chunk=3), (hidden, weight)
    )


def test_second_gradient_is_an_error():
    hidden, weight, ids = example(tokens=7)
    total = linear_logprobs(hidden, weight, ids)[0].sum()
    (first,) = torch.autograd.grad(total, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad|differentiat"):
        first.sum().backward()


def test_result_for_no_tokens_has_gradients():
    hidden, weight, ids = example(tokens=0)
    logprobs, entropy = linear_logprobs(hidden, weight, ids)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad.shape == (0, 3)
    assert weight.grad.shape == (9, 3)
    assert not weight.grad.any()


# ---- precision -----------------------------------------------------------------------------------


def test_huge_logits_do_not_overflow():
    hidden, weight, ids = example(dtype=torch.float32, scale=30.0)
    logits = hidden.detach() @ weight.detach().t()
    assert logits.abs().max() > 1000  # exp alone overflows
    logprobs, entropy = linear_logprobs(hidden, weight, ids, chunk=7)
    close(logprobs, tricks.token_logprobs(logits, ids), 1e-3)
    close(entropy, tricks.entropy(logits), 1e-3)
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP16, FP16), (FP32, BF16)])
def test_half_precision_is_rounded_once(dtypes, autocast, device):
    """Products and sums are in float32; an autocast region around the call changes nothing."""
    hidden, weight, ids = (x.detach().to(device) for x in example())
    hidden, weight = hidden.to(dtypes[0]), weight.to(dtypes[1])

    def total(h, w):
        logprobs, entropy = linear_logprobs(h, w, ids, chunk=6)
        assert logprobs.dtype == entropy.dtype == torch.float32
        return logprobs + 2 * entropy

    value_tol, grad_tol = (1e-9, 1e-9) if device == "cpu" else (1e-5, 3e-2)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        exact = total(hidden.float(), weight.float())
        close(total(hidden, weight).cpu(), exact.cpu(), value_tol)
        gradients = grad(total, hidden, weight)
        exact_gradients = grad(total, hidden.float(), weight.float())
    for a, b, dtype in zip(gradients, exact_gradients, dtypes):
        assert a.dtype == dtype
        close(a.cpu(), b.to(dtype).cpu(), grad_tol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_gives_float32_results(dtype):
    hidden, weight, ids = example(dtype=torch.float32)
    check_precision(linear_logprobs, (hidden.detach(), weight.detach(), ids), dtype)


def test_arguments_are_not_written_to():
    hidden, weight, ids = example()
    check_purity(linear_logprobs, (hidden.detach(), weight.detach(), ids))


# ---- memory --------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Observes every tensor that is made, in backward as well.

    largest: numbers in the largest one; makers: the operations that make large ones;
    most_held: how many large ones exist at the same time.
    """

    def __init__(self, large):
        super().__init__()
        self.large = large
        self.largest = 0
        self.makers = set()
        self.held = []
        self.most_held = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in args if torch.is_tensor(x)}
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            # a view or an in-place result has the storage of an argument
            if torch.is_tensor(x) and x.untyped_storage()._cdata not in given:
                self.record(function, x)
        return result

    def record(self, function, x):
        size = x.untyped_storage().nbytes() // x.element_size()
        self.largest = max(self.largest, size)
        if size >= self.large:
            self.makers.add(function.name().removeprefix("aten::").split(".")[0])
            self.held = [storage for storage in self.held if not storage.expired()]
            self.held.append(StorageWeakRef(x.untyped_storage()))
            self.most_held = max(self.most_held, len(self.held))


@pytest.mark.parametrize("chunk,dtype", [(16, FP32), (16, torch.float64), (24, FP32), (1, FP32)])
def test_one_chunk_of_logits_exists_at_a_time(chunk, dtype):
    tokens, vocab = 64, 512
    hidden, weight, ids = example(tokens, vocab, dim=1, dtype=dtype)
    block = math.ceil(chunk / 8)
    with Allocations(large=block * vocab + 1) as memory:
        logprobs, entropy = linear_logprobs(hidden, weight, ids, 0.9, chunk)
        (logprobs.sum() + entropy.sum()).backward()
    assert memory.largest == chunk * vocab < tokens * vocab
    if chunk > 1:  # all other tensors have at most an eighth of a chunk
        assert memory.most_held == 1
        assert memory.makers == {"mm"}


def test_backward_without_entropy_makes_no_temporary():
    hidden, weight, ids = example(64, 512, dim=1)
    logprobs, _ = linear_logprobs(hidden, weight, ids, 1.0, 16)
    with Allocations(large=513) as memory:
        logprobs.sum().backward()
    assert memory.makers == {"mm"}


def test_backward_makes_only_the_gradient_that_is_needed():
    hidden, weight, ids = example(64, 8, dim=50)
    with Allocations(large=8 * 50) as memory:
        linear_logprobs(hidden, weight.detach(), ids, 1.0, 2)[0].sum().backward()
    assert memory.makers == {"empty_like"}  # [T, D], no [V, D]
    with Allocations(large=8 * 50) as memory:
        linear_logprobs(hidden.detach(), weight, ids, 1.0, 2)[0].sum().backward()
    assert memory.makers == {"zeros_like"}  # one [V, D], no [T, D]
    assert memory.largest == 8 * 50


# ---- errors --------------------------------------------------------------------------------------

x2, x3, i2 = torch.zeros(2), torch.zeros(3), torch.zeros(2, dtype=torch.int64)
b2, b3 = torch.zeros(2, 2), torch.zeros(2, 3)
ERRORS = [
    ((x2, b2, i2), "hidden.*(2,)"),
    ((b2, b3, i2), "weight.*(2, 3)"),
    ((b2, x2, i2), "weight.*(2,)"),
    ((b2, b2, x3.long()), "token_ids.*(3,)"),
    ((torch.zeros(2, 3, 4), torch.zeros(5, 3, 4), i2), "hidden.*(2, 3, 4)"),
    ((b2, b2, i2, 0), "temperature.*0"),
    ((b2, b2, i2, -1), "temperature.*-1"),
    ((b2, b2, i2, NAN), "temperature.*nan"),
    ((b2, b2, i2, 1.0, 0), "chunk.*0"),
]


@pytest.mark.parametrize("arguments,message", ERRORS)
def test_error_names_the_argument_and_its_value(arguments, message):
    check_error(linear_logprobs, arguments, message)


# ---- named mutants -------------------------------------------------------------------------------

MUTANTS = parse_mutants("""
linear_logprobs: temperature forgotten in backward
- g = grad_logprobs[part].unsqueeze(-1) / temperature
+ g = grad_logprobs[part].unsqueeze(-1)

linear_logprobs: entropy missing from its gradient
- (rows + entropy[part].unsqueeze(-1))
+ rows.clone()

linear_logprobs: weight gradient of the last chunk only
- addmm_(grad.t(), inputs)
+ copy_(grad.t() @ inputs)

linear_logprobs: token of another chunk
- start + i * block
+ i * block
""")


@pytest.mark.parametrize("name,right,wrong", MUTANTS)
def test_named_mutant_fails_its_check(name, right, wrong):
    mutant = mutate(getattr(module, name), right, wrong)
    with pytest.raises(AssertionError):
        check_linear_logprobs(mutant)
