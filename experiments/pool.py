"""Makes runs, several side by side.

A run is lite_ppo.py with flags. It is a fork of this process with one thread, or a command.
"""

import contextlib
import importlib
import json
import math
import multiprocessing as mp
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

# One thread per run: runs share the cores, and sums are the same on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from definitions import DEFINITIONS, OtherStd
from grid import Run
from records import HERE, record
from tqdm import tqdm

import lite_ppo
from support.checkpoints import checkpoints

PRELOADED = [  # slow imports that every fork would repeat
    "matplotlib.figure",
    "torch.utils.tensorboard",
    "transformers.models.qwen3.modeling_qwen3",
]


def preload() -> None:
    """Import slow packages once, before the forks."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def arguments(run: Run, folder: Path) -> list[str]:
    """The command line of a run."""
    return [*shlex.split(run.flags), "--seed", str(run.seed), "--output-dir", str(folder)]


def child(run: Run, folder: Path) -> None:
    """A run in a fork of this process. Its output goes to a file."""
    torch.set_num_threads(1)
    console = os.open(folder / "console", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(console, sys.stdout.fileno())
    os.dup2(console, sys.stderr.fileno())
    sys.argv = ["lite_ppo.py", *arguments(run, folder)]
    if run.setting in DEFINITIONS:
        OtherStd(lite_ppo, run.setting)
    sys.exit(lite_ppo.main())


def launched(command: list[str], console: Path) -> None:
    """A run as a command of its own. Its output goes to a file."""
    with open(console, "w") as file:
        done = subprocess.run(command, stdout=file, stderr=file)
    sys.exit(done.returncode)


LAST_LINES = 40  # of a failed run, which are kept


def last_lines(console: Path) -> list[str]:
    """The end of a run's output. Of a progress bar, only its last state."""
    text = console.read_text(errors="replace") if console.exists() else ""
    lines = [line.rsplit("\r", 1)[-1] for line in text.replace("\r\n", "\n").split("\n")]
    return [line[-300:] for line in lines if line.strip()][-LAST_LINES:] or ["no output"]


@dataclass
class Started:
    """A run in progress."""

    run: Run
    folder: Path
    process: mp.Process
    began: float


@dataclass
class Pool:
    """Runs side by side. Each finished run becomes a line of the results file."""

    results: Path
    folder: Path  # of the run directories
    jobs: int = 1
    launch: str = ""  # the command that starts a run; empty: fork this process
    keep: bool = False  # keep the run directories
    keep_models: bool = True  # and the weights in them
    flags: str = ""  # of every run: what does not change the result, such as paths
    stagger: float = 0  # seconds between two starts
    deadline: float = math.inf  # no run starts later

    def folder_of(self, run: Run) -> Path:
        """The directory of a run."""
        return self.folder / run.name.replace("/", "-").replace(" ", "_")

    def start(self, run: Run) -> Started:
        """Start a run in its directory."""
        folder = self.folder_of(run)
        if not self.keep:  # left by a grid that was killed
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        target, args = child, (run, folder)
        if self.launch:
            script = str(HERE.parent / "lite_ppo.py")
            flags = [*shlex.split(self.flags), *arguments(run, folder)]
            command = [*shlex.split(self.launch), script, *flags]
            target, args = launched, (command, folder / "console")
        process = mp.get_context("fork").Process(target=target, args=args)
        process.start()
        return Started(run, folder, process, time.time())

    def finish(self, started: Started) -> str:
        """Add the run to the results. Returns the failure in words, or nothing."""
        started.process.join()
        code, folder = started.process.exitcode, started.folder
        if code:
            return self.keep_reason(started)
        try:
            row = record(started.run, folder, time.time() - started.began)
        except (OSError, ValueError, KeyError, IndexError) as error:
            reason = f"{type(error).__name__}: {error}"
            return f"{started.run.name}: the logs in {folder} cannot be read: {reason}"
        with open(self.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if not self.keep:
            shutil.rmtree(folder)
        elif not self.keep_models:
            for weights in (folder / "final", *checkpoints(folder)):
                shutil.rmtree(weights, ignore_errors=True)
        return ""

    def keep_reason(self, started: Started) -> str:
        """Print and store the end of a failed run's output. Returns the failure in words."""
        lines = last_lines(started.folder / "console")
        kept = self.results.with_suffix("") / "failed" / f"{started.folder.name}.txt"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text("\n".join(lines) + "\n", encoding="utf-8")
        for line in lines:
            tqdm.write(f"    {line}")
        name, code = started.run.name, started.process.exitcode
        return f"{name}: exit code {code}, {lines[-1]} (log: {kept})"

    def run_all(self, runs: list[Run]) -> list[str]:
        """Make the runs, `jobs` at a time. Returns the failures in words."""
        waiting = runs[::-1]
        running: dict[int, Started] = {}
        failures = []
        with tqdm(total=len(runs), unit="run", dynamic_ncols=True, smoothing=0) as bar:
            while running or (waiting and time.time() < self.deadline):
                pause = None  # until a run ends
                if waiting and len(running) < self.jobs and time.time() < self.deadline:
                    started = self.start(waiting.pop())
                    running[started.process.sentinel] = started
                    pause = self.stagger
                for sentinel in wait(list(running), pause):
                    failure = self.finish(running.pop(sentinel))
                    bar.update()
                    if failure:
                        failures.append(failure)
                        tqdm.write(failure)
        return failures + [f"{run.name}: not started, the time is over" for run in waiting[::-1]]
