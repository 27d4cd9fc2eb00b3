"""Rewards and the processes that run them."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.fuzz_rewards import fuzz
from support import data, rewards

HERE = Path(__file__).parent.parent
REWARD = r"""
import os, signal, subprocess, sys, threading, time
class Mute(Exception):
    def __init__(self, text): super().__init__(text); self.unpicklable = lambda: None
    def __reduce__(self): raise TypeError("cannot be pickled")
    def __str__(self): raise ValueError("no text either")
class Odd(Exception):
    def __init__(self, two, values): super().__init__("two values")  # cannot be unpickled
def trouble(response, row):
    while response == "hangs": pass
    if response == "computes": return 9 ** 9 ** 9 ** 9  # no signal handler runs in there
    if response == "deaf":
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        for s in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM): signal.signal(s, signal.SIG_IGN)
        while True: time.sleep(1)
    if response == "thread":
        threading.Thread(target=time.sleep, args=(600,)).start(); time.sleep(600)
    if response.startswith("family"):
        child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
        fork = os.fork()
        if not fork: time.sleep(600)
        with open(response.split()[1], "w") as file: file.write(f"{os.getpid()} {child.pid} {fork}")
        time.sleep(600)
    if response == "forgets" and not os.fork(): return 99
    if response == "exits": os._exit(3)
    if response == "segfaults": os.kill(os.getpid(), signal.SIGSEGV)
    if response == "leaves": sys.exit("bye")
    if response == "raises": raise KeyError("no such thing")
    if response == "babbles": raise ValueError("a\nb\x1b[31m\x00" * 10**6)
    if response == "mute": raise Mute("")
    if response == "odd": raise Odd(1, 2)
    if response == "eats": return len([bytearray(2**26) for _ in range(10**4)])
    if response in ("waits", "pid"): time.sleep(0.2)
    values = {"nan": float("nan"), "inf": float("inf"), "none": None, "word": "seven", "digits": "7", "complex": 1j, "vast": 10**400, "list": [1.0] * 10**5,
              "lambda": lambda: 1, "true": True, "pid": os.getpid()}
    return values.get(response, float(row["answer"]))
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead but not yet buried does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX" if Path("/proc").exists() else True
    except (ProcessLookupError, FileNotFoundError):
        return False


