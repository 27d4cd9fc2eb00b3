"""Faults: signals, ranks that die or hang, full disks, numbers that are not finite, bad rewards.

The faults of other processes are in faulty.py. Those runs start with the session: conftest.py.
"""

import contextlib
import ctypes
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import lite_ppo
import tricks
from lite_ppo import make_micro_batch
from support import run, samplers, watchdog
from support.checkpoints import checkpoints
from support.clock import clock
from support.data import Problem
from support.errors import RunError, Stopped
from support.logs import Log
from support.metrics import NOT_FINITE, check_gap
from support.response import Response
from support.transformers_sampler import TransformersSampler
from tests import faulty
from tests.forks import Fork
from tests.test_config import call_main
from tests.test_run import rollout_scores
from tests.world import CPU, HERE, command_line, config, read

MEASURED = ("time/", "perf/", "memory/")  # metrics that differ from run to run


def steps_logged(folder: Path) -> list[int]:
    return [row["step"] for row in read(folder / "metrics.jsonl")]


def checkpoint_names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


# ---- a rank that fails, hangs or dies ------------------------------------------------------------


@pytest.mark.parametrize(
    "fault,messages",
    [
        ("hung", ["rank 1, step 1, rollout: no progress for --timeout-minutes"]),
        ("frozen", ["no progress for --timeout-minutes 0.3; rank 1 is behind, in step"]),
        ("dead", ["another rank has ended", "exitcode  : 7"]),
        ("failing", ["rank 1, step 1, step: ZeroDivisionError"]),
        ("memory", ["rank 1, step 1, update: out of memory; a lower --micro-batch-tokens"]),
        ("overflow", ["no finite gradient in 3 rollouts in a row", "every loss is finite"]),
    ],
)
def test_fault_of_a_rank_ends_the_run_with_its_name(fault, messages, faulty_runs):
    result = faulty_runs[fault].wait()
    assert result.returncode == 1, result.stderr[-6000:]
    for message in messages:
        assert message in result.stderr, result.stderr[-6000:]


def test_slow_rank_with_signs_of_life_is_no_fault(faulty_runs, root):
    """The other rank waits for it, longer than --timeout-minutes."""
    result = faulty_runs["slow"].wait()
    assert result.returncode == 0, result.stderr[-6000:]
    (row,) = read(root / "slow/metrics.jsonl")[1:]
    patience = 60 * float(faulty.FLAGS["slow"]["--timeout-minutes"]) + watchdog.Watchdog.GRACE
    assert row["time/step"] > patience


@pytest.mark.parametrize(
    "reports,alive",
    [
        pytest.param(["0 5 step 1, rollout", "0 6 step 1, rollout"], True, id="behind"),
        pytest.param(["0 5 step 1, rollout", "0 5 step 1, rollout"], False, id="behind, hung"),
        pytest.param(["99 5 step 1, reward", "99 6 step 1, reward"], False, id="not behind"),
        pytest.param(["99 5 step 0, start", "99 6 step 0, start"], True, id="start"),
        pytest.param(["99 5 step 0, start", "99 5 step 0, start"], False, id="start, hung"),
        pytest.param(["100 5 step 0, start", "100 6 step 0, start"], False, id="start, ahead"),
    ],
)
def test_only_signs_of_life_of_a_rank_behind_count(reports, alive, monkeypatch):
    """While a run starts, ranks wait at the same point for the one that downloads."""
    phase = "start" if "start" in reports[0] else "reward"
    monkeypatch.setattr(clock, "phase", phase)
    monkeypatch.setattr(clock, "ticks", 99)
    monkeypatch.setattr(clock, "signs", 0)
    monkeypatch.setattr(clock, "since", 0.0)
    store = dist.HashStore()
    watching = watchdog.Watchdog(60, rank=0, world=2, store=store)
    for report in reports:
        assert clock.since == 0
        store.set("lite_ppo/1", report)
        watching.look_at_ranks_behind()
    assert (clock.since > 0) == alive
    assert clock.signs == 0  # two ranks that wait must not count for each other


@pytest.mark.skipif(watchdog.bytes_moved() == 0, reason="the system does not count bytes")
@pytest.mark.parametrize("phase,size,alive", [("start", 2, 1), ("start", 0, 0), ("update", 2, 0)])
def test_load_is_a_sign_of_life_in_start_up(phase, size, alive, monkeypatch, tmp_path):
    """A download that was slow and healthy ended the run."""
    monkeypatch.setattr(clock, "phase", phase)
    found = watchdog.Watchdog(60, rank=0, world=1)
    found.moved = watchdog.bytes_moved()
    monkeypatch.setattr(clock, "signs", 0)
    monkeypatch.setattr(clock, "since", 0.0)
    (tmp_path / "file").write_bytes(bytes(size * 2**20))
    for _ in range(3):
        found.look_at_bytes()
    assert (clock.signs, clock.since > 0) == (alive, bool(alive))


