"""How much of tricks.py do its tests pin down? Breaks it in every small way, one at a time, and counts who notices.

    python benchmarks/mutation.py [jobs] [only this function]

A mutant is one changed node of the syntax tree (docstrings, messages and other strings excepted). It is killed if a test of
test_tricks.py fails on it; the tests that compare source text are left out, as they would fail for the wrong reason.
"""

import ast
import copy
import multiprocessing
import os
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import hypothesis, pytest, torch  # noqa: E401, F401  imported once, before the processes fork

ROOT = Path(__file__).resolve().parent.parent
OPERATORS = {ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult], ast.FloorDiv: [ast.Mult],
             ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd], ast.And: [ast.Or], ast.Or: [ast.And],
             ast.Lt: [ast.LtE, ast.Gt], ast.LtE: [ast.Lt, ast.GtE], ast.Gt: [ast.GtE, ast.Lt], ast.GtE: [ast.Gt, ast.LtE],
             ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.In: [ast.NotIn], ast.NotIn: [ast.In],
             ast.Is: [ast.IsNot], ast.IsNot: [ast.Is]}
NAMES = {a: b for pair in ("min max", "amax amin", "mean sum", "any all", "std var", "exp expm1", "sub_ add_", "mul_ div_",
                           "prod sum", "exp_ expm1_", "addmm_ copy_") for a, b in (pair.split(), pair.split()[::-1])}


def variants(node):
    """(kind, what replaces the node) for every mutation of one node."""
    def changed(**fields):
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new
    if isinstance(node, (ast.BinOp, ast.BoolOp)):
        for new in OPERATORS.get(type(node.op), []):
            yield "operator", changed(op=new())
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for new in OPERATORS.get(type(op), []):
                yield "comparison", changed(ops=[*node.ops[:i], new(), *node.ops[i + 1:]])
    if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):  # -1 is one constant
        yield from (("constant", ast.Constant(step - node.operand.value)) for step in (1, -1))
    elif isinstance(node, ast.UnaryOp):
        yield "sign, not", node.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", changed(value=not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield from (("constant", changed(value=node.value + step)) for step in (1, -1))
    if isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield "min/max, mean/sum", changed(attr=NAMES[node.attr])
    if isinstance(node, ast.Name) and node.id in NAMES:
        yield "min/max, mean/sum", changed(id=NAMES[node.id])
    if isinstance(node, ast.keyword) and node.arg in ("min", "max"):
        yield "min/max, mean/sum", changed(arg=NAMES[node.arg])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) != "torch":
        yield "call dropped", node.func.value
    if isinstance(node, (ast.If, ast.IfExp)):
        for value in (True, False):
            yield "condition", changed(test=ast.Constant(value))
    if isinstance(node, ast.Return) and node.value is not None:
        yield "return", changed(value=ast.Constant(None))
    if isinstance(node, (ast.Expr, ast.Delete)) and not isinstance(getattr(node, "value", None), ast.Constant):
        yield "statement", ast.Pass()


def mutants(tree, only):
    def walk(node, name):
        if isinstance(node, (ast.Raise, ast.JoinedStr)) or isinstance(getattr(node, "operand", None), ast.Constant):
            return
        for field, value in ast.iter_fields(node):
            for i, child in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(child, ast.AST):
                    continue
                for kind, new in variants(child):
                    def put(x):
                        setattr(node, field, [*value[:i], x, *value[i + 1:]] if isinstance(value, list) else x)
                    put(new)
                    yield name, kind, child, new, ast.unparse(ast.fix_missing_locations(tree))
                    setattr(node, field, value)
                yield from walk(child, name)
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and only in ("", function.name):
            yield from walk(function, function.name)


def survives(source):
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # an endless loop ends in KeyboardInterrupt, which fails
    signal.alarm(180)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tricks.py").write_text(source)
        Path(folder, "test_tricks.py").symlink_to(ROOT / "test_tricks.py")
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.path.insert(0, folder)
        return pytest.main(["-xq", "--assert=plain", "-pno:cacheprovider", "-pno:unraisableexception", "-Wignore",
                            "-k", "not named_mutants", folder]) == 0


if __name__ == "__main__":
    os.environ.setdefault("EXAMPLES", "15")
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    source = (ROOT / "tricks.py").read_text()
    todo = list(mutants(ast.parse(source), (sys.argv[2:] or [""])[0]))
    total, survived = Counter(), Counter()
    with multiprocessing.get_context("fork").Pool(int((sys.argv[1:] or ["2"])[0]), maxtasksperchild=1) as pool:
        assert pool.apply(survives, (ast.unparse(ast.parse(source)),)), "the tests fail on the original"
        for (name, kind, old, new, _), lives in zip(todo, pool.imap(survives, [mutant[-1] for mutant in todo])):
            total.update((name, kind, "all"))
            if lives:
                survived.update((name, kind, "all"))
                print(f"survivor: {name} line {getattr(old, 'lineno', '?')}, {kind}: {ast.unparse(old)!r:.90} -> "
                      f"{ast.unparse(new)!r:.90}", flush=True)
    for key in total:
        print(f"{key:32s} {total[key] - survived[key]:4d} of {total[key]:4d} killed  {1 - survived[key] / total[key]:6.1%}")
