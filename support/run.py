"""One run: its folder and its position, what it prints, logs and saves, and how it ends."""

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from support import banner, samplers, signals
from support.checkpoints import (
    Checkpoints,
    Position,
    check_space,
    find_checkpoint,
    load_checkpoint,
    open_folder,
)
from support.clock import clock
from support.data import Problem, ProblemSet
from support.errors import RunError, Stopped, UserError
from support.host import reclaim_memory
from support.logs import Log, read_jsonl, sample_text
from support.metrics import NOT_FINITE, rollout_metrics, speed_metrics
from support.models import architectures, count_parameters, end_of_sequence_ids, save_model
from support.response import Response
from support.rewards import reward_id
from support.util import compute_device, compute_dtype, gather, seed_for
from support.vllm_sampler import check_temperatures

MAX_SKIPPED = 3  # rollouts in a row with a skipped optimizer step end the run


def problems_id(problems: list[Problem]) -> str:
    """Number and checksum of the problems. A resumed run must have the same ones."""
    content = [(problem.prompt_ids, problem.row["answer"]) for problem in problems]
    return f"{len(problems)} problems, {seed_for(content):012x}"


class Run:
    """`with Run(...) as run:` holds the output folder, its lock, signal handlers and workers.

    It releases them when the block ends, with or without an exception. A signal ends the run with a
    checkpoint of the last whole step. The step in progress is dropped, or finished if it has
    changed the weights already.
    """

    def __init__(
        self,
        cfg,
        path: str,
        tokenizer,
        train_set: ProblemSet,
        eval_sets: dict[str, ProblemSet],
    ):
        self.cfg = cfg
        self.path = path
        self.tokenizer = tokenizer
        self.train_set = train_set
        self.eval_sets = eval_sets
        self.eos_ids = end_of_sequence_ids(path, tokenizer)
        self.began = time.time()
        banner.check_ids(cfg, path, tokenizer, [train_set, *eval_sets.values()])
        self.is_rank_0 = dist.get_rank() == 0
        self.skipped_in_a_row = 0
        self.bar = None
        self.saver = None
        classes = architectures(path)
        self.sampler_name, self.sampler_reason = samplers.choose_sampler(cfg.sampler, classes)
        if self.sampler_name == "vllm":
            check_temperatures(cfg)
        self.identity = {
            "training problems": problems_id(train_set.problems),
            "sampler in use": self.sampler_name,
            "dtype in use": str(compute_dtype(cfg.dtype)),
            "reward file": reward_id(cfg.reward),
        }
        with contextlib.ExitStack() as resources:
            self.folder = open_folder(cfg, resources)
            # Rank 0 decides: a network file system may show older files to other ranks.
            self.checkpoint = gather([find_checkpoint(self.folder, cfg, self.identity)])[0]
            check_space(self.folder, path, cfg)
            self.resources = resources.pop_all()
        self.handlers = contextlib.ExitStack()  # restores the signal handlers

    def print(self, text: str) -> None:
        """Print on rank 0, above the progress bar."""
        if self.is_rank_0:
            tqdm.write(text)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            with self.resources:
                if kind is Stopped and self.saver:
                    self.save_before_exit()
        finally:
            # A failed rank keeps its handlers: the launcher sends SIGTERM at once, and that must
            # not end the process before it has printed the reason.
            if kind in (None, Stopped) or dist.get_world_size() == 1:
                self.handlers.close()

    def close_at_end(self, resource: Any) -> Any:
        """Close the resource when the run ends. Returns the resource."""
        self.resources.callback(resource.close)
        return resource

    # ---- start -----------------------------------------------------------------------------------

    def print_banner(self) -> None:
        """What will run, and where its files go."""
        cfg = self.cfg
        ranks = dist.get_world_size()
        dtype = str(compute_dtype(cfg.dtype)).removeprefix("torch.")
        responses = cfg.prompts_per_step * cfg.group_size
        device = compute_device().type.replace("cuda", "GPU").replace("cpu", "CPU")
        lines = [
            f"model      {cfg.model}, {count_parameters(self.path):,} parameters",
            f"data       {banner.describe_data(self.train_set, self.eval_sets)}",
            f"training   {cfg.steps} steps of {cfg.prompts_per_step} prompts x {cfg.group_size} "
            f"responses = {responses}, {cfg.minibatches} optimizer step(s) each",
            f"machine    {ranks} {'process' if ranks == 1 else 'processes'}, {device}, {dtype}",
            f"sampler    {self.sampler_name} ({self.sampler_reason})",
            f"output     {self.folder}",
        ]
        self.print("\n".join(lines))
        sets = (self.train_set, self.eval_sets)
        for line in banner.warnings(cfg, self.tokenizer, self.eos_ids, *sets):
            self.print(line)

    @clock("start")
    def restore(self, policy, optimizer, sampler) -> None:
        """Load the newest checkpoint, if any. Then open logs and checkpoints."""
        self.policy = policy
        self.optimizer = optimizer
        self.sampler = sampler
        cfg = self.cfg
        self.position = Position(pending={})  # a new run begins with the evaluation of step 0
        if self.checkpoint:
            self.position = load_checkpoint(self.checkpoint, policy, optimizer)
            if self.step > cfg.steps:
                raise UserError(
                    f"--steps {cfg.steps}: {self.checkpoint} already has {self.step} steps; "
                    "give a larger number"
                )
            self.print(f"resumed from {self.checkpoint}, {self.step} of {cfg.steps} steps done")
            if self.step == cfg.steps and self.pending is None:
                self.position.pending = gather([self.find_unevaluated()])[0]  # rank 0 decides
        self.saver = Checkpoints(self.folder, cfg, self.identity, self.print)
        if self.checkpoint and self.checkpoint.parent == self.folder:
            self.saver.newest = self.step
        self.log = Log(self.folder, cfg, self.position) if self.is_rank_0 else None

    def find_unevaluated(self) -> dict[str, float] | None:
        """The logged metrics of the last step, if it has no evaluation of some set yet.

        Such a step was not the last one when it was trained, or was trained in another folder.
        """
        logged = {}
        for row in read_jsonl(self.folder / "metrics.jsonl"):
            if row["step"] == self.step:
                logged = row
        if all(f"eval/{name}/accuracy" in logged for name in self.eval_sets):
            return None
        known = {key: value for key, value in logged.items() if key != "step"}
        return {key: math.nan if value is None else value for key, value in known.items()}

    # ---- position --------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Steps done."""
        return self.position.step

    @property
    def cursor(self) -> int:
        """Position in the stream of prompts."""
        return self.position.cursor

    @property
    def pending(self) -> dict[str, float] | None:
        """Metrics of a step whose evaluation and log line are still to come."""
        return self.position.pending

    def steps(self) -> Iterator[int]:
        """The steps that are still to do.

        The first one may be trained already. Then only its evaluation is missing, because a signal
        ended the run during that evaluation, or because the step had none (find_unevaluated).
        """
        signals.install_signals(self.handlers)  # before this point there is nothing to save
        first = self.step + (self.pending is None)
        for step in range(first, self.cfg.steps + 1):
            clock.start(step)
            if step > self.step and not self.bar:
                self.open_bar()
            yield step

    def open_bar(self) -> None:
        """Show the progress bar on rank 0."""
        self.bar = tqdm(
            initial=self.step,
            total=self.cfg.steps,
            disable=not self.is_rank_0,
            unit="step",
            dynamic_ncols=True,
            leave=False,
        )
        self.resources.callback(self.bar.close)

    def is_due(self, step: int, every: int) -> bool:
        """True at step 0, at the last step, and between them at every `every`-th; 0: at none."""
        if step in (0, self.cfg.steps):
            return True
        return every > 0 and step % every == 0

    # ---- a step ----------------------------------------------------------------------------------

    def end_step(self, cursor: int, responses, dropped, rewards, advantages, stats) -> None:
        """Record the step. The weights are updated, so a checkpoint made now contains the step.

        dropped: responses that were sampled and graded, but not trained.
        """
        step = clock.step
        metrics = stats.reduce(responses)
        metrics = rollout_metrics(responses, dropped, rewards) | metrics
        metrics |= speed_metrics(responses, dropped, clock, self.policy.config)
        metrics["policy/lr"] = self.optimizer.param_groups[0]["lr"]
        metrics["rollout/responses"] = (cursor - self.cursor) * self.cfg.group_size
        self.position = Position(step, cursor, metrics)
        self.saver.finish()  # before the logs: a partial checkpoint may fill the disk
        if self.log:
            self.log.samples(step, responses, dropped, rewards, advantages)
            self.log.clipped(step, stats.clipped, self.tokenizer)
        self.check_skipped(step, metrics["policy/skipped"], responses)
        if clock.seconds["compile"] >= 1:
            self.print(
                f"step {step}: {clock.seconds['compile']:.0f} s of it compiled the model; later "
                "runs find the result in the cache"
            )
        self.bar.update()

    def check_skipped(self, step: int, skipped: int, responses: list[Response]) -> None:
        """Warn of skipped optimizer steps. RunError after MAX_SKIPPED rollouts in a row."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if not skipped:
            return
        bad = [i for i, r in enumerate(responses) if r.failure == NOT_FINITE]
        reason = "every loss is finite, so the backward pass overflowed"
        if bad:
            reason = (
                f"responses {bad[:10]} of the step are the cause, see {self.folder}/samples.jsonl"
            )
        self.print(
            f"warning: step {step}: {skipped} optimizer step(s) skipped, "
            f"the gradient is not finite; {reason}"
        )
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise RunError(f"no finite gradient in {MAX_SKIPPED} rollouts in a row; {reason}")

    def log_evaluation(self, name: str, found: dict, responses: list[Response]) -> None:
        """Print and log the evaluation of one held-out set."""
        if found["failed"]:
            self.print(
                f"warning: step {clock.step}: {found['failed']:.1%} of the responses to {name} "
                "got no score and count as wrong; see samples.jsonl for the reasons"
            )
        if self.log:
            self.log.failures(clock.step, name, responses)
        self.print(
            f"step {clock.step:4d}  {name}: accuracy {found['accuracy']:.3f} "
            f"[{found['accuracy_low']:.3f}, {found['accuracy_high']:.3f}]  "
            f"pass@{self.cfg.eval_samples} {found['pass_at_k']:.3f}  "
            f"length {found['length_mean']:.0f}"
        )
        if clock.step in (0, self.cfg.steps) and name == next(iter(self.eval_sets)):
            self.print(sample_text(responses[0]))

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        """Write the log line of a step, with its evaluation if it had one."""
        self.position.pending = None
        if self.log:
            for warning in self.log.metrics(step, metrics):
                self.print(f"warning: step {step}: {warning}")
            if (step and step % 20 == 0) or step == self.cfg.steps:
                self.log.curves()
        if self.bar and "reward/mean" in metrics:
            shown = {
                "reward": f"{metrics['reward/mean']:.3f}",
                "length": f"{metrics['response/length_mean']:.0f}",
                "entropy": f"{metrics['policy/entropy']:.3g}",
            }
            self.bar.set_postfix(shown)
        reclaim_memory()

    # ---- the end ---------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint, in the background where the memory allows it."""
        self.saver.save(self.position, self.policy, self.optimizer)

    def save_if_due(self, step: int) -> None:
        """save() at every --save-every-th step and after the last."""
        every = self.cfg.save_every
        if every and step and self.is_due(step, every):
            self.save()

    def finish(self) -> None:
        """Write the final model and print the summary."""
        self.saver.finish(last=True)
        save_model(self.policy, self.tokenizer, self.path, self.folder / "final")
        if self.bar:
            self.bar.close()
        if self.log:
            self.print_summary()
        self.sampler.close()

    def print_summary(self) -> None:
        """The first and the last accuracy in the log, or the only one, and where the files are."""
        cfg = self.cfg
        for name, (problems, _) in self.eval_sets.items():
            _, values = self.log.points(f"eval/{name}/accuracy")
            ends = [values[0], values[-1]] if len(values) > 1 else values
            self.print(
                f"{name}: accuracy {' -> '.join(f'{value:.3f}' for value in ends)} "
                f"({len(problems)} problems x {cfg.eval_samples} samples, "
                f"temperature {cfg.eval_temperature:g})"
            )
        self.print(
            f"{time.time() - self.began:.0f} s. In {self.folder}: final/ (the model), curves.png, "
            "metrics.jsonl, samples.jsonl, tensorboard/"
        )

    def save_before_exit(self) -> None:
        """After a signal: a checkpoint of the last whole step, unless there is one."""
        self.saver.finish()
        if self.step and (self.pending is not None or self.step != self.saver.newest):
            self.save()
            self.saver.finish(last=True)
        self.print(
            f"stopped by a signal after step {self.step}. To continue, run the same command with "
            f"--output-dir {self.folder}"
        )
        sys.stdout.flush()
        self.sampler.close()
