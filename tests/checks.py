"""Helpers for the tests of pure functions: comparison, gradients, strategies, altered copies."""

import ast
import inspect
import math
import os
import re

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("EXAMPLES", 60))
settings.register_profile(
    "repeatable", max_examples=EXAMPLES, deadline=None, derandomize=True, database=None
)
settings.load_profile("repeatable")
torch.set_num_threads(1)  # the tensors here are too small for more

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


# ---- values --------------------------------------------------------------------------------------


def T(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def close(actual, expected, tol=1e-6):
    """Same shape, and equal up to `tol`, relative and absolute; NaN equals nothing."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    actual = actual.detach().double()
    assert torch.allclose(actual, expected, rtol=tol, atol=tol), (actual, expected)


def grad(function, *inputs):
    """Gradients of the summed result in copies of the inputs."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*inputs).sum(), inputs)


values = st.floats(-5, 5).map(lambda x: round(x, 2))


@st.composite
def tensors(draw, *sizes, elements=values):
    """A float64 tensor; each size is an int or a (low, high) range."""
    shape = [draw(st.integers(*size)) if isinstance(size, tuple) else size for size in sizes]
    count = math.prod(shape)
    numbers = draw(st.lists(elements, min_size=count, max_size=count))
    return torch.tensor(numbers, dtype=torch.float64).reshape(shape)


# ---- functions of a module -----------------------------------------------------------------------


def public(module):
    """Names of the functions that the module defines."""
    functions = inspect.getmembers(module, inspect.isfunction)
    return [name for name, value in functions if value.__module__ == module.__name__]


def signatures(module):
    """One line for each public function, sorted."""
    lines = [f"{name}{inspect.signature(getattr(module, name))}" for name in public(module)]
    return "\n".join(sorted(lines))


def run_alone(source, name):
    """The function that `source` defines, with `import torch` and nothing else around it."""
    scope = {}
    exec("import torch\n" + source, scope)
    return scope[name]


def cut_out(function):
    """A copy of the function, cut out of its file."""
    return run_alone(inspect.getsource(function), function.__name__)


def parse_mutants(text):
    """Blocks of three lines, `function: mistake`, `- right code`, `+ wrong code`, as tuples."""
    mutants = []
    for block in text.strip().split("\n\n"):
        title, right, wrong = block.splitlines()
        name, mistake = title.split(": ")
        mutants.append(pytest.param(name, right[2:], wrong[2:], id=f"{name}: {mistake}"))
    return mutants


def mutate(function, right, wrong):
    """A copy of the function with some code replaced, as ast.unparse writes it (on one line)."""
    source = ast.unparse(ast.parse(inspect.getsource(function)))
    assert right in source
    return run_alone(source.replace(right, wrong), function.__name__)


# ---- what holds for every function ---------------------------------------------------------------


def outputs(function, arguments, dtype=None):
    """The results as a list; `dtype` replaces that of all floating-point arguments."""
    converted = []
    for x in arguments:
        if dtype and torch.is_tensor(x) and x.is_floating_point():
            x = x.to(dtype)
        converted.append(x)
    result = function(*converted)
    return list(result) if isinstance(result, tuple) else [result]


def check_precision(function, arguments, dtype):
    """Half precision is computed in float32; float32 and float64 stay as they are."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rounded = [
        x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments
    ]
    actual, expected = outputs(function, rounded), outputs(function, rounded, wide)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == wide
        close(a, b, 1e-9)


def check_purity(function, arguments):
    """No argument is written to."""
    copies = [x.clone() if torch.is_tensor(x) else x for x in arguments]
    function(*copies)
    for copy, original in zip(copies, arguments, strict=True):
        same = torch.equal(copy, original) if torch.is_tensor(copy) else copy == original
        assert same


def check_error(function, arguments, message):
    """The call raises ValueError. `message` is a pattern; its parentheses are literal."""
    pattern = re.sub(r"([()])", r"\\\1", message)
    with pytest.raises(ValueError, match=pattern):
        function(*arguments)
