"""support/logprobs.py: linear_logprobs equals the plain formula, and never holds all logits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters
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
    # a bias of log 3 on token 1 is as good as a hidden state of log 3
    bias = T(0, math.log(3))
    close(linear_logprobs(0 * hidden, weight, ids, bias=bias)[0][:1], [math.log(1 / 4)])
    rest = hidden - bias  # so that the logits are those from above
    of_bias = grad(lambda x: linear_logprobs(rest, weight, ids, chunk=2, bias=x)[0], bias)
    close(of_bias[0], by_logprob.sum(0))
    # at temperature 1/2, the bias is divided as well
    close(linear_logprobs(0 * hidden, weight, ids, 0.5, bias=bias)[0][:1], [math.log(1 / 10)])
    # rows of very different size in one block: each has a peak of its own
    uneven = linear_logprobs(T([0, math.log(3)], [2000, 0]), weight, ids[:2], chunk=16)
    close(uneven[0], [math.log(1 / 4), -2000])
    close(uneven[1], [h, 0])
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
    expected = (
        "linear_logprobs(hidden, weight, token_ids, temperature=1.0, chunk=1024, bias=None, "
        "compiled=False)"
    )
    assert signatures(module) == expected
    assert public(module) == ["linear_logprobs"]


def test_docstring_is_complete_and_short():
    assert len(linear_logprobs.__doc__) > 200
    assert linear_logprobs.__doc__.count("\n") <= 15


# ---- equal to the plain formula ------------------------------------------------------------------


def plain(hidden, weight, ids, temperature, bias):
    """What linear_logprobs computes, with all logits in memory."""
    logits = hidden @ weight.t() + (0 if bias is None else bias)
    return tricks.token_logprobs(logits, ids, temperature), tricks.entropy(logits, temperature)


@st.composite
def cases(draw):
    """(hidden [T, D], weight [V, D], token_ids [T]), and a bias [V] or None"""
    t, v, d = draw(st.integers(0, 9)), draw(st.integers(2, 7)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    hidden = torch.randn(t, d, dtype=torch.float64, generator=generator)
    weight = torch.randn(v, d, dtype=torch.float64, generator=generator)
    bias = torch.randn(v, dtype=torch.float64, generator=generator) if draw(st.booleans()) else None
    return (hidden, weight, torch.randint(0, v, (t,), generator=generator)), bias


temperatures, chunks = st.floats(0.3, 3), st.integers(1, 11)


@given(cases(), temperatures, chunks)
def test_values_equal_the_plain_formula(case, temperature, chunk):
    inputs, bias = case
    expected = plain(*inputs, temperature, bias)
    found = linear_logprobs(*inputs, temperature, chunk, bias)
    for a, b in zip(found, expected, strict=True):
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
    (hidden, weight, ids), bias = case
    bias = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias

    def chunked(h, w, b):
        return objective(linear_logprobs(h, w, ids, temperature, chunk, b), kind, mix)

    def expected(h, w, b):
        return objective(plain(h, w, ids, temperature, b), kind, mix)

    inputs = (hidden, weight, bias)
    gradients = grad(expected, *inputs)
    for a, b in zip(grad(chunked, *inputs), gradients, strict=True):
        close(a, b, 1e-9)
    # only one of them needs a gradient
    for i, gradient in enumerate(gradients):
        alone = grad(lambda x: chunked(*inputs[:i], x, *inputs[i + 1 :]), inputs[i])
        close(alone[0], gradient, 1e-9)


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
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprobs(h, w, ids, temperature, chunk=3, bias=b),
        (hidden, weight, bias),
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_compiled_equals_plain(dtype):
    """The same formulas in fewer passes, compiled once for all numbers of tokens."""
    before = counters["stats"]["unique_graphs"]
    for tokens in (20, 35, 7):
        hidden, weight, ids = example(tokens, dtype=dtype)
        bias = torch.randn(len(weight), dtype=dtype, requires_grad=True)
        results = []
        for compiled in (False, True):
            found = linear_logprobs(hidden, weight, ids, 0.7, 8, bias, compiled)
            loss = (found[0] + 2 * found[1]).sum()
            results.append((*found, *torch.autograd.grad(loss, (hidden, weight, bias))))
        for plain_result, compiled_result in zip(*results, strict=True):
            close(compiled_result, plain_result.detach(), 1e-12 if dtype == torch.float64 else 1e-2)
    assert counters["stats"]["unique_graphs"] - before == 2


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


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("top,tail", [(30, 1e-6), (1000, 1e-4), (-1000, 1e-4)])
@pytest.mark.parametrize("others", [1, 7, 5000])
def test_gradient_of_a_nearly_certain_token_is_as_accurate_as_the_plain_one(
    top, tail, others, entropy
):
    """It is 1 - p, and that is far smaller than the rounding of the top logit."""
    logits = torch.full((1, 1 + others), top + math.log(tail / others))
    logits[0, 0] = top
    ids = torch.tensor([0])

    def chunked(x):  # the logits are the weight
        found = linear_logprobs(torch.ones(1, 1, dtype=x.dtype), x.t(), ids)
        return found[0] + found[1] if entropy else found[0]

    def naive(x):
        logp = x.log_softmax(-1)
        return logp[:, 0] - (logp.exp() * logp).sum(-1) if entropy else logp[:, 0]

    exact = grad(naive, logits.double())[0]
    error, naive_error = ((grad(f, logits)[0] - exact).abs().max() for f in (chunked, naive))
    assert error <= 2.4e-7 + naive_error  # two units in the last place of 1
    if others == 1:  # else the terms of the sum are rounded as well, in either form
        assert error < 0.15 * exact.abs().max()


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
    exact = total(hidden.float(), weight.float())
    exact_gradients = grad(total, hidden.float(), weight.float())
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        close(total(hidden, weight).cpu(), exact.cpu(), value_tol)
        gradients = grad(total, hidden, weight)
    for a, b, dtype in zip(gradients, exact_gradients, dtypes):
        assert a.dtype == dtype
        close(a.cpu(), b.to(dtype).cpu(), grad_tol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_gives_float32_results(dtype):
    hidden, weight, ids = example(dtype=torch.float32)
    check_precision(linear_logprobs, (hidden.detach(), weight.detach(), ids), dtype)


def test_half_precision_bias_gets_its_gradient_in_half_precision():
    hidden, weight, ids = (x.detach() for x in example(dtype=torch.bfloat16))
    bias = torch.randn(9).bfloat16()
    gradient, exact = (
        grad(lambda b: linear_logprobs(hidden, weight, ids, chunk=3, bias=b)[0], x)[0]
        for x in (bias, bias.float())
    )
    assert gradient.dtype == torch.bfloat16
    close(gradient, exact.bfloat16(), 1e-9)


def test_arguments_are_not_written_to():
    hidden, weight, ids = example()
    bias = torch.ones(9, dtype=torch.float64)
    check_purity(linear_logprobs, (hidden.detach(), weight.detach(), ids, 0.9, 7, bias))


def mm_of_a_gpu(a, b, out_dtype=None):
    assert a.dtype == b.dtype
    assert out_dtype == (FP32 if a.dtype in (FP16, BF16) else None)  # kept in float32
    return (a.double() @ b.double()).to(out_dtype or a.dtype)


def addmm_of_a_gpu(total, a, b, out_dtype, out):
    assert total is out and total.dtype == out_dtype
    return out.add_(mm_of_a_gpu(a, b, out_dtype))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Tensors claim to be on a GPU, and matrix products take the dtypes that they take there."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch, "mm", mm_of_a_gpu)
    monkeypatch.setattr(torch, "addmm", addmm_of_a_gpu)


@pytest.mark.parametrize("of_weight", DTYPES)
@pytest.mark.parametrize("of_hidden", DTYPES)
def test_code_for_gpus_takes_every_pair_of_dtypes(of_hidden, of_weight, as_on_a_gpu):
    hidden, weight, ids = (x.detach() for x in example())
    inputs = (hidden.to(of_hidden), weight.to(of_weight), torch.linspace(-1, 1, 9).bfloat16())

    def total(function, h, w, b):
        logprobs, entropy = function(h, w, ids, 0.7, bias=b)
        return logprobs + 2 * entropy

    exact = [x.double() for x in inputs]
    close(total(linear_logprobs, *inputs), total(plain, *exact), 1e-5)
    found = grad(lambda *x: total(linear_logprobs, *x), *inputs)
    expected = grad(lambda *x: total(plain, *x), *exact)
    for x, a, b in zip(inputs, found, expected):
        assert a.dtype == x.dtype
        close(a, b, 2e-2)  # the gradient by the logits is in half precision


def test_nearly_certain_token_keeps_its_gradient_in_half_precision(as_on_a_gpu):
    """1 - p = 1 / (1 + e^8) = 3.3535e-4. In bfloat16 p itself is 1."""
    hidden, weight = T([1], dtype=BF16), T([8], [0], dtype=BF16)
    (found,) = grad(lambda w: linear_logprobs(hidden, w, torch.tensor([0]))[0], weight)
    close(1e4 * found, [[3.3535], [-3.3535]], 4e-3)


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
    bias = torch.zeros(vocab, dtype=dtype, requires_grad=True)
    block = math.ceil(chunk / 8)
    with Allocations(large=block * vocab + 1) as memory:
        logprobs, entropy = linear_logprobs(hidden, weight, ids, 0.9, chunk, bias)
        (logprobs.sum() + entropy.sum()).backward()
    assert memory.largest == chunk * vocab < tokens * vocab
    if chunk > 1:  # all other tensors have at most an eighth of a chunk
        assert memory.most_held == 1
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


class Passes(TorchDispatchMode):
    """Counts the operations on at least `large` numbers, in backward as well."""

    def __init__(self, large):
        super().__init__()
        self.large = large
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count += torch.is_tensor(result) and result.numel() >= self.large
        return result


def test_unused_entropy_costs_no_pass_over_the_logits_in_backward():
    hidden, weight, ids = example(6, 40)
    counts = []
    for used in (False, True):
        logprobs, entropy = linear_logprobs(hidden, weight, ids)
        loss = logprobs.sum() + (entropy.sum() if used else 0)
        with Passes(large=40) as passes:  # a row of logits
            loss.backward()
        counts.append(passes.count)
    assert 0 < counts[0] < counts[1]


def test_vocabulary_may_be_larger_than_a_block_of_rows():
    hidden, weight, ids = example(2, 2**20 + 1, dim=1)
    close(linear_logprobs(hidden, weight, ids)[0], tricks.token_logprobs(hidden @ weight.t(), ids))


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
    ((b2, b2, i2, 1.0, 1, x3), "bias.*(3,).*(2, 2)"),
    ((b2, b2, i2, 1.0, 1, b2), "bias.*(2, 2)"),
]


@pytest.mark.parametrize("arguments,message", ERRORS)
def test_error_names_the_argument_and_its_value(arguments, message):
    check_error(linear_logprobs, arguments, message)


# ---- named mutants -------------------------------------------------------------------------------

MUTANTS = parse_mutants("""
linear_logprobs: temperature forgotten in backward
- g / temperature))
+ g))