def test_launcher_restarts_a_run_from_its_checkpoint(faulty_runs, root):
    folder = root / "dead once"
    result = faulty_runs["dead once"].wait()
    assert result.returncode == 0, result.stderr[-6000:]
    resumed = "resumed from .*/dead once/checkpoint-[12], [12] of 4 steps done"
    assert re.search(resumed, result.stdout), result.stdout
    assert steps_logged(folder) == list(range(5))
    assert (folder / "final").is_dir()


WATCHED = """
import threading
from datetime import timedelta
import torch.distributed as dist
from support import watchdog
from support.clock import clock

class SlowStore:
    store = dist.HashStore()
    asked = threading.Event()

    def set(self, key, value):
        self.asked.set()
        for _ in range(300):
            try:
                self.store.wait(["never"], timedelta(milliseconds=1))
            except dist.DistError:
                pass

clock.since -= 9999  # before the watchdog starts, so it does not count
watchdog.watch(60, 0, 2, SlowStore())
SlowStore.asked.wait()
"""


def test_watchdog_does_not_abort_a_process_that_ends():
    """A daemon thread in a C++ call would, when Python exits: exit code -6."""
    command = [sys.executable, "-c", WATCHED]
    result = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


# ---- signals -------------------------------------------------------------------------------------

SIGNALS = [signal.SIGTERM, signal.SIGINT]


def wait_for_steps(fork: Fork, folder: Path, count: int) -> None:
    log = folder / "metrics.jsonl"
    while fork.process.is_alive():
        if log.exists() and len(read(log)) >= count:
            return
        time.sleep(0.05)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_ends_a_run_with_a_checkpoint(number, root, monkeypatch, capfd):
    folder = root / f"signal-{number}"
    flags = {"--output-dir": str(folder), "--steps": "500", "--eval-every": "1"}
    fork = Fork(lite_ppo.main, argv=command_line(root, **flags))
    wait_for_steps(fork, folder, 3)
    os.kill(fork.process.pid, number)
    result = fork.wait(60)
    assert result.returncode == 128 + number, result.stderr
    assert "Traceback" not in result.stderr, result.stderr

    (checkpoint,) = checkpoints(folder)
    state = json.loads((checkpoint / "state.json").read_text())
    step = state["step"]
    assert step >= 2
    assert f"stopped by a signal after step {step}" in result.stdout
    logged = step + 1 if state["pending"] is None else step  # step 0 is logged, too
    assert steps_logged(folder) == list(range(logged))

    flags["--steps"] = str(step + 1)
    assert call_main(monkeypatch, command_line(root, **flags)) == 0
    assert f"resumed from {checkpoint}" in capfd.readouterr().out
    assert steps_logged(folder) == list(range(step + 2))


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_before_training_ends_the_process_at_once(number, root):
    fork = Fork(faulty.main, "slow start", argv=command_line(root))
    while fork.process.is_alive() and fork.read("out") != "loading\n":
        time.sleep(0.05)
    os.kill(fork.process.pid, number)
    result = fork.wait(20)
    assert result.returncode == -number, result.stderr
    assert "Traceback" not in result.stderr, result.stderr


class InterruptedEvaluation:
    """evaluate(), but a signal arrives in one step: before the work, or after it."""

    def __init__(self, step: int, after_work: bool):
        self.evaluate = lite_ppo.evaluate
        self.step = step
        self.after_work = after_work

    def __call__(self, *args):
        interrupted = clock.step == self.step
        if interrupted and not self.after_work:
            raise Stopped
        metrics = self.evaluate(*args)
        if interrupted:
            raise Stopped
        return metrics


def test_signal_during_an_evaluation_loses_nothing(root, monkeypatch):
    options = dict(steps=4, save_every=2, eval_every=1)
    expected = root / "calm"
    lite_ppo.train(config(root, output_dir=str(expected), **options))

    folder = root / "stopped"
    cfg = config(root, output_dir=str(folder), **options)
    with monkeypatch.context() as patch:
        patch.setattr(lite_ppo, "evaluate", InterruptedEvaluation(2, after_work=False))
        for _ in range(2):  # the second time while it repeats the evaluation
            with pytest.raises(Stopped):
                lite_ppo.train(cfg)
            state = json.loads((folder / "checkpoint-2/state.json").read_text())
            assert state["pending"]["policy/grad_norm"] > 0
            assert steps_logged(folder) == [0, 1]
    lite_ppo.train(cfg)
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert read(folder / file, *MEASURED) == read(expected / file, *MEASURED)
    assert checkpoint_names(folder) == ["checkpoint-2", "checkpoint-4"]
    assert not list(folder.glob("partial*"))


