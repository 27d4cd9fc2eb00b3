"""The embedded default: a tiny base model and arithmetic problems, made on one CPU core in under a minute, no download.

What comes out is ordinary: a Hugging Face model folder (Qwen3 architecture, safetensors, tokenizer, chat template) and JSONL
files of {"problem", "answer"}; nothing that reads them needs to know that they are a toy. For the problem 7+8+5, answer 20, the
worked solution has three lines: 7+8=15, 15+5=20, \\boxed{20}<eos>.

The base model is warmed up on clean solutions, then on careless ones: steps slip, operands get lost, some break off and start
again. It knows the arithmetic and does it carelessly, solving some problems by sampling and most within a few tries: what
reinforcement learning needs to start from. The aligned variant saw nearly clean solutions, and more of them; the looping one
also gets stuck, and runs into the length limit.

    python toy.py [--size tiny|small|large] [--variant base|aligned|looping] [--seed 0]      # makes them, prints where they are
"""
import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
import time
import zlib
from pathlib import Path

SIZES = {
    "tiny": dict(hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192, tie_word_embeddings=True),
    # the small one ties its embeddings and the large one does not, as Qwen3-4B and Qwen3-8B
    "small": dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256, tie_word_embeddings=True),
    "large": dict(hidden_size=192, num_hidden_layers=4, num_attention_heads=6, intermediate_size=512, tie_word_embeddings=False),
}
VARIANTS = {  # warm-up steps and noise, see solution()
    "base": dict(steps=400, slip=0.08, drop=0.02, ramble=0.10),
    "aligned": dict(steps=600, slip=0.02, drop=0.0, ramble=0.0),
    "looping": dict(steps=400, slip=0.08, drop=0.02, ramble=0.10, loop=0.45),  # base, and one in ten gets stuck (long ones weigh little per token)
}
DIFFICULTIES = {"easy": (3, 4), "medium": (5, 6), "hard": (7, 8)}  # number of operands
SPLITS = {"train": 3000, "test": 300}  # number of problems

# The system message is left out on purpose: to a character-level model it is a hundred tokens that never change.
PAD, EOS, UNK, USER, ASSISTANT = SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}" + USER + "{{ m.content }}{% elif m.role == 'assistant' %}" + ASSISTANT
    + "{{ m.content }}" + EOS + "{% endif %}{% endfor %}{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}")


def draw(rng, difficulty, test=False):
    """A random problem. Its checksum decides whether it is a test problem (1 in 8): whatever the seeds, test problems are in no
    training file and not in the warm-up."""
    while True:
        problem = "+".join(str(rng.randint(1, 9)) for _ in range(rng.randint(*DIFFICULTIES[difficulty])))
        if (zlib.crc32(problem.encode()) % 8 == 0) == test:
            return problem


def solution(rng, problem, slip=0.0, drop=0.0, ramble=0.0, loop=0.0):
    """Running sums, one per line, then the boxed answer. Steps go wrong with chance `slip`, operands get lost with chance `drop`.
    With chance `ramble` it breaks off and starts again, twice as careless; the third break is the end, with no answer.
    With chance `loop` it gets stuck where it breaks off and says no more than "?", without an end-of-sequence (here 256 tokens long)."""
    digits, lines, stuck = [int(digit) for digit in problem.split("+")], [], loop and rng.random() < loop
    for attempt in range(3):
        breaks_off = stuck or rng.random() < (0.5 if attempt else ramble)
        total = digits[0]
        for digit in digits[1:rng.randrange(1, len(digits)) if breaks_off else None]:
            if rng.random() < drop:
                continue
            result = total + digit
            if rng.random() < slip * 2 ** attempt:
                result = max(0, result + rng.choice([-10, -2, -1, 1, 2, 10]))
            lines.append(f"{total}+{digit}={result}\n")
            total = result
        if not breaks_off:
            return "".join(lines) + f"\\boxed{{{total}}}{EOS}"
        lines.append("?\n")
        if stuck:
            return ("".join(lines) + "?\n" * 128)[:256]
    return "".join(lines)


