"""A training step of TRL's GRPOTrainer against one of lite_ppo.py, in turns.

    python benchmarks/versus_trl.py --trl-python trl-venv/bin/python [--pairs 5] [--steps 6]
        [--output versus_trl.json]
    python benchmarks/versus_trl.py --gpu --model FOLDER --data FILE.jsonl ...

Both have the same model, data, batch, loss and machine. TRL has its own environment
(requirements-trl.txt). A pair is a chunk of steps of each side, in a process of its own; the order
alternates. Both start from the same checkpoint (the toy), in float32, on the same number of
threads. Both sample with `transformers`, the engine that they share. A step is one rollout and its
optimizer steps, from the start of one rollout to the start of the next; the first is dropped.
Ratios are taken within a pair; the median and the range are printed. The output is written after
each pair, so a killed benchmark keeps its finished pairs.

Settings of both: N prompts, K responses each, temperature 1, no top-p or top-k, M optimizer steps
per rollout with one forward and backward each, AdamW, the same learning rate and warm-up, no KL
term, group mean and batch std, token mean of the clipped loss (TRL: scale_rewards="batch",
loss_type="dapo"), rewards by comparison of the boxed answer. In favour of TRL: without --gpu no
gradient checkpointing; no saving, no progress bar, no reporting, rewards in the same process.

--gpu: both sample with vLLM in the training process, compute in bfloat16 with weights in float32,
and recompute activations in the backward pass. vLLM of TRL never sleeps, and TRL compares no
log-probs with it. TRL pads its micro-batches (--trl-batch responses); lite_ppo.py packs them
(--micro-batch-tokens). Phases end when the GPU is done.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PHASES = ("rollout", "reward", "logprobs", "update", "other")
BOUND = 0.6  # of the step time of TRL
VLLM_MEMORY = 0.3  # of the GPU, for vLLM's weights and cache


def make_step(seconds: float, cpu: float, times: dict[str, float], tokens: float) -> dict:
    """`times`: all phases but "other", which is the rest: sync, logs."""
    other = seconds - sum(times.values())
    return times | {"other": other, "step": seconds, "cpu": cpu, "tokens": tokens}


class Marks:
    """The times at which rollouts start."""

    def __init__(self):
        self.times: list[tuple[float, float]] = []  # (wall clock, processor)

    def add(self) -> None:
        self.times.append((time.perf_counter(), time.process_time()))

    def steps(self) -> list[tuple[float, float]]:
        """(seconds, processor seconds) from each start to the next."""
        pairs = zip(self.times, self.times[1:])
        return [(end - start, cpu_end - cpu) for (start, cpu), (end, cpu_end) in pairs]


# ---- one chunk of lite_ppo.py --------------------------------------------------------------------


def lite_ppo_flags(job: dict) -> list[str]:
    gpu = job["gpu"]
    flags = dict(
        model=job["model"],
        train_data=job["data"],
        output_dir=job["folder"],
        reward="exact",
        sampler="vllm" if gpu else "transformers",
        dtype="bfloat16" if gpu else "float32",
        prompts_per_step=job["prompts"],
        group_size=job["group"],
        minibatches=job["minibatches"],
        max_prompt_tokens=job["prompt_tokens"],
        max_new_tokens=job["new_tokens"],
        micro_batch_tokens=job["micro_batch_tokens"],
        max_num_seqs=job["prompts"] * job["group"],
        gpu_memory_utilization=VLLM_MEMORY,
        steps=job["steps"] + 2,
        lr=job["lr"],
        warmup_steps=job["warmup"],
        eval_every=0,
        save_every=0,
        seed=job["seed"],
    )
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    words += [] if gpu else ["--no-activation-checkpointing"]
    return [*words, "--eval-data"]


def run_lite_ppo(job: dict) -> list[dict]:
    import lite_ppo

    marks, rollout = Marks(), lite_ppo.rollout

    def marked_rollout(*args):
        marks.add()
        return rollout(*args)

    lite_ppo.rollout = marked_rollout
    sys.argv = ["lite_ppo.py", *lite_ppo_flags(job)]
    if code := lite_ppo.main():
        raise SystemExit(code)
    lines = Path(job["folder"], "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["step"] > 0]
    steps = []
    for (seconds, cpu), row in zip(marks.steps(), rows):
        times = {phase: row[f"time/{phase}"] for phase in PHASES if phase != "other"}
        tokens = row["response/length_mean"] * job["prompts"] * job["group"]
        steps.append(make_step(seconds, cpu, times, tokens))
    return steps[1:]


# ---- one chunk of TRL, in its own environment ----------------------------------------------------


def trl_config(job: dict):
    from trl import GRPOConfig

    gpu, minibatches = job["gpu"], job["minibatches"]
    minibatch = job["prompts"] * job["group"] // minibatches
    micro_batch = job["trl_batch"] or minibatch
    micro_batches = minibatch // micro_batch
    vllm = dict(
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=VLLM_MEMORY,
        vllm_max_model_length=job["prompt_tokens"] + job["new_tokens"],
        vllm_importance_sampling_correction=False,
    )
    return GRPOConfig(
        output_dir=job["folder"],
        use_cpu=not gpu,
        bf16=gpu,
        gradient_checkpointing=gpu,
        model_init_kwargs={"dtype": "float32"},
        seed=job["seed"],
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=micro_batches,
        steps_per_generation=micro_batches * minibatches,
        num_generations=job["group"],
        max_completion_length=job["new_tokens"],
        max_steps=(job["steps"] + 2) * minibatches,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        epsilon=0.2,
        loss_type="dapo",
        scale_rewards="batch",
        learning_rate=job["lr"],
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=job["warmup"] * minibatches,
        weight_decay=0.0,
        max_grad_norm=1.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **(vllm if gpu else {}),
    )


def trl_rows(job: dict, tokenizer) -> list[dict]:
    """The problems, with the prompts that lite_ppo.py makes of them."""
    rows = [json.loads(line) for line in Path(job["data"]).read_text().splitlines()]
    for row in rows:
        chat = [{"role": "user", "content": row.pop("problem")}]
        row["prompt"] = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        )
    return rows


def correct(completions, answer, **_):
    from support.rewards import exact_reward

    pairs = zip(completions, answer, strict=True)
    return [exact_reward(text, {"answer": gold}) for text, gold in pairs]


def now() -> float:
    """The time when the GPU has done all that it was given; without a GPU, the time."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Observation:
    """Seconds of TRL's methods; rollouts and their tokens."""

    def __init__(self):
        self.clock: dict[str, float] = defaultdict(float)
        self.marks = Marks()
        self.clocks: list[dict[str, float]] = []  # at the start of each rollout
        self.tokens: list[int] = []  # of each rollout

    def start_rollout(self) -> None:
        self.marks.add()
        self.clocks.append(dict(self.clock))

    def timed(self, name: str, function, *args, **kwargs):
        begin = now()
        result = function(*args, **kwargs)
        self.clock[name] += now() - begin
        return result

    def steps(self) -> list[dict]:
        steps = []
        for i, (seconds, cpu) in enumerate(self.marks.steps()):
            before, after = self.clocks[i], self.clocks[i + 1]
            spent = {name: after[name] - before.get(name, 0) for name in after}
            times = {phase: spent.get(phase, 0.0) for phase in ("rollout", "reward", "logprobs")}
            # The rollout is part of "prepare", which is part of "training_step".
            times["update"] = spent["training_step"] - spent["prepare"] + spent["optimizer"]
            steps.append(make_step(seconds, cpu, times, self.tokens[i]))
        return steps