# ---- disks and logs that cannot be written -------------------------------------------------------


class FullDiskWriter(dcp.HuggingFaceStorageWriter):
    """Finds no space left for the checkpoints of these steps."""

    steps: list[int] = []

    def write_data(self, *args):
        if any(f"partial-{step}" in str(self.path) for step in self.steps):
            raise OSError(28, "No space left on device")
        return super().write_data(*args)


def full_host() -> int:
    """Bytes of free memory: checkpoints are not written in the background."""
    return 0


def empty_host() -> int:
    return 2**40


@pytest.mark.parametrize("background", [True, False])
def test_checkpoint_that_cannot_be_written_leaves_the_others(background, root, monkeypatch, capfd):
    folder = root / f"full-{background}"
    options = dict(output_dir=str(folder), save_every=1)
    monkeypatch.setattr("support.checkpoints.free_memory", [full_host, empty_host][background])
    monkeypatch.setattr(dcp, "HuggingFaceStorageWriter", FullDiskWriter)

    monkeypatch.setattr(FullDiskWriter, "steps", [2])
    lite_ppo.train(config(root, steps=3, **options))
    printed = capfd.readouterr().out
    assert printed.count("checkpoints are written while the training waits") == (not background)
    assert "warning: checkpoint-2 could not be written" in printed
    assert "No space left" in printed
    assert "newest complete one: checkpoint-1" in printed
    assert checkpoint_names(folder) == ["checkpoint-1", "checkpoint-3"]

    monkeypatch.setattr(FullDiskWriter, "steps", [4, 5])
    message = (
        "checkpoint-5 could not be written .*No space left.*"
        "newest complete one: checkpoint-3.*Make room"
    )
    with pytest.raises(RunError, match=message):
        lite_ppo.train(config(root, steps=6, **options))

    monkeypatch.setattr(FullDiskWriter, "steps", [])
    lite_ppo.train(config(root, steps=6, **options))
    assert steps_logged(folder) == list(range(7))
    assert not list(folder.glob("partial*"))


ROOM = 400_000  # bytes: enough for the logs, too little for a checkpoint


@contextlib.contextmanager
def little_room(folder: Path):
    """A disk that is nearly full; where none can be mounted, a limit on the size of a file."""
    if os.path.ismount(folder):
        with ballast(folder):
            yield
    else:
        with file_size_limit():
            yield


@contextlib.contextmanager
def ballast(folder: Path):
    free = shutil.disk_usage(folder).free
    (folder / "ballast").write_bytes(bytes(free - ROOM))
    yield
    (folder / "ballast").unlink()


@contextlib.contextmanager
def file_size_limit():
    """Python ignores the signal SIGXFSZ, so that the write fails."""
    limit, highest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, highest))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, highest))


@contextlib.contextmanager
def no_permission(folder: Path):
    """Nothing can be created in the folder, not even by root."""
    with contextlib.ExitStack() as held:
        if os.geteuid() == 0:
            held.enter_context(without_dac_override())
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(0o755)


CAPABILITY_VERSION_3 = 0x20080522
CAP_DAC_OVERRIDE = 1  # the right to ignore the permissions of files


@contextlib.contextmanager
def without_dac_override():
    """Drop the capability for this thread and those that it starts."""
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    before = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    less = (ctypes.c_uint32 * 6)(*before)
    less[0] &= ~(1 << CAP_DAC_OVERRIDE)  # effective capabilities
    assert libc.capset(header, less) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


