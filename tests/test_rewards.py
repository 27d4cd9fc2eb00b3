"""Rewards: what counts as correct, and that no response or reward can harm a run."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import sympy

from benchmarks import fuzz_rewards
from support.answers import answer_comparison
from support.data import load_rows
from support.errors import UserError
from support.grader import Grader
from support.notation import last_boxed
from support.rewards import exact_reward, load_reward, math_reward
from tests.world import ROOT

ROWS = [{"problem": "", "answer": str(i)} for i in range(100)]

# ---- what is correct -----------------------------------------------------------------------------

BOXES = {  # text: content of its last box
    r"so \boxed{42}.": "42",
    r"\boxed{1} no, \boxed{ 2 }": "2",
    r"\boxed{\frac{1}{2}}": r"\frac{1}{2}",
    r"\boxed{\{1,\{2\}\}} q": r"\{1,\{2\}\}",
    r"\boxed{}": "",
    r"\boxed{a}}": "a",
    r"\boxed{\boxed{3}}": "3",
    r"\boxed{1} then \boxed{2": None,
    r"\boxed 5": "5",
    r"so $\boxed 42$.": "42",
    r"\boxed {42}": "42",
    r"\fbox{42}": "42",
    r"\boxed \frac{1}{2}$ is it": r"\frac{1}{2}",
    r"\boxed{\left\{ x \right.}": r"\left\{ x \right.",
    r"\boxed{2} in a \boxedtext": "2",
    r"\boxed": None,
    r"\boxedtext{3}": None,
    "42": None,
    "": None,
}
LONG_SUM = "1+" * 1500 + "1"
SCORES = [  # answer, gold, score
    ("42", "42", 1),
    ("0.5", r"\frac{1}{2}", 1),
    (r"\frac12", "0.5", 1),
    ("1,000", "1000", 1),
    ("42.0", "42", 1),
    ("-3", "-3", 1),
    ("(1, 2)", "(1,2)", 1),
    ("p-q", "p - q", 1),
    (r"x \in [0,1]", "[0,1]", 1),
    (r"2\sqrt{2}", r"\sqrt{8}", 1),
    ("43", "42", 0),
    ("3", "-3", 0),
    ("(2,1)", "(1,2)", 0),
    ("0.3333", r"\frac{1}{3}", 0),
    ("", "42", 0),
    ("x", "42", 0),
    (r"\frac{", "42", 0),
    ("12345678901234567890123", "12345678901234567890124", 0),
    (LONG_SUM, LONG_SUM, 1),  # the same string
    (LONG_SUM, "1501", 0),  # too long to be parsed
]
EXACT = {  # response: score for the answer 7
    r"\boxed{7}": 1,
    "so\n7\n": 1,
    "7": 1,
    "7.0": 0,
    r"\boxed{8}" + "\n7": 0,
    "": 0,
    "7\nor 8": 0,
}


@pytest.mark.parametrize("text, content", BOXES.items())
def test_last_box(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize("answer, gold, score", SCORES)
def test_math_reward(answer, gold, score):
    assert math_reward(rf"\boxed{{7}}, no: \boxed{{{answer}}}.", {"answer": gold}) == score
    assert math_reward(answer, {"answer": gold}) == 0  # no box


@pytest.mark.parametrize("response, score", EXACT.items())
def test_exact_reward(response, score):
    assert exact_reward(response, {"answer": "7"}) == score


GOLDS = [
    "42",
    "-7",
    "0.25",
    r"\frac{3}{4}",
    r"\left( 3, \frac{\pi}{2} \right)",
    r"2\sqrt{3}",
    "p - q",
    "x^2 + 1",
    "[0, 1)",
    r"\{1, 2, 3\}",
    r"10\%",
    r"\text{east}",
    r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
    "1,000",
    r"k \neq 1",
    r"\infty",
    r"90^\circ",
    "5",
]
FILES = sorted((ROOT.parent / "shared/data").glob("*.jsonl"))  # real data sets, if there are any


def boxed(answer) -> str:
    return f"\\boxed{{{answer}}}"


def check_golds(golds: list[str], grader) -> None:
    """Each gold accepts itself. A sample accepts itself with a space, and no wrong number."""
    for gold in golds:
        assert math_reward(boxed(gold), {"answer": gold}) == 1, gold
    few = golds[:: max(1, len(golds) // 100)]
    responses = [boxed(gold) for gold in few]
    other_strings = [{"answer": gold + " "} for gold in few]  # so that math-verify decides
    right = [grade.score for grade in grader(responses, other_strings)]
    assert sum(right) >= 0.99 * len(few), [gold for gold, score in zip(few, right) if not score]
    numbers = [boxed(i + 1234567) for i in range(len(few))]
    wrong = [grade.score for grade in grader(numbers, [{"answer": gold} for gold in few])]
    assert sum(wrong) == 0


@pytest.mark.parametrize("file", [None, *FILES])
def test_gold_answers_are_correct(file, make_grader):
    golds = [row["answer"] for row in load_rows(str(file))] if file else GOLDS
    check_golds(golds, make_grader("math"))


# ---- hostile text --------------------------------------------------------------------------------

MEGABYTES = {
    "boxes": "\\boxed{" * 200_000,
    "braces in a box": "\\boxed{" + "{" * 10**6,
    "pairs in a box": "\\boxed{" + "{}" * 500_000,
    "open braces": "{" * 10**6,
    "closed braces": "}\\" * 500_000,
}


@pytest.mark.parametrize("name", MEGABYTES)
def test_megabytes_take_little_time(name):
    began = time.process_time()
    for text in (MEGABYTES[name], MEGABYTES[name] + "}"):
        assert math_reward(text, {"answer": "1"}) == 0
        assert exact_reward(text, {"answer": "1"}) == 0
    assert time.process_time() - began < 10


@pytest.fixture
def code(tmp_path) -> str:
    """Python code that writes a file, if it is ever evaluated."""
    return f"__import__('pathlib').Path('{tmp_path}/canary').touch()"


@pytest.mark.parametrize(
    "form", ["{}", r"\text{{{}}}", r"\operatorname{{eval}}({})", "1e{}", r"\gcd({},2)", "x_{{{}}}"]
)
def test_answers_are_not_evaluated(form, code, tmp_path):
    assert math_reward(boxed(form.format(code)), {"answer": "5"}) == 0
    assert math_reward(boxed(rf"\max(1,{code})"), {"answer": "5"}) == 0
    assert not (tmp_path / "canary").exists()


def test_sympy_evaluates_only_numbers_while_answers_are_compared(code, tmp_path):
    """Even if the grammar of math-verify let code through."""
    comparison = answer_comparison()
    comparison.running = True
    try:
        for text in (code, "open(0)", "().__class__", "x.y", "exit()"):
            with pytest.raises(ValueError, match="not a number"):
                sympy.sympify(text)
        assert float(sympy.Number("1.5e3")) == 1500
    finally:
        comparison.running = False
    assert not (tmp_path / "canary").exists()
    assert sympy.sympify("x**2").is_Pow  # elsewhere sympy is unchanged


def test_laws_hold_for_300_hostile_answers(monkeypatch):
    monkeypatch.setattr(
        fuzz_rewards, "BATCH", 100
    )  # later batches meet the workers of earlier ones
    figures = fuzz_rewards.fuzz(300, timeout=2, workers=2, seed=1)
    ignored = ("memory",) if sys.platform == "linux" else ("memory", "leak")
    assert [law for law in figures["broken"] if not law.startswith(ignored)] == [], figures


# ---- hostile rewards -----------------------------------------------------------------------------

REWARD = r"""
import os, signal, subprocess, sys, threading, time

