"""What a run leaves on disk: metrics, samples, curves, checkpoints, the final model."""

import contextlib
import dataclasses
import html
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

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from filelock import FileLock, Timeout  # torch depends on it
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict

import tricks
from data import UserError
from guard import Clock, RunError, out_of_memory, rank_has_ended
from samplers import stored_shapes


# ---- metrics and logs ------------------------------------------------------------------------------------------------


def rollout_metrics(responses: list, rewards: torch.Tensor, clock: Clock, config, world: int) -> dict[str, float]:
    """What the step's responses and clock say; solve_all and solve_none come from the scores, whatever the normaliser."""
    correct = torch.tensor([r.score >= 1 for r in responses]).view(rewards.shape)
    lengths = [len(r.token_ids) for r in responses]
    cut = [r for r in responses if r.truncated]
    sizes = [len(r.problem.prompt_ids) + n for r, n in zip(responses, lengths)]
    seconds = clock.seconds
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/std_within": float((rewards - rewards.mean(1, keepdim=True)).square().mean().sqrt()),
        "reward/solve_all": float(correct.all(1).float().mean()),
        "reward/solve_none": float((~correct.any(1)).float().mean()),
        "reward/failed": float(np.mean([r.failure != "" for r in responses])),
        "response/length_mean": float(np.mean(lengths)),
        "response/length_max": max(lengths),
        "response/truncated": len(cut) / len(responses),
        "response/looping": sum(bool(tricks.is_looping(torch.from_numpy(r.token_ids))) for r in cut) / max(1, len(cut)),  # of the truncated ones
        "perf/rollout_tokens_per_s": sum(lengths) / seconds["rollout"],
        "perf/train_tokens_per_s": sum(sizes) / (seconds["logprobs"] + seconds["update"]),
        "perf/peak_memory_gib": max(clock.memory.values()),
    }
    metrics |= {f"time/{phase}": seconds[phase] for phase in ("rollout", "reward", "logprobs", "update", "sync", "step")}
    metrics["time/slowest_reward"] = max(r.seconds for r in responses)
    metrics |= {f"memory/{phase}_gib": clock.memory[phase] for phase in ("rollout", "logprobs", "update", "sync")}
    for peak in [flops for name, flops in PEAK_FLOPS.items() if torch.cuda.is_available() and name in torch.cuda.get_device_name()]:
        metrics["perf/mfu"] = sum(train_flops(config, n, m) for n, m in zip(sizes, lengths)) / (seconds["update"] * peak * world)
    return metrics


PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}  # dense bfloat16, from the data sheets


def train_flops(config, length: int, predicted: int) -> float:
    """Operations of a forward and backward over a sequence of which so many tokens are predicted (Qwen, Llama; dense).

    6 per token and weight of the blocks, 6 per predicted token and weight of the head, and causal attention: 2 products
    of length^2 / 2 * width multiplications each, 2 operations each, three times (forward, and twice that backward).
    Recomputation (activation checkpointing) is not counted.
    """
    hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    block = 2 * hidden * head_dim * (heads + config.num_key_value_heads) + 3 * hidden * config.intermediate_size
    return 6 * (layers * block * length + config.vocab_size * hidden * predicted) + 6 * layers * heads * head_dim * length**2


PANELS = {"reward": ["reward/mean"], "response length (tokens)": ["response/length_mean"], "entropy (nats per token)": ["policy/entropy"],
          "clipped tokens (share)": ["policy/clip_low", "policy/clip_high"], "gradient norm": ["policy/grad_norm"]}  # fmt: skip


def for_curves(row: dict) -> dict:
    """What curves.png shows of a row; `warnings` needs no more of the first one."""
    return {key: value for key, value in row.items() if key == "step" or key.endswith("/accuracy") or any(key in keys for keys in PANELS.values())}