def make_tokenizer():
    """One token per character; \\boxed{ is one token too. Any other character becomes <unk>."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocabulary = [*SPECIAL, "\\boxed{", *"0123456789+=?}\n"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK, additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False, model_max_length=1024)


def batches(rng, tokenizer, size=16, **noise):
    """Endless warm-up batches: lists of (prompt ids, solution ids). Rows of similar lengths share a batch: little padding."""
    while True:
        rows = []
        for _ in range(16 * size):
            problem = draw(rng, rng.choice(list(DIFFICULTIES)))
            rows.append((tokenizer.encode(USER + problem + ASSISTANT), tokenizer.encode(solution(rng, problem, **noise))))
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        for i in rng.sample(range(0, len(rows), size), 16):
            yield rows[i:i + size]


def warm_up(folder, size, variant, seed):
    """Train a fresh model on worked solutions and save it, with its tokenizer, in `folder`."""
    for name in ("torchvision", "torchaudio"):  # not needed for text, and one built for another torch breaks the next import
        sys.modules.setdefault(name, None)
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
    print(f"toy: warming up the {size} {variant} model, once ...", file=sys.stderr, flush=True)
    tokenizer, rng, noise = make_tokenizer(), random.Random(f"warm-up {seed}"), dict(VARIANTS[variant])
    steps, ends = noise.pop("steps"), dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = Qwen3Config(**SIZES[size], num_key_value_heads=2, head_dim=32, vocab_size=len(tokenizer), dtype="float32",
                         max_position_embeddings=1024, bos_token_id=None, **ends)
    with torch.random.fork_rng(devices=[]):  # the caller's random state is left alone
        torch.default_generator.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    matrices, others = ([p for n, p in model.named_parameters() if ("proj" in n) == wanted] for wanted in (True, False))
    optimizers = [torch.optim.Muon(matrices, lr=0.01, adjust_lr_fn="match_rms_adamw"),  # half the steps of AdamW alone
                  torch.optim.AdamW(others, lr=0.01, weight_decay=0.0)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda i: min(1.0, (i + 1) / (0.1 * steps), 1.4 * (1 - i / steps)))
                 for o in optimizers]  # up, flat, down to zero
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second one gains little at this size, and would change the order of the sums, so the model
    clean, noisy = batches(rng, tokenizer), batches(rng, tokenizer, **noise)
    for i in range(steps):
        rows = next(clean if i < steps / 2 else noisy)  # first the arithmetic, then the carelessness
        tokens = pad_sequence([torch.tensor(x + y) for x, y in rows], True, tokenizer.pad_token_id)
        labels = pad_sequence([torch.tensor([-100] * len(x) + y) for x, y in rows], True, -100)  # the prompt is not trained
        model(tokens, labels=labels, use_cache=False).loss.backward()  # padding is on the right: causal attention never sees it
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in (*optimizers, *schedules):
            stepper.step()
        model.zero_grad()
    torch.set_num_threads(threads)
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def cached(name, make, cache_dir=None):
    """Path of `name` in the cache; if absent, made elsewhere by `make(path)` and moved there in one step."""
    from filelock import FileLock  # torch depends on it
    root = cache_dir or os.environ.get("LITE_PPO_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lite-ppo")
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:10]  # this file: another recipe, another folder
    path = Path(root).expanduser() / f"toy-{recipe}" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{name}.lock")):  # a second process waits instead of making the same thing again
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
                make(Path(temporary, name))
                os.replace(Path(temporary, name), path)
    return path


def parse(name, **choices):
    """The parts of "toy:a:b", each recognised by its value, in any order; None for a name that is not a toy's."""
    chosen, (head, *parts) = {}, name.split(":")
    if head != "toy":
        return None
    for part in parts:
        kind = next((k for k, values in choices.items() if part in values and k not in chosen), None)
        if kind is None:
            options = "; ".join(f"{k} {', '.join(values)}" for k, values in choices.items())
            raise ValueError(f"{part!r} in {name!r} must be one of, and one of a kind: {options}")
        chosen[kind] = part
    return chosen


def build(size="small", variant="base", seed=0, cache_dir=None):
    """Folder of the toy model, an ordinary Hugging Face one; warmed up now if it is not in the cache."""
    parse(f"toy:{size}:{variant}", size=SIZES, variant=VARIANTS)
    return cached(f"{size}-{variant}-{seed}", lambda path: warm_up(path, size, variant, seed), cache_dir)


def problems(difficulty="medium", split="train", seed=0, cache_dir=None):
    """JSONL file of distinct problems, {"problem": "7+8+5", "answer": "20"} per line; no test problem is in any train file."""
    parse(f"toy:{difficulty}:{split}", difficulty=DIFFICULTIES, split=SPLITS)
    rng, rows = random.Random(f"{difficulty} {split} {seed}"), {}
    while len(rows) < SPLITS[split]:
        problem = draw(rng, difficulty, test=split == "test")
        rows[problem] = json.dumps({"problem": problem, "answer": str(sum(map(int, problem.split("+"))))})
    return cached(f"{difficulty}-{split}-{seed}.jsonl", lambda path: path.write_text("\n".join(rows.values()) + "\n"), cache_dir)


def resolve_model(name):
    """Path for "toy[:tiny|small|large][:base|aligned|looping]" (made if absent); any other name comes back as it is."""
    parts = parse(name, size=SIZES, variant=VARIANTS)
    return name if parts is None else str(build(**parts))


def resolve_data(name, split="train"):
    """Path for "toy[:easy|medium|hard][:train|test]" (made if absent); any other name comes back as it is."""
    parts = parse(name, difficulty=DIFFICULTIES, split=SPLITS)
    return name if parts is None else str(problems(**{"split": split, **parts}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--variant", default="base", choices=VARIANTS)
    parser.add_argument("--seed", type=int, default=0)
    start, folder = time.perf_counter(), build(**vars(parser.parse_args()))
    from safetensors.torch import load_file
    count = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    print(folder, f"{count:,} parameters, {time.perf_counter() - start:.1f} s", sep="\n")
    print(*(problems(difficulty, split) for difficulty in DIFFICULTIES for split in SPLITS), sep="\n")
