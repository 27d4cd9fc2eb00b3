"""Log-probs and entropy of a large vocabulary: time and memory of tricks.linear_logprobs against forms that hold the logits.

    python benchmarks/logprobs.py [--tokens 4096] [--output logprobs.json]

Every form maps hidden states [T, D], the output embedding [V, D] and tokens [T] to log-probs, whose weighted sum is taken
backward into hidden states and embedding, and, where it says so, to the entropy. That is wanted as a metric: forms that
would remember it for backward compute it without gradient, in their favour.

    naive                  all logits in float32, log_softmax, gather; entropy from the same log_softmax
    selective              logit minus logsumexp, row by row; entropy in chunks of 128 rows (as in TRL)
    rows                   log_softmax and gather row by row; entropy at once as logsumexp - sum p logit (as in verl, half precision)
    linear_cross_entropy   torch's own, in its own choice of chunks, from 2.13 on; no entropy
    linear_logprobs        tricks.py, in chunks as in the trainer

Each measurement is a fresh process: a small warm-up, then forward and backward once (on a GPU twice, and the second counts).
Extra memory is the peak meanwhile minus what was in use before, measured, not computed: the allocator's on a GPU, the resident
set on a CPU. It includes the two gradients, which all forms need. Forms alternate, round by round; the ratio to naive is taken within a round; medians are
printed. Gradients are compared at --check-tokens rows in float32, as |difference| / |naive| in the Euclidean norm.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from statistics import median

import torch
import torch.nn.functional as F
import tyro

import common
import tricks


@dataclass
class Args:
    tokens: int = 0  # T; 0 = 8192 on a GPU, 4096 on a CPU
    hidden: int = 1024  # D
    vocab: int = 151_936  # V
    dtype: str = "bfloat16" if common.CUDA else "float32"
    chunk: int = 0  # rows of logits that linear_logprobs holds; 0 = as many as in the trainer, 256 MiB in float32
    rounds: int = 3  # of naive and linear_logprobs
    peer_rounds: int = 1  # of the others
    check_tokens: int = 256  # T of the comparison of gradients
    only: str = ""  # run this form once, here, and print JSON (what the fresh processes do)
    output: str = ""  # JSON file


@torch.no_grad()
def whole_entropy(logits):
    return torch.logsumexp(logits, -1) - (logits.softmax(-1) * logits).sum(-1)


def naive(hidden, weight, ids, chunk):
    logits = (hidden @ weight.t()).float()
    logprobs = logits.log_softmax(-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, ids[:, None])[:, 0], entropy


def selective(hidden, weight, ids, chunk):
    logits = (hidden @ weight.t()).float()
    chosen = logits.gather(-1, ids[:, None])[:, 0] - torch.stack([row.logsumexp(-1) for row in logits])
    with torch.no_grad():
        parts = (part.log_softmax(-1) for part in logits.split(128))
        return chosen, torch.cat([-(part.exp() * part).sum(-1) for part in parts])


def rows(hidden, weight, ids, chunk):
    logits = (hidden @ weight.t()).float()
    return torch.stack([row.log_softmax(-1)[i] for row, i in zip(logits, ids)]), whole_entropy(logits)


def linear_cross_entropy(hidden, weight, ids, chunk):
    return -F.linear_cross_entropy(hidden, weight, ids, reduction="none", options=torch.nn.LinearCrossEntropyOptions()), None


def linear_logprobs(hidden, weight, ids, chunk):
    return tricks.linear_logprobs(hidden, weight, ids, 1.0, chunk)


FORMS = {f.__name__: f for f in (naive, selective, rows, linear_cross_entropy, linear_logprobs)}
if not hasattr(F, "linear_cross_entropy"):
    del FORMS["linear_cross_entropy"]


def make_inputs(args: Args, tokens: int, dtype: torch.dtype):
    generator, device = torch.Generator().manual_seed(0), "cuda" if common.CUDA else "cpu"
    hidden, weight = (torch.randn(n, args.hidden, generator=generator).to(device, dtype) for n in (tokens, args.vocab))
    weight.mul_(2 / args.hidden**0.5)  # logits of standard deviation 2: neither flat nor one-hot
    ids, loss_weights = torch.randint(args.vocab, (tokens,), generator=generator), torch.randn(tokens, generator=generator) / tokens
    return hidden.requires_grad_(), weight.requires_grad_(), ids.to(device), loss_weights.to(device)


def gradients(form: str, args: Args, hidden, weight, ids, loss_weights):
    hidden.grad = weight.grad = None
    logprobs, entropy = FORMS[form](hidden, weight, ids, args.chunk)
    (loss_weights * logprobs).sum().backward()
    return hidden.grad, weight.grad


def run_once(args: Args) -> dict:
    inputs = make_inputs(args, args.tokens, getattr(torch, args.dtype))
    few = (inputs[0][:16].detach().requires_grad_(), inputs[1], *(x[:16] for x in inputs[2:]))
    gradients(args.only, args, *few)
    if common.CUDA:
        gradients(args.only, args, *inputs)
    inputs[0].grad = inputs[1].grad = few[0].grad = None
    before, _ = common.memory(reset=True)
    start = time.perf_counter()
    gradients(args.only, args, *inputs)
    _, peak = common.memory()  # waits for the GPU
    return {"seconds": time.perf_counter() - start, "extra_gib": (peak - before) / 2**30}


def compare(args: Args) -> dict[str, float]:
    """Largest error of the two gradients of each form, in float32."""
    inputs = make_inputs(args, args.check_tokens, torch.float32)
    expected = gradients("naive", args, *inputs)
    return {form: max(float((a - b).norm() / b.norm()) for a, b in zip(gradients(form, args, *inputs), expected)) for form in FORMS}


def main(args: Args) -> None:
    args.tokens = args.tokens or (8192 if common.CUDA else 4096)
    args.chunk = args.chunk or max(64, 2**26 // args.vocab)
    if args.only:
        print(json.dumps(compare(args) if args.only == "gradients" else run_once(args)))
        return

    def fresh(only: str) -> dict:
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in (asdict(args) | {"only": only, "output": ""}).items()]
        return json.loads(subprocess.run([sys.executable, __file__, *flags], check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])

    print(f"T {args.tokens}, D {args.hidden}, V {args.vocab}, {args.dtype}, chunk {args.chunk}; [T, V] in float32: "
          f"{args.tokens * args.vocab * 4 / 2**30:.2f} GiB, the two gradients: "
          f"{(args.tokens + args.vocab) * args.hidden * getattr(torch, args.dtype).itemsize / 2**30:.2f} GiB", flush=True)
    measured: dict[str, list[dict]] = {form: [] for form in FORMS}
    for i in range(args.rounds):
        for form in FORMS:
            if form in ("naive", "linear_logprobs") or i < args.peer_rounds:
                measured[form].append(fresh(form))
    errors = fresh("gradients")
    table = []
    for form, runs in measured.items():
        row: dict = {"form": form}
        for key in ("seconds", "extra_gib") if runs else ():
            row[key] = median(run[key] for run in runs)
            row[f"{key} / naive"] = median(run[key] / base[key] for run, base in zip(runs, measured["naive"]))
        table += [row | {"gradient error": errors[form], "entropy": "no" if form == "linear_cross_entropy" else "yes", "rounds": len(runs)}] if runs else []
    common.table(table)
    ours = table[-1]
    checks = [
        common.check("extra memory of linear_logprobs / naive", ours["extra_gib / naive"], 1 / 8),
        common.check("time of linear_logprobs / naive", ours["seconds / naive"], 1.3),
        common.check("gradient error of linear_logprobs", ours["gradient error"], 1e-5),
    ]
    common.finish(args.output, asdict(args), rows=table, runs=measured, checks=checks)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
