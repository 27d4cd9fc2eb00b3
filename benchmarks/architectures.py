"""Which classes of transformers are accepted, and are their log-probs right?

    python benchmarks/architectures.py [NAMES ...] [--output docs/architectures.md]

For each class that transformers' AutoModelForCausalLM knows: the checks of the start
(support/models.py, support/selfcheck.py) judge its default config. If they accept it, a folder with
a tiny model of the class is made, with random weights, biases and norms, and lite_ppo.train() runs
two optimizer steps of it in float32 with the transformers sampler, into a final model folder.

The table shows the largest of two differences, in nats:
    of a sampled token's log-prob between sampler and trainer, in both steps;
    of a token's log-prob between the trainer (one packed row) and transformers' own class
    (from_pretrained, each sequence alone), for the final model.
The law: for an accepted class it is at most 1e-4. The exit code is 1 if it is broken.

NAMES: model types, such as qwen3; default: all. Some are tried with further settings as well.
"""

import argparse
import contextlib
import io
import json
import math
import sys
import tempfile
import traceback
from datetime import date
from pathlib import Path
from typing import NamedTuple

import common  # first: it makes lite_ppo importable
import torch

import lite_ppo
from support import models, selfcheck, toy
from support.errors import UserError

LAW = 1e-4  # nats
TOKENS = 28  # of a prompt and its response
# Settings that the default config of the class lacks, but every published model has.
MISSING = {
    "hunyuan_v1_dense": dict(head_dim=128),
    "ministral": dict(head_dim=128),
    "nemotron": dict(num_key_value_heads=8),
}
WINDOW = dict(use_sliding_window=True, sliding_window=4096, max_window_layers=14)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0)
LLAMA3 |= dict(high_freq_factor=4.0, original_max_position_embeddings=8192)
YARN = dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=32768)
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.75)
LONGROPE |= dict(short_factor=[1.0] * 48, long_factor=[1.0 + i for i in range(48)])
LONGROPE |= dict(original_max_position_embeddings=4096)
PHI4 = dict(num_attention_heads=24, num_key_value_heads=8, rope_parameters=LONGROPE)
PHI4 |= dict(max_position_embeddings=131072, tie_word_embeddings=True)
DROPOUT = dict(attention_dropout=0.1, residual_dropout=0.1)
FURTHER = {  # model type: {what is set: the fields}
    "granite": {"logits_scaling 8": dict(logits_scaling=8.0)},
    "lfm2": {"with convolutions": dict(layer_types=["conv", "full_attention"] * 16)},
    "llama": {"llama3 rope": dict(rope_parameters=LLAMA3, max_position_embeddings=65536)},
    "mistral": {"no window": dict(sliding_window=None)},
    "phi3": {
        "longrope, at most 4,096 tokens": PHI4,
        "longrope, up to 8,192 tokens": PHI4 | dict(tokens=8192),
    },
    "qwen2": {"window in the upper half": WINDOW},
    "qwen3": {
        "tied": dict(tie_word_embeddings=True),
        "yarn": dict(rope_parameters=YARN, max_position_embeddings=131072),
    },
    "seed_oss": {"dropout": DROPOUT},
    "starcoder2": {"dropout": DROPOUT | dict(embedding_dropout=0.1)},
}


class Row(NamedTuple):
    """A line of the table."""

    name: str  # class, and what is set
    reason: str  # why it is refused; "" if it is accepted
    difference: float  # nats; 0 if it is refused

    def markdown(self) -> str:
        if self.reason:
            return f"| {self.name} | no | | {self.reason} |"
        return f"| {self.name} | yes | {self.difference:.1e} | |"


# ---- one class -----------------------------------------------------------------------------------


