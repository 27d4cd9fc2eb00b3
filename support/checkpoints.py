"""Checkpoints: sharded, written in the background, visible when whole, read on any number of ranks."""

import contextlib
import dataclasses
import json
import math
import os
import re
import secrets
import shutil
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from filelock import FileLock, Timeout  # torch depends on it
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from support.clock import clock
from support.errors import RunError, UserError
from support.guard import out_of_memory, rank_has_ended
from support.models import model_dtype, stored_shapes

# ---- checkpoints -----------------------------------------------------------------------------------------------------

# What may change when a run goes on: how it is computed, watched and saved, but not what is learned.
MAY_CHANGE = set("""steps train_data eval_data eval_every eval_samples eval_pass_k eval_size eval_temperature output_dir resume save_every keep_checkpoints
    background_save samples_per_step reward_timeout reward_workers reward_memory_gib max_failed_rewards micro_batch_tokens activation_checkpointing cpu_offload
    shard_ranks max_num_seqs gpu_memory_utilization max_logprob_gap max_skipped_steps timeout_minutes""".split())


@dataclasses.dataclass
class Position:
    """Where a run stands; with weights and optimizer state all that its next step depends on."""

    step: int = 0  # steps done
    cursor: int = 0  # place in the stream of prompts
    pending: dict[str, float] | None = None  # metrics of a step whose evaluation and log line are still to come


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")}  # a user's checkpoint-best is none of ours
    return sorted((path for path in found if found[path]), key=lambda path: int(found[path][1]))


def find_checkpoint(folder: Path, cfg, identity: dict[str, str]) -> Path | None:
    """The checkpoint that this run goes on from, if any; its settings must be this run's, unless --resume names it.

    identity: what a run depends on besides its flags, such as its problems, by name.
    """
    found = checkpoints(folder)
    if not found and (folder / "final").exists():
        raise UserError(f"--output-dir {folder}: holds the final model of a run and no checkpoint to go on from; give another folder, or move it away")
    if cfg.resume == "never" and found:
        raise UserError(f"--resume never: --output-dir {folder} holds {found[-1].name}; give another folder")
    saved = read_state(found[-1]) if found else {}
    if cfg.resume not in ("auto", "never"):
        path, goes_on = Path(cfg.resume), found and saved["config"]["resume"] == cfg.resume  # this run began there, was ended, and has come further
        if not goes_on:
            read_state(path)
        if not found or found[-1].resolve() == path.resolve():
            return path
        if not goes_on:
            raise UserError(f"--resume {cfg.resume}: --output-dir {folder} holds {found[-1].name}, another one; give another folder")
    if not found:
        return None
    old, new = ({**config, **rest} for config, rest in ((saved["config"], saved["identity"]), (json.loads(json.dumps(dataclasses.asdict(cfg))), identity)))
    changed = [f"{key}: {old.get(key)} -> {value}" for key, value in new.items() if key not in MAY_CHANGE and old.get(key) != value]
    if changed:
        raise UserError(f"--output-dir {folder}: {found[-1].name} was made with other settings ({'; '.join(changed)}); "
                        f"take those, another folder, or --resume {found[-1]} with another folder to go on from it with the new ones")  # fmt: skip
    return found[-1]


def read_state(path: Path) -> dict:
    """state.json of a checkpoint."""
    if not os.path.isfile(path / "state.json"):
        raise UserError(f"--resume {path}: neither auto nor never nor a checkpoint folder (it would hold state.json)")
    try:
        state = json.loads((path / "state.json").read_text())
        if state["config"]["resume"] and state["identity"].items() and state["step"] >= 0:
            return state
        raise ValueError("incomplete")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a checkpoint of this version ({type(error).__name__}: {error}); move it away, or give another --output-dir") from None


def open_folder(cfg, gather, held, patience: float = 60) -> Path:
    """The output directory, made and locked. UserError if it cannot be written to, if another run is using it (two would lose each other's files),
    or if a rank does not see what rank 0 writes there.

    The lock ends with `held`, or with the process, however that ends. Network file systems get `patience` seconds to show a new file elsewhere.
    """
    label = f"runs/{Path(cfg.model).name.replace(':', '-')}-{cfg.preset}-seed{cfg.seed}-{datetime.now():%Y%m%d-%H%M%S}"
    word, free = secrets.token_hex(8), True
    folder, word = gather([(Path(cfg.output_dir or label), word)])[0]  # rank 0's clock and word
    seen, lock = folder / f".seen-{word}", FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if dist.get_rank() == 0:
            held.callback(seen.unlink, missing_ok=True)
            seen.touch()  # can it be written to?
            with contextlib.suppress(NotImplementedError):  # a file system without locks
                lock.acquire(timeout=0)
                held.callback(lock.release)
    except Timeout:
        free = False
    except OSError as error:
        raise UserError(f"--output-dir {folder}: {error}") from None
    if not gather([free])[0]:
        raise UserError(f"--output-dir {folder}: another run is using it; wait for its end, or give another folder")
    end = time.monotonic() + patience
    while not seen.exists() and time.monotonic() < end:
        time.sleep(0.1)
    if blind := [rank for rank, sees in enumerate(gather([seen.exists()])) if not sees]:
        raise UserError(f"--output-dir {folder}: ranks {blind} do not see what rank 0 writes there; give a folder on a file system that all machines share")
    seen.unlink(missing_ok=True)
    return folder


