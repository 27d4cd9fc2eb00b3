"""Packed and padded training: tokens per second of forward and backward over one rollout.

    python benchmarks/packing.py [--max-length 512] [--output packing.json]

All forms share the model, the log-prob function, the loss (a fixed weight per response) and the
responses. Lengths are log-normal, clipped at --max-length; their mean is about a third of the
maximum. Only real tokens count. Sequences per micro-batch:

    packed                    lite_ppo.py: plan_micro_batches at --budget tokens, make_micro_batch,
                              packed_attention (on CPUs a kernel call per run of equal lengths)
    packed, padded inside     the same, but attention pads inside: one kernel call for all
    padded                    [B, longest of all], padding on the right, attention mask, the SDPA
                              forward of transformers; B * longest <= budget: equal activations
    padded, own longest       the same B; each micro-batch is as wide as its longest sequence
    padded, as many           as many sequences per micro-batch as packed on average: more memory

Padded micro-batches take the sequences in random order, as a rollout does. All forms train the same
FSDP2 model, in alternation; medians are printed. The first round is not timed; it compares the
gradients: |difference| / |packed|. A second table times attention alone, on the first micro-batch.
"""

import functools
import time
from dataclasses import asdict, dataclass
from statistics import NormalDist, median

import common  # first: it makes lite_ppo importable
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn.utils.rnn import pad_sequence

import lite_ppo
from support.logprobs import linear_logprobs
from support.packed import packed_attention
from support.util import compute_device, compute_dtype


@dataclass
class Args:
    shape: str = "qwen3-0.6b" if common.CUDA else "small"  # a name in common.SHAPES, or JSON text
    max_length: int = 8192 if common.CUDA else 512  # of a response
    prompt_length: int = 128 if common.CUDA else 32
    sequences: int = 64 if common.CUDA else 32
    budget: int = 16_384 if common.CUDA else 4096  # tokens of a micro-batch, with padding
    activation_checkpointing: bool = common.CUDA
    rounds: int = 5
    seed: int = 0
    output: str = ""  # JSON file


def draw_lengths(args: Args) -> list[int]:
    """One draw from each of equally likely ranges, so that few draws have the spread of many."""
    rng = np.random.default_rng(args.seed)
    ranks = (np.arange(args.sequences) + rng.random(args.sequences)) / args.sequences
    normal = np.array([NormalDist().inv_cdf(rank) for rank in ranks])
    lengths = 0.25 * args.max_length * np.exp(0.8 * normal)
    return rng.permutation(lengths.clip(8, args.max_length).astype(int)).tolist()


# ---- attention -----------------------------------------------------------------------------------


def padded_attention(
    module, query, key, value, attention_mask, scaling=None, micro_batch=None, **kwargs
):
    """One kernel call. It pads the sequences and removes the padding, which is on the right."""
    lengths = torch.tensor(micro_batch.lengths, device=query.device)
    padded = []
    for x in (query, key, value):
        sequences = x[0].transpose(0, 1).split(micro_batch.lengths)
        padded.append(pad_sequence(sequences, batch_first=True).transpose(1, 2))
    out = F.scaled_dot_product_attention(*padded, is_causal=True, scale=scaling, enable_gqa=True)
    real = torch.arange(max(micro_batch.lengths), device=query.device) < lengths[:, None]
    return out.transpose(1, 2)[real][None], None


ATTENTIONS = {"lite_ppo": packed_attention, "padded inside": padded_attention}


def attention_rows(batch, config, dtype, rounds: int) -> list[dict]:
    """Seconds of forward and backward of attention alone."""
    tokens, device = len(batch.token_ids), batch.token_ids.device
    inputs = []
    for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2):
        x = torch.randn(1, heads, tokens, config.head_dim, device=device, dtype=dtype)
        inputs.append(x.requires_grad_())
    seconds: dict[str, list[float]] = {name: [] for name in ATTENTIONS}
    for i in range(rounds + 1):
        for name, attention in ATTENTIONS.items():
            start = time.perf_counter()
            out, _ = attention(
                None, *inputs, None, scaling=config.head_dim**-0.5, micro_batch=batch
            )
            torch.autograd.grad(out.sum(), inputs)
            common.memory()  # waits for the GPU
            if i:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, times in seconds.items():
        speed = median(b / a for a, b in zip(times, seconds["lite_ppo"], strict=True))
        row = {"attention alone": name, "seconds": median(times), "speed / lite_ppo": speed}
        rows.append(row)
    return rows


