"""A tiny world for the tests: models with random weights, data, rewards, and a configuration.

Importing this module prepares the process: CPU only, no network, one thread.
"""

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

# For test_gpu.py: the GPUs that the user lets this process see.
os.environ.update(TEST_GPUS=os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
# The imports below read these variables.
os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

# Before transformers: the package `support` hides broken packages from it.
from lite_ppo import Config
from support import samplers, toy

# isort: split
import torch
import torch.distributed as dist
from hypothesis import settings
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

one_rank = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
for name, value in one_rank.items():
    os.environ.setdefault(name, value)  # torchrun has set them for two ranks

settings.register_profile(
    "repeatable", max_examples=60, deadline=None, derandomize=True, database=None
)
settings.load_profile("repeatable")
torch.set_num_threads(1)

ROOT = HERE = Path(__file__).parent.parent  # of the repository
CPU = torch.device("cpu")
WORLD = int(os.environ["WORLD_SIZE"])
ENGINE = os.environ.get("TEST_ENGINE", "transformers")
EOS = [1, 9]  # token ids that end a response: <eos>, and "3"
VOCABULARY = 21  # tokens

load_model = AutoModelForCausalLM.from_pretrained


def start_ranks() -> None:
    """Start torch.distributed, unless it runs: vLLM ends it when its engine is closed."""
    if dist.is_initialized():
        return
    if int(os.environ["WORLD_SIZE"]) > 1:  # in a fork, WORLD is that of the server
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def missing_engine() -> str:
    """Why ENGINE does not run here: vLLM is not installed, or not for this machine."""
    if ENGINE != "vllm":
        return ""  # choose_sampler() would import vLLM, which changes this process
    chosen, reason = samplers.choose_sampler("auto")
    return "" if chosen == "vllm" else reason


# ---- data and rewards ----------------------------------------------------------------------------

REWARDS = r"""
import os

def sevens(response, row):
    return float(response[:1] == "7" and row["answer"].isdigit())

def even(response, row):
    return float(len(response) % 2 == 0)

def trouble(response, row):
    while response == "hangs":
        pass
    if response == "exits":
        os._exit(3)
    if response == "raises":
        raise KeyError("no such thing")
    if response == "nan":
        return float("nan")
    if response == "word":
        return float("seven")
    return float(row["answer"])
"""

GOOD = '{"problem": "1+1", "answer": 2}\n'
LONG = '{"problem": "1+1+1+1+1+1+1+1+1+1", "answer": 10}\n'


def training_data() -> str:
    """Ten problems with prompts of different lengths."""
    lines = []
    for i in range(10):
        summands = [*"12345"[: 1 + i % 5], str(i)]
        lines.append(json.dumps({"problem": "+".join(summands), "answer": str(i)}) + "\n")
    return "".join(lines)


FILES = {
    "train.jsonl": training_data(),
    "dev.jsonl": GOOD,
    "long.jsonl": LONG,
    "mixed.jsonl": GOOD + LONG,
    "syntax.jsonl": GOOD + "\n{'problem': 1}\n",
    "list.jsonl": '["1+1", "2"]\n',
    "empty.jsonl": "\n",
    "unanswered.jsonl": GOOD + '{"problem": "1+2"}\n',
    "rewards.py": REWARDS,
    "syntax.py": "def f(:\n",
}


# ---- model folders, whole and spoilt -------------------------------------------------------------


def make_model(folder: Path, tied: bool) -> None:
    """A Qwen3 model with random weights, and its tokenizer."""
    torch.manual_seed(0)
    shape = Qwen3Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=96,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        eos_token_id=1,
        bos_token_id=None,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(shape)
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=0)
    model.save_pretrained(folder)
    toy.make_tokenizer().save_pretrained(folder)


def change_json(folder: Path, file: str, **values) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def setting(file: str, **values) -> Callable[[Path], None]:
    """A change of a JSON file in a model folder."""
    return functools.partial(change_json, file=file, **values)


