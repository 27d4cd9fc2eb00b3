"""A training step of TRL's GRPOTrainer against one of lite_ppo.py: same model, data, batch, loss and machine, in turns.

    python benchmarks/versus_trl.py --trl-python trl-venv/bin/python [--pairs 5] [--steps 6] [--output versus_trl.json]

TRL lives in an environment of its own (requirements-trl.txt). A pair is a chunk of steps of each, in a process of its own;
which of the two goes first alternates. Both start from the same checkpoint (the toy), in float32, on the same number of
threads, and sample with `transformers`, their common engine: no vLLM on either side. A step is one rollout and its optimizer
steps, timed from the start of one rollout to the start of the next, whatever happens in between; the first is dropped.
Speed-ups are ratios within a pair; the median and its range are printed.

What both are told: N prompts, K responses each, temperature 1, no top-p or top-k, M optimizer steps per rollout with one
forward and backward each, AdamW, the same learning rate and warm-up, no KL term, group-mean and batch-std advantages, token
mean of the clipped loss (TRL: scale_rewards="batch", loss_type="dapo"), rewards by comparing the boxed answer. What suits TRL
here: no gradient checkpointing for a model this small, no saving, no progress bar, no reporting, rewards in process.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PHASES = ("rollout", "reward", "logprobs", "update", "other")
BOUND = 0.6  # of TRL's step time


# ---- one chunk of one side, in a process of its own ------------------------------------------------------------------


def run_lite_ppo(job: dict) -> list[dict]:
    import lite_ppo
    import toy

    starts, original = [], lite_ppo.rollout

    def rollout(*args, **kwargs):
        starts.append((time.perf_counter(), time.process_time()))
        return original(*args, **kwargs)

    lite_ppo.rollout = rollout
    flags = dict(
        model=job["model"], train_data=job["data"], output_dir=job["folder"], reward="exact", sampler="transformers", dtype="float32",
        prompts_per_step=job["prompts"], group_size=job["group"], minibatches=job["minibatches"], max_prompt_tokens=64, max_new_tokens=job["new_tokens"],
        micro_batch_tokens=2**20, max_num_seqs=job["prompts"] * job["group"], steps=job["steps"] + 2, lr=job["lr"], warmup_steps=job["warmup"],
        eval_every=0, save_every=0, seed=job["seed"],
    )  # fmt: skip
    sys.argv = ["lite_ppo.py", *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items()), "--no-activation-checkpointing", "--eval-data"]
    if code := lite_ppo.main():
        raise SystemExit(code)
    rows = [json.loads(line) for line in Path(job["folder"], "metrics.jsonl").read_text().splitlines()]
    steps = []
    for (start, cpu), (end, cpu_end), row in zip(starts, starts[1:], (row for row in rows if row["step"] > 0)):
        times = {phase: row[f"time/{phase}"] for phase in ("rollout", "reward", "logprobs", "update")}
        tokens = row["response/length_mean"] * job["prompts"] * job["group"]
        steps.append(times | {"other": end - start - sum(times.values()), "step": end - start, "cpu": cpu_end - cpu, "tokens": tokens})  # other: sync, logs
    return steps[1:]


def run_trl(job: dict) -> list[dict]:
    import torch
    from datasets import Dataset
    from rewards import exact_reward
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    rows = [json.loads(line) for line in Path(job["data"]).read_text().splitlines()]
    for row in rows:
        chat = [{"role": "user", "content": row.pop("problem")}]
        row["prompt"] = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    def correct(completions, answer, **_):
        return [exact_reward(text, {"answer": gold}) for text, gold in zip(completions, answer)]

    clock, starts, marks, lengths = defaultdict(float), [], [], []

    def timed(name, function, only=lambda: True):
        def call(*args, **kwargs):
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            if only():
                clock[name] += time.perf_counter() - begin
            return result

        return call

    class Trainer(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):  # once per rollout
            starts.append((time.perf_counter(), time.process_time()))
            marks.append(dict(clock))
            return super()._generate_and_score_completions(inputs)

        def _generate(self, prompts):
            result = timed("rollout", super()._generate)(prompts)
            lengths.append(sum(map(len, result[1])))
            return result

        def _calculate_rewards(self, *args):
            return timed("reward", super()._calculate_rewards)(*args)

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):  # in the rollout: without gradient; in the loss: with it
            return timed("logprobs", super()._get_per_token_logps_and_entropies, lambda: not torch.is_grad_enabled())(*args, **kwargs)

        def _prepare_inputs(self, batch):
            return timed("prepare", super()._prepare_inputs)(batch)

        def training_step(self, *args, **kwargs):  # prepare, forward, backward
            return timed("training_step", super().training_step)(*args, **kwargs)

        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            optimizer.step = timed("optimizer", optimizer.step)
            return optimizer

    config = GRPOConfig(
        output_dir=job["folder"], use_cpu=True, bf16=False, gradient_checkpointing=False, seed=job["seed"],
        per_device_train_batch_size=job["prompts"] * job["group"] // job["minibatches"], gradient_accumulation_steps=1,
        steps_per_generation=job["minibatches"], num_generations=job["group"], max_completion_length=job["new_tokens"],
        max_steps=(job["steps"] + 2) * job["minibatches"], temperature=1.0, top_p=1.0, top_k=0, beta=0.0, epsilon=0.2,
        loss_type="dapo", scale_rewards="batch", learning_rate=job["lr"], lr_scheduler_type="constant_with_warmup",
        warmup_steps=job["warmup"] * job["minibatches"], weight_decay=0.0, max_grad_norm=1.0, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=job["model"], args=config, reward_funcs=correct, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    if next(trainer.model.parameters()).dtype != torch.float32:
        raise SystemExit("error: TRL loaded the model in another precision than float32")
    if trainer.model.is_gradient_checkpointing:
        raise SystemExit("error: TRL computes activations twice: this comparison is meant to be without checkpointing")
    trainer.train()
    steps = []
    for i, ((start, cpu), (end, cpu_end)) in enumerate(zip(starts, starts[1:])):
        spent = {name: marks[i + 1][name] - marks[i].get(name, 0) for name in marks[i + 1]}
        times = {phase: spent.get(phase, 0.0) for phase in ("rollout", "reward", "logprobs")}
        # "prepare" of this rollout ended after its mark was set, as everything it holds did: it belongs to this step.
        times["update"] = spent["training_step"] - spent["prepare"] + spent["optimizer"]
        steps.append(times | {"other": end - start - sum(times.values()), "step": end - start, "cpu": cpu_end - cpu, "tokens": lengths[i]})
    return steps[1:]


def run_chunk(job: dict) -> None:
    """The child process: run one side, write its steps and versions where the parent looks for them."""
    import torch

    steps = (run_trl if job["side"] == "trl" else run_lite_ppo)(job)
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "trl", "accelerate"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            pass
    Path(job["result"]).write_text(json.dumps(dict(steps=steps, versions=versions, threads=torch.get_num_threads())))


# ---- pairs and report ------------------------------------------------------------------------------------------------


def chunk(side: str, python: str, job: dict, threads: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        job = job | dict(side=side, folder=str(Path(folder, "run")), result=str(Path(folder, "result.json")))
        threading = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        quiet = dict(TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1")
        done = subprocess.run([python, __file__, "--chunk", json.dumps(job)], env=os.environ | threading | quiet, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"error: the chunk of {side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads(Path(job["result"]).read_text())


def summarize(pairs: list[dict]) -> dict:
    """Medians over all steps of each side, and ratios lite_ppo / TRL within each pair."""
    rows = {}
    for phase in ("step", *PHASES, "cpu"):
        trl, ours = ([step[phase] for pair in pairs for step in pair[side]["steps"]] for side in ("trl", "lite_ppo"))
        within = [median(s[phase] for s in p["lite_ppo"]["steps"]) / max(1e-9, median(s[phase] for s in p["trl"]["steps"])) for p in pairs]
        rows[phase] = dict(trl=median(trl), lite_ppo=median(ours), ratio=median(within), lowest=min(within), highest=max(within))
    tokens = {side: mean(s["tokens"] for p in pairs for s in p[side]["steps"]) for side in ("trl", "lite_ppo")}
    return dict(seconds=rows, tokens_per_step=tokens)


def cpu_name() -> str:
    try:
        return next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default="trl-venv/bin/python", help="interpreter of the environment that holds TRL")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="timed steps per chunk; one more is dropped")
    parser.add_argument("--model", default="toy")
    parser.add_argument("--data", default="toy:medium")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--minibatches", type=int, default=2, help="optimizer steps per rollout")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--warmup", type=int, default=5, help="in rollouts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", help="write everything measured to this JSON file")
    parser.add_argument("--chunk", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.chunk:
        return run_chunk(json.loads(args.chunk))
    if args.prompts * args.group % args.minibatches:
        parser.error("--minibatches must divide the responses of a step: TRL takes no uneven batches")
    import toy

    job = {name: getattr(args, name) for name in ("prompts", "group", "minibatches", "new_tokens", "lr", "warmup", "steps")}
    job |= dict(model=toy.resolve_model(args.model), data=toy.resolve_data(args.data))
    pythons, pairs = {"trl": args.trl_python, "lite_ppo": sys.executable}, []
    for i in range(args.pairs):
        order = ("trl", "lite_ppo") if i % 2 == 0 else ("lite_ppo", "trl")
        pair = {side: chunk(side, pythons[side], job | {"seed": i}, args.threads) for side in order}
        pairs.append(pair)
        one = {side: median(step["step"] for step in pair[side]["steps"]) for side in pair}
        print(f"pair {i + 1}: TRL {one['trl']:.3f} s, lite_ppo {one['lite_ppo']:.3f} s per step, ratio {one['lite_ppo'] / one['trl']:.2f}", flush=True)
    summary = summarize(pairs)
    print(f"\n{'median seconds':<16}{'TRL':>10}{'lite_ppo':>10}{'ratio':>10}   over pairs")
    for phase, row in summary["seconds"].items():
        print(f"{phase:<16}{row['trl']:>10.3f}{row['lite_ppo']:>10.3f}{row['ratio']:>10.2f}   {row['lowest']:.2f} to {row['highest']:.2f}")
    tokens = summary["tokens_per_step"]
    print("cpu: processor seconds of the main process, with those of threads that spin while they wait for work")
    print(f"{'tokens per step':<16}{tokens['trl']:>10.0f}{tokens['lite_ppo']:>10.0f}{tokens['lite_ppo'] / tokens['trl']:>10.2f}")
    ratio = summary["seconds"]["step"]["ratio"]
    print(f"\n{'PASS' if ratio <= BOUND else 'FAIL'}  median step time of lite_ppo / TRL: {ratio:.2f} (at most {BOUND})")
    versions = {side: pairs[0][side]["versions"] for side in pythons}
    machine = f"{os.cpu_count()} cores, {cpu_name()}; {args.threads} threads"
    print(f"{machine}; TRL {versions['trl']['trl']}, torch {versions['trl']['torch']} and {versions['lite_ppo']['torch']}, "
          f"transformers {versions['trl']['transformers']} and {versions['lite_ppo']['transformers']}")  # fmt: skip
    if args.output:
        record = dict(
            command=" ".join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]).replace(args.trl_python, "trl-venv/bin/python"), date=f"{datetime.now():%Y-%m-%d %H:%M}", machine=machine,
            versions=versions, settings={k: v for k, v in job.items() if k not in ("model", "data")} | dict(model=args.model, data=args.data),
            summary=summary, pairs=pairs,
        )  # fmt: skip
        Path(args.output).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