def check_space(folder: Path, model: str, cfg) -> None:
    """An error before models load, if the final model and the checkpoints that will stand beside each other do not fit on the disk of `folder`."""
    parameters = sum(map(math.prod, stored_shapes(model).values()))
    stored = parameters * model_dtype(model).itemsize
    count = min(cfg.keep_checkpoints + 1, -(-cfg.steps // cfg.save_every)) if cfg.save_every else 0  # the newest is whole before the oldest goes
    need = stored + count * 12 * parameters  # float32: weights and two moments
    free = shutil.disk_usage(folder).free
    room = free + sum(path.stat().st_size for path in folder.glob("*-*/*"))  # an earlier run's checkpoints, whole and half-written, make way
    if need > room:
        gib = lambda size: f"{size / 2**30:.2f}"  # noqa: E731
        raise UserError(
            f"--output-dir {folder}: {gib(free)} GiB free, and this run needs {gib(need - room + free)}: "
            f"{gib(stored)} for the final model and {gib(12 * parameters)} for each of {count} checkpoints. "
            "Make room, give another folder, a lower --keep-checkpoints or a higher --save-every"
        )


class Checkpoints:
    """Writes sharded checkpoints (safetensors, no pickle), in the background if asked, and shows each only when it is whole."""

    def __init__(self, folder: Path, cfg, identity: dict[str, str], say):
        self.folder, self.cfg, self.identity, self.say = folder, cfg, identity, say
        self.group = dist.new_group(backend="gloo")  # the background thread must not mix its messages with the step's
        self.writing: Position | None = None
        self.future, self.error, self.failures = None, None, 0
        self.newest = -1  # step of the checkpoint that needs no second one
        for path in folder.glob("partial*") if dist.get_rank() == 0 else ():
            if re.fullmatch(r"partial(\.jsonl|-final|-(old-)?\d+)", path.name):  # of a run that was killed, and nobody else's
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        dist.barrier()

    def save(self, position: Position, policy, optimizer) -> None:
        """Copy the state and start to write it; without --background-save, return when it is written."""
        self.finish()
        self.writing, self.error, self.newest = dataclasses.replace(position), None, position.step
        storage = dcp.HuggingFaceStorageWriter(str(self.folder / f"partial-{position.step}"), save_distributed=True)
        options = dict(storage_writer=storage, process_group=self.group)
        with clock("save"):
            try:
                if self.cfg.background_save:
                    self.future = dcp.async_save(flat_state(policy, optimizer)[0], **options)
                else:
                    dcp.save(flat_state(policy, optimizer)[0], **options)
            except (Exception, CheckpointException) as error:  # a full disk, a lost mount; finish() tells
                self.error = error
        if not self.cfg.background_save:
            self.finish()

    def finish(self, last: bool = False) -> None:
        """Wait for the checkpoint that is being written, if any, and show it; every rank must call this.

        One that cannot be written leaves the older ones alone and is told. The next one may succeed; if that fails too, or
        none will follow (`last`), the run ends.
        """
        if not self.writing:
            return
        position, future = self.writing, self.future
        self.writing = self.future = None
        with clock("save"):
            try:
                if self.error:
                    raise self.error
                if future:
                    future.result()
                if dist.get_rank() == 0:
                    self._show(position)
            except (Exception, CheckpointException) as error:
                self.error = error
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, self.error and cause(self.error))
        self.failures = self.failures + 1 if any(errors) else 0
        if any(errors):
            self.newest = -1
            if dist.get_rank() == 0:
                shutil.rmtree(self.folder / f"partial-{position.step}", ignore_errors=True)
            newest = [path.name for path in checkpoints(self.folder)][-1:] or ["none"]
            text = f"checkpoint-{position.step} could not be written to {self.folder} ({next(filter(None, errors))}); the newest whole one: {newest[0]}"
            if last or self.failures > 1:
                raise RunError(f"{text}. Make room or give write permission there, then run the same command again")
            self.say(f"warning: {text}. The run goes on, and tries again at the next --save-every")

    def _show(self, position: Position) -> None:
        """The rename makes it visible: none is ever seen half-written."""
        partial = self.folder / f"partial-{position.step}"
        state = dataclasses.asdict(position) | {"config": dataclasses.asdict(self.cfg), "identity": self.identity}
        (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        target, old = self.folder / f"checkpoint-{position.step}", self.folder / f"partial-old-{position.step}"
        if target.exists():  # saved when a signal came during this step's evaluation
            target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        for old in checkpoints(self.folder)[: -self.cfg.keep_checkpoints]:
            shutil.rmtree(old)


def cause(error: BaseException) -> str:
    """The error itself, out of the report about all ranks that torch wraps it in (which is no Exception)."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {str(error)[:300]}"


def flat_state(policy, optimizer) -> tuple[dict[str, torch.Tensor], Any, Any]:
    """Weights and optimizer state as one flat dict of this rank's tensors (shared, not copied), and the two it comes from."""
    model, optim = get_state_dict(policy, optimizer)
    tied = policy.config.tie_word_embeddings  # the head is the embedding: once is enough, and safetensors takes it only once
    flat = {f"model.{name}": tensor for name, tensor in model.items() if not (tied and name == "lm_head.weight")}
    return flat | {f"optimizer.{name}.{key}": tensor for name, state in optim["state"].items() for key, tensor in state.items()}, model, optim


def load_checkpoint(path: Path, policy, optimizer) -> Position:
    """Restore in place, on any number of ranks. Returns where the run stood."""
    flat, model, optim = flat_state(policy, optimizer)
    try:
        saved = json.loads((path / "state.json").read_text())
        dcp.load(flat, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    except (Exception, CheckpointException) as error:
        if out_of_memory(error) or rank_has_ended(error):
            raise  # no fault of the checkpoint
        raise UserError(f"{path}: does not load ({cause(error)}); move it away to go on from the one before") from error
    set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim)
    return Position(saved["step"], saved["cursor"], saved["pending"])


