"""The grading server: a process that runs a reward in worker processes.

    python -m support.grading_server PIPE    # started by grader.py

The server loads the reward and forks the workers. It never calls the reward itself. So it can kill
a worker at any time, even inside a computation in C, where no Python signal handler runs. Process
pools of libraries kill workers one at a time, and never the processes that a reward has started.

This file imports neither torch nor transformers, so that the server starts fast and stays small.
"""

import contextlib
import gc
import math
import multiprocessing.connection as mp
import os
import reprlib
import resource
import signal
import sys
import time
from pathlib import Path

from support.columns import Row
from support.errors import UserError
from support.grader import Grade, Limits
from support.rewards import Reward, describe_error, load_reward, math_reward

# The trainer computes in float32, at most 3.4e38. With this limit the sum of 2^20 scores is finite
# there for every --reward-low (2^31 at most): 1e20 * 2^31 * 2^20 = 2.3e35.
LARGEST_SCORE = 1e20
WARM_UP_ANSWERS = [
    r"\frac{3}{4}",
    r"2\sqrt{3}",
    "x^2 + 1",
    "[0, 1)",
    r"10\%",
    r"\text{east}",
    "1,000",
    r"\infty",
    r"x^2 + \sqrt{2}",
    "(1, 2)",
    r"x \le \pi",
]

# ---- a worker process ----------------------------------------------------------------------------


def describe_value(value: object) -> str:
    """A value and its type in one short line. It never raises."""
    try:
        shown = " ".join(reprlib.repr(value).split())[:100]
    except Exception:
        shown = "something"
    return f"{shown} ({type(value).__name__[:60]})"


def call_reward(reward: Reward, response: str, row: Row) -> tuple[float, str]:
    """(score, ""), or (0, reason) if the reward raises or returns no usable number.

    The number must be finite and at most LARGEST_SCORE in size. Both are plain values, because
    others might not pickle.
    """
    try:
        value = reward(response, row)
    except BaseException as error:  # also SystemExit
        return 0.0, describe_error(error)
    score = to_float(value)
    if abs(score) <= LARGEST_SCORE:
        return score, ""
    name = getattr(reward, "__name__", "the reward")[:60]
    limit = f" of at most {LARGEST_SCORE:g} in size" if math.isfinite(score) else ""
    shown = f"{describe_value(value)}, not a finite number{limit}"
    return 0.0, f"{name} returned {shown}; return one, such as 0.0 or 1.0"


def to_float(value: object) -> float:
    """A bool, a number, or a scalar of numpy or torch as a float; NaN for anything else."""
    if isinstance(value, (str, bytes)):
        return math.nan
    try:
        return float(value)
    except Exception:
        return math.nan


def run_worker(pipe: mp.Connection, reward: Reward, limits: Limits) -> None:
    """Receive responses and send back (score, reason), until the server closes the pipe."""
    # The server ignores signals. Anything that a reward forks handles them by default again.
    os.register_at_fork(after_in_child=restore_signals)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core dumps
    if limits.memory_gib:
        limit_memory(limits.memory_gib)
    pid = os.getpid()
    while True:
        response, row = pipe.recv()
        # The alarm ends this process if the reward hangs and the server is dead.
        signal.setitimer(signal.ITIMER_REAL, limits.timeout + 5)
        result = call_reward(reward, response, row)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if os.getpid() != pid:
            return  # a process that the reward forked, and that returned from the reward as well
        pipe.send(result)