def observed_trainer(seen: Observation):
    """A subclass of GRPOTrainer that measures its phases."""
    import functools

    import torch
    from trl import GRPOTrainer

    class Trainer(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):  # once per rollout
            seen.start_rollout()
            return super()._generate_and_score_completions(inputs)

        def _generate(self, prompts):
            result = seen.timed("rollout", super()._generate, prompts)
            seen.tokens.append(sum(map(len, result[1])))
            return result

        def _calculate_rewards(self, *args):
            return seen.timed("reward", super()._calculate_rewards, *args)

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            inner = super()._get_per_token_logps_and_entropies
            if torch.is_grad_enabled():  # those of the loss belong to the update
                return inner(*args, **kwargs)
            return seen.timed("logprobs", inner, *args, **kwargs)

        def _prepare_inputs(self, batch):
            return seen.timed("prepare", super()._prepare_inputs, batch)

        def training_step(self, *args, **kwargs):  # prepare, forward, backward
            return seen.timed("training_step", super().training_step, *args, **kwargs)

        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            optimizer.step = functools.partial(seen.timed, "optimizer", optimizer.step)
            return optimizer

    return Trainer


def run_trl(job: dict) -> list[dict]:
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer, seen = AutoTokenizer.from_pretrained(job["model"]), Observation()
    trainer = observed_trainer(seen)(
        model=job["model"],
        args=trl_config(job),
        reward_funcs=correct,
        train_dataset=Dataset.from_list(trl_rows(job, tokenizer)),
        processing_class=tokenizer,
    )
    if next(trainer.model.parameters()).dtype != torch.float32:
        raise SystemExit("error: TRL loaded the model in another precision than float32")
    trainer.train()
    if trainer.model.is_gradient_checkpointing != job["gpu"]:
        raise SystemExit("error: TRL ignores gradient_checkpointing, so the sides are not equal")
    return seen.steps()[1:]