# ---- padded micro-batches ------------------------------------------------------------------------


@dataclass
class PaddedBatch:
    """B sequences in rows of equal width; R response tokens."""

    token_ids: torch.Tensor  # [B, width]
    mask: torch.Tensor  # [B, width]
    predict: torch.Tensor  # [R] places in the flat [B * width] that predict a response token
    targets: torch.Tensor  # [R]
    weights: torch.Tensor  # [R]


def make_padded_batch(responses, members, width: int, weights, device) -> PaddedBatch:
    ids, mask = np.zeros((len(members), width), np.int64), np.zeros((len(members), width), np.int64)
    predict, targets, owners = [], [], []
    for row, i in enumerate(members):
        prompt, tokens = responses[i].problem.prompt_ids, responses[i].token_ids
        n = len(prompt) + len(tokens) - 1
        ids[row, :n] = [*prompt, *tokens[:-1]]
        mask[row, :n] = 1
        predict.append(row * width + np.arange(len(prompt) - 1, n))
        targets.append(tokens)
        owners.append(np.full(len(tokens), i))

    def tensor(array):
        return torch.from_numpy(np.asarray(array, np.int64)).to(device)

    return PaddedBatch(
        token_ids=tensor(ids),
        mask=tensor(mask),
        predict=tensor(np.concatenate(predict)),
        targets=tensor(np.concatenate(targets)),
        weights=weights.to(device)[tensor(np.concatenate(owners))],
    )