def remove_files(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        path.unlink()


def without(pattern: str) -> Callable[[Path], None]:
    return functools.partial(remove_files, pattern=pattern)


def cut_off(folder: Path, lost: int) -> None:
    """An interrupted download: the last bytes of the weights are missing."""
    path = folder / "model.safetensors"
    os.truncate(path, max(500, path.stat().st_size - lost))


def without_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up" not in name}
    save_file(kept, path, {"format": "pt"})


def with_empty_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def with_new_token(folder: Path) -> None:
    """The chat template uses a token that was added without a row of the embedding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens("<new>")
    tokenizer.chat_template += "{% if tools %}<new>{% endif %}"
    tokenizer.save_pretrained(folder)


def with_broken_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")


def with_gpt2(folder: Path) -> None:
    """A model without a list of layers."""
    shape = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=VOCABULARY, eos_token_id=1)
    GPT2LMHeadModel(shape).save_pretrained(folder)


def with_class(folder: Path, name: str, **changes) -> None:
    """Another class of transformers, with random weights. name: model_type."""
    shape = dict(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=16,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
    )
    config = CONFIG_MAPPING[name](**shape | changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def with_more(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    """Weights of another class than that of config.json."""
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name: torch.ones(shape)}, path, {"format": "pt"})


def with_other_names(folder: Path) -> None:
    """The names of the tensors that a converter might write."""
    path = folder / "model.safetensors"
    tensors = {f"decoder.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


SPOILT = {  # folder: what is changed in a copy of the tied model
    "weightless": without("model.safetensors"),
    "silent": without("chat_template.jinja"),
    "hollow": without("config.json"),
    "dumb": without("tokenizer*"),
    "cut": functools.partial(cut_off, lost=4),  # within the weights
    "stub": functools.partial(cut_off, lost=200_000),  # within the header
    "lost": without_tensor,
    "wide": setting("config.json", intermediate_size=128),
    "quantized": setting("config.json", quantization_config=dict(quant_method="fp8")),
    "crowd": with_new_token,
    "ended": setting("generation_config.json", eos_token_id=[1, 40]),
    "garbled": with_empty_tokenizer,
    "unspoken": with_broken_generation_config,
    "gpt": with_gpt2,
    "capped": functools.partial(with_class, name="gemma2"),
    "experts": functools.partial(with_class, name="mixtral", num_local_experts=4),
    "renamed": with_other_names,
    "foreign": setting("config.json", model_type="x", auto_map={"AutoConfig": "code.Config"}),
    "biased": functools.partial(with_more, name="lm_head.bias", shape=(VOCABULARY,)),
    "loose": functools.partial(with_more, name="lm_head.weight", shape=(VOCABULARY, 64)),
    "normed": setting("config.json", model_type="llama"),  # it has no norms of the queries
}


def make_world(root: Path) -> None:
    """Fill the folder with models, data and reward functions, some of them broken."""
    make_model(root / "tied", tied=True)
    make_model(root / "untied", tied=False)
    for name, spoil in SPOILT.items():
        shutil.copytree(root / "tied", root / name)
        spoil(root / name)
    for name, text in FILES.items():
        (root / name).write_text(text)


# ---- configurations ------------------------------------------------------------------------------


def config(root: Path, **changes) -> Config:
    """Two steps of 16 responses, in two mini-batches each."""
    values = dict(
        model=f"{root}/tied",
        train_data=f"{root}/train.jsonl",
        eval_data=(f"{root}/dev.jsonl",),
        reward=f"{root}/rewards.py:even",
        lr=1e-3,
        warmup_steps=0,
        sampler="transformers",
        prompts_per_step=4,
        group_size=4,
        max_prompt_tokens=16,
        max_new_tokens=12,
        steps=2,
        minibatches=2,
        micro_batch_tokens=100,
        eval_samples=2,
        reward_workers=1,
        max_num_seqs=64,
        activation_checkpointing=False,
        samples_per_step=16,
    )
    return Config(**values | changes)


def command_line(root: Path, **flags: str) -> list[str]:
    """The flags of a run that learns to begin its responses with "7"."""
    values = {
        "--model": f"{root}/tied",
        "--train-data": f"{root}/train.jsonl",
        "--eval-data": f"{root}/dev.jsonl",
        "--reward": f"{root}/rewards.py:sevens",
        "--sampler": "transformers",
        "--steps": "16",
        "--prompts-per-step": "8",
        "--group-size": "8",
        "--minibatches": "2",
        "--max-prompt-tokens": "16",
        "--max-new-tokens": "4",
        "--lr": "3e-3",
        "--warmup-steps": "4",
        "--eval-every": "10",
        "--samples-per-step": "64",
        "--reward-workers": "1",
    }
    return [word for pair in (values | flags).items() for word in pair]


# ---- what a model computes, what a run has written -----------------------------------------------


def predictions(model, prompt, tokens, temperature: float = 1.0):
    """Log-probs of the response tokens [R], and of the whole vocabulary [R, V].

    The model sees this sequence alone, without a cache and without packing.
    """
    tokens = torch.as_tensor(tokens).long()
    sequence = torch.cat([torch.as_tensor(prompt), tokens])
    logits = model(sequence[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs[range(len(tokens)), tokens], logprobs


def read(path, *prefixes: str) -> list[dict]:
    """The rows of a JSONL file, without the keys that begin with one of these prefixes."""
    rows = []
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        rows.append({key: row[key] for key in row if not key.startswith(prefixes)})
    return rows
