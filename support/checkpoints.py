"""Checkpoints, and the output folder that holds them.

A checkpoint is sharded. It is written in the background, becomes visible when it is complete, and
can be read by any number of ranks.
"""

import contextlib
import dataclasses
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from filelock import FileLock, Timeout  # a dependency of torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from support.clock import clock
from support.errors import RunError, UserError
from support.failures import out_of_memory, rank_has_ended
from support.host import free_memory
from support.models import count_parameters, model_dtype
from support.packed import stored_state
from support.util import env, gather

KEPT = 2  # checkpoints; older ones are deleted
STATE_BYTES = 12  # per parameter, in float32: weights and two moments
COPIES = 2  # of the state in host memory while it is written: the copy, and the bytes of the file
PATHS = ("model", "reward")  # flags that may be paths, which have several spellings
PATIENCE = 60.0  # seconds until a network file system must show a new file to all machines

# Flags that may change on resume: how the run computes, watches and saves, not what it learns.
MAY_CHANGE = {
    *("steps", "train_data", "output_dir", "resume", "save_every", "samples_per_step"),
    *("eval_data", "eval_every", "eval_samples", "eval_size", "eval_temperature"),
    *("reward_timeout", "reward_workers", "reward_memory_gib"),
    *("micro_batch_tokens", "compile", "activation_checkpointing", "cpu_offload", "shard_ranks"),
    *("max_num_seqs", "gpu_memory_utilization", "max_logprob_gap", "timeout_minutes"),
}


@dataclasses.dataclass
class Position:
    """Where a run stands. The next step depends on this, the weights and the optimizer state."""

    step: int = 0  # steps done
    cursor: int = 0  # position in the stream of prompts
    # Metrics of a step whose evaluation and log line are still to come.
    pending: dict[str, float] | None = None


# ---- the output folder ---------------------------------------------------------------------------


def open_folder(cfg, resources: contextlib.ExitStack) -> Path:
    """Make and lock the output folder. The lock ends with `resources`, or with the process.

    UserError if the folder cannot be written to, if another run uses it (two runs would overwrite
    each other's files), or if a rank does not see what rank 0 writes there.
    """
    model = Path(cfg.model).name.replace(":", "-")
    default = f"runs/{model}-{cfg.preset}-seed{cfg.seed}-{datetime.now():%Y%m%d-%H%M%S}"
    # Every rank takes the name and the token of rank 0.
    folder, token = gather([(Path(cfg.output_dir or default), secrets.token_hex(8))])[0]
    probe = folder / f".seen-{token}"
    if not gather([lock_folder(folder, probe, resources)])[0]:
        raise UserError(
            f"--output-dir {folder}: another run uses it; wait for its end or give another folder"
        )
    end = time.monotonic() + PATIENCE
    while not probe.exists() and time.monotonic() < end:
        time.sleep(0.1)
    blind = [rank for rank, sees in enumerate(gather([probe.exists()])) if not sees]
    if blind:
        raise UserError(
            f"--output-dir {folder}: ranks {blind} do not see the files of rank 0; "
            "give a folder on a file system that all machines share"
        )
    probe.unlink(missing_ok=True)
    return folder


def lock_folder(folder: Path, probe: Path, resources: contextlib.ExitStack) -> bool:
    """Rank 0: make the folder, lock it and write the probe. False if another run holds the lock."""
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if dist.get_rank() == 0:
            resources.callback(probe.unlink, missing_ok=True)
            probe.touch()
            with contextlib.suppress(NotImplementedError):  # a file system without locks
                lock.acquire(timeout=0)
                resources.callback(lock.release)
    except Timeout:
        return False
    except OSError as error:
        raise UserError(f"--output-dir {folder}: {error}") from None
    return True