def judge(config, tokens: int) -> str:
    """The reason why the checks of the start refuse this config, or ""."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    problem = next(models.find_architecture_problems(model, config, tokens), "")
    return clean(problem.removeprefix(f"{type(model).__name__} is "))


def clean(problem: str) -> str:
    """A message without its remedy, for a cell of the table."""
    problem = problem.removeprefix("not supported: ")
    return problem.split(f"; {models.REMEDY}")[0].replace("|", "\\|")


def make_folder(config, folder: Path) -> str:
    """A tiny model of the class, and the tokenizer of the toy."""
    tokenizer = toy.make_tokenizer()
    tiny = selfcheck.shrink(config, selfcheck.LONG)
    tiny.vocab_size = len(tokenizer)
    tiny.dtype = torch.float32
    tiny.eos_token_id = tokenizer.eos_token_id
    tiny.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    model = selfcheck.build_plain(tiny)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def train(model: str, output: Path, steps: int = 2) -> float:
    """A run of so many optimizer steps. Returns the largest gap between sampler and trainer."""
    cfg = lite_ppo.Config(
        model=model,
        train_data="toy:easy",
        sampler="transformers",
        dtype="float32",
        prompts_per_step=4,
        group_size=4,
        max_prompt_tokens=TOKENS // 2,
        max_new_tokens=TOKENS // 2,
        steps=steps,
        lr=1e-3,
        warmup_steps=0,
        micro_batch_tokens=200,
        eval_every=0,
        reward_workers=1,
        max_logprob_gap=1e9,  # the table shows it
        save_every=2,
        output_dir=str(output),
    )
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        lite_ppo.train(cfg)
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return max(json.loads(line).get("rollout/logprob_gap_max", 0.0) for line in lines)


@torch.no_grad()
def compare(folder: str) -> float:
    """The largest difference between the trainer's log-probs and transformers' own."""
    from transformers import AutoModelForCausalLM

    responses = common.synthetic([14, 30, 3, 21], 9, len(toy.make_tokenizer()))
    zeros = torch.zeros(len(responses) + 1)
    batch = lite_ppo.make_micro_batch(responses, [0, 1, 2, 3], zeros, zeros, torch.device("cpu"))
    cfg = lite_ppo.Config(model=folder, dtype="float32")
    policy = lite_ppo.build_policy(cfg, folder, torch.device("cpu"))
    found, _ = policy.response_logprobs(batch, 1.0)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    expected = []
    for response in responses:
        prompt = torch.tensor(response.problem.prompt_ids)
        tokens = torch.from_numpy(response.token_ids).long()
        logits = plain(torch.cat([prompt, tokens])[None], use_cache=False).logits[0]
        logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
        expected.append(logprobs.gather(-1, tokens[:, None])[:, 0])
    return float((found - torch.cat(expected)).abs().max())


def try_class(name: str, config, tokens: int = TOKENS) -> Row:
    try:
        reason = judge(config, tokens)
    except Exception as error:  # a default config may be incomplete
        reason = f"its default config builds no model ({selfcheck.describe(error)})"
    if reason:
        return Row(name, reason, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        model = make_folder(config, Path(folder, "model"))
        try:
            models.load_tokenizer(model, TOKENS)  # the checks of the files as well
        except UserError as error:
            return Row(name, clean(str(error).removeprefix(f"--model {model}: ")), 0.0)
        try:
            gap = train(model, Path(folder, "run"))
            return Row(name, "", max(gap, compare(f"{folder}/run/final")))
        except Exception:  # an accepted class must train
            traceback.print_exc()
            return Row(name, "", math.inf)


# ---- all classes ---------------------------------------------------------------------------------


def variants(model_type: str, class_name: str):
    """(name of the row, config, tokens) for the default config and the further settings."""
    from transformers import CONFIG_MAPPING

    for label, changes in {"": {}, **FURTHER.get(model_type, {})}.items():
        fields = MISSING.get(model_type, {}) | changes
        tokens = fields.pop("tokens", TOKENS)
        config = CONFIG_MAPPING[model_type](**fields)
        yield f"`{class_name}`{label and ', '}{label}", config, tokens


def try_all(names: list[str]) -> list[Row]:
    """A row for each class and setting, printed as soon as it is known."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    rows = []
    seen = set()
    for model_type, class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if names and model_type not in names or class_name in seen:
            continue
        seen.add(class_name)
        try:
            found = [try_class(*variant) for variant in variants(model_type, class_name)]
        except Exception as error:
            if type(error).__module__.startswith("huggingface_hub"):  # of the default config
                found = [Row(f"`{class_name}`", "it is a model of several parts", 0.0)]
            else:
                raise
        for row in found:
            print(row.markdown(), flush=True)
        rows += found
    return rows


PAGE = """# Which architectures are accepted

Whether a model is accepted is decided when a run starts, not by a list:
[support/selfcheck.py](../support/selfcheck.py) builds a tiny copy of its class and compares the
log-probs and gradients of a packed row with those of each sequence alone. This page shows the
outcome for every class of `AutoModelForCausalLM`, with its default config; some have further
settings. "Difference" is the largest one, in nats, between the log-probs of the trainer, the
sampler and transformers' own class in two real optimizer steps of a tiny model in float32. The law
is at most {law:g}.

{accepted} of {count} rows are accepted. Made by `{command}` with transformers {version} and torch
{torch}, {date}.

| class | accepted | difference | why not |
|---|---|---|---|
{rows}
"""


def write_page(rows: list[Row], output: str) -> None:
    import transformers

    rows = sorted(rows, key=lambda row: (row.reason != "", row.name.lower()))
    text = PAGE.format(
        law=LAW,
        accepted=sum(not row.reason for row in rows),
        count=len(rows),
        command=common.command(),
        version=transformers.__version__,
        torch=torch.__version__,
        date=date.today(),
        rows="\n".join(row.markdown() for row in rows),
    )
    Path(output).write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="model types; default: all")
    parser.add_argument("--output", default="", help="Markdown file")
    args = parser.parse_args()
    if not torch.distributed.is_initialized():
        common.start_ranks()
    rows = try_all(args.names)
    if not rows:
        sys.exit(f"error: {' '.join(args.names)}: no such model type in AutoModelForCausalLM")
    if args.output:
        write_page(rows, args.output)
    worst = max(rows, key=lambda row: row.difference)
    verdict = common.check(f"largest difference, {worst.name}", worst.difference, LAW)
    if not verdict["pass"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
