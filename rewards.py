"""Rewards: who judges an answer, in processes that can be killed. Nothing here knows about learning.

A reward is a function (response: str, row: dict) -> float, where row is the data row with at least "problem" and "answer".
Model text is never evaluated as code, and no reward can stall a run: see Grader.
"""

import importlib.util
import logging
import math
import multiprocessing
import os
import re
from fractions import Fraction
from pathlib import Path
from typing import Callable

from data import Row, UserError

Reward = Callable[[str, Row], float]


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`, braces balanced and white space stripped; None if there is none or it never ends."""
    start = text.rfind("\\boxed{")
    depth, begin = 1, start + len("\\boxed{")
    for end in range(begin, len(text)) if start >= 0 else ():
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[begin:end].strip()
    return None


def math_reward(response: str, row: Row) -> float:
    """1 if the last boxed answer equals row["answer"]: as a string, as a plain number, or by math-verify; else 0."""
    answer, gold = last_boxed(response), row["answer"]
    if not answer or answer == gold:
        return float(answer == gold)
    if all(re.fullmatch(r"-?\d{1,30}(\.\d{1,30})?", x) for x in (answer, gold)):  # most answers; spares them the parser
        return float(Fraction(answer) == Fraction(gold))
    from math_verify import LatexExtractionConfig, parse, verify

    # Time limits are the Grader's business: it can kill, and signals do not reach every kind of hang.
    box = [LatexExtractionConfig(boxed_match_priority=0)]
    gold, answer = (parse(f"\\boxed{{{x}}}", box, parsing_timeout=None) for x in (gold, answer))
    return float(verify(gold, answer, timeout_seconds=None))


def exact_reward(response: str, row: Row) -> float:
    """1 if the last boxed answer, or without a box the last line that is not empty, is row["answer"] to the letter."""
    answer = last_boxed(response)
    return float((response.strip().split("\n")[-1].strip() if answer is None else answer) == row["answer"])


def load_reward(spec: str) -> Reward:
    """math, exact, or FILE.py:FUNCTION."""
    if spec in ("math", "exact"):
        return {"math": math_reward, "exact": exact_reward}[spec]
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise UserError(f"--reward {spec}: neither math nor exact nor an existing FILE.py:FUNCTION")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--reward {spec}: {path} does not load: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"--reward {spec}: {path} has no function {name!r}")
    return getattr(module, name)


def _start_worker(spec: str) -> None:
    global _reward  # of this worker process
    _reward = load_reward(spec)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off


def _grade(response: str, row: Row) -> float:
    score = float(_reward(response, row))
    if not math.isfinite(score):
        raise ValueError(f"the reward function returned {score}, not a finite number")
    return score


class Grader:
    """Runs a reward in worker processes, which are killed and replaced when a response takes them longer than `timeout` seconds.

    They come from a fork server, a clean process: forking one that holds CUDA, gloo or vLLM threads can dead-lock.
    """

    def __init__(self, reward: str, timeout: float, workers: int):
        from pebble import ProcessPool

        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "math_verify"])  # imported once, shared by all workers
        self.timeout = timeout
        self.pool = ProcessPool(workers, initializer=_start_worker, initargs=(os.path.abspath(reward) if ":" in reward else reward,), context=context)

    def __call__(self, responses: list[str], rows: list[Row]) -> list[tuple[float, str]]:
        """(score, "") for each response, in order; (0, reason) where the function hung, raised, or took its worker down."""
        jobs = [self.pool.schedule(_grade, args=pair, timeout=self.timeout) for pair in zip(responses, rows)]
        verdicts = []
        for job in jobs:
            try:
                verdicts.append((job.result(), ""))
            except TimeoutError:
                verdicts.append((0.0, f"no verdict within {self.timeout:g} s"))
            except Exception as error:  # whatever a reward may raise is reported with its response, never lost
                verdicts.append((0.0, f"{type(error).__name__}: {error}"))
        return verdicts

    def close(self) -> None:
        self.pool.stop()
        self.pool.join()