class Mute(Exception):
    def __init__(self, text):
        super().__init__(text)
        self.unpicklable = lambda: None
    def __reduce__(self):
        raise TypeError("cannot be pickled")
    def __str__(self):
        raise ValueError("no text either")

class Odd(Exception):
    def __init__(self, two, values):
        super().__init__("two values")  # cannot be unpickled

def ignore_signals():
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(1)

def start_family(file):
    ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", ignore])
    fork = os.fork()
    if not fork:
        time.sleep(600)
    with open(file, "w") as pids:
        pids.write(f"{os.getpid()} {child.pid} {fork}")
    time.sleep(600)

VALUES = {
    "nan": float("nan"), "inf": float("inf"), "none": None, "word": "seven", "digits": "7",
    "complex": 1j, "vast": 10**400, "list": [1.0] * 10**5, "lambda": lambda: 1, "true": True,
    "big": 1e39, "negative": -1.1e20, "largest": -1e20,
}

def trouble(response, row):
    while response == "hangs":
        pass
    if response == "computes":
        return 9 ** 9 ** 9 ** 9  # no signal handler runs in there
    if response == "ignores":
        ignore_signals()
    if response == "thread":
        threading.Thread(target=time.sleep, args=(600,)).start()
        time.sleep(600)
    if response.startswith("family"):
        start_family(response.split()[1])
    if response == "forgets" and not os.fork():
        return 99
    if response == "exits":
        os._exit(3)
    if response == "segfaults":
        os.kill(os.getpid(), signal.SIGSEGV)
    if response == "leaves":
        sys.exit("bye")
    if response == "raises":
        raise KeyError("no such thing")
    if response == "babbles":
        raise ValueError("a\nb\x1b[31m\x00" * 10**6)
    if response == "mute":
        raise Mute("")
    if response == "odd":
        raise Odd(1, 2)
    if response == "eats":
        return len([bytearray(2**26) for _ in range(10**4)])
    if response in ("waits", "pid"):
        time.sleep(0.2)
    if response == "pid":
        return os.getpid()
    return VALUES.get(response, float(row["answer"]))
