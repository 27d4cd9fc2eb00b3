"""Mutation score: how many small changes of the formulas a test notices.

    python benchmarks/mutation.py [JOBS] [FUNCTION]

A mutant is a file with one changed node of its syntax tree; strings, docstrings and messages stay
as they are. A mutant is killed if a test of that file fails. The tests that compare source text are
left out, because they would fail for that reason alone.

    tricks.py              test_tricks.py
    support/logprobs.py    tests/test_logprobs.py
    support/stats.py       tests/test_stats.py
"""

import argparse
import ast
import copy
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis  # noqa: F401  imported once, before the processes fork
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TESTS = {
    "tricks.py": "test_tricks.py",
    "support/logprobs.py": "tests/test_logprobs.py",
    "support/stats.py": "tests/test_stats.py",
}
SECONDS = 180  # limit for the tests of one mutant

# ---- changes -------------------------------------------------------------------------------------

OPERATORS = {
    ast.Add: [ast.Sub],
    ast.Sub: [ast.Add],
    ast.Mult: [ast.Div],
    ast.Div: [ast.Mult],
    ast.FloorDiv: [ast.Mult],
    ast.BitAnd: [ast.BitOr],
    ast.BitOr: [ast.BitAnd],
    ast.And: [ast.Or],
    ast.Or: [ast.And],
    ast.Lt: [ast.LtE, ast.Gt],
    ast.LtE: [ast.Lt, ast.GtE],
    ast.Gt: [ast.GtE, ast.Lt],
    ast.GtE: [ast.Gt, ast.LtE],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
}
PAIRS = """
min max, amin amax, mean sum, any all, std var, exp expm1, sub_ add_, mul_ div_, prod sum,
exp_ expm1_, addmm_ copy_
"""
NAMES = {}
for pair in PAIRS.split(","):
    left, right = pair.split()
    NAMES |= {left: right, right: left}

Variant = tuple[str, ast.AST]  # kind of the change, new node


def changed(node, **fields):
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def is_number(node) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def operator_variants(node) -> Iterator[Variant]:
    if isinstance(node, (ast.BinOp, ast.BoolOp)):
        for new in OPERATORS.get(type(node.op), []):
            yield "operator", changed(node, op=new())
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for new in OPERATORS.get(type(op), []):
                ops = [*node.ops[:i], new(), *node.ops[i + 1 :]]
                yield "comparison", changed(node, ops=ops)


def constant_variants(node) -> Iterator[Variant]:
    if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
        for step in (1, -1):  # -1 is one constant
            yield "constant", ast.Constant(step - node.operand.value)
    elif isinstance(node, ast.UnaryOp):
        yield "sign, not", node.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", changed(node, value=not node.value)
    elif is_number(node):
        for step in (1, -1):
            yield "constant", changed(node, value=node.value + step)


def name_variants(node) -> Iterator[Variant]:
    kind = "min/max, mean/sum"
    if isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield kind, changed(node, attr=NAMES[node.attr])
    if isinstance(node, ast.Name) and node.id in NAMES:
        yield kind, changed(node, id=NAMES[node.id])
    if isinstance(node, ast.keyword) and node.arg in ("min", "max"):
        yield kind, changed(node, arg=NAMES[node.arg])


def statement_variants(node) -> Iterator[Variant]:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if ast.unparse(node.func.value) != "torch":
            yield "call dropped", node.func.value
    if isinstance(node, (ast.If, ast.IfExp)):
        for value in (True, False):
            yield "condition", changed(node, test=ast.Constant(value))
    if isinstance(node, ast.Return) and node.value is not None:
        yield "return", changed(node, value=ast.Constant(None))
    if isinstance(node, (ast.Expr, ast.Delete)):
        if not isinstance(getattr(node, "value", None), ast.Constant):  # a docstring
            yield "statement", ast.Pass()


def variants(node) -> Iterator[Variant]:
    yield from operator_variants(node)
    yield from constant_variants(node)
    yield from name_variants(node)
    yield from statement_variants(node)


# ---- mutants -------------------------------------------------------------------------------------


@dataclass
class Mutant:
    file: str
    function: str
    kind: str
    line: str
    old: str
    new: str
    source: str  # of the whole file


def places(node) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """(parent, field, index in that field, node) of every node that may change."""
    is_negative_number = isinstance(getattr(node, "operand", None), ast.Constant)
    if isinstance(node, (ast.Raise, ast.JoinedStr)) or is_negative_number:
        return
    for field, value in ast.iter_fields(node):
        children = enumerate(value) if isinstance(value, list) else [(None, value)]
        for i, child in children:
            if isinstance(child, ast.AST):
                yield node, field, i, child
                yield from places(child)


def put(parent, field: str, index: int | None, node) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def mutants(file: str, only: str) -> Iterator[Mutant]:
    tree = ast.parse((ROOT / file).read_text())
    for function in tree.body:
        if not isinstance(function, ast.FunctionDef) or only not in ("", function.name):
            continue
        for parent, field, i, node in list(places(function)):
            for kind, new in variants(node):
                put(parent, field, i, new)
                source = ast.unparse(ast.fix_missing_locations(tree))
                put(parent, field, i, node)
                line, old = str(getattr(node, "lineno", "?")), ast.unparse(node)
                yield Mutant(file, function.name, kind, line, old, ast.unparse(new), source)


def survives(file: str, source: str) -> bool:
    """Whether the tests pass with this source in place of the file; runs in its own process."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # ends an endless loop, as a failure
    signal.alarm(SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "support", Path(folder, "support"), ignore=ignored)
        Path(folder, "tests").mkdir()
        Path(folder, "tests/__init__.py").touch()
        for name in ("tricks.py", "tests/checks.py", TESTS[file]):
            shutil.copy(ROOT / name, Path(folder, name))
        Path(folder, file).write_text(source)
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.path.insert(0, folder)
        flags = "-xq --assert=plain -p no:cacheprovider -p no:unraisableexception -W ignore"
        code = pytest.main([*flags.split(), "-k", "not named_mutant", TESTS[file]])
        os.chdir("/")
        return code == 0


# ---- report --------------------------------------------------------------------------------------


def report(total: Counter, survived: Counter) -> None:
    for key, count in total.items():
        killed = count - survived[key]
        print(f"{key:32s} {killed:4d} of {count:4d} killed  {killed / count:6.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("jobs", nargs="?", type=int, default=2, help="processes at a time")
    parser.add_argument("function", nargs="?", default="", help="only this function")
    args = parser.parse_args()
    os.environ.setdefault("EXAMPLES", "15")
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    todo = [mutant for file in TESTS for mutant in mutants(file, args.function)]
    if not todo:
        sys.exit(f"error: no function {args.function} in {', '.join(TESTS)}")
    total, survived = Counter(), Counter()
    with multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=1) as pool:
        for file in dict.fromkeys(mutant.file for mutant in todo):
            original = ast.unparse(ast.parse((ROOT / file).read_text()))
            if not pool.apply(survives, (file, original)):
                sys.exit(f"error: {TESTS[file]} fails on the original {file}")
        jobs = [pool.apply_async(survives, (mutant.file, mutant.source)) for mutant in todo]
        for mutant, job in zip(todo, jobs, strict=True):
            total.update((mutant.function, mutant.kind, "all"))
            if job.get():
                survived.update((mutant.function, mutant.kind, "all"))
                change = f"{mutant.old!r:.90} -> {mutant.new!r:.90}"
                where = f"{mutant.function} line {mutant.line}, {mutant.kind}"
                print(f"survivor: {where}: {change}", flush=True)
    report(total, survived)


if __name__ == "__main__":
    main()
