"""Fixtures of the session: the tiny world, and processes that run while other tests run.

Some tests run again in processes of their own: on two ranks, and with vLLM, which changes the
process that it runs in.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import faulty
from tests.forks import Fork
from tests.world import ROOT, command_line, make_world, missing_engine, start_ranks

ON_TWO_RANKS = [
    "test_update.py",
    "test_run.py::test_every_preset_runs[lite_ppo]",
    "test_faults.py::test_forgotten_sync_ends_the_run",
]
WITH_VLLM = ["test_run.py::test_every_preset_runs[grpo]", "test_samplers.py"]
SELECTED = ["-k", "preset or test_sampler_"]  # not all of test_samplers.py


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """The folder with the tiny world. Helpers share the folder of the process that starts them."""
    if "TEST_ROOT" in os.environ:
        return Path(os.environ["TEST_ROOT"])
    root = tmp_path_factory.mktemp("world")
    make_world(root)
    return root


@pytest.fixture(scope="session", autouse=True)
def ranks_and_helpers(request) -> None:
    """Start torch.distributed, and the helpers and faulty runs if a test needs them."""
    start_ranks()
    if reason := missing_engine():
        pytest.skip(reason)
    for name in ("helpers", "faulty_runs"):
        if any(name in item.fixturenames for item in request.session.items):
            request.getfixturevalue(name)


class Helpers:
    """Processes by name; a call waits for one and returns what it printed."""

    def __init__(self, root: Path):
        self.root = root
        self.processes: dict[str, subprocess.Popen] = {}

    def start(self, name: str, *arguments: str, engine: str = "transformers") -> None:
        """Run Python with these arguments."""
        environment = os.environ | {"TEST_ROOT": str(self.root), "TEST_ENGINE": engine}
        with open(self.root / name, "w") as output:
            self.processes[name] = subprocess.Popen(
                [sys.executable, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.root,
                env=environment,
            )

    def __call__(self, name: str) -> str:
        code = self.processes[name].wait(timeout=300)
        printed = (self.root / name).read_text()
        assert code == 0, printed[-8000:]
        return printed

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()  # torchrun passes the signal on to its ranks


def arguments_of(tests: list[str]) -> list[str]:
    paths = [str(ROOT / "tests" / test) for test in tests]
    return ["-m", "pytest", "-xqrs", "-p", "no:cacheprovider", *paths]


@pytest.fixture(scope="session")
def helpers(root):
    """helpers(name) waits for the process of this name and returns what it printed."""
    helpers = Helpers(root)
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    helpers.start("two_ranks", *launcher, *arguments_of(ON_TWO_RANKS))
    helpers.start("vllm", *arguments_of(WITH_VLLM), *SELECTED, engine="vllm")
    helpers.start("script", str(ROOT / "lite_ppo.py"), *command_line(root))
    yield helpers
    helpers.stop()


@pytest.fixture(scope="session")
def faulty_runs(root) -> Iterator[dict[str, Fork]]:
    """Runs on two ranks, each with a fault, by its name."""
    runs = faulty.start_all(root)
    yield runs
    for run in runs.values():
        run.process.terminate()  # the launcher passes the signal on to its ranks