"""
REASONS = {  # response: part of the reason why it has no score
    "raises": "KeyError: 'no such thing' (my_reward.py:",
    "babbles": "ValueError: a b",
    "mute": "Mute: (its __str__ fails)",
    "odd": "Odd: two values",
    "leaves": "SystemExit: bye",
    "exits": "exit code 3",
    "segfaults": "signal 11",
    "nan": "trouble returned nan (float), not a finite number",
    "inf": "inf (float)",
    "none": "None (NoneType), not a finite number; return one, such as 0.0 or 1.0",
    "word": "'seven' (str)",
    "digits": "'7' (str)",
    "complex": "1j (complex)",
    "vast": "(int)",
    "big": "1e+39 (float), not a finite number of at most 1e+20 in size; return one, such as",
    "negative": "-1.1e+20 (float), not a finite number of at most 1e+20 in size",
    "list": "(list)",
    "lambda": "(function)",
}
if sys.platform == "linux":  # elsewhere there is no memory limit
    REASONS["eats"] = "MemoryError"


@pytest.fixture
def trouble(tmp_path) -> str:
    """A reward that does what the response says."""
    (tmp_path / "my_reward.py").write_text(REWARD)
    return f"{tmp_path}/my_reward.py:trouble"


class Graders:
    """A call makes a grader."""

    def __init__(self):
        self.made: list[Grader] = []

    def __call__(
        self, reward: str, timeout: float = 30.0, workers: int = 2, memory_gib: float = 4.0
    ) -> Grader:
        limits = dict(reward_timeout=timeout, reward_memory_gib=memory_gib)
        grader = Grader(SimpleNamespace(reward=reward, reward_workers=workers, **limits))
        self.made.append(grader)
        return grader


@pytest.fixture
def make_grader():
    """A function that makes a grader, which is closed at the end."""
    graders = Graders()
    yield graders
    for grader in graders.made:
        grader.close()


def results(grader: Grader, responses: list[str], rows=None) -> list[tuple[float, str]]:
    """Scores and reasons."""
    grades = grader(responses, rows or ROWS[: len(responses)])
    return [(grade.score, grade.failure) for grade in grades]


def worker_pids(grader: Grader) -> set[int]:
    return {int(score) for score, _ in results(grader, ["pid"] * 4)}


def is_alive(pid: int) -> bool:
    """Whether a process runs. A zombie does not."""
    try:
        os.kill(pid, 0)
        if not Path("/proc").exists():
            return True
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        return state not in "ZX"
    except (ProcessLookupError, FileNotFoundError):
        return False


def wait_until(condition, seconds: float = 20.0):
    """The value of condition() as soon as it is true, or its last value."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value or time.monotonic() > end:
            return value
        time.sleep(0.05)


def none_is_alive(pids) -> bool:
    return not any(map(is_alive, pids))


def all_end(pids) -> bool:
    return wait_until(functools.partial(none_is_alive, pids))


def test_every_response_gets_its_own_grade(trouble, make_grader):
    grader = make_grader(trouble, memory_gib=0.5)
    kinds = [kind for name in REASONS for kind in ("fine", name)] * 2
    for _ in range(2):  # the second time with replaced workers
        rows = ROWS[: len(kinds)]
        for kind, row, grade in zip(kinds, rows, grader(kinds, rows)):
            if kind == "fine":
                assert (grade.score, grade.failure) == (float(row["answer"]), "")
            else:
                assert grade.score == 0
                assert REASONS[kind] in grade.failure, kind
            assert len(grade.failure) <= 300
            assert grade.failure.isprintable()
            assert 0 <= grade.seconds < 30