linear_logprobs: entropy missing from its gradient
- (rows + shift)
+ rows.clone()

linear_logprobs: chosen token without its own gradient
- bias[ids]) + g
+ bias[ids])

linear_logprobs: bias of another token in the chosen entry
- bias if bias is None else bias[ids]
+ bias if bias is None else bias[0]

linear_logprobs: entropy gradient from logits less the peak, instead of log p
- shift = entropy - total.log()
+ shift = entropy

linear_logprobs: weight gradient of the last chunk only
- total.addmm_(a, b)
+ total.copy_(a @ b)

linear_logprobs: bias added after the division by the temperature
- logits + bias
+ logits + bias * temperature

linear_logprobs: bias missing in backward
- result = without_onehot(logits, bias)
+ result = without_onehot(logits, None)

linear_logprobs: bias gradient of the last chunk only
- grad_bias.add_(grad.sum(dim=0, dtype=dtype))
+ grad_bias.copy_(grad.sum(dim=0, dtype=dtype))

linear_logprobs: one peak for all rows of a block
- rows.amax(dim=-1, keepdim=True)
+ rows.amax().expand(len(rows), 1)

linear_logprobs: token of another chunk
- start + i * block
+ i * block
""")


@pytest.mark.parametrize("name,right,wrong", MUTANTS)
def test_named_mutant_fails_its_check(name, right, wrong):
    mutant = mutate(getattr(module, name), right, wrong)
    with pytest.raises(AssertionError):
        check_linear_logprobs(mutant)
