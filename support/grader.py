"""The grader: runs a reward on many responses, in processes that may be killed.

No reward can block a run or use up its memory, whatever a response makes it do.

    trainer --batch of (response, row)--> server --one response at a time--> workers, which run
            <----- batch of grades -----         <-------- grade --------    the reward
            <------ signs of life ------

The server (grading_server.py) is a process of its own, because a process that holds threads of
CUDA, gloo or vLLM must not fork: its children can dead-lock.
"""

import contextlib
import multiprocessing.connection as mp
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from support.columns import Row


class Grade(NamedTuple):
    """What a reward gives a response."""

    score: float  # 0 if there is none
    failure: str  # why there is no score, or ""
    seconds: float  # duration of the reward


class Limits(NamedTuple):
    """What a response may use."""

    timeout: float  # seconds per response
    memory_gib: float  # per worker; 0: no limit


def do_nothing() -> None:
    """For a caller that no watchdog watches."""


class Grader:
    """Runs a reward in worker processes with limits.

    Whatever one response does to its worker, all other responses get their scores. Reads these
    fields of cfg:

    reward: see load_reward. The server loads a file once and then forks the workers. So later
        changes of the file do not reach a run. A file must open threads, connections and CUDA
        inside the function, not when it is loaded.
    reward_timeout: seconds per response. Then the worker and all processes that it has started are
        killed (SIGKILL), and the worker is replaced.
    reward_memory_gib: address space that a worker may map in addition to that of the loaded
        reward; 0: no limit. Beyond it the reward gets a MemoryError or is killed, and the worker is
        replaced. Linux only. A reward that uses CUDA needs 0: CUDA maps far more than it uses.
    reward_workers: processes; 0: CPU cores / ranks of this machine, at most 8.

    alive() is called about once a second while responses are graded, unless the server hangs. The
    processes end with close(), or as soon as this process has ended for any reason.
    """

    def __init__(self, cfg, alive: Callable[[], None] = do_nothing):
        self.alive = alive
        self.reward = cfg.reward
        self.pipe, far_end = mp.Pipe()
        self.server = start_server(far_end)
        far_end.close()
        path, colon, name = cfg.reward.rpartition(":")
        if path:
            path = os.path.abspath(path)
        limits = Limits(cfg.reward_timeout, cfg.reward_memory_gib)
        count = cfg.reward_workers or default_workers()
        self.pipe.send((path + colon + name, limits, count, sys.path))

    def __call__(self, responses: list[str], rows: list[Row]) -> list[Grade]:
        """The grade of each response, in order.

        A response gets the score 0 and a reason if the reward hung, raised, died, or returned no
        finite number. RuntimeError if nothing can be graded: the reward no longer loads, or the
        server was killed.
        """
        if not responses:
            return []
        with contextlib.suppress(OSError):  # the server has ended; it may have sent the reason
            self.pipe.send(list(zip(responses, rows, strict=True)))
        try:
            while (grades := self.pipe.recv()) is None:
                self.alive()
        except (EOFError, OSError):
            raise RuntimeError(
                f"--reward {self.reward}: the grading server has ended unexpectedly; "
                "see its output above"
            ) from None
        except BaseException:  # interrupted: the next call must not receive these grades
            self.pipe.close()
            raise
        if isinstance(grades, str):
            raise RuntimeError(f"--reward {self.reward}: the grading server failed: {grades}")
        return grades

    def close(self) -> None:
        """End all processes. Nothing can be graded any more."""
        with contextlib.suppress(OSError):
            self.pipe.send(None)  # EOF alone may never arrive, see Server.run
        self.pipe.close()
        self.server.wait()


def start_server(pipe: mp.Connection) -> subprocess.Popen:
    """Start the server process at the other end of the pipe."""
    root = Path(__file__).parents[1]
    # -P: a file of the working directory must not shadow a module of the standard library.
    command = [sys.executable, "-P", "-u", "-m", "support.grading_server", str(pipe.fileno())]
    return subprocess.Popen(
        command,
        pass_fds=[pipe.fileno()],
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in the terminal does not reach it
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )


def default_workers() -> int:
    """CPU cores per rank of this machine, at least 1 and at most 8."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(8, os.cpu_count() // ranks))