def test_bool_is_a_number_and_a_forgotten_fork_does_no_harm(trouble, make_grader):
    grader = make_grader(trouble)
    responses = ["true", "forgets", "fine", "fine"]
    assert results(grader, responses) == [(1.0, ""), (1.0, ""), (2.0, ""), (3.0, "")]
    assert results(grader, ["largest"]) == [(-1e20, "")]
    assert grader([], []) == []


def test_scalars_of_numpy_and_torch_are_numbers(tmp_path, make_grader):
    code = "import numpy, torch\ndef score(response, row): return eval(response)\n"
    (tmp_path / "scalars.py").write_text(code)
    grader = make_grader(f"{tmp_path}/scalars.py:score", timeout=60.0, workers=1)
    numbers = ["numpy.float32(0.5)", "numpy.bool_(True)", "numpy.array([2.0])[0]"]
    numbers += ["torch.tensor(3)", "torch.tensor([4.0])"]
    assert results(grader, numbers) == [(0.5, ""), (1.0, ""), (2.0, ""), (3.0, ""), (4.0, "")]
    for score, reason in results(grader, ["torch.ones(2)", "numpy.nan"]):
        assert score == 0
        assert "not a finite number" in reason


def test_reward_that_hangs_is_killed_with_its_processes(trouble, make_grader, tmp_path):
    grader = make_grader(trouble, timeout=1.5)
    family = f"family {tmp_path}/pids"
    kinds = ["fine", "hangs", "computes", "fine", "ignores", "thread", family, "fine"]
    results(grader, ["fine"])
    began = time.monotonic()
    found = results(grader, kinds)
    assert time.monotonic() - began < 20  # three in a row on each worker
    for i, (kind, result) in enumerate(zip(kinds, found)):
        late = (0.0, "no score within 1.5 s (--reward-timeout)")
        assert result == ((float(i), "") if kind == "fine" else late)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 3
    assert all_end(pids)
    assert results(grader, ["fine"] * 10) == [(float(i), "") for i in range(10)]  # new workers


def test_long_batch_shows_signs_of_life_unless_the_server_hangs(trouble, make_grader):
    grader = make_grader(trouble, workers=1)
    signs = []
    grader.alive = functools.partial(signs.append, 1)
    grader(["waits"] * 12, ROWS[:12])  # 2.4 s
    assert len(signs) >= 2

    signs.clear()
    grader.server.send_signal(signal.SIGSTOP)
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.3)
        with pytest.raises(KeyboardInterrupt):
            grader(["waits"], ROWS[:1])
    finally:
        signal.signal(signal.SIGALRM, previous)
        grader.server.send_signal(signal.SIGCONT)
    assert not signs


def send_signals(pids) -> None:
    for number in (signal.SIGINT, signal.SIGTERM) * 3:
        time.sleep(0.1)
        for pid in pids:
            os.kill(pid, number)


def test_signals_to_every_process_cost_no_score(trouble, make_grader, capfd):
    grader = make_grader(trouble)
    workers = worker_pids(grader)
    thread = threading.Thread(target=send_signals, args=[(grader.server.pid, *workers)])
    thread.start()
    assert results(grader, ["waits"] * 10) == [(float(i), "") for i in range(10)]
    thread.join()
    assert worker_pids(grader) <= workers
    assert capfd.readouterr().err == ""


# ---- the end of the processes --------------------------------------------------------------------

