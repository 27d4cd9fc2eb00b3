"""A run: its folder, where it stands, what it logs, when it saves, how it ends."""

import contextlib
import math
import time

import torch.distributed as dist
from tqdm import tqdm

from support import guard, samplers
from support.checkpoints import (
    Checkpoints,
    Position,
    check_space,
    find_checkpoint,
    load_checkpoint,
    open_folder,
)
from support.clock import clock
from support.data import problems_id
from support.errors import RunError, Stopped, UserError
from support.logs import Log
from support.metrics import NOT_FINITE, rollout_metrics
from support.models import save_model
from support.rewards import reward_id
from support.util import compute_device, compute_dtype, gather


class Run:
    """`with Run(...) as run:` holds workers, lock and signals, and lets go of them however it ends.

    A signal ends it with a checkpoint: nothing of the step in progress has touched the weights.
    """

    def __init__(self, cfg, path: str, train_set: list, left_out: str):
        self.cfg, self.path, self.began, self.held = cfg, path, time.time(), contextlib.ExitStack()
        self.main, self.bad_steps = dist.get_rank() == 0, 0
        self.say = tqdm.write if self.main else lambda text: None
        self.sampler, reason = samplers.choose_sampler(cfg.sampler)
        self.identity = {"training problems": problems_id(train_set), "sampler in use": self.sampler,
                         "dtype in use": str(compute_dtype(cfg)), "reward file": reward_id(cfg.reward)}  # fmt: skip
        with contextlib.ExitStack() as held:
            self.folder = open_folder(cfg, gather, held)
            self.checkpoint = gather([find_checkpoint(self.folder, cfg, self.identity)])[0]
            check_space(self.folder, path, cfg)
            self.held = held.pop_all()
        self.say(f"model {cfg.model}, {len(train_set)} training problems (left out: {left_out}), "
                 f"{dist.get_world_size()} rank(s), {compute_device().type}, {compute_dtype(cfg)}")  # fmt: skip
        self.say(f"sampler {self.sampler}: {reason}")
        if cfg.top_p < 1 or cfg.top_k:
            self.say("warning: top-p and top-k sample from another distribution than the trained one; ratios and log-prob gaps are off by the mass cut away")
        if cfg.minibatches == 1:
            self.say("note: with one optimizer step per rollout the ratio is 1 and no clip can bind; --minibatches 2 or more changes that")

    # where it stands

    step = property(lambda self: self.position.step)
    cursor = property(lambda self: self.position.cursor)
    pending = property(lambda self: self.position.pending)

    @clock("start")
    def restore(self, policy, optimizer, sampler) -> None:
        """The newest checkpoint, or the state before step 1."""
        self.policy, self.optimizer, self.engine = policy, optimizer, sampler
        cfg, checkpoint = self.cfg, self.checkpoint
        self.position = load_checkpoint(checkpoint, policy, optimizer) if checkpoint else Position(pending={})
        if self.step > cfg.steps:
            raise UserError(f"--steps {cfg.steps}: {checkpoint} has {self.step} steps behind it")
        if checkpoint:
            self.say(f"resumed from {checkpoint}, {self.step} of {cfg.steps} steps done")
        self.saver = Checkpoints(self.folder, cfg, self.identity, self.say)
        self.saver.newest = self.step if checkpoint and checkpoint.parent == self.folder else -1
        self.log = Log(self.folder, cfg, self.position) if self.main else None

    def steps(self):
        """Steps that are still to do or, after a signal during its evaluation, to report."""
        guard.install_signals(self.held)  # until here nothing can be lost
        self.bar = self.held.enter_context(tqdm(initial=self.step, total=self.cfg.steps, disable=not self.main, unit="step", dynamic_ncols=True))
        for step in range(self.step + (self.pending is None), self.cfg.steps + 1):
            clock.start(step)
            yield step

    def is_due(self, step: int, every: int) -> bool:
        return step in (0, self.cfg.steps) or bool(every) and step % every == 0

    # a step

    def end_step(self, step, cursor, responses, rewards, advantages, stats, tokenizer) -> None:
        """The weights have moved: from here on a checkpoint holds this step."""
        metrics = stats.reduce(responses) | {"policy/lr": self.optimizer.param_groups[0]["lr"]}
        metrics["rollout/responses"] = (cursor - self.cursor) * self.cfg.group_size
        self.position = Position(step, cursor, rollout_metrics(responses, rewards, clock, self.policy.config, dist.get_world_size()) | metrics)
        self.saver.finish()  # what is half-written may fill the disk for a while
        if self.main:
            self.log.samples(step, responses, rewards, advantages, self.cfg.samples_per_step)
            self.log.clipped(step, stats.clipped, tokenizer)
        self.check_skipped(step, metrics["policy/skipped"], responses)
        self.bar.update()

    def check_skipped(self, step, skipped, responses) -> None:
        self.bad_steps = self.bad_steps + 1 if skipped else 0
        broken = [i for i, r in enumerate(responses) if r.failure == NOT_FINITE]
        blame = (f"responses {broken[:10]} of the step, in {self.folder}/samples.jsonl" if broken
                 else "every loss is finite, so the backward pass has overflowed")  # fmt: skip
        if skipped:
            self.say(f"warning: step {step}: {skipped} optimizer step(s) skipped, the gradient is not finite; {blame}")
        if self.bad_steps >= self.cfg.max_skipped_steps:
            raise RunError(f"no finite gradient in {self.bad_steps} rollouts in a row (--max-skipped-steps); {blame}")

    def log_step(self, step, metrics) -> dict:
        """The log line of a step, with its evaluation if it had one."""
        self.position.pending = None
        if self.main:
            for warning in self.log.metrics(step, metrics):
                self.say(f"warning: step {step}: {warning}")
            if (step and step % 20 == 0) or step == self.cfg.steps:
                self.log.curves()
            shown = dict(reward="reward/mean", length="response/length_mean", entropy="policy/entropy")
            self.bar.set_postfix({name: f"{metrics.get(key, 0):.3g}" for name, key in shown.items()})
        guard.tidy()
        return metrics

    def tell_evaluation(self, name, found, responses) -> None:
        if found["failed"]:
            self.say(f"warning: step {clock.step}: {found['failed']:.1%} of the responses to {name} got no verdict and count as wrong: reasons in samples.jsonl")
        if self.log:
            self.log.failures(clock.step, name, responses)
        self.say(f"step {clock.step:4d}  {name}: accuracy {found['accuracy']:.3f} [{found['accuracy_low']:.3f}, {found['accuracy_high']:.3f}]  "
                 f"pass@{self.cfg.eval_pass_k} {found['pass_at_k']:.3f}  length {found['length_mean']:.0f}")  # fmt: skip

    # the end

    def save(self) -> None:
        self.saver.save(self.position, self.policy, self.optimizer)

    def finish(self, tokenizer, sets) -> None:
        self.saver.finish(last=True)
        save_model(self.policy, tokenizer, self.path, self.folder / "final")
        for name, problems in sets.items() if self.main else ():
            before, after = (row.get(f"eval/{name}/accuracy", math.nan) for row in (self.log.rows[0], self.log.rows[-1]))
            self.say(f"{name}: accuracy {before:.3f} -> {after:.3f} ({len(problems)} problems x {self.cfg.eval_samples} samples, temperature {self.cfg.eval_temperature:g})")
        self.say(f"{time.time() - self.began:.0f} s; final model, metrics.jsonl, samples.jsonl, curves.png and TensorBoard events are in {self.folder}")
        self.engine.close()

    def close_at_end(self, thing):
        self.held.callback(thing.close)
        return thing

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        with self.held:
            if kind is Stopped and hasattr(self, "saver"):
                self.saver.finish()
                if self.step and (self.pending is not None or self.step != self.saver.newest):
                    self.save()
                    self.saver.finish(last=True)
                self.say(f"ended by a signal after step {self.step}; the same command with --output-dir {self.folder} goes on from there")
                self.engine.close()