class Log:
    """metrics.jsonl, samples.jsonl, clipped.jsonl, TensorBoard events and curves.png, written by rank 0."""

    def __init__(self, folder: Path, cfg, position: "Position"):
        from torch.utils.tensorboard import SummaryWriter

        last = position.step - (position.pending is not None)  # step in the metrics; a resumed run repeats what came after its checkpoint
        self.folder, self.tensorboard = folder, SummaryWriter(str(folder), purge_step=last + 1)
        self.rows, self.warned = [], set()
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")
        for name, end in {"metrics.jsonl": last, "samples.jsonl": position.step, "clipped.jsonl": position.step}.items():
            rows = [row for row in read_jsonl(folder / name) if row["step"] <= (last if "eval" in row else end)]
            (folder / "partial.jsonl").write_text("".join(map(to_line, rows)), encoding="utf-8")
            os.replace(folder / "partial.jsonl", folder / name)
            if name == "metrics.jsonl":
                self.rows = [*map(for_curves, rows[:-5]), *rows[-5:]]

    def metrics(self, step: int, values: dict[str, float]) -> list[str]:
        """Write them down. Returns warnings in words, each of them once a run."""
        self.rows.append({"step": step} | values)
        self.rows[-6:-5] = map(for_curves, self.rows[-6:-5])  # a long run must not grow by all that it has ever measured
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(to_line(self.rows[-1]))
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)
        self.tensorboard.flush()  # its thread may lag behind; a killed run must not lack what came before its checkpoint
        news = [text for text in warnings(self.rows) if text.split(":")[0] not in self.warned]
        self.warned |= {text.split(":")[0] for text in news}
        return news

    def samples(self, step: int, responses: list, rewards: torch.Tensor, advantages: torch.Tensor, count: int) -> None:
        """Some responses of the step, evenly spread, and those whose reward function failed."""
        failed = [i for i, r in enumerate(responses) if r.failure][:20]
        chosen = sorted({*np.linspace(0, len(responses) - 1, min(count, len(responses)), dtype=int).tolist(), *failed})
        rows = [
            dict(step=step, prompt=r.problem.row["problem"], response=r.text, reward=float(rewards.flatten()[i]), gold=r.problem.row["answer"],
                 advantage=float(advantages.flatten()[i]), truncated=r.truncated, length=len(r.token_ids), failure=r.failure, **{"time/reward": r.seconds})
            for i, r in ((i, responses[i]) for i in chosen)
        ]  # fmt: skip
        with open(self.folder / "samples.jsonl", "a", encoding="utf-8") as file:
            file.writelines(map(to_line, rows))
        for row in rows[:1]:  # TensorBoard renders Markdown and HTML: a model's text must be neither
            self.tensorboard.add_text("sample", f"<pre>{html.escape(row['prompt'] + chr(10) * 2 + row['response'])}</pre>", step)

    def failures(self, step: int, name: str, responses: list) -> None:
        """Responses of an evaluation that got no verdict, at most 20."""
        with open(self.folder / "samples.jsonl", "a", encoding="utf-8") as file:
            for r in [r for r in responses if r.failure][:20]:
                file.write(to_line({"step": step, "eval": name, "prompt": r.problem.row["problem"], "response": r.text, "gold": r.problem.row["answer"],
                                    "truncated": r.truncated, "length": len(r.token_ids), "failure": r.failure, "time/reward": r.seconds}))  # fmt: skip

    def clipped(self, step: int, counts: torch.Tensor, tokenizer) -> None:
        """The 20 tokens that were clipped most, by side, with counts [2, V]; no line where nothing was clipped."""
        row = {"step": step}
        for side, of_tokens in zip(("low", "high"), counts.cpu()):
            number, ids = of_tokens.topk(min(20, len(of_tokens)))
            row[side] = [[tokenizer.decode([i]), int(n)] for i, n in zip(ids.tolist(), number.tolist()) if n]
        if row["low"] or row["high"]:
            with open(self.folder / "clipped.jsonl", "a", encoding="utf-8") as file:
                file.write(to_line(row))

    def curves(self) -> None:
        from matplotlib.figure import Figure

        rows = self.rows
        accuracies = sorted({key for row in rows for key in row if key.endswith("/accuracy")})
        panels = {"held-out accuracy": accuracies} | PANELS
        figure = Figure(figsize=(12, 6), layout="constrained")
        for axes, (title, keys) in zip(figure.subplots(2, 3).flat, panels.items()):
            for key in keys:
                points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
                axes.plot([x for x, _ in points], [y for _, y in points], marker="o" if key in accuracies else None, label=key)
            axes.set(title=title, xlabel="step")
            if len(keys) > 1:
                axes.legend()
        figure.savefig(self.folder / "curves.png", dpi=110)