TRAINER = """
import sys
from types import SimpleNamespace
from support.grader import Grader
reward, response = sys.argv[1:]
limits = dict(reward_timeout=600, reward_memory_gib=0)
grader = Grader(SimpleNamespace(reward=reward, reward_workers=2, **limits))
grader(["fine"], [{"answer": 1}])
print(grader.server.pid, flush=True)
if response:
    grader([response], [{}])
else:
    input()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize("kind", ["idle", "computes", "family"])
def test_no_process_outlives_a_killed_trainer(kind, trouble, tmp_path):
    responses = {"idle": "", "computes": "computes", "family": f"family {tmp_path}/pids"}
    command = [sys.executable, "-c", TRAINER, trouble, responses[kind]]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    trainer = subprocess.Popen(command, cwd=ROOT, **pipes)
    server = int(trainer.stdout.readline())
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    assert len(children) == 2
    family = ""
    if kind == "family":
        assert wait_until((tmp_path / "pids").exists)
        family = wait_until((tmp_path / "pids").read_text)
    else:
        time.sleep(0.5)  # the reward has begun
    pids = [server, *map(int, children), *map(int, family.split())]
    assert all(map(is_alive, pids))
    trainer.kill()
    trainer.communicate()
    assert all_end(pids), [pid for pid in pids if is_alive(pid)]


def test_killed_server_is_one_message(trouble, make_grader):
    grader = make_grader(trouble)
    workers = worker_pids(grader)
    grader.server.kill()
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match="my_reward.py:trouble: the grading server has ended"
        ):
            grader(["fine"], ROWS[:1])
    assert all_end(workers)


def test_reward_file_that_has_gone_is_one_message(tmp_path, make_grader):
    grader = make_grader(f"{tmp_path}/gone.py:f")
    with pytest.raises(
        RuntimeError, match="gone.py:f: the grading server failed: neither math nor"
    ):
        grader(["fine"], ROWS[:1])


def test_closed_grader_leaves_no_process(trouble, make_grader):
    grader = make_grader(trouble)
    pids = {grader.server.pid, *worker_pids(grader)}
    holder = os.fork()  # a child that holds the pipe open
    if not holder:
        time.sleep(30)
        os._exit(0)
    grader.close()
    grader.close()  # a second time does no harm
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert not any(map(is_alive, pids))
    with pytest.raises(RuntimeError):
        grader(["fine"], ROWS[:1])


def test_interrupted_grader_never_returns_the_grades_of_another_call(trouble, make_grader):
    grader = make_grader(trouble, workers=1)
    grader(["fine"], ROWS[:1])
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            grader(["hangs"], ROWS[:1])
    finally:
        signal.signal(signal.SIGALRM, previous)
    with pytest.raises(RuntimeError):
        grader(["fine"], ROWS[5:6])


# ---- loading -------------------------------------------------------------------------------------

BAD_FILES = {  # content: words that the message must contain
    "def f(:": "SyntaxError",
    "import nothing_of_that_name": "ModuleNotFoundError nothing_of_that_name",
    "import sys; sys.exit(3)": "SystemExit 3",
    "raise ValueError('x')": "ValueError: x (bad.py:1)",
    "f = 5": "no function 'f'",
    "def g(r, w): 0": "no function 'f'",
    "def f(response): 0": "f(response) (response, row)",
    "def f(a, b, c): 0": "f(a, b, c) (response, row) 'c'",
    "async def f(r, w): return 1": "async",
    "def f(r, w): yield 1": "generator",
    "def f(*, r, w): 0": "f(*, r, w) must take",
}


@pytest.mark.parametrize("content", BAD_FILES)
def test_bad_reward_file_is_one_message(content, tmp_path):
    (tmp_path / "bad.py").write_text(content)
    with pytest.raises(UserError) as error:
        load_reward(f"{tmp_path}/bad.py:f")
    for word in f"--reward {tmp_path}/bad.py:f {BAD_FILES[content]}".split():
        assert word in str(error.value)


GOOD_FILE = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class C:
    x: int = 1
    def __call__(self, response, row):
        return 2

def f(response, row, extra=3):
    return extra

def g(*args, **kwargs):
    return 4

h = C()
"""


@pytest.mark.parametrize("name, score", [("f", 3), ("g", 4), ("h", 2)])
def test_functions_and_callable_objects_load(name, score, tmp_path):
    (tmp_path / "good.py").write_text(GOOD_FILE)
    assert load_reward(f"{tmp_path}/good.py:{name}")("", {}) == score


def test_reward_imports_the_files_beside_it(tmp_path, make_grader, monkeypatch):
    """At the end of the path: a json.py beside it hides nothing."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "beside_the_reward.py").write_text("value = 3.0\n")
    code = "import beside_the_reward\ndef f(response, row):\n    import json\n"
    (tmp_path / "good.py").write_text(code + "    return beside_the_reward.value\n")
    (tmp_path / "json.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    grader = make_grader("good.py:f")
    assert grader([""], [{}])[0][:2] == (3.0, "")


def test_built_in_rewards_load():
    assert load_reward("math") is math_reward
    assert load_reward("exact") is exact_reward


@pytest.mark.parametrize("spec", ["maths", "my_reward.py", "FOLDER/none.py:f", "FOLDER:f"])
def test_unknown_reward_is_one_message(spec, tmp_path):
    with pytest.raises(UserError, match="neither math nor exact"):
        load_reward(spec.replace("FOLDER", str(tmp_path)))
