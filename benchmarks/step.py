"""One step of the trainer, phase by phase: seconds, tokens per second, peak memory, and on GPUs the share of their peak (MFU).

    python benchmarks/step.py                                                                      # toy shape, any machine
    python benchmarks/step.py --shape qwen3-0.6b --prompts-per-step 2 --group-size 2 --max-new-tokens 16    # 24 GiB of memory, no GPU
    python benchmarks/step.py --shape qwen3-1.7b --update-only 16384 --prompts-per-step 2 --group-size 4    # a GPU: 8 x 16k tokens
    torchrun --nproc-per-node 8 benchmarks/step.py --shape qwen3-8b ...

Runs lite_ppo's own functions on a model of the given shape with random weights: rollout, reward, log-probs of the old
weights, update, sync; every flag of lite_ppo.py counts, except those of data and evaluation. Rewards are drawn: random weights
solve nothing. Nor do they end a response where the vocabulary is large, so that all have --max-new-tokens. With --update-only N
only update() runs, on random sequences of N tokens, of which --prompt-length are prompt. The first step warms up and is not
counted; the others are, and their medians printed.

FLOPs are counted from the shape, by hand: 2 per weight and token forward, 4 backward, weights of the head only where a
response token is predicted; attention 2 L^2 width per layer forward (causal: half of all pairs), twice that backward.
MFU counts these alone. HFU adds what is computed a second time: the blocks under activation checkpointing, the logits in
backward (tricks.linear_logprobs). Both are over the seconds of the update phase and the data sheets' dense bfloat16 peak.
"""

import os
import time
from dataclasses import asdict, dataclass, field
from statistics import median

import common  # first: it finds lite_ppo
import lite_ppo
import samplers
import torch
import torch.distributed as dist
import tyro
from rundir import PEAK_FLOPS, train_flops


@dataclass
class Args:
    config: tyro.conf.OmitArgPrefixes[lite_ppo.Config] = field(default_factory=lambda: lite_ppo.Config(
        prompts_per_step=8, group_size=4, max_prompt_tokens=64, max_new_tokens=64, reward="exact", train_data="toy:medium", warmup_steps=0))
    shape: str = "toy"  # a name in common.SHAPES, or JSON text with fields of a Qwen3 config
    rounds: int = 3  # steps that count
    update_only: int = 0  # tokens of each sequence; only update() runs, on prompts_per_step * group_size of them
    prompt_length: int = 128  # of these
    peak_tflops: float = 0.0  # of one device; 0 = by the GPU's name
    keep_model: str = ""  # folder in which the random model stays for the next time
    pin: bool = False  # each rank on one CPU core of its own, with one thread
    weights: str = ""  # file for the trained weights
    output: str = ""  # JSON file


def count_flops(config, prompt: int, response: int, recompute: bool) -> tuple[float, float]:
    """(model, hardware) operations of forward and backward over one sequence; its last token is not an input."""
    D, inner, layers, width = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads * config.head_dim
    L, width_kv = prompt + response - 1, config.num_key_value_heads * config.head_dim
    projections = D * width + 2 * D * width_kv + width * D  # q; k and v; o
    blocks = layers * (2 * L * (projections + 3 * D * inner) + 2 * L**2 * width)  # forward; scores and values: L^2 / 2 pairs, 2 products of 2 operations
    head = 2 * response * D * config.vocab_size
    return 3 * (blocks + head), (4 if recompute else 3) * blocks + 4 * head