def to_line(row: dict) -> str:
    """A line of JSON, which knows no NaN and no infinity: null."""
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
    return json.dumps(finite, ensure_ascii=False) + "\n"


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a log; a line that was cut off when its run was killed is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def warnings(rows: list[dict[str, float]]) -> list[str]:
    """What the metrics of a run say about its health. Each text begins with its name and a colon."""
    now, first, recent = rows[-1], next((row for row in rows if row.get("policy/entropy") is not None), None), rows[-5:]
    if first is None or "reward/failed" not in now:  # step 0
        return []
    known = lambda key, law: all(row.get(key) is not None and math.isfinite(row[key]) and law(row[key]) for row in recent)  # noqa: E731
    every = lambda key, law: len(recent) == 5 and known(key, law)  # noqa: E731  of the last five steps
    found = {
        "entropy collapse": (every("policy/entropy", lambda x: x < 0.01 and x < 0.1 * first["policy/entropy"]),
                             "below 0.01 nats per token and a tenth of the first step's: samples hardly differ. On a hard task: a lower --lr, or --clip-high"),
        "entropy explosion": (every("policy/entropy", lambda x: x > 3 * first["policy/entropy"] + 0.5),
                              "three times the first step's: the policy is losing its way. A lower --lr or --clip-high, or --kl-coef"),
        "short responses": (every("response/length_mean", lambda x: x < 0.1 * first["response/length_mean"]),
                            "a tenth of the first step's length: look at samples.jsonl; the reward may be had without reasoning"),
        "truncated responses": (every("response/truncated", lambda x: x > 0.5), "more than half hit --max-new-tokens: raise it, or see --overlong-filter"),
        "nothing to learn": (every("reward/std", lambda x: x == 0),
                             "all rewards of the step are equal, so every advantage is 0: other --train-data, or look at samples.jsonl for the reason"),
        "failing rewards": (now["reward/failed"] > 0.05, f"{now['reward/failed']:.0%} of the responses got no verdict: reasons in samples.jsonl"),
    }  # fmt: skip
    return [f"{name}: {text}" for name, (true, text) in found.items() if true]


# ---- checkpoints -----------------------------------------------------------------------------------------------------

# What may change when a run goes on: how it is computed, watched and saved, but not what is learned.
MAY_CHANGE = set("""steps train_data eval_data eval_every eval_samples eval_pass_k eval_size eval_temperature output_dir resume save_every keep_checkpoints
    background_save samples_per_step reward_timeout reward_workers reward_memory_gib max_failed_rewards micro_batch_tokens activation_checkpointing cpu_offload
    shard_ranks max_num_seqs gpu_memory_utilization tensor_parallel_size max_logprob_gap max_skipped_steps timeout_minutes""".split())


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
        with Clock()("save"):
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
        with Clock()("save"):
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


def model_dtype(source: str) -> torch.dtype:
    """The precision that a model folder is in, as its config.json says."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source).dtype or torch.float32


def save_model(policy, tokenizer, source: str, folder: Path) -> None:
    """An ordinary Hugging Face model folder, in the precision that the model came in; visible when it is whole."""
    from transformers import AutoModelForCausalLM

    state = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        dtype, partial = model_dtype(source), folder.with_name(f"partial-{folder.name}")  # policy.config has the trainer's
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(policy.config, dtype=dtype)
        model.save_pretrained(partial, state_dict={name: tensor.to(dtype) for name, tensor in state.items()})
        tokenizer.save_pretrained(partial)
        if (Path(source) / "generation_config.json").exists():  # as it is: transformers reads some that it refuses to write
            shutil.copy(Path(source) / "generation_config.json", partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    dist.barrier()