def soon(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return met


@pytest.fixture
def trouble(tmp_path):
    (tmp_path / "my_reward.py").write_text(REWARD)
    return f"{tmp_path}/my_reward.py:trouble"


class Pairs(rewards.Grader):
    """A grader that returns (score, reason) and keeps the seconds."""

    def __call__(self, responses, rows):
        grades = super().__call__(responses, rows)
        self.seconds = [seconds for *_, seconds in grades]
        return [(score, reason) for score, reason, _ in grades]


@pytest.fixture
def graders():
    made = []


    def make(reward, timeout, workers, memory_gib=0.0):
        limits = dict(reward_timeout=timeout, reward_workers=workers, reward_memory_gib=memory_gib)
        made.append(Pairs(SimpleNamespace(reward=reward, **limits)))
        return made[-1]

    yield make
    for grader in made:
        grader.close()


ROWS = [{"problem": "", "answer": str(i)} for i in range(100)]


# ---- what is right ---------------------------------------------------------------------------------------------------


def test_boxes_and_rewards():
    for text, answer in {
        r"so \boxed{42}.": "42", r"\boxed{1} no, \boxed{ 2 }": "2", r"\boxed{\frac{1}{2}}": r"\frac{1}{2}", r"\boxed{\{1,\{2\}\}} q": r"\{1,\{2\}\}", "": None,
        r"\boxed{}": "", r"\boxed{1} then \boxed{2": None, r"\boxed 5": None, "42": None, r"\boxed{a}}": "a", r"\boxed{\boxed{3}}": "3",
    }.items():  # fmt: skip
        assert rewards.last_boxed(text) == answer
    for answer, gold, score in [
        ("42", "42", 1), ("0.5", r"\frac{1}{2}", 1), (r"\frac12", "0.5", 1), ("1,000", "1000", 1), ("42.0", "42", 1), ("-3", "-3", 1), ("(1, 2)", "(1,2)", 1),
        ("p-q", "p - q", 1), (r"x \in [0,1]", "[0,1]", 1), (r"2\sqrt{2}", r"\sqrt{8}", 1), ("43", "42", 0), ("3", "-3", 0), ("(2,1)", "(1,2)", 0),
        ("0.3333", r"\frac{1}{3}", 0), ("", "42", 0), ("x", "42", 0), (r"\frac{", "42", 0), ("12345678901234567890123", "12345678901234567890124", 0),
        ("1+" * 1500 + "1", "1+" * 1500 + "1", 1), ("1+" * 1500 + "1", "1501", 0),
    ]:  # fmt: skip
        assert rewards.math_reward(rf"\boxed{{7}}, no: \boxed{{{answer}}}.", {"answer": gold}) == score and rewards.math_reward(answer, {"answer": gold}) == 0
    for text, score in {r"\boxed{7}": 1, "so\n7\n": 1, "7": 1, "7.0": 0, r"\boxed{8}" + "\n7": 0, "": 0, "7\nor 8": 0}.items():
        assert rewards.exact_reward(text, {"answer": "7"}) == score


GOLDS = ["42", "-7", "0.25", r"\frac{3}{4}", r"\left( 3, \frac{\pi}{2} \right)", r"2\sqrt{3}", "p - q", "x^2 + 1", "[0, 1)", r"\{1, 2, 3\}", r"10\%",
         r"\text{east}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", "1,000", r"k \neq 1", r"\infty", r"90^\circ", "5"]  # fmt: skip


def test_gold_answers_are_graded_right(graders):
    grader = graders("math", 10.0, 2)
    for file in [None, *(HERE.parent / "shared" / "data").glob("*.jsonl")]:  # real data sets, where there are any
        golds = [row["answer"] for row in data.load_rows(str(file))] if file else GOLDS
        assert all(rewards.math_reward(f"\\boxed{{{gold}}}", {"answer": gold}) == 1 for gold in golds)
        few = golds[:: max(1, len(golds) // 100)]
        right = [score for score, _ in grader([f"\\boxed{{{gold}}}" for gold in few], [{"answer": gold + " "} for gold in few])]  # another string: math-verify
        wrong = [score for score, _ in grader([f"\\boxed{{{i + 1234567}}}" for i in range(len(few))], [{"answer": gold} for gold in few])]
        assert sum(right) >= 0.99 * len(right) and sum(wrong) == 0, (file, [gold for gold, score in zip(few, right) if score < 1])


# ---- hostile text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["\\boxed{" * 200_000, "\\boxed{" + "{" * 10**6, "\\boxed{" + "{}" * 500_000, "{" * 10**6, "}\\" * 500_000])
def test_megabytes_take_no_time(text):
    began = time.process_time()
    for closed in (text, text + "}"):
        assert rewards.math_reward(closed, {"answer": "1"}) == rewards.exact_reward(closed, {"answer": "1"}) == 0
    assert time.process_time() - began < 10


def test_no_text_reaches_eval(tmp_path):
    import sympy

    canary = tmp_path / "canary"
    code = f"__import__('pathlib').Path('{canary}').touch()"
    for answer in (code, f"\\text{{{code}}}", f"\\operatorname{{eval}}({code})", f"1e{code}", f"\\gcd({code},2)", f"x_{{{code}}}", f"\\max(1,{code})"):
        assert rewards.math_reward(f"\\boxed{{{answer}}}", {"answer": "5"}) == 0
    same = rewards._math_verify()
    same.running = True  # even if the grammar let it through
    try:
        for text in (code, "open(0)", "().__class__", "x.y", "exit()"):
            with pytest.raises(ValueError, match="not a number"):
                sympy.sympify(text)
        assert float(sympy.Number("1.5e3")) == 1500
    finally:
        same.running = False
    assert not canary.exists() and sympy.sympify("x**2").is_Pow  # elsewhere sympy is itself


def test_the_laws_hold_for_300_hostile_answers():
    figures = fuzz(300, timeout=2, workers=2, seed=1)
    broken = figures["broken"]
    assert [law for law in broken if not law.startswith(("memory", "leak") if sys.platform != "linux" else "memory")] == [], figures


# ---- hostile rewards -------------------------------------------------------------------------------------------------


def test_every_response_gets_its_own_verdict(trouble, graders):
    grader = graders(trouble, 30.0, 2, memory_gib=0.5)
    reasons = {
        "raises": "KeyError: 'no such thing' (my_reward.py:", "babbles": "ValueError: a b", "mute": "Mute: (its __str__ fails)", "odd": "Odd: two values", "leaves": "SystemExit: bye",
        "exits": "exit code 3", "segfaults": "signal 11", "nan": "trouble returned nan (float), not a finite number", "inf": "inf (float)",
        "none": "None (NoneType), not a finite number; return one, such as 0.0 or 1.0", "word": "'seven' (str)", "digits": "'7' (str)", "complex": "1j (complex)",
        "vast": "(int)", "list": "(list)", "lambda": "(function)",
    } | ({"eats": "MemoryError"} if sys.platform == "linux" else {})  # fmt: skip
    kinds = [kind for reason in reasons for kind in ("fine", reason)] * 2
    for _ in range(2):  # the second time with replaced workers
        for kind, row, (score, reason), seconds in zip(kinds, ROWS, grader(kinds, ROWS[: len(kinds)]), grader.seconds, strict=False):
            assert (score, reason) == (float(row["answer"]), "") if kind == "fine" else score == 0 and reasons[kind] in reason, (kind, score, reason)
            assert len(reason) <= 300 and (reason == "" or reason.isprintable()) and 0 <= seconds < 30
    assert grader(["true", "forgets", "fine", "fine"], ROWS[:4]) == [(1.0, ""), (1.0, ""), (2.0, ""), (3.0, "")] and grader([], []) == []


def test_scalars_of_numpy_and_torch_are_numbers(tmp_path, graders):
    (tmp_path / "scalars.py").write_text("import numpy, torch\ndef score(response, row): return eval(response)\n")
    values = ["numpy.float32(0.5)", "numpy.bool_(True)", "numpy.array([2.0])[0]", "torch.tensor(3)", "torch.tensor([4.0])", "torch.ones(2)", "numpy.nan"]
    verdicts = graders(f"{tmp_path}/scalars.py:score", 60.0, 1)(values, ROWS[:7])
    assert verdicts[:5] == [(0.5, ""), (1.0, ""), (2.0, ""), (3.0, ""), (4.0, "")] and all(s == 0 and "not a finite number" in r for s, r in verdicts[5:])


def test_what_hangs_is_killed_with_all_that_it_started(trouble, graders, tmp_path):
    grader = graders(trouble, 1.5, 2)
    kinds = ["fine", "hangs", "computes", "fine", "deaf", "thread", f"family {tmp_path}/pids", "fine"]
    grader(["fine"], ROWS[:1])
    began = time.monotonic()
    verdicts = grader(kinds, ROWS[:8])
    assert time.monotonic() - began < 20  # three in a row on each worker
    for i, (kind, (score, reason)) in enumerate(zip(kinds, verdicts)):
        assert (score, reason) == ((i, "") if kind == "fine" else (0, "no verdict within 1.5 s"))
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 3 and soon(lambda: not any(map(alive, pids)))
    assert grader(["fine"] * 10, ROWS[:10]) == [(float(i), "") for i in range(10)]  # the workers are back


def test_signals_to_everyone_cost_no_verdict(trouble, graders, capfd):
    grader = graders(trouble, 30.0, 2)
    workers = {int(pid) for pid, _ in grader(["pid"] * 4, ROWS[:4])}

    def storm():
        for s in (signal.SIGINT, signal.SIGTERM) * 3:
            time.sleep(0.1)
            for pid in (grader.judge.pid, *workers):
                os.kill(pid, s)
    thread = threading.Thread(target=storm)
    thread.start()
    assert grader(["waits"] * 10, ROWS[:10]) == [(float(i), "") for i in range(10)]
    thread.join()
    assert {int(pid) for pid, _ in grader(["pid"] * 4, ROWS[:4])} <= workers and capfd.readouterr().err == ""


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize("kind", ["idle", "computes", "family"])
def test_no_process_outlives_a_killed_trainer(kind, trouble, tmp_path):
    script = f"from types import SimpleNamespace; from support import rewards; g = rewards.Grader(SimpleNamespace(reward={trouble!r}, reward_timeout=600, reward_workers=2, reward_memory_gib=0)); g(['fine'], [{{'answer': 1}}]); print(g.judge.pid, flush=True)\n"
    script += {"idle": "input()", "computes": "g(['computes'], [{}])", "family": f"g(['family {tmp_path}/pids'], [{{}}])"}[kind]
    trainer = subprocess.Popen([sys.executable, "-c", script], cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    judge = int(trainer.stdout.readline())
    workers = [int(pid) for pid in Path(f"/proc/{judge}/task/{judge}/children").read_text().split()]
    family = soon((tmp_path / "pids").exists) and soon((tmp_path / "pids").read_text) if kind == "family" else time.sleep(0.5)
    pids = [judge, *workers, *map(int, (family or "").split())]
    assert len(workers) == 2 and all(map(alive, pids))
    trainer.kill()
    trainer.communicate()
    assert soon(lambda: not any(map(alive, pids))), [pid for pid in pids if alive(pid)]


def test_a_broken_grader_says_so_instead_of_hanging(trouble, tmp_path, graders, capfd):
    grader = graders(trouble, 30.0, 2)
    workers = {int(pid) for pid, _ in grader(["pid"] * 4, ROWS[:4])}
    grader.judge.kill()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="my_reward.py:trouble: the process that runs the workers has died"):
            grader(["fine"], ROWS[:1])
    assert soon(lambda: not any(map(alive, workers)))
    with pytest.raises(RuntimeError, match="gone.py:f: no verdicts: .* neither math nor exact"):
        graders(f"{tmp_path}/gone.py:f", 30.0, 1)(["fine"], ROWS[:1])


def test_a_closed_grader_is_gone_and_an_interrupted_one_never_mixes_verdicts_up(trouble, graders):
    grader = graders(trouble, 30.0, 2)
    workers = {int(pid) for pid, _ in grader(["pid"] * 4, ROWS[:4])}
    holder = os.fork()  # a child that holds the pipe open
    if not holder:
        time.sleep(30)
        os._exit(0)
    grader.close()
    grader.close()
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert not any(map(alive, (grader.judge.pid, *workers)))
    interrupted, standard = graders(trouble, 30.0, 1), signal.signal(signal.SIGALRM, signal.default_int_handler)
    interrupted(["fine"], ROWS[:1])
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    with pytest.raises(KeyboardInterrupt):
        interrupted(["hangs"], ROWS[:1])
    signal.signal(signal.SIGALRM, standard)
    for grader in (grader, interrupted):
        with pytest.raises(RuntimeError):
            grader(["fine"], ROWS[5:6])


@pytest.mark.parametrize("content,named", [  # what the file holds; what the message must name
    ("def f(:", "SyntaxError"), ("import nothing_of_that_name", "ModuleNotFoundError nothing_of_that_name"), ("import sys; sys.exit(3)", "SystemExit 3"),
    ("raise ValueError('x')", "ValueError: x (bad.py:1)"), ("f = 5", "no function 'f'"), ("def g(r, w): 0", "no function 'f'"), ("def f(response): 0", "f(response) (response, row)"),
    ("def f(a, b, c): 0", "f(a, b, c) (response, row) 'c'"), ("async def f(r, w): return 1", "async"), ("def f(r, w): yield 1", "generator"), ("def f(*, r, w): 0", "f(*, r, w) must take"),
])  # fmt: skip
def test_a_reward_that_is_none_is_refused_in_words(content, named, tmp_path):
    (tmp_path / "bad.py").write_text(content)
    with pytest.raises(data.UserError) as error:
        rewards.load_reward(f"{tmp_path}/bad.py:f")
    assert all(word in str(error.value) for word in f"--reward {tmp_path}/bad.py:f {named}".split()), error.value


def test_rewards_that_load(tmp_path):
    (tmp_path / "good.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass C:\n    x: int = 1\n    def __call__(self, response, row): return 2\n"
        "def f(response, row, extra=3): return extra\ndef g(*args, **kwargs): return 4\nh = C()\n"
    )
    assert [rewards.load_reward(f"{tmp_path}/good.py:{name}")("", {}) for name in "fgh"] == [3, 4, 2]
    assert rewards.load_reward("math") is rewards.math_reward and rewards.load_reward("exact") is rewards.exact_reward
    for spec in ("maths", "my_reward.py", f"{tmp_path}/none.py:f", f"{tmp_path}:f"):
        with pytest.raises(data.UserError, match="neither math nor exact"):
            rewards.load_reward(spec)