def main(args: Args) -> None:
    if args.pin:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ.get("LOCAL_RANK", "0")) % len(cores)]})
        torch.set_num_threads(1)
    cfg = args.config
    kind = samplers.choose_sampler(cfg.sampler)[0] if not args.update_only else ""
    rank, world = common.start_ranks()
    device, dtype, say = lite_ppo.compute_device(), lite_ppo.compute_dtype(cfg), print if rank == 0 else lambda *a, **k: None
    if args.update_only:
        cfg.max_logprob_gap = 1e9  # nobody has sampled these responses
    with common.model_folder(args.shape, args.keep_model) as folder:
        say(f"{args.shape}, {world} rank(s), {device.type}, {dtype}, " + (f"sampler {kind}" if kind else "update only"), flush=True)
        if kind:
            tokenizer, eos_ids = samplers.load_tokenizer(folder, cfg.max_prompt_tokens + cfg.max_new_tokens)
            train_set = lite_ppo.load_sets(tokenizer, cfg)[0]
            grader = lite_ppo.Grader(cfg.reward, cfg.reward_timeout, cfg.reward_workers or 1)
            sampler = {"vllm": samplers.VllmSampler, "transformers": samplers.TransformersSampler}[kind](cfg, folder, eos_ids, device, dtype)
        policy = lite_ppo.build_policy(cfg, folder, device)
        reference = lite_ppo.build_policy(cfg, folder, device, trainable=False) if cfg.kl_coef else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    config, vocabulary, count, cursor = policy.config, policy.config.vocab_size, cfg.prompts_per_step * cfg.group_size, 0
    if kind:
        sampler.load_weights(lite_ppo.full_weights(policy, dtype))

    steps = []
    for step in range(1, args.rounds + 2):
        clock, began = lite_ppo.Clock(), time.perf_counter()
        if kind:
            responses, cursor = lite_ppo.rollout(sampler, grader, tokenizer, train_set, cursor, cfg, clock)
            sampler.sleep()
        else:
            responses = common.synthetic([args.update_only - args.prompt_length] * count, args.prompt_length, vocabulary, step)
        rewards = torch.rand(cfg.prompts_per_step, cfg.group_size, generator=torch.Generator().manual_seed(step))
        stats = lite_ppo.update(policy, reference, optimizer, responses, lite_ppo.compute_advantages(rewards, cfg).flatten(), step, cfg, clock)
        if kind:
            with clock("sync"):
                sampler.load_weights(lite_ppo.full_weights(policy, dtype))
        clock.seconds["step"] = time.perf_counter() - began
        steps.append((clock, responses, stats))
    steps = steps[1:]

    pairs = [(len(r.problem.prompt_ids), len(r.token_ids)) for r in steps[-1][1]]
    model, hardware = (sum(x) for x in zip(*(count_flops(config, *pair, cfg.activation_checkpointing) for pair in pairs)))
    theirs = sum(train_flops(config, sum(pair), pair[1]) for pair in pairs)
    total = sum(map(sum, pairs))
    passes = (cfg.minibatches - 1) / cfg.minibatches + (cfg.kl_coef > 0)  # of the log-probs phase
    tokens = {"rollout": sum(n for _, n in pairs), "update": total, "logprobs": passes * total, "step": total}
    rows = []
    for phase in ("rollout", "reward", "logprobs", "update", "sync", "step"):
        seconds = median(clock.seconds[phase] for clock, *_ in steps)
        memories = [max(clock.memory[phase] for clock, *_ in steps)] * world
        dist.all_gather_object(memories, memories[0])
        if seconds > 1e-3:
            rows.append({"phase": phase, "seconds": seconds, "tokens/s": tokens[phase] / seconds if phase in tokens else "",
                         "peak GiB of a rank": max(memories) or ""})  # the whole step has the largest of its phases
    update = next(row["seconds"] for row in rows if row["phase"] == "update")
    names = [name for name in PEAK_FLOPS if common.CUDA and name in torch.cuda.get_device_name()]
    peak = args.peak_tflops * 1e12 or (PEAK_FLOPS[names[0]] if names else 0)
    totals = {"sequences": count, "tokens": total, "parameters": sum(p.numel() for p in policy.parameters()),
              "model TFLOP": model / 1e12, "TFLOP/s per rank": model / update / world / 1e12,
              "MFU": model / update / world / peak if peak else None, "HFU": hardware / update / world / peak if peak else None,
              "rundir.train_flops / model": theirs / model, "loss": steps[-1][2]["policy/loss"], "grad_norm": steps[-1][2]["policy/grad_norm"],
              "logprob gap": steps[-1][2]["rollout/logprob_gap_mean"] if kind else None}
    if args.weights:
        state = {name: tensor.cpu() for name, tensor in lite_ppo.full_weights(policy, torch.float32)}
        if rank == 0:
            torch.save(state, args.weights)
    if rank == 0:
        common.table(rows)
        print("\n" + "\n".join(f"{key:28s}{value if isinstance(value, int) else f'{value:.4g}'}" for key, value in totals.items() if value is not None))
        common.finish(args.output, asdict(args), world=world, rows=rows, totals=totals, seconds=[dict(clock.seconds) for clock, *_ in steps])
    if kind:
        grader.close()
        sampler.close()  # vLLM ends torch.distributed, too
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
