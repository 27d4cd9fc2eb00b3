r"""Rewards: who judges an answer, in processes that can be killed. Nothing here knows about learning.

A reward is a function (response: str, row: dict) -> float, where row is the data row with at least "problem" and "answer".
Model text is never evaluated as code, and no reward can stall a run or eat its memory: see Grader.

    trainer --batch of (response, row)--> judge --one response at a time--> workers, which run the reward
            <----- batch of verdicts -----       <-------- verdict --------

The judge is a process of its own: forking workers from one that holds CUDA, gloo or vLLM threads can dead-lock. It loads the reward
but never calls it, so nothing keeps it from killing a worker, not even a computation in C that no Python signal handler interrupts.
(Process pools of libraries kill one worker after the other, and only the worker: what a reward has started lives on.)
"""

import contextlib
import functools
import gc
import hashlib
import inspect
import logging
import math
import multiprocessing.connection as mp
import os
import re
import reprlib
import resource
import signal
import subprocess
import sys
import time
import types
from fractions import Fraction
from pathlib import Path
from typing import Callable

from data import Row, UserError

Reward = Callable[[str, Row], float]
Verdict = tuple[float, str]  # (score, ""), or (0, why there is none)
WARM_UP = [r"\frac{3}{4}", r"2\sqrt{3}", "x^2 + 1", "[0, 1)", r"10\%", r"\text{east}", "1,000", r"\infty", r"x^2 + \sqrt{2}", "(1, 2)", r"x \le \pi"]
LONGEST_ANSWER = 2000  # characters in the box; the longest gold answer of DeepMath (5,000 rows), GSM8K and MATH-500 has 161


