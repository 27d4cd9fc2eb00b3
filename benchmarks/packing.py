"""Packed against padded training: tokens per second of forward and backward over the responses of one rollout.

    python benchmarks/packing.py [--max-length 512] [--output packing.json]

The same model, log-prob function and loss (a fixed weight per response) over the same responses, whose lengths are drawn from
a log-normal distribution that is clipped at --max-length, so that the mean is about a third of the maximum. Only real tokens
count. Sequences per micro-batch:

    packed                    lite_ppo's: plan_micro_batches at --budget tokens, make_pack, packed_attention (on CPUs a kernel call
                              for each sequence)
    packed, padded inside     the same, but attention pads inside itself: one kernel call for all
    padded                    [B, longest of all], right padding, attention mask, transformers' own SDPA forward;
                              B * longest <= budget: the same memory for activations
    padded, own longest       the same B, each micro-batch cut to its own longest sequence
    padded, as many           as many sequences per micro-batch as packed has on average: more memory

Padded micro-batches take the sequences in random order, as they come from a rollout. All forms train the same FSDP2 model, in
alternation; medians are printed. The first, untimed round compares their gradients: |difference| / |packed|.
A second table times attention alone, forward and backward on the first pack.
"""

import functools
import time
from dataclasses import asdict, dataclass
from statistics import NormalDist, median

import common  # first: it finds lite_ppo
import lite_ppo
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tricks
import tyro
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn.utils.rnn import pad_sequence


@dataclass
class Args:
    shape: str = "qwen3-0.6b" if common.CUDA else "small"  # a name in common.SHAPES, or JSON text
    max_length: int = 8192 if common.CUDA else 512  # of a response
    prompt_length: int = 128 if common.CUDA else 32
    sequences: int = 64 if common.CUDA else 32
    budget: int = 16_384 if common.CUDA else 4096  # tokens of a micro-batch, padding included
    activation_checkpointing: bool = common.CUDA
    rounds: int = 5
    seed: int = 0
    output: str = ""  # JSON file


def draw_lengths(args: Args) -> list[int]:
    """Stratified: one draw from each of as many equally likely ranges, so that few draws have the spread of many."""
    rng = np.random.default_rng(args.seed)
    ranks = (np.arange(args.sequences) + rng.random(args.sequences)) / args.sequences
    draws = 0.25 * args.max_length * np.exp(0.8 * np.array([NormalDist().inv_cdf(rank) for rank in ranks]))
    return rng.permutation(draws.clip(8, args.max_length).astype(int)).tolist()


# ---- attention -------------------------------------------------------------------------------------------------------


def padded_attention(module, query, key, value, attention_mask, scaling=None, pack=None, **kwargs):
    """One kernel call; the sequences are padded for it and cut out of its result. Padding lies behind every real token."""
    lengths = pack.cu_seqlens.diff()
    padded = [pad_sequence(x[0].transpose(0, 1).split(lengths.tolist()), True).transpose(1, 2) for x in (query, key, value)]
    out = F.scaled_dot_product_attention(*padded, is_causal=True, scale=scaling, enable_gqa=True).transpose(1, 2)
    return out[torch.arange(pack.max_seqlen, device=out.device) < lengths[:, None]][None], None


ATTENTIONS = {"lite_ppo": lite_ppo.packed_attention, "padded inside": padded_attention}


def attention_rows(pack, config, dtype, rounds: int) -> list[dict]:
    heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
    inputs = [torch.randn(1, h, len(pack.token_ids), config.head_dim, device=pack.token_ids.device, dtype=dtype, requires_grad=True) for h in heads]
    seconds: dict[str, list[float]] = {name: [] for name in ATTENTIONS}
    for i in range(rounds + 1):
        for name, attention in ATTENTIONS.items():
            start = time.perf_counter()
            out, _ = attention(None, *inputs, None, scaling=config.head_dim**-0.5, pack=pack)
            torch.autograd.grad(out.sum(), inputs)
            common.memory()  # waits for the GPU
            seconds[name] += [time.perf_counter() - start] if i else []
    base = seconds["lite_ppo"]
    return [{"attention alone": name, "seconds": median(s), "speed / lite_ppo": median(b / a for a, b in zip(s, base))} for name, s in seconds.items()]


# ---- training --------------------------------------------------------------------------------------------------------


