"""Seconds and peak memory of named phases, and what this process is doing right now."""

import contextlib
import resource
import sys
import time
from collections import defaultdict

import torch


class Clock:
    """Seconds and peak memory (GiB) of phases: `with clock("rollout"):` or `@clock("update")`.

    A process has one clock. The watchdog and all messages about failures read its step and phase.
    """

    def __init__(self):
        self.phase = "start"
        self.ticks = 0  # all ranks tick at the same points: the one with the fewest is behind
        self.signs = 0  # signs of life: ticks, and others that a rank has alone, such as its tokens
        self.since = time.monotonic()  # time of the last sign of life
        self.start(0)

    def start(self, step: int) -> None:
        """Begin a step: clear the measurements of the last one."""
        self.step = step
        self.seconds: dict[str, float] = defaultdict(float)
        self.memory: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, phase: str):
        """Measure a phase. Phases may be nested; the memory of the outer one is then incomplete."""
        outer = self.phase
        self.phase = phase
        self.tick()
        reset_peak_memory()
        start = time.perf_counter()
        yield  # after an exception the phase keeps its name, for the message
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - start
        self.memory[phase] = max(self.memory[phase], peak_memory())
        self.phase = outer
        self.tick()

    def tick(self) -> None:
        """Record progress that every rank makes."""
        self.ticks += 1
        self.alive()

    def alive(self) -> None:
        """Record a sign of life that other ranks may not have, such as a token."""
        self.signs += 1
        self.since = time.monotonic()

    def where(self) -> str:
        """The current step and phase, for messages."""
        return f"step {self.step}, {self.phase}"


clock = Clock()


def reset_peak_memory() -> None:
    """Let peak_memory() start again from the memory in use now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):  # not Linux: peak_memory() is then that of the whole run
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def peak_memory() -> float:
    """Peak memory in GiB: torch's allocator on a GPU, resident memory of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    with contextlib.suppress(OSError):
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith("VmHWM"))
            return int(line.split()[1]) / 2**20
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, others KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