def restore_signals() -> None:
    """The default handlers for SIGINT and SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def limit_memory(gib: float) -> None:
    """Limit the address space of this process to its present size plus `gib`. Linux only."""
    # macOS has neither /proc nor such a limit. A lower limit may already be set.
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + int(gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


# ---- the server process --------------------------------------------------------------------------


class Worker:
    """A worker process as the server sees it. Its pipe is closed when it is dead."""

    def __init__(self, inherited: list[mp.Connection], reward: Reward, limits: Limits):
        """Fork the process. inherited: pipes of the server that the worker must close."""
        self.timeout = limits.timeout
        self.job: int | None = None  # index of the response in the batch
        self.began = 0.0
        self.deadline = math.inf  # then the worker is killed
        self.pipe, far_end = mp.Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setpgid(0, 0)  # a process group: what the reward starts is killed with it
                for pipe in (*inherited, self.pipe):
                    pipe.close()  # an open copy would hide EOF from the reader
                run_worker(far_end, reward, limits)
            finally:
                os._exit(0)
        with contextlib.suppress(OSError):  # parent and child both call it: one of them is first
            os.setpgid(self.pid, self.pid)
        far_end.close()

    def send(self, job: int, pair: tuple[str, Row]) -> None:
        """Start a response. OSError if the worker has died."""
        self.pipe.send(pair)
        self.job = job
        self.began = time.monotonic()
        self.deadline = self.began + self.timeout

    def poll(self, readable: bool) -> tuple[float, str] | None:
        """The result of the response, or None if it is still running.

        readable: whether the pipe holds a message or EOF. Kills the worker if it is late, has
        died, or has run out of memory.
        """
        if readable:
            try:
                result = self.pipe.recv()
            except (EOFError, OSError):
                return 0.0, f"the worker process ended with {self.kill()}"
            if result[1].startswith("MemoryError"):
                self.kill()  # the memory may still be in use
            return result
        if time.monotonic() >= self.deadline:
            self.kill()
            return 0.0, f"no score within {self.timeout:g} s (--reward-timeout)"
        return None

    def kill(self) -> str:
        """End the process and everything it has started. Returns how it ended."""
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)
        self.pipe.close()
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if code >= 0:
            return f"exit code {code}"
        return f"signal {-code} ({signal.strsignal(-code)})"


class Server:
    """Distributes a batch over the workers, and replaces workers that were killed."""

    def __init__(self, trainer: mp.Connection, parent: int, reward: Reward, limits: Limits):
        self.trainer = trainer
        self.parent = parent  # process id of the trainer
        self.reward = reward
        self.limits = limits
        self.workers: list[Worker] = []
        self.start_batch([])

    def start_batch(self, batch: list[tuple[str, Row]]) -> None:
        """Begin to grade (response, row) pairs."""
        self.batch = batch
        self.grades: dict[int, Grade] = {}  # by index of the response
        self.sent = 0  # responses that workers have received
        self.reported = time.monotonic()  # time of the last message to the trainer

    def start_worker(self) -> Worker:
        """Fork a worker."""
        return Worker([self.trainer, *self.worker_pipes()], self.reward, self.limits)

    def worker_pipes(self) -> list[mp.Connection]:
        """The pipes of all workers."""
        return [worker.pipe for worker in self.workers]

    def run(self, count: int) -> None:
        """Grade batches with `count` workers, until the trainer sends None or has ended."""
        for _ in range(count):
            self.workers.append(self.start_worker())
        # EOF may never arrive: another child of the trainer can hold the pipe open.
        while os.getppid() == self.parent:
            self.send_responses()
            deadline = min(worker.deadline for worker in self.workers)
            patience = max(0, min(1, deadline - time.monotonic()))
            readable = mp.wait([self.trainer, *self.worker_pipes()], patience)
            self.collect_grades(readable)
            if self.batch and len(self.grades) == len(self.batch):
                self.trainer.send([self.grades[i] for i in range(len(self.batch))])
                self.start_batch([])
            self.report()
            if self.trainer in readable:
                batch = self.trainer.recv()
                if batch is None:
                    return
                self.start_batch(batch)

    def report(self) -> None:
        """Once a second during a batch, send the trainer a sign of life, which is None.

        The same loop ends rewards that hang. So the number of responses bounds the time of a batch.
        """
        if self.batch and time.monotonic() - self.reported >= 1:
            self.trainer.send(None)
            self.reported = time.monotonic()

    def send_responses(self) -> None:
        """Give each idle worker a response."""
        for worker in self.workers:
            if worker.job is None and self.sent < len(self.batch):
                with contextlib.suppress(OSError):  # it died idle: collect_grades() replaces it
                    worker.send(self.sent, self.batch[self.sent])
                    self.sent += 1

    def collect_grades(self, readable: list[mp.Connection]) -> None:
        """Take the results of the workers, and replace the workers that are dead."""
        for i, worker in enumerate(self.workers):
            result = worker.poll(worker.pipe in readable)
            if result and worker.job is not None:
                self.grades[worker.job] = Grade(*result, time.monotonic() - worker.began)
                worker.job = None
                worker.deadline = math.inf
            if worker.pipe.closed:
                self.workers[i] = self.start_worker()

    def close(self) -> None:
        """Kill all workers."""
        for worker in self.workers:
            if not worker.pipe.closed:
                worker.kill()


def serve(trainer: mp.Connection) -> None:
    """The main function of the server process.

    Replies to a batch with None once a second, and at the end with a list of Grades. If the reward
    does not load, sends the reason as a string.
    """
    parent = os.getppid()
    # Ctrl-C, or the end of a job, sends a signal to every process. Only the trainer handles it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ignore_signal)
    spec, limits, count, sys.path[:] = trainer.recv()
    server = None
    try:
        reward = load_reward(spec)
        if reward is math_reward:
            for answer in WARM_UP_ANSWERS:  # the workers inherit all imports and caches
                reward(f"\\boxed{{{answer}}}", {"answer": r"\sqrt{3} + x^2"})
        gc.freeze()  # a collection in a worker would copy the memory that it shares
        server = Server(trainer, parent, reward, limits)
        server.run(count)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the trainer has ended
        pass
    except UserError as error:
        trainer.send(str(error).removeprefix(f"--reward {spec}: "))
    except Exception as error:
        trainer.send(describe_error(error))
    finally:
        if server:
            server.close()


def ignore_signal(number: int, frame: object) -> None:
    """A handler and not SIG_IGN, which programs that a reward starts would inherit."""


if __name__ == "__main__":
    serve(mp.Connection(int(sys.argv[1])))