def padded_logprobs(model, batch: PaddedBatch):
    """As lite_ppo.response_logprobs, for padded sequences."""
    output = model.base_model(input_ids=batch.token_ids, attention_mask=batch.mask, use_cache=False)
    hidden = output.last_hidden_state.flatten(0, 1)[batch.predict]
    head = model.get_output_embeddings().weight
    chunk = max(64, 2**26 // model.config.vocab_size)
    return linear_logprobs(hidden, head, batch.targets, 1.0, chunk)


# ---- the forms -----------------------------------------------------------------------------------


@dataclass
class Form:
    name: str
    attention: str  # of transformers' config
    batches: list
    seconds: list[float]
    extra_gib: float = 0.0
    error: float = 0.0  # of the gradient

    def most_sequences(self) -> int:
        if isinstance(self.batches[0], PaddedBatch):
            return max(len(batch.token_ids) for batch in self.batches)
        return max(len(batch.lengths) for batch in self.batches)

    def places(self) -> int:
        """Tokens with padding."""
        return sum(batch.token_ids.numel() for batch in self.batches)


def make_forms(args: Args, responses: list, sizes: list[int], device) -> list[Form]:
    generator = torch.Generator().manual_seed(args.seed)
    response_tokens = sum(len(response.token_ids) for response in responses)
    weights = torch.randn(len(responses), generator=generator) / response_tokens
    advantages = torch.ones(len(responses))
    plan = lite_ppo.plan_micro_batches(sizes, args.budget, 1)[0]
    packed = [
        lite_ppo.make_micro_batch(responses, members, advantages, weights, device)
        for members in plan
    ]
    order = np.random.default_rng(args.seed).permutation(len(sizes)).tolist()

    def pad(count: int, own_width: bool = False) -> list[PaddedBatch]:
        batches = []
        for start in range(0, len(order), count):
            members = order[start : start + count]
            width = max(sizes[i] for i in (members if own_width else order))
            batches.append(make_padded_batch(responses, members, width, weights, device))
        return batches

    fits = max(1, args.budget // max(sizes))
    as_many = -(-len(order) // len(plan))
    return [
        Form("packed", "packed", packed, []),
        Form("packed, padded inside", "packed_padded", packed, []),
        Form("padded", "sdpa", pad(fits), []),
        Form("padded, own longest", "sdpa", pad(fits, own_width=True), []),
        Form("padded, as many", "sdpa", pad(as_many), []),
    ]


def run(policy, form: Form) -> float:
    """Forward and backward over all micro-batches. Returns the seconds."""
    policy.config._attn_implementation = form.attention
    policy.zero_grad()
    before, _ = common.memory(reset=True)
    start = time.perf_counter()
    for batch in form.batches:
        if isinstance(batch, PaddedBatch):
            logprobs, _ = policy.padded_logprobs(batch)
        else:
            logprobs, _ = policy.response_logprobs(batch, 1.0)
        (batch.weights * logprobs).sum().backward()
    _, peak = common.memory()
    form.extra_gib = (peak - before) / 2**30
    return time.perf_counter() - start


def measure(policy, forms: list[Form], rounds: int) -> None:
    expected = None
    for form in forms:
        run(policy, form)
        parts = [p.grad.full_tensor().flatten() for p in policy.parameters()]
        gradient = torch.cat(parts)
        expected = gradient if expected is None else expected
        form.error = float((gradient - expected).norm() / expected.norm())
    del expected, gradient, parts
    for _ in range(rounds):
        for form in forms:
            form.seconds.append(run(policy, form))


def form_rows(forms: list[Form], tokens: int) -> list[dict]:
    packed, rows = forms[0], []
    for form in forms:
        pairs = zip(form.seconds, packed.seconds, strict=True)
        row = {
            "form": form.name,
            "tokens/s": tokens / median(form.seconds),
            "packed / it": median(a / b for a, b in pairs),
            "micro-batches": len(form.batches),
            "most sequences": form.most_sequences(),
            "padding": f"{1 - tokens / form.places():.0%}",
            "extra GiB": form.extra_gib,
            "gradient error": form.error,
        }
        rows.append(row)
    return rows


def build_policy(args: Args):
    """The policy of the trainer, with a method for padded micro-batches."""
    cfg = lite_ppo.Config(activation_checkpointing=args.activation_checkpointing)
    with common.model_folder(args.shape) as folder:
        policy = lite_ppo.build_policy(cfg, folder, compute_device())
    from transformers import AttentionInterface

    AttentionInterface.register("packed_padded", padded_attention)
    policy.padded_logprobs = functools.partial(padded_logprobs, policy)
    register_fsdp_forward_method(policy, "padded_logprobs")
    return policy, compute_dtype(cfg.dtype)


def main(args: Args) -> None:
    common.start_ranks()
    policy, dtype = build_policy(args)
    lengths = draw_lengths(args)
    vocabulary = policy.config.vocab_size
    responses = common.synthetic(lengths, args.prompt_length, vocabulary, args.seed)
    sizes = [args.prompt_length + n - 1 for n in lengths]
    forms = make_forms(args, responses, sizes, compute_device())
    print(
        f"{len(lengths)} responses, mean {np.mean(lengths):.0f}, longest {max(lengths)} "
        f"(ratio {np.mean(lengths) / max(lengths):.2f}), prompts of {args.prompt_length}, "
        f"budget {args.budget} tokens, {dtype}",
        flush=True,
    )
    measure(policy, forms, args.rounds)
    rows = form_rows(forms, sum(sizes))
    common.table(rows)
    print()
    attention = attention_rows(forms[0].batches[0], policy.config, dtype, args.rounds)
    common.table(attention)
    speedup = next(row["packed / it"] for row in rows if row["form"] == "padded")
    checks = [common.check("tokens/s of packed / padded, same budget", speedup, 2, above=True)]
    settings = asdict(args) | {"lengths": lengths}
    seconds = {form.name: form.seconds for form in forms}
    common.finish(
        args.output, settings, rows=rows, attention=attention, seconds=seconds, checks=checks
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