def padded_logprobs(model, batch):
    """As lite_ppo.response_logprobs, from [B, width] token ids and a mask."""
    ids, mask, predict, targets, _ = batch
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    chunk = max(64, 2**26 // model.config.vocab_size)
    return tricks.linear_logprobs(hidden.flatten(0, 1)[predict], model.get_output_embeddings().weight, targets, 1.0, chunk)


def padded_batch(responses, members, width, device):
    ids, mask = (np.zeros((len(members), width), np.int64) for _ in range(2))
    predict = []
    for row, i in enumerate(members):
        prompt, tokens = responses[i].problem.prompt_ids, responses[i].token_ids
        n = len(prompt) + len(tokens) - 1
        ids[row, :n], mask[row, :n] = [*prompt, *tokens[:-1]], 1
        predict.append(row * width + np.arange(len(prompt) - 1, n))
    targets, owner = (np.concatenate(x) for x in ([responses[i].token_ids for i in members], [np.full(len(responses[i].token_ids), i) for i in members]))
    return [torch.from_numpy(np.asarray(x, np.int64)).to(device) for x in (ids, mask, np.concatenate(predict), targets, owner)]


def main(args: Args) -> None:
    common.start_ranks()
    device, cfg = lite_ppo.compute_device(), lite_ppo.Config(activation_checkpointing=args.activation_checkpointing)
    with common.model_folder(args.shape) as folder:
        policy = lite_ppo.build_policy(cfg, folder, device)
    from transformers import AttentionInterface

    AttentionInterface.register("packed_padded", padded_attention)
    policy.padded_logprobs = functools.partial(padded_logprobs, policy)
    register_fsdp_forward_method(policy, "padded_logprobs")

    lengths = draw_lengths(args)
    responses = common.synthetic(lengths, args.prompt_length, policy.config.vocab_size, args.seed)
    sizes = [args.prompt_length + n - 1 for n in lengths]
    plan = lite_ppo.plan_micro_batches(sizes, args.budget, 1)[0]
    coefficients = torch.randn(len(lengths), generator=torch.Generator().manual_seed(args.seed)).to(device) / sum(lengths)
    order = np.random.default_rng(args.seed).permutation(len(lengths)).tolist()

    def padded(count: int, own: bool = False) -> list:
        groups = [order[i : i + count] for i in range(0, len(order), count)]
        return [padded_batch(responses, group, max(sizes[i] for i in (group if own else order)), device) for group in groups]

    packs, fits = [lite_ppo.make_pack(responses, micro, device) for micro in plan], max(1, args.budget // max(sizes))
    forms = {"packed": ("packed", packs), "packed, padded inside": ("packed_padded", packs),
             "padded": ("sdpa", padded(fits)), "padded, own longest": ("sdpa", padded(fits, own=True)),
             "padded, as many": ("sdpa", padded(-(-len(order) // len(plan))))}  # fmt: skip
    print(f"{len(lengths)} responses, mean {np.mean(lengths):.0f}, longest {max(lengths)} (ratio {np.mean(lengths) / max(lengths):.2f}), "
          f"prompts of {args.prompt_length}, budget {args.budget} tokens, {lite_ppo.compute_dtype(cfg)}", flush=True)

    def run(form: str) -> tuple[float, float]:
        policy.config._attn_implementation, batches = forms[form]
        policy.zero_grad()
        before, _ = common.memory(reset=True)
        start = time.perf_counter()
        for batch in batches:
            logprobs, _ = policy.padded_logprobs(batch) if isinstance(batch, list) else policy.response_logprobs(batch, 1.0)
            (coefficients[batch[-1] if isinstance(batch, list) else batch.owner] * logprobs).sum().backward()
        _, peak = common.memory()
        return time.perf_counter() - start, (peak - before) / 2**30

    seconds, extra, errors, expected = {form: [] for form in forms}, {}, {}, None
    for i in range(args.rounds + 1):
        for form in forms:
            took, extra[form] = run(form)
            if i:
                seconds[form].append(took)
            else:
                gradient = torch.cat([p.grad.full_tensor().flatten() for p in policy.parameters()])
                expected = gradient if expected is None else expected
                errors[form] = float((gradient - expected).norm() / expected.norm())
                del gradient
        expected = None

    rows = []
    for form, (_, batches) in forms.items():
        places = sum(b[0].numel() if isinstance(b, list) else len(b.token_ids) for b in batches)
        rows.append({"form": form, "tokens/s": sum(sizes) / median(seconds[form]), "packed / it": median(a / b for a, b in zip(seconds[form], seconds["packed"])),
                     "micro-batches": len(batches), "most sequences": max(len(b[0]) if isinstance(b, list) else len(b.cu_seqlens) - 1 for b in batches),
                     "padding": f"{1 - sum(sizes) / places:.0%}", "extra GiB": extra[form], "gradient error": errors[form]})
    common.table(rows)
    print()
    attention = attention_rows(packs[0], policy.config, lite_ppo.compute_dtype(cfg), args.rounds)
    common.table(attention)
    checks = [common.check("tokens/s of packed / padded, same budget", next(row["packed / it"] for row in rows if row["form"] == "padded"), 2, above=True)]
    common.finish(args.output, asdict(args) | {"lengths": lengths}, rows=rows, attention=attention, seconds=seconds, checks=checks)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
