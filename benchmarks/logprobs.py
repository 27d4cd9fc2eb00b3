"""Time and memory of log-probs and entropy with a large vocabulary: linear_logprobs and its rivals.

    python benchmarks/logprobs.py [--tokens 4096] [--output logprobs.json]

Every form maps hidden states [T, D], the output embedding [V, D] and tokens [T] to log-probs. The
backward pass of their weighted sum gives the gradients of hidden states and embedding. Entropy is a
metric: the forms that would store it for the backward pass compute it without gradient here.

    naive                  all logits in float32, log_softmax, gather; entropy from the log_softmax
    selective              logit minus logsumexp, row by row; entropy by 128 rows (as TRL)
    rows                   log_softmax and gather, row by row; entropy of all rows at once as
                           logsumexp - sum p logit (as verl in half precision)
    linear_cross_entropy   torch's own, from 2.13 on, with its own chunks; no entropy
    linear_logprobs        support/logprobs.py, in the chunks of the trainer

Each measurement is a new process: a small warm-up, then one forward and backward pass (on a GPU
two, and the second counts). Extra memory is the measured peak minus the memory in use before: of
the allocator on a GPU, of the resident set on a CPU. It includes the two gradients.
The forms alternate, round by round; ratios are taken within a round, and medians are printed.
Gradients are compared in float32 at --check-tokens rows: |difference| / |naive|, Euclidean norm.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from statistics import median

import common  # first: it makes support importable
import torch
import torch.nn.functional as F
import tyro

from support import logprobs as ours


@dataclass
class Args:
    tokens: int = 0  # T; 0: 8192 on a GPU, 4096 on a CPU
    hidden: int = 1024  # D
    vocab: int = 151_936  # V
    dtype: str = "bfloat16" if common.CUDA else "float32"
    chunk: int = 0  # rows of logits in linear_logprobs; 0: as in the trainer, 256 MiB in float32
    rounds: int = 3  # of naive and linear_logprobs
    peer_rounds: int = 1  # of the others
    check_tokens: int = 256  # T of the comparison of gradients
    only: str = ""  # run this form once, in this process, and print JSON
    output: str = ""  # JSON file


# ---- the forms -----------------------------------------------------------------------------------


@torch.no_grad()
def entropy_of_all_rows(logits):
    return torch.logsumexp(logits, -1) - (logits.softmax(-1) * logits).sum(-1)


@torch.no_grad()
def entropy_by_128_rows(logits):
    parts = [part.log_softmax(-1) for part in logits.split(128)]
    return torch.cat([-(part.exp() * part).sum(-1) for part in parts])


def naive(hidden, weight, ids, chunk):
    logits = (hidden @ weight.t()).float()
    logprobs = logits.log_softmax(-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, ids[:, None])[:, 0], entropy


def selective(hidden, weight, ids, chunk):
    logits = (hidden @ weight.t()).float()
    normalizer = torch.stack([row.logsumexp(-1) for row in logits])
    logprobs = logits.gather(-1, ids[:, None])[:, 0] - normalizer
    return logprobs, entropy_by_128_rows(logits)


def rows(hidden, weight, ids, chunk):
    logits = (hidden @ weight.t()).float()
    logprobs = [row.log_softmax(-1)[i] for row, i in zip(logits, ids, strict=True)]
    return torch.stack(logprobs), entropy_of_all_rows(logits)


def linear_cross_entropy(hidden, weight, ids, chunk):
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, ids, reduction="none", options=options), None


def linear_logprobs(hidden, weight, ids, chunk):
    return ours.linear_logprobs(hidden, weight, ids, 1.0, chunk)


FORMS = {f.__name__: f for f in (naive, selective, rows, linear_cross_entropy, linear_logprobs)}
if not hasattr(F, "linear_cross_entropy"):
    del FORMS["linear_cross_entropy"]


# ---- one measurement -----------------------------------------------------------------------------


def make_inputs(args: Args, tokens: int, dtype: torch.dtype):
    """(hidden, weight, ids, loss weights)"""
    generator, device = torch.Generator().manual_seed(0), "cuda" if common.CUDA else "cpu"
    hidden = torch.randn(tokens, args.hidden, generator=generator).to(device, dtype)
    weight = torch.randn(args.vocab, args.hidden, generator=generator).to(device, dtype)
    weight.mul_(2 / args.hidden**0.5)  # the logits have standard deviation 2
    ids = torch.randint(args.vocab, (tokens,), generator=generator).to(device)
    loss_weights = (torch.randn(tokens, generator=generator) / tokens).to(device)
    return hidden.requires_grad_(), weight.requires_grad_(), ids, loss_weights


def gradients(form: str, args: Args, hidden, weight, ids, loss_weights):
    hidden.grad = weight.grad = None
    logprobs, entropy = FORMS[form](hidden, weight, ids, args.chunk)
    (loss_weights * logprobs).sum().backward()
    return hidden.grad, weight.grad


def run_once(args: Args) -> dict:
    hidden, weight, ids, loss_weights = make_inputs(args, args.tokens, getattr(torch, args.dtype))
    few = hidden[:16].detach().requires_grad_()
    gradients(args.only, args, few, weight, ids[:16], loss_weights[:16])
    if common.CUDA:
        gradients(args.only, args, hidden, weight, ids, loss_weights)
    hidden.grad = weight.grad = few.grad = None
    before, _ = common.memory(reset=True)
    start = time.perf_counter()
    gradients(args.only, args, hidden, weight, ids, loss_weights)
    _, peak = common.memory()  # waits for the GPU
    return {"seconds": time.perf_counter() - start, "extra_gib": (peak - before) / 2**30}


def compare(args: Args) -> dict[str, float]:
    """The larger error of the two gradients of each form, in float32."""
    inputs = make_inputs(args, args.check_tokens, torch.float32)
    expected = gradients("naive", args, *inputs)
    errors = {}
    for form in FORMS:
        pairs = zip(gradients(form, args, *inputs), expected, strict=True)
        errors[form] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    return errors


def run_in_new_process(args: Args, only: str) -> dict:
    fields = asdict(args) | {"only": only, "output": ""}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in fields.items()]
    command = [sys.executable, __file__, *flags]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


# ---- all measurements ----------------------------------------------------------------------------


def measure(args: Args) -> dict[str, list[dict]]:
    measured: dict[str, list[dict]] = {form: [] for form in FORMS}
    for i in range(args.rounds):
        for form in FORMS:
            if form in ("naive", "linear_logprobs") or i < args.peer_rounds:
                measured[form].append(run_in_new_process(args, form))
    return measured


def summarize(measured: dict[str, list[dict]], errors: dict[str, float]) -> list[dict]:
    table = []
    for form, runs in measured.items():
        if not runs:
            continue
        row: dict = {"form": form}
        for key in ("seconds", "extra_gib"):
            row[key] = median(run[key] for run in runs)
            pairs = zip(runs, measured["naive"])  # of the same round
            row[f"{key} / naive"] = median(run[key] / base[key] for run, base in pairs)
        row["gradient error"] = errors[form]
        row["entropy"] = "no" if form == "linear_cross_entropy" else "yes"
        row["rounds"] = len(runs)
        table.append(row)
    return table


def describe(args: Args) -> str:
    logits = args.tokens * args.vocab * 4 / 2**30
    itemsize = getattr(torch, args.dtype).itemsize
    both_gradients = (args.tokens + args.vocab) * args.hidden * itemsize / 2**30
    return (
        f"T {args.tokens}, D {args.hidden}, V {args.vocab}, {args.dtype}, chunk {args.chunk}; "
        f"[T, V] in float32: {logits:.2f} GiB, the two gradients: {both_gradients:.2f} GiB"
    )


def main(args: Args) -> None:
    args.tokens = args.tokens or (8192 if common.CUDA else 4096)
    args.chunk = args.chunk or max(64, 2**26 // args.vocab)
    if args.only:
        print(json.dumps(compare(args) if args.only == "gradients" else run_once(args)))
        return
    print(describe(args), flush=True)
    measured = measure(args)
    table = summarize(measured, run_in_new_process(args, "gradients"))
    common.table(table)
    last = table[-1]  # linear_logprobs
    checks = [
        common.check("extra memory of linear_logprobs / naive", last["extra_gib / naive"], 1 / 8),
        common.check("time of linear_logprobs / naive", last["seconds / naive"], 1.3),
        common.check("gradient error of linear_logprobs", last["gradient error"], 1e-5),
    ]
    common.finish(args.output, asdict(args), rows=table, runs=measured, checks=checks)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