@pytest.fixture
def disk(tmp_path) -> Path:
    """A folder on a file system of 16 MiB of its own, where one can be mounted."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(tmp_path)]
    mounted = False
    if shutil.which("mount"):
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    yield tmp_path
    if mounted:
        subprocess.run(["umount", "-l", tmp_path], check=True)


class TroubledLog(Log):
    """Trouble with the disk begins at step 2, before its metrics are written."""

    held: contextlib.ExitStack
    trouble: contextlib.AbstractContextManager

    def metrics(self, step, values):
        if step == 2:
            self.held.enter_context(self.trouble)
        return super().metrics(step, values)


REASONS = {  # trouble with a disk: a pattern of its messages
    little_room: "No space left on device|File too large|os error 28|os error 27",
    no_permission: "Permission denied",
}


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("trouble", REASONS)
def test_full_or_closed_disk_leaves_earlier_checkpoints(
    trouble, background, root, disk, monkeypatch, capfd
):
    reason = REASONS[trouble]
    cfg = config(root, output_dir=str(disk), save_every=1, steps=4)
    monkeypatch.setattr("support.checkpoints.free_memory", [full_host, empty_host][background])
    message = (
        f"(?s)checkpoint-3 could not be written.*({reason}).*"
        "newest complete one: checkpoint-1.*Make room or give write"
    )
    with monkeypatch.context() as patch, contextlib.ExitStack() as held:
        patch.setattr(TroubledLog, "held", held, raising=False)
        patch.setattr(TroubledLog, "trouble", trouble(disk), raising=False)
        patch.setattr(run, "Log", TroubledLog)
        with pytest.raises(RunError, match=message):
            lite_ppo.train(cfg)
    printed = capfd.readouterr().out
    assert "warning: checkpoint-2 could not be written" in printed
    assert re.search(reason, printed), printed
    assert checkpoint_names(disk) == ["checkpoint-1"]

    lite_ppo.train(cfg)
    assert f"resumed from {disk}/checkpoint-1, 1 of 4" in capfd.readouterr().out
    assert not list(disk.glob("partial*"))
    assert steps_logged(disk) == list(range(5))
    assert checkpoint_names(disk) == ["checkpoint-3", "checkpoint-4"]


class FullLog(Log):
    """Every write to metrics.jsonl fails from step 2 on."""

    def metrics(self, step, values):
        if step == 2:
            (self.folder / "metrics.jsonl").rename(self.folder / "kept")
            (self.folder / "metrics.jsonl").symlink_to("/dev/full")
        return super().metrics(step, values)


def test_log_that_cannot_be_written_is_one_message(root, monkeypatch, capfd):
    folder = root / "logless"
    flags = {"--output-dir": str(folder), "--steps": "3", "--save-every": "1"}
    with monkeypatch.context() as patch:
        patch.setattr(run, "Log", FullLog)
        assert call_main(patch, command_line(root, **flags)) == 1
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert "error: rank 0, step 2, " in error
    assert (
        "No space left on device; checkpoints are unchanged, "
        "and the same command resumes from the newest one"
    ) in error

    (folder / "kept").rename(folder / "metrics.jsonl")
    assert call_main(monkeypatch, command_line(root, **flags)) == 0
    assert f"resumed from {folder}/checkpoint-1" in capfd.readouterr().out
    assert steps_logged(folder) == [0, 1, 2, 3]


# ---- numbers that are not finite -----------------------------------------------------------------


class NanLosses:
    """clipped_surrogate(), but the first loss of some of the calls is NaN."""

    def __init__(self):
        self.clipped_surrogate = tricks.clipped_surrogate
        self.calls = 0

    def __call__(self, logprobs, *args) -> torch.Tensor:
        self.calls += 1
        losses = self.clipped_surrogate(logprobs, *args)
        if self.calls in (1, 9) or self.calls > 20:
            first = torch.arange(len(losses)) == 0
            losses = losses * torch.where(first, torch.nan, 1.0)
        return losses


def test_gradient_that_is_not_finite_is_skipped_and_soon_ends_the_run(root, monkeypatch, capfd):
    """Each step has two mini-batches of one micro-batch: two calls."""
    monkeypatch.setattr(tricks, "clipped_surrogate", NanLosses())
    folder = root / "not-finite"
    options = dict(steps=50, micro_batch_tokens=1000, samples_per_step=0)
    monkeypatch.setattr(run, "MAX_SKIPPED", 2)
    message = "no finite gradient in 2 rollouts in a row; responses .*samples.jsonl"
    with pytest.raises(RunError, match=message):
        lite_ppo.train(config(root, output_dir=str(folder), **options))
    skipped = [row["policy/skipped"] for row in read(folder / "metrics.jsonl")[1:]]
    assert skipped == [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 2]
    assert "NaN" not in (folder / "metrics.jsonl").read_text()
    warning = "step 1: 1 optimizer step(s) skipped, the gradient is not finite; responses ["
    assert warning in capfd.readouterr().out
    failures = {row["failure"] for row in read(folder / "samples.jsonl")}
    assert failures == {NOT_FINITE}


class NanLogprobs:
    """response_logprobs(), but those of response 3 are NaN in the second call."""

    def __init__(self):
        self.response_logprobs = lite_ppo.response_logprobs
        self.calls = 0

    def __call__(self, model, compiled, batch, temperature):
        self.calls += 1
        logprobs, entropy = self.response_logprobs(model, compiled, batch, temperature)
        sick = (batch.response_index == 3) & (self.calls == 2)
        return logprobs * torch.where(sick, torch.nan, 1.0), entropy


def test_log_probs_that_are_not_finite_do_not_count_as_stale_weights(root, monkeypatch, capfd):
    """Each step has one mini-batch of one micro-batch: one call."""
    monkeypatch.setattr(lite_ppo, "response_logprobs", NanLogprobs())
    folder = root / "nan-logprobs"
    options = dict(steps=3, minibatches=1, micro_batch_tokens=1000, samples_per_step=0)
    lite_ppo.train(config(root, output_dir=str(folder), **options))
    rows = read(folder / "metrics.jsonl")
    assert [row.get("policy/skipped") for row in rows] == [None, 0, 1, 0]
    for row in rows[1:]:
        assert row["rollout/logprob_gap_max"] < 1e-4
    warning = "step 2: 1 optimizer step(s) skipped, the gradient is not finite; responses [3] of"
    assert warning in capfd.readouterr().out


def test_log_probs_of_the_sampler_must_be_finite(root):
    token_ids = np.array([1])
    response = Response(Problem({}, [3]), token_ids, np.array([np.nan]), False, "", 0.0)
    batch = make_micro_batch([response], [0], torch.zeros(1), torch.zeros(1), CPU)
    batch.old_logprobs = torch.zeros(1)
    with pytest.raises(RunError, match="does not hold the trainer's weights"):
        check_gap([batch], config(root))


class ForgetfulSampler(TransformersSampler):
    """Takes the trainer's weights only once."""

    loaded = False

    def load_weights(self, weights):
        if not self.loaded:
            super().load_weights(weights)
        self.loaded = True