# ---- chunks and pairs ----------------------------------------------------------------------------


def run_chunk(job: dict) -> None:
    """In the new process: run one side, and write its steps and versions to a file."""
    import torch

    steps = run_trl(job) if job["side"] == "trl" else run_lite_ppo(job)
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "vllm", "trl", "accelerate"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            pass
    gpu = torch.cuda.get_device_name() if job["gpu"] else ""
    result = dict(steps=steps, versions=versions, threads=torch.get_num_threads(), gpu=gpu)
    Path(job["result"]).write_text(json.dumps(result))


def chunk(side: str, python: str, job: dict, threads: int) -> dict:
    """Start run_chunk in a new process of this interpreter."""
    environment = os.environ | dict(
        OMP_NUM_THREADS=str(threads),
        MKL_NUM_THREADS=str(threads),
        TOKENIZERS_PARALLELISM="false",
        TRANSFORMERS_VERBOSITY="error",
        HF_HUB_OFFLINE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # both load weights into an engine in their process
    )
    if not job["gpu"]:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        job = job | dict(side=side, folder=str(Path(folder, "run")), result=str(result))
        command = [python, __file__, "--chunk", json.dumps(job)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            output = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            raise SystemExit(f"error: the chunk of {side} failed:\n{output}")
        return json.loads(result.read_text())


def median_of(phase: str, side: dict) -> float:
    return median(step[phase] for step in side["steps"])


def summarize(pairs: list[dict]) -> dict:
    """Medians over all steps of each side, and ratios lite_ppo / TRL within each pair."""
    steps: dict[str, list[dict]] = {"trl": [], "lite_ppo": []}
    for pair in pairs:
        for side in steps:
            steps[side] += pair[side]["steps"]
    rows = {}
    for phase in ("step", *PHASES, "cpu"):
        ratios = []
        for pair in pairs:
            trl = max(1e-9, median_of(phase, pair["trl"]))
            ratios.append(median_of(phase, pair["lite_ppo"]) / trl)
        rows[phase] = dict(
            trl=median(step[phase] for step in steps["trl"]),
            lite_ppo=median(step[phase] for step in steps["lite_ppo"]),
            ratio=median(ratios),
            lowest=min(ratios),
            highest=max(ratios),
        )
    tokens = {side: mean(step["tokens"] for step in steps[side]) for side in steps}
    return dict(seconds=rows, tokens_per_step=tokens)


def run_pairs(args, job: dict) -> Iterator[dict]:
    """Each pair as soon as it is measured."""
    pythons = {"trl": args.trl_python, "lite_ppo": sys.executable}
    for i in range(args.pairs):
        order = ("trl", "lite_ppo") if i % 2 == 0 else ("lite_ppo", "trl")
        pair = {}
        for side in order:
            pair[side] = chunk(side, pythons[side], job | {"seed": i}, args.threads)
        trl, ours = median_of("step", pair["trl"]), median_of("step", pair["lite_ppo"])
        text = f"TRL {trl:.3f} s, lite_ppo {ours:.3f} s per step, ratio {ours / trl:.2f}"
        print(f"pair {i + 1}: {text}", flush=True)
        yield pair


# ---- report --------------------------------------------------------------------------------------


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def make_record(args, settings: dict, pairs: list[dict]) -> dict:
    """What --output holds: the conditions, the summary and all pairs so far."""
    command = " ".join(["python", "benchmarks/versus_trl.py", *sys.argv[1:]])
    return dict(
        command=command.replace(args.trl_python, "trl-venv/bin/python"),
        date=f"{datetime.now():%Y-%m-%d %H:%M}",
        machine=f"{os.cpu_count()} cores, {cpu_name()}; {args.threads} threads",
        gpu=pairs[0]["lite_ppo"]["gpu"],
        versions={side: pairs[0][side]["versions"] for side in ("trl", "lite_ppo")},
        settings=settings | dict(model=args.model, data=args.data),
        summary=summarize(pairs),
        pairs=pairs,
    )


def write(record: dict, output: str) -> None:
    """Replace the file at once: it never holds half a record."""
    partial = f"{output}.partial"
    Path(partial).write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, output)