# ---- the rewards -----------------------------------------------------------------------------------------------------


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`, braces balanced and white space stripped; None if there is none or it never ends."""
    start = text.rfind("\\boxed{")
    depth, begin = 1, start + len("\\boxed{")
    for brace in re.compile(r"[{}]").finditer(text, begin) if start >= 0 else ():
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[begin : brace.start()].strip()
    return None


@functools.cache
def _math_verify() -> Callable[[str, str], bool]:
    """Gold and answer -> whether math-verify takes them for the same; in it, sympy's `eval` is shut to all but numbers.

    sympy makes expressions of strings by `eval`, and gets the number tokens of an answer that way. The LaTeX grammar lets nothing else
    through; here that does not depend on a grammar.
    """
    import sympy.parsing.sympy_parser as sympy_parser
    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limit is off; the Grader has a better one
    box, parse_expr = [LatexExtractionConfig(boxed_match_priority=0)], sympy_parser.parse_expr
    harmless = re.compile(r"[A-Za-z]*|([\d.\s+\-*/()eE]|sqrt|exp|log|pi)*", re.ASCII)  # a name, or a number as sympy writes them

    def guarded(text, *args, **kwargs):
        if same.running and not harmless.fullmatch(text):
            raise ValueError("not a number")
        return parse_expr(text, *args, **kwargs)

    def same(gold: str, answer: str) -> bool:
        same.running = True
        try:
            return verify(*(parse(f"\\boxed{{{x}}}", box, parsing_timeout=None) for x in (gold, answer)), timeout_seconds=None)
        finally:
            same.running = False  # a reward of the user's may parse what it likes

    same.running, sympy_parser.parse_expr = False, guarded
    return same


def math_reward(response: str, row: Row) -> float:
    """1 if the last boxed answer equals row["answer"]: as a string, as a plain number, or by math-verify; else 0.

    An answer of more than LONGEST_ANSWER characters that is not the string itself is wrong: no problem asks for it, and the parser
    takes more than linear time.
    """
    answer, gold = last_boxed(response), row["answer"]
    if not answer or answer == gold or len(answer) > LONGEST_ANSWER:
        return float(answer == gold)
    if all(re.fullmatch(r"-?\d{1,30}(\.\d{1,30})?", x) for x in (answer, gold)):  # most answers; spares them the parser
        return float(Fraction(answer) == Fraction(gold))
    return float(_math_verify()(gold, answer))


def exact_reward(response: str, row: Row) -> float:
    """1 if the last boxed answer, or without a box the last line that is not empty, is row["answer"] to the letter."""
    answer = last_boxed(response)
    return float((response.strip().split("\n")[-1].strip() if answer is None else answer) == row["answer"])


def load_reward(spec: str) -> Reward:
    """math, exact, or FILE.py:FUNCTION; UserError if that is no function of (response, row)."""
    if spec in ("math", "exact"):
        return {"math": math_reward, "exact": exact_reward}[spec]
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not os.path.isfile(path):
        raise UserError(f"--reward {spec}: neither math nor exact nor an existing FILE.py:FUNCTION")
    module = sys.modules["reward_file"] = types.ModuleType("reward_file")  # where dataclasses and pickle look for it
    module.__file__ = path
    try:
        exec(compile(Path(path).read_bytes(), path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise UserError(f"--reward {spec}: {path} does not load: {_describe(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--reward {spec}: {path} has no function {name!r}")
    if any(test(function) for test in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)):
        raise UserError(f"--reward {spec}: {name} is async or a generator; a reward is a plain function that returns a number")
    try:
        inspect.signature(function).bind("response", {})
    except TypeError as error:
        raise UserError(f"--reward {spec}: {name}{inspect.signature(function)} must take (response, row): {error}") from None
    except ValueError:
        pass  # some built-in functions have no signature
    return function


def reward_id(spec: str) -> str:
    """math, exact, or a checksum of the file: an edited reward is another one."""
    path = spec.rpartition(":")[0]
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=6).hexdigest() if path else spec


# ---- a worker: one response at a time --------------------------------------------------------------------------------


def _describe(error: BaseException) -> str:
    """Type, message and place of an error in one printable line of at most 300 characters, whatever the error holds."""
    try:
        message = "".join(c if c.isprintable() else " " for c in str(error)[:1000])
    except Exception:
        message = "(its __str__ fails)"
    name = "MemoryError" if isinstance(error, MemoryError) else type(error).__name__[:60]  # the judge looks for it
    place, trace = "", error.__traceback__
    while trace:
        place, trace = f" ({os.path.basename(trace.tb_frame.f_code.co_filename)[:80]}:{trace.tb_lineno})", trace.tb_next
    return f"{name}: {' '.join(message.split())}"[: 300 - len(place)] + place


def _verdict(reward: Reward, response: str, row: Row) -> Verdict:
    """What the reward says, or why it says nothing; only plain short values, as anything else may not pickle."""
    try:
        value = reward(response, row)
    except BaseException as error:  # SystemExit too: whatever a reward may raise is reported with its response, never lost
        return 0.0, _describe(error)
    try:
        score = math.nan if isinstance(value, (str, bytes)) else float(value)  # bool, numpy and torch scalars are numbers
    except Exception:
        score = math.nan
    if math.isfinite(score):
        return score, ""
    try:
        shown = " ".join(reprlib.repr(value).split())[:100]
    except Exception:
        shown = "something"
    name, kind = getattr(reward, "__name__", "the reward")[:60], type(value).__name__[:60]
    return 0.0, f"{name} returned {shown} ({kind}), not a finite number; return one, such as 0.0 or 1.0"


def _work(pipe: mp.Connection, reward: Reward, timeout: float, memory_gib: float) -> None:
    """The life of a worker, until the judge is gone."""
    # What a reward forks must not inherit the judge's deafness to signals.
    os.register_at_fork(after_in_child=lambda: [signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGTERM)])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_gib:
        with contextlib.suppress(OSError, ValueError):  # macOS has neither /proc nor such a limit; a lower one may be in force
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + int(memory_gib * 2**30),) * 2)
    pid = os.getpid()
    while True:
        response, row = pipe.recv()
        signal.setitimer(signal.ITIMER_REAL, timeout + 5)  # ends this process if it hangs and the judge is no more
        verdict = _verdict(reward, response, row)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if os.getpid() != pid:
            return  # a process that the reward forked and forgot
        pipe.send(verdict)


class _Worker:
    """A worker as the judge sees it: its pipe (closed once it is dead), its job, and by when that must be done."""

    def __init__(self, inherited: list[mp.Connection], reward: Reward, timeout: float, memory_gib: float):
        self.timeout, self.job, self.began, self.deadline = timeout, None, 0.0, math.inf
        self.pipe, far = mp.Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setpgid(0, 0)  # a group of its own: what the reward starts is killed with it
                for pipe in (*inherited, self.pipe):
                    pipe.close()  # or a copy here would hide an end of file from its reader
                _work(far, reward, timeout, memory_gib)
            finally:
                os._exit(0)
        with contextlib.suppress(OSError):  # whoever comes first
            os.setpgid(self.pid, self.pid)
        far.close()

    def give(self, job: int, pair: tuple[str, Row]) -> None:
        self.pipe.send(pair)
        self.job, self.began = job, time.monotonic()
        self.deadline = self.began + self.timeout

    def listen(self, heard: bool) -> Verdict | None:
        """What has become of its job by now; kills it where it hung, died or filled its memory."""
        if heard:
            try:
                verdict = self.pipe.recv()
            except (EOFError, OSError):
                return 0.0, f"the worker process ended with {self.kill()}"
            if verdict[1].startswith("MemoryError"):
                self.kill()  # what filled it may still be there
            return verdict
        if time.monotonic() >= self.deadline:
            self.kill()
            return 0.0, f"no verdict within {self.timeout:g} s"
        return None

    def kill(self) -> str:
        """End it and all that it has started; returns how it ended."""
        for kill, target in (os.killpg, self.pid), (os.kill, self.pid):
            with contextlib.suppress(OSError):
                kill(target, signal.SIGKILL)
        self.pipe.close()
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.strsignal(-code)})"


# ---- the judge: a batch at a time ------------------------------------------------------------------------------------


def _serve(trainer: mp.Connection) -> None:
    """The life of the judge, until the trainer is gone. Replies to a batch with a list of (score, reason, seconds), or, where there
    can be no verdicts, with a string that says why."""
    for s in (signal.SIGINT, signal.SIGTERM):  # sent to every process at the end of a job; only the trainer decides what they mean
        signal.signal(s, lambda *_: None)  # unlike SIG_IGN, not inherited by programs that a reward starts
    parent, crew = os.getppid(), []
    spec, timeout, workers, memory_gib, sys.path[:] = trainer.recv()

    def hire() -> _Worker:
        return _Worker([trainer, *(worker.pipe for worker in crew)], reward, timeout, memory_gib)

    try:
        reward = load_reward(spec)
        if spec == "math":
            for answer in WARM_UP:  # what takes a second to import and to cache is there when a worker is forked
                reward(f"\\boxed{{{answer}}}", {"answer": r"\sqrt{3} + x^2"})
        gc.freeze()  # or every collection in a worker would copy the memory that it shares
        for _ in range(workers):
            crew.append(hire())
        batch, verdicts, given = [], {}, 0
        while os.getppid() == parent:  # the end of file may stay away: a child of the trainer's can hold the pipe open
            for worker in crew:
                if worker.job is None and given < len(batch):
                    with contextlib.suppress(OSError):  # it died idle, which is heard below
                        worker.give(given, batch[given])
                        given += 1
            patience = min(worker.deadline for worker in crew) - time.monotonic()
            heard = mp.wait([trainer, *(worker.pipe for worker in crew)], max(0, min(1, patience)))
            for i, worker in enumerate(crew):
                verdict = worker.listen(worker.pipe in heard)
                if verdict and worker.job is not None:
                    verdicts[worker.job] = (*verdict, time.monotonic() - worker.began)
                    worker.job, worker.deadline = None, math.inf
                if worker.pipe.closed:
                    crew[i] = hire()
            if batch and len(verdicts) == len(batch):
                trainer.send([verdicts[i] for i in range(len(batch))])
                batch = []
            if trainer in heard:
                batch, verdicts, given = trainer.recv(), {}, 0
                if batch is None:
                    return
    except (EOFError, BrokenPipeError):  # the trainer is gone
        pass
    except Exception as error:
        trainer.send(str(error) if isinstance(error, UserError) else _describe(error))
    finally:
        for worker in crew:
            if not worker.pipe.closed:
                worker.kill()


class Grader:
    """Runs a reward in worker processes with limits; whatever one response does to its worker costs no other response its verdict.

    reward: see load_reward. A file is loaded once, in a process from which the workers are forked: later changes do not reach a run, and
        threads, connections and CUDA must wait for the first call.
    timeout: seconds for one response. Then its worker is killed (SIGKILL, with all processes that it has started) and replaced.
    memory_gib: address space that a worker may map on top of what loading the reward takes; 0 = no limit. Beyond it the reward gets a
        MemoryError, or dies, and its worker is replaced. Linux only. CUDA maps far more than it uses: such a reward needs 0.
    The processes end with close(), or as soon as this process has ended, however it has.
    """

    def __init__(self, reward: str, timeout: float, workers: int, memory_gib: float = 4.0):
        path, colon, name = reward.rpartition(":")
        self.reward, self.seconds = reward, []  # of the last batch
        self.pipe, far = mp.Pipe()
        self.judge = subprocess.Popen(
            [sys.executable, "-u", os.path.abspath(__file__), str(far.fileno())], pass_fds=[far.fileno()], stdin=subprocess.DEVNULL,
            start_new_session=True,  # out of reach of the terminal's Ctrl-C: the last batch still gets its verdicts
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # the workers are the parallelism
        )  # fmt: skip
        far.close()
        self.pipe.send(((path and os.path.abspath(path)) + colon + name, timeout, workers, memory_gib, sys.path))

    def __call__(self, responses: list[str], rows: list[Row]) -> list[Verdict]:
        """(score, "") for each response, in order; (0, reason) where the reward hung, raised, died or returned no finite number.

        `seconds` then holds what each verdict took. RuntimeError if there can be no verdicts: the reward does not load any more, or
        somebody else has killed the processes.
        """
        if not responses:
            return []
        with contextlib.suppress(OSError):  # it has ended; its last words may say why
            self.pipe.send(list(zip(responses, rows, strict=True)))
        try:
            verdicts = self.pipe.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"--reward {self.reward}: the process that runs the workers has died (see above)") from None
        except BaseException:  # interrupted: the answer to this call must not become the answer to the next
            self.pipe.close()
            raise
        if isinstance(verdicts, str):
            raise RuntimeError(f"--reward {self.reward}: no verdicts: {verdicts}")
        self.seconds = [seconds for _, _, seconds in verdicts]
        return [(score, reason) for score, reason, _ in verdicts]

    def close(self) -> None:
        """End all processes; nothing can be graded any more."""
        with contextlib.suppress(OSError):
            self.pipe.send(None)  # the end of file alone may stay away, see _serve
        self.pipe.close()
        self.judge.wait()


if __name__ == "__main__":
    _serve(mp.Connection(int(sys.argv[1])))
