"""Seconds and peak memory of named phases, and where this process is right now."""

import contextlib
import resource
import sys
import time
from collections import defaultdict

import torch


class Clock:
    """Seconds and peak memory (GiB) of named phases: `with clock("rollout"): ...`

    The class itself knows what this process is doing right now; the watchdog and every message about a failure ask it.
    """

    step, phase, ticks, since = 0, "start", 0, time.monotonic()  # of the process

    def __init__(self):
        self.start(0)

    def start(self, step: int) -> None:
        """A new step: nothing measured yet."""
        Clock.step = step
        self.seconds: dict[str, float] = defaultdict(float)
        self.memory: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, phase: str):
        outer, Clock.phase, start = Clock.phase, phase, time.perf_counter()
        Clock.tick()
        reset_peak_memory()
        yield  # an exception leaves the name of its phase behind, for the message
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - start
        self.memory[phase] = max(self.memory[phase], peak_memory())
        Clock.phase = outer
        Clock.tick()

    @classmethod
    def tick(cls) -> None:
        """The process has got on. Every rank ticks at the same places, so that ticks tell who is behind."""
        cls.ticks, cls.since = cls.ticks + 1, time.monotonic()

    @classmethod
    def where(cls) -> str:
        return f"step {cls.step}, {cls.phase}"


clock = Clock()


def reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # Linux only; elsewhere the peak is that of the whole run
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")


def peak_memory() -> float:
    """GiB: what torch held of this rank's GPU; without one, what this process held of the machine's memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    with contextlib.suppress(OSError):
        with open("/proc/self/status") as file:
            return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