def check_space(folder: Path, model: str, cfg) -> None:
    """UserError if the final model and the checkpoints do not fit on the disk of `folder`."""
    parameters = count_parameters(model)
    final = parameters * model_dtype(model).itemsize
    checkpoint = STATE_BYTES * parameters
    count = 0
    if cfg.save_every:
        saves = -(-cfg.steps // cfg.save_every)
        count = min(KEPT + 1, saves)  # the newest is complete before the oldest is deleted
    need = final + count * checkpoint
    free = shutil.disk_usage(folder).free
    # Checkpoints of an earlier run, complete or partial, will be deleted.
    old = [path for path in folder.glob("*-*/*") if path.is_file()]
    reusable = sum(path.stat().st_size for path in old)
    if need <= free + reusable:
        return
    raise UserError(
        f"--output-dir {folder}: {gib(free)} GiB free, and this run needs {gib(need - reusable)}: "
        f"{gib(final)} for the final model and {gib(checkpoint)} for each of {count} checkpoints. "
        "Make room, give another folder, or raise --save-every"
    )


def gib(size: int) -> str:
    """Bytes as a number of GiB."""
    return f"{size / 2**30:.2f}"


# ---- which checkpoint to resume from -------------------------------------------------------------


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first. Folders with other names are not touched."""
    found = []
    for path in folder.glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", path.name):
            found.append(path)
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def find_checkpoint(folder: Path, cfg, identity: dict[str, str]) -> Path | None:
    """The checkpoint that this run continues, or None for a new run.

    identity: what a run depends on besides its flags, by name, such as its problems. UserError if
    the folder is a model's, or if the checkpoint has other settings and --resume does not name it.
    """
    config = folder / "config.json"
    if config.exists() and '"preset"' not in config.read_text(errors="replace"):
        raise UserError(
            f"--output-dir {folder}: holds a config.json that is not a run's, such as that of a "
            "model, and the run would overwrite it; give another folder"
        )
    found = checkpoints(folder)
    if not found and (folder / "final").exists():
        raise UserError(
            f"--output-dir {folder}: holds the final model of a run and no checkpoint to resume "
            "from; give another folder, or move it away"
        )
    newest = found[-1] if found else None
    saved = read_state(newest) if newest else {}
    if cfg.resume != "auto":
        named = Path(cfg.resume)
        # This run started from the named checkpoint, was stopped, and has newer checkpoints.
        restarted = bool(newest) and Path(saved["config"]["resume"]).resolve() == named.resolve()
        if not restarted:
            read_state(named)
        if not newest or newest.resolve() == named.resolve():
            return named
        if not restarted:
            raise UserError(
                f"--resume {cfg.resume}: --output-dir {folder} holds another checkpoint, "
                f"{newest.name}; give another folder"
            )
    if newest:
        check_settings(newest, saved, cfg, identity)
    return newest


def check_settings(path: Path, saved: dict, cfg, identity: dict[str, str]) -> None:
    """UserError that lists the settings in which a checkpoint differs from this run."""
    old = saved["config"] | saved["identity"]
    new = json.loads(json.dumps(dataclasses.asdict(cfg))) | identity
    changed = []
    for key, value in new.items():
        if key in PATHS and os.path.abspath(str(old.get(key))) == os.path.abspath(value):
            continue
        if key not in MAY_CHANGE and old.get(key) != value:
            changed.append(f"{key}: {old.get(key)} -> {value}")
    if changed:
        raise UserError(
            f"--output-dir {path.parent}: {path.name} has other settings ({'; '.join(changed)}). "
            "Use those settings, or another folder. To continue from it with the new settings, "
            f"give another folder and --resume {path}"
        )


def read_state(path: Path) -> dict:
    """state.json of a checkpoint. UserError if there is none, or if it is damaged."""
    if not os.path.isfile(path / "state.json"):
        raise UserError(
            f"--resume {path}: not a checkpoint folder (it has no state.json); "
            "give one, or auto for the newest in --output-dir"
        )
    try:
        state = json.loads((path / "state.json").read_text())
        if state["config"]["resume"] and state["identity"].items() and state["step"] >= 0:
            return state
        raise ValueError("incomplete")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a checkpoint of this version ({type(error).__name__}: {error}); "
            "move it away, or give another --output-dir"
        ) from None


# ---- writing and reading -------------------------------------------------------------------------


class Checkpoints:
    """Writes sharded checkpoints (safetensors, no pickle), each visible only when it is complete.

    It writes in the background while training continues, if the host memory has room for that.
    """

    def __init__(self, folder: Path, cfg, identity: dict[str, str], print_line: Callable):
        self.folder = folder
        self.cfg = cfg
        self.identity = identity
        self.print = print_line
        # A group of its own, so that messages of the background thread and of a step do not mix.
        self.group = dist.new_group(backend="gloo")
        self.writing: Position | None = None
        self.future = None
        self.error: BaseException | None = None
        self.failures = 0  # in a row
        self.noted = False  # whether the console says that checkpoints are not in the background
        self.newest = -1  # step of the newest checkpoint
        if dist.get_rank() == 0:
            self.delete_partial()
        dist.barrier()

    def delete_partial(self) -> None:
        """Delete the partial files of a killed run. Files with other names are not touched."""
        for path in self.folder.glob("partial*"):
            if not re.fullmatch(r"partial(\.jsonl|-final|-(old-)?\d+)", path.name):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def save(self, position: Position, policy, optimizer) -> None:
        """Copy the state and start to write it. Without room for the copy, wait for the end.

        Errors such as a full disk are reported by finish().
        """
        self.finish()
        self.writing = dataclasses.replace(position)
        self.error = None
        self.newest = position.step
        partial = self.folder / f"partial-{position.step}"
        storage = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
        background = self.has_room(policy)
        write = dcp.async_save if background else dcp.save
        with clock("save"):
            try:
                tensors, _, _ = flat_state(policy, optimizer)
                result = write(tensors, storage_writer=storage, process_group=self.group)
                self.future = result if background else None
            except (Exception, CheckpointException) as error:
                self.error = error
        if not background:
            self.finish()

    def has_room(self, policy) -> bool:
        """Whether the host memory of every machine has room to write in the background.

        The ranks of a machine share its memory. All ranks get the same result. Where the free
        memory cannot be read, there is room. The first time that there is none, print why.
        """
        parameters = sum(p.to_local().numel() for p in policy.parameters())
        need = COPIES * STATE_BYTES * parameters * env("LOCAL_WORLD_SIZE", 1)
        rooms = [(free, need) for free, need in gather([(free_memory(), need)]) if free is not None]
        short = [(free, need) for free, need in rooms if free < need]
        if short and not self.noted:
            free, need = min(short)
            self.noted = True
            self.print(
                "note: checkpoints are written while the training waits: in the background this "
                f"takes {gib(need)} GiB of host memory per machine, and {gib(free)} are free"
            )
        return not short

    def finish(self, last: bool = False) -> None:
        """Wait for the checkpoint that is being written, if any, and show it. Collective.

        If it could not be written, the older ones stay and a warning is printed. The next one may
        succeed. If that fails too, or none will follow (`last`), RunError.
        """
        if not self.writing:
            return
        position = self.writing
        future = self.future
        self.writing = None
        self.future = None
        with clock("save"):
            try:
                if self.error:
                    raise self.error
                if future:
                    future.result()
                if dist.get_rank() == 0:
                    self.show(position)
            except (Exception, CheckpointException) as error:
                self.error = error
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, self.error and cause(self.error))
        self.failures = self.failures + 1 if any(errors) else 0
        if any(errors):
            self.report_failure(position.step, next(filter(None, errors)), last)

    def show(self, position: Position) -> None:
        """Make a checkpoint visible by renaming it. Then delete the oldest."""
        step = position.step
        partial = self.folder / f"partial-{step}"
        config = dataclasses.asdict(self.cfg)
        if config["resume"] != "auto":  # the next run may start in another working directory
            config["resume"] = os.path.abspath(config["resume"])
        state = dataclasses.asdict(position)
        state |= {"config": config, "identity": self.identity}
        (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        target = self.folder / f"checkpoint-{step}"
        replaced = self.folder / f"partial-old-{step}"
        if target.exists():  # saved when a signal came during this step's evaluation
            target.rename(replaced)
        partial.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
        for old in checkpoints(self.folder)[:-KEPT]:
            shutil.rmtree(old)

    def report_failure(self, step: int, reason: str, last: bool) -> None:
        """Print a warning, or raise RunError at the second failure in a row or the last save."""
        self.newest = -1
        if dist.get_rank() == 0:
            shutil.rmtree(self.folder / f"partial-{step}", ignore_errors=True)
        complete = checkpoints(self.folder)
        newest = complete[-1].name if complete else "none"
        text = (
            f"checkpoint-{step} could not be written to {self.folder} ({reason}); "
            f"the newest complete one: {newest}"
        )
        if last or self.failures > 1:
            raise RunError(
                f"{text}. Make room or give write permission there, then run the same command again"
            )
        self.print(f"warning: {text}. The run continues and tries again at the next --save-every")


def cause(error: BaseException) -> str:
    """Type and message of an error. torch wraps it in a report about all ranks."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {str(error)[:300]}"


def flat_state(policy, optimizer) -> tuple[dict[str, torch.Tensor], Any, Any]:
    """This rank's tensors as one flat dict (shared, not copied), then the two state dicts."""
    model, optim = get_state_dict(policy, optimizer)
    stored = stored_state(policy).keys()  # safetensors takes a shared tensor only once
    flat = {f"model.{name}": tensor for name, tensor in model.items() if name in stored}
    for name, state in optim["state"].items():
        flat |= {f"optimizer.{name}.{key}": tensor for key, tensor in state.items()}
    return flat, model, optim


def load_checkpoint(path: Path, policy, optimizer) -> Position:
    """Restore weights and optimizer in place, on any number of ranks. Returns the position."""
    flat, model, optim = flat_state(policy, optimizer)
    try:
        saved = json.loads((path / "state.json").read_text())
        dcp.load(flat, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    except (Exception, CheckpointException) as error:
        if out_of_memory(error) or rank_has_ended(error):
            raise  # the checkpoint is not the cause
        raise UserError(
            f"{path}: does not load ({cause(error)}); move it away to resume from the one before"
        ) from error
    set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim)
    return Position(saved["step"], saved["cursor"], saved["pending"])