def test_forgotten_sync_ends_the_run(root, monkeypatch):
    monkeypatch.setattr(samplers, "TransformersSampler", ForgetfulSampler)
    message = (
        "differ by .* --max-logprob-gap 0.001. The sampler does not hold the trainer's weights"
    )
    with pytest.raises(RunError, match=message):
        lite_ppo.train(config(root, lr=1e-2, output_dir=f"{root}/forgotten-sync"))


# ---- rewards without a verdict -------------------------------------------------------------------

MOODY = """
def moody(response, row):
    fails = len(response) % 3 == 0 and row["answer"] == "2"
    return float("nan") if fails else 0.0
"""


def test_failed_rewards_of_an_evaluation_are_logged_once(root, tmp_path, monkeypatch, capfd):
    """Also when a signal comes between the evaluation of a step and its log line."""
    (tmp_path / "moody.py").write_text(MOODY)
    folder = root / "moody"
    cfg = config(
        root,
        reward=f"{tmp_path}/moody.py:moody",
        output_dir=str(folder),
        steps=2,
        save_every=1,
        eval_every=1,
        eval_samples=8,
        samples_per_step=0,
    )
    with monkeypatch.context() as patch:
        patch.setattr(lite_ppo, "evaluate", InterruptedEvaluation(1, after_work=True))
        with pytest.raises(Stopped):
            lite_ppo.train(cfg)
    lite_ppo.train(cfg)

    shares = [row["eval/dev/failed"] for row in read(folder / "metrics.jsonl")]
    assert max(shares) > 0
    logged = [row for row in read(folder / "samples.jsonl") if row.get("eval") == "dev"]
    for step in range(3):
        rows = [row for row in logged if row["step"] == step]
        assert len(rows) / 8 == shares[step]
    for row in logged:
        assert "not a finite number" in row["failure"]
        assert len(row["response"]) % 3 == 0
    warning = "of the responses to dev got no score and count as wrong; see samples.jsonl"
    assert warning in capfd.readouterr().out


FAILED = (0.0, "ValueError: x")  # score and reason
LATE = (0.0, "late")


def test_too_many_failed_rewards_end_the_run_with_the_reason():
    message = "no score for 4 of 4 responses.*50%.*ValueError.*x"
    with pytest.raises(RunError, match=message):
        rollout_scores([FAILED, FAILED, FAILED, FAILED])


def test_half_of_the_rewards_may_fail():
    scores, _ = rollout_scores([FAILED, LATE, 1, 0])
    assert scores == [0, 0, 1, 0]