def report(summary: dict) -> None:
    print(f"\n{'median seconds':<16}{'TRL':>10}{'lite_ppo':>10}{'ratio':>10}   over pairs")
    for phase, row in summary["seconds"].items():
        numbers = f"{row['trl']:>10.3f}{row['lite_ppo']:>10.3f}{row['ratio']:>10.2f}"
        print(f"{phase:<16}{numbers}   {row['lowest']:.2f} to {row['highest']:.2f}")
    print("cpu: processor seconds of the main process, with threads that spin while they wait")
    trl, ours = (summary["tokens_per_step"][side] for side in ("trl", "lite_ppo"))
    print(f"{'tokens per step':<16}{trl:>10.0f}{ours:>10.0f}{ours / trl:>10.2f}")
    ratio = summary["seconds"]["step"]["ratio"]
    word = "PASS" if ratio <= BOUND else "FAIL"
    print(f"\n{word}  median step time of lite_ppo / TRL: {ratio:.2f} (at most {BOUND})")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--trl-python", default="trl-venv/bin/python", help="python of the environment of TRL")
    add("--pairs", type=int, default=5, help="at least 1")
    add("--steps", type=int, default=6, help="timed steps per chunk; one more is dropped")
    add("--model", default="toy")
    add("--data", default="toy:medium")
    add("--prompts", type=int, default=32)
    add("--group", type=int, default=8)
    add("--minibatches", type=int, default=2, help="optimizer steps per rollout")
    add("--prompt-tokens", type=int, default=64, help="the longest prompt")
    add("--new-tokens", type=int, default=96)
    add("--lr", type=float, default=5e-4)
    add("--warmup", type=int, default=5, help="in rollouts")
    add("--threads", type=int, default=2)
    add("--gpu", action="store_true", help="both with vLLM, in bfloat16, on one GPU")
    add("--trl-batch", type=int, default=0, help="responses per micro-batch; default: all")
    add("--micro-batch-tokens", type=int, default=2**20, help="of lite_ppo.py")
    add("--output", help="JSON file")
    add("--chunk", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.pairs < 1:
        parser.error(f"--pairs {args.pairs}: must be at least 1")
    if not args.chunk:
        check_machine(parser, args)
    if args.output and not Path(args.output).resolve().parent.is_dir():
        parser.error(f"--output {args.output}: its folder does not exist; create it")
    if not args.chunk and args.prompts * args.group % args.minibatches:
        parser.error("--minibatches must divide the responses of a step: TRL needs equal batches")
    minibatch = args.prompts * args.group // args.minibatches
    if args.trl_batch and minibatch % args.trl_batch:
        parser.error(f"--trl-batch {args.trl_batch}: must divide a mini-batch of {minibatch}")
    return args


def check_machine(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a message if TRL's environment or the GPU is missing."""
    import torch

    if not shutil.which(args.trl_python):
        text = "no such program; make an environment from benchmarks/requirements-trl.txt"
        parser.error(f"--trl-python {args.trl_python}: {text}")
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu: torch finds no GPU; leave it out to compare on the CPU")


def main() -> None:
    args = parse()
    if args.chunk:
        return run_chunk(json.loads(args.chunk))
    from support import toy

    names = """prompts group minibatches prompt_tokens new_tokens lr warmup steps gpu trl_batch
        micro_batch_tokens""".split()
    settings = {name: getattr(args, name) for name in names}
    paths = dict(model=toy.resolve_model(args.model), data=toy.resolve_data(args.data))
    pairs = []
    for pair in run_pairs(args, settings | paths):
        pairs.append(pair)
        record = make_record(args, settings, pairs)
        if args.output:
            write(record, args.output)
    report(record["summary"])
    trl, ours = (record["versions"][side] for side in ("trl", "lite_ppo"))
    print(
        f"{record['machine']}; TRL {trl['trl']}, torch {trl['torch']} and {ours['torch']}, "
        f"transformers {trl['transformers']} and {ours['transformers']}"
    )


if __name__ == "__main__":
    main()
