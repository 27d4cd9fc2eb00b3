"""Processes that start in a moment: forks of a server that has imported the trainer.

A new interpreter spends ten seconds of one core on imports, and two ranks under torchrun spend
twice that. Tests of the launcher command, of imports and of the end of the interpreter start new
interpreters; all others start forks.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lite_ppo
from tests.world import ROOT, start_ranks

# isort: split
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.preloaded"])


class Fork:
    """work(*args) in a new process, with `argv` as its command line and its output in files."""

    def __init__(self, work: Callable, *args: Any, argv: Sequence[str] = (), **environment: str):
        self.args = args  # kept, because a lock is lost with its last owner
        self.files = tempfile.TemporaryDirectory(prefix="lite-ppo-fork-")
        settings = (self.files.name, argv, os.environ | environment)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(ROOT))  # the server does not know our sys.path
            forkserver.ensure_running()
        self.process = SERVER.Process(target=run_here, args=(settings, work, args))
        self.process.start()

    def read(self, name: str) -> str:
        """What it has printed so far: name is "out" or "err"."""
        file = Path(self.files.name, name)
        return file.read_text() if file.exists() else ""

    def wait(self, timeout: float = 120) -> SimpleNamespace:
        """Its exit code and what it has printed, as subprocess.run() returns them."""
        self.process.join(timeout)
        code = self.process.exitcode
        self.process.kill()  # if it has not ended
        assert code is not None, f"no end within {timeout} s: {self.read('err')[-6000:]}"
        return SimpleNamespace(returncode=code, stdout=self.read("out"), stderr=self.read("err"))


def run_here(settings: tuple, work: Callable, args: tuple) -> None:
    """In the fork: exit with the code that work(*args) returns."""
    folder, argv, environment = settings
    for name, standard in (("out", 1), ("err", 2)):
        file = os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, standard)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = argv
    sys.exit(work(*args))


# ---- what a fork can do --------------------------------------------------------------------------


def train_each(*configs: lite_ppo.Config) -> None:
    """Runs that follow one another."""
    start_ranks()
    for cfg in configs:
        lite_ppo.train(cfg)
    dist.destroy_process_group()  # else a rank waits for the other one at its exit


def run_script(path: Path, *argv: str, **environment: str) -> Fork:
    """A Python script with these arguments."""
    return Fork(run_file, str(path), argv=argv, **environment)


def run_file(path: str) -> None:
    sys.argv[0] = path
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")


def run_command(command: list[str], env: dict | None = None, **options) -> SimpleNamespace:
    """Stands in for subprocess.run() of a script, also of one under torchrun on two ranks."""
    if "torch.distributed.run" in command:
        script, *argv = command[5:]
        return two_ranks(run_file, script, argv=argv).wait()
    script, *argv = command[1:]
    return run_script(Path(script), *argv, **(env or {})).wait()


# ---- two ranks -----------------------------------------------------------------------------------


def two_ranks(
    work: Callable, *args: Any, argv: Sequence[str] = (), restarts: int = 0, turn: Any = None
) -> Fork:
    """work(*args) on two ranks, started, watched and ended by the agent that torchrun starts, too.

    turn: a lock; runs with the same lock follow one another.
    """
    turn = turn or contextlib.nullcontext()
    patience = dict(TORCH_ELASTIC_SHUTDOWN_TIMEOUT="5")  # seconds until SIGKILL follows SIGTERM
    return Fork(launch, work, args, restarts, turn, argv=argv, **patience)


def launch(work: Callable, args: tuple, restarts: int, turn: Any) -> None:
    """As `torchrun --standalone --nproc-per-node 2`. Raises an exception if a rank fails."""
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()),
        max_restarts=restarts,
        start_method="fork",
    )
    with turn:
        elastic_launch(settings, run_rank)(work, args)


def run_rank(work: Callable, args: tuple) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the handler of the launcher
    if code := work(*args):
        sys.exit(code)
