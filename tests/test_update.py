"""The PPO step: gradient and metrics equal the formulas, however the step is split.

The formulas are a second implementation, without packing and without ranks: float64, one sequence
at a time, one token at a time. This file also runs on two ranks, see conftest.py.
"""

import ast
import functools
import inspect
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import lite_ppo
from lite_ppo import Config, MicroBatch, build_policy, make_micro_batch
from support import flash, metrics, packing
from support.data import Problem
from support.response import Response
from support.util import permutation
from tests.checks import parse_mutants
from tests.world import CPU, VOCABULARY, WORLD, config, load_model, predictions

# ---- nine responses, and the settings under which they are trained -------------------------------

LENGTHS = [1, 5, 12, 3, 12, 8, 2, 7, 4]
PROMPT_LENGTHS = [4, 1, 6, 2, 3, 9, 5, 1, 7]
ADVANTAGES = [0.9, -1.1, 0.7, -0.4, 1.3, -0.8, 0.5, -0.6, 1.0]
TRUNCATED = (2, 5)  # response 4 has the maximal length too, but ends with an end-of-sequence token
MAX_LENGTH = 12  # max_new_tokens of config()
STEP = 7
RATE = 0.1  # of plain gradient steps; so large that the second step clips

CASES = {  # settings that differ from those of config()
    "token": dict(activation_checkpointing=True),
    "token filtered": dict(overlong_filter=True),
    "sequence": dict(loss_level="sequence"),
    "sequence filtered": dict(loss_level="sequence", overlong_filter=True),
    "constant": dict(loss_level="constant"),
    "constant filtered": dict(loss_level="constant", overlong_filter=True),
    "sum": dict(loss_level="sum"),
    "sum filtered": dict(loss_level="sum", overlong_filter=True),
    "one step": dict(minibatches=1),
    "a single EOS": dict(minibatches=1),
    "fewer responses than ranks": dict(minibatches=1),
    "a rank with nothing to train": dict(minibatches=1, overlong_filter=True),
    "nothing to train": dict(minibatches=1, overlong_filter=True),
    "a copy of the model per rank": dict(shard_ranks=1),
    "every option": dict(
        minibatches=3, temperature=0.7, clip_high=0.28, dual_clip=1.3, kl_coef=0.3, tis_cap=1.2
    ),
}
CHOSEN = {  # the responses of a case; the other cases take all nine
    "a single EOS": [0],
    "fewer responses than ranks": [3],
    "a rank with nothing to train": [0, 2],
    "nothing to train": [2, 5],
}


def settings_of(case: str, root: Path, **changes) -> Config:
    unlimited = dict(max_logprob_gap=1e9, max_grad_norm=1e9)
    return config(root, **dict(lr=RATE) | unlimited | CASES[case] | changes)


def make_responses() -> list[Response]:
    """Random tokens and random log-probs; only tis_cap reads the log-probs."""
    generator = torch.Generator().manual_seed(5)
    responses = []
    for i, (length, prompt_length) in enumerate(zip(LENGTHS, PROMPT_LENGTHS)):
        tokens = torch.randint(2, VOCABULARY, (prompt_length + length,), generator=generator)
        if i not in TRUNCATED:
            tokens[-1] = 1  # end of sequence
        response = Response(
            problem=Problem({}, tokens[:prompt_length].tolist()),
            token_ids=tokens[prompt_length:].numpy().astype(np.int32),
            logprobs=torch.randn(length, generator=generator).sub(3).numpy(),
            truncated=i in TRUNCATED,
            text="",
            score=0.0,
        )
        responses.append(response)
    return responses


def step_of(case: str) -> tuple[list[Response], torch.Tensor]:
    """Responses and advantages."""
    chosen = CHOSEN.get(case, range(9))
    responses = make_responses()
    return [responses[i] for i in chosen], torch.tensor([ADVANTAGES[i] for i in chosen])


# ---- the update of lite_ppo.py, as it is or with a mistake ---------------------------------------

PARTS = [
    lite_ppo.make_micro_batch,
    lite_ppo.make_minibatches,
    lite_ppo.add_logprobs,
    lite_ppo.token_losses,
    lite_ppo.update,
    metrics.UpdateStats,
]
SOURCE = "\n\n".join(ast.unparse(ast.parse(inspect.getsource(part))) for part in PARTS)


def load(source: str) -> SimpleNamespace:
    """The functions of lite_ppo.py, with those of the update from this source."""
    scope = vars(metrics) | vars(lite_ppo)
    exec(source, scope)
    return SimpleNamespace(**scope)


def mutate(right: str, wrong: str) -> SimpleNamespace:
    assert right in SOURCE, f"the code of the update no longer contains {right}"
    return load(SOURCE.replace(right, wrong))


class GradientRecorder:
    """A hook of an optimizer; keeps the gradient of each of its steps."""

    def __init__(self, policy):
        self.policy = policy
        self.gradients = []

    def __call__(self, *args) -> None:
        parameters = self.policy.named_parameters()
        gradient = {name: p.grad.full_tensor().clone() for name, p in parameters}
        self.gradients.append(gradient)


def run_update(case: str, root: Path, code=lite_ppo, **changes) -> SimpleNamespace:
    """The gradients of the optimizer steps, the metrics, and the clipped tokens [2, V]."""
    cfg = settings_of(case, root, **changes)
    responses, advantages = step_of(case)
    policy = build_policy(cfg, cfg.model, CPU)
    reference = build_policy(cfg, cfg.model, CPU, trainable=False)
    optimizer = torch.optim.SGD(policy.parameters())
    recorder = GradientRecorder(policy)
    optimizer.register_step_pre_hook(recorder)

    minibatches = code.make_minibatches(responses, advantages, STEP, cfg)
    code.add_logprobs(policy, reference, minibatches, cfg)
    stats = code.update(policy, optimizer, minibatches, STEP, cfg)
    reduced = stats.reduce(responses)
    clipped = stats.clipped.int().tolist()
    return SimpleNamespace(gradients=recorder.gradients, metrics=reduced, clipped=clipped)


# ---- the same from the formulas ------------------------------------------------------------------


class Formulas:
    """The update of a case in float64, one sequence at a time, one token at a time."""

    def __init__(self, case: str, root: Path):
        self.cfg = settings_of(case, root)
        self.responses, advantages = step_of(case)
        self.advantages = advantages.tolist()
        self.model = load_model(root / "tied", dtype=torch.float64)
        self.old = []  # log-probs before the update, also those of the reference model
        for response in self.responses:
            logprobs, _ = self.predict(response)
            self.old.append(logprobs.detach())
        self.tokens = 0
        names = ("entropy", "clip_low", "clip_high", "clip_dual", "approx_kl", "reference_kl")
        self.sums = dict.fromkeys(names, 0.0)
        self.clipped = [[0] * VOCABULARY, [0] * VOCABULARY]  # low and high, by token
        self.gradients = []
        self.losses = []

    def predict(self, response: Response) -> tuple[torch.Tensor, torch.Tensor]:
        prompt = response.problem.prompt_ids
        return predictions(self.model, prompt, response.token_ids, self.cfg.temperature)

    def weight(self, i: int, kept: list[int]) -> float:
        """Of a token of response i in the loss of a mini-batch."""
        if i not in kept:
            return 0.0
        length = len(self.responses[i].token_ids)
        if self.cfg.loss_level == "token":
            return 1 / sum(len(self.responses[j].token_ids) for j in kept)
        if self.cfg.loss_level == "sequence":
            return 1 / (len(kept) * length)
        if self.cfg.loss_level == "sum":
            return 1 / len(kept)
        return 1 / (len(kept) * MAX_LENGTH)

    def objective(self, ratio: torch.Tensor, advantage: float) -> torch.Tensor:
        cfg = self.cfg
        clipped = min(max(ratio, 1 - cfg.clip_low), 1 + cfg.clip_high)
        objective = min(ratio * advantage, clipped * advantage)
        if cfg.dual_clip and advantage < 0:
            objective = max(objective, cfg.dual_clip * advantage)
        return objective

    def loss(self, i: int, t: int, logprob: torch.Tensor) -> torch.Tensor:
        """Of token t of response i, without its weight."""
        old = self.old[i][t]
        objective = self.objective((logprob - old).exp(), self.advantages[i])
        if self.cfg.tis_cap:
            sampled = self.responses[i].logprobs[t]
            objective = objective * min(math.exp(old - sampled), self.cfg.tis_cap)
        log_ratio = old - logprob  # the reference model has the old weights
        kl = log_ratio.exp() - log_ratio - 1
        return self.cfg.kl_coef * kl - objective

    def count(self, i: int, t: int, logprobs: torch.Tensor) -> None:
        """Add a token to the metrics; logprobs are those of the whole vocabulary."""
        cfg = self.cfg
        token = self.responses[i].token_ids[t]
        log_ratio = (logprobs[token] - self.old[i][t]).item()
        ratio = math.exp(log_ratio)
        low = self.advantages[i] < 0 and ratio < 1 - cfg.clip_low
        high = self.advantages[i] > 0 and ratio > 1 + cfg.clip_high
        self.tokens += 1
        self.sums["entropy"] -= (logprobs.exp() * logprobs).sum().item()
        self.sums["clip_low"] += low
        self.sums["clip_high"] += high
        if cfg.dual_clip and self.advantages[i] < 0:
            self.sums["clip_dual"] += ratio > cfg.dual_clip
        self.sums["approx_kl"] += ratio - 1 - log_ratio
        if cfg.kl_coef:
            self.sums["reference_kl"] += math.exp(-log_ratio) + log_ratio - 1
        self.clipped[0][token] += low
        self.clipped[1][token] += high

    def train(self, members: list[int]) -> None:
        """One optimizer step on a mini-batch."""
        kept = list(members)
        if self.cfg.overlong_filter:
            kept = [i for i in members if not self.responses[i].truncated]
        total = torch.zeros((), dtype=torch.float64, requires_grad=True)
        for i in members:
            chosen, vocabulary = self.predict(self.responses[i])
            for t, logprob in enumerate(chosen):
                total = total + self.weight(i, kept) * self.loss(i, t, logprob)
                self.count(i, t, vocabulary[t].detach())
        self.model.zero_grad()
        total.backward()
        parameters = dict(self.model.named_parameters())
        gradient = {name: p.grad.clone() for name, p in parameters.items()}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.sub_(RATE * gradient[name])
        self.gradients.append(gradient)
        self.losses.append(total.item())

    def metrics(self) -> dict[str, float]:
        means = {f"policy/{name}": total / self.tokens for name, total in self.sums.items()}
        norms = [norm(gradient.values()) for gradient in self.gradients]
        totals = {
            "policy/loss": np.mean(self.losses),
            "policy/grad_norm": np.mean(norms),
            "policy/skipped": 0,
        }
        return means | totals


@functools.cache
def expected(case: str, root: Path) -> SimpleNamespace:
    """What run_update() has to return."""
    formulas = Formulas(case, root)
    order = permutation(len(formulas.responses), formulas.cfg.seed, "minibatches", STEP)
    for members in np.array_split(order, formulas.cfg.minibatches):
        formulas.train(members.tolist())
    return SimpleNamespace(
        gradients=formulas.gradients, metrics=formulas.metrics(), clipped=formulas.clipped
    )


def norm(tensors) -> float:
    return torch.cat([tensor.double().flatten() for tensor in tensors]).norm().item()


def difference(found: SimpleNamespace, truth: SimpleNamespace) -> float:
    """The largest relative error of the gradient of an optimizer step."""
    errors = []
    for gradient, right in zip(found.gradients, truth.gradients, strict=True):
        assert gradient.keys() == right.keys()
        error = norm(gradient[name] - right[name] for name in right)
        errors.append(error / (norm(right.values()) or 1))
    return max(errors)


# ---- gradient and metrics ------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch_tokens", [12, 10**6])
@pytest.mark.parametrize("case", CASES)
def test_gradient_and_metrics_equal_the_formulas(case, micro_batch_tokens, root):
    truth = expected(case, root)
    found = run_update(case, root, micro_batch_tokens=micro_batch_tokens)
    assert difference(found, truth) <= 1e-5
    compared = {name: found.metrics[name] for name in truth.metrics}
    assert compared == pytest.approx(truth.metrics, rel=1e-4, abs=1e-6)
    assert found.clipped == truth.clipped


class AttentionCalls(TorchDispatchMode):
    """Counts the forward passes of attention."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in flash.saved_operators()
        return function(*args, **(kwargs or {}))


def test_backward_recomputes_the_blocks_but_not_attention(root):
    """The output of attention is kept; everything else of a block is computed again."""
    calls = {}
    for checkpointing in (False, True):
        cfg = config(root, activation_checkpointing=checkpointing)
        policy = build_policy(cfg, cfg.model, CPU)
        batch = pack(make_responses())
        with AttentionCalls() as forward:
            logprobs, _ = policy.response_logprobs(batch, 1.0)
        with AttentionCalls() as backward, FlopCounterMode(display=False) as flops:
            logprobs.sum().backward()
        calls[checkpointing] = (forward.count, backward.count)
        calls[checkpointing, "flops"] = flops.get_total_flops()
    runs = len(list(itertools.groupby(batch.lengths)))  # a kernel call each
    assert calls[False] == calls[True] == (runs * policy.config.num_hidden_layers, 0)
    assert calls[True, "flops"] > calls[False, "flops"]


def test_every_clip_bound_is_in_use(root):
    truth = expected("token", root).metrics
    assert truth["policy/clip_low"] > 0.05
    assert truth["policy/clip_high"] > 0.05
    assert truth["policy/clip_dual"] == 0
    assert expected("every option", root).metrics["policy/clip_dual"] > 0.05


def test_single_optimizer_step_clips_nothing(root):
    assert expected("one step", root).clipped == [[0] * VOCABULARY, [0] * VOCABULARY]


def test_gradient_is_clipped_to_the_maximal_norm(root):
    found = run_update("one step", root, max_grad_norm=0.01)
    (gradient,) = found.gradients
    assert norm(gradient.values()) == pytest.approx(0.01, rel=1e-4)
    assert found.metrics["policy/grad_norm"] > 1  # before it is clipped


def infinite_weights(lengths, *args) -> torch.Tensor:
    return torch.full((len(lengths),), math.inf)


def test_gradient_that_is_not_finite_is_skipped(root, monkeypatch):
    monkeypatch.setattr(lite_ppo.tricks, "loss_weights", infinite_weights)
    found = run_update("token", root)
    assert found.gradients == []  # no optimizer step
    assert found.metrics["policy/skipped"] == 2
    assert not math.isfinite(found.metrics["policy/grad_norm"])


def test_skipped_gradient_is_not_added_to_the_next_one(root, monkeypatch):
    functions = iter([infinite_weights, lite_ppo.tricks.loss_weights])  # one per mini-batch
    monkeypatch.setattr(lite_ppo.tricks, "loss_weights", lambda *args: next(functions)(*args))
    found = run_update("token", root)
    (gradient,) = found.gradients
    assert math.isfinite(norm(gradient.values()))
    assert found.metrics["policy/skipped"] == 1


# ---- named mutants -------------------------------------------------------------------------------

# Each block: the case that detects the mistake, and its name; the right code, as ast.unparse()
# writes it; the wrong code.
GRADIENT_MUTANTS = parse_mutants("""
token: normalized by the micro-batch
- loss = (batch.weights * losses).sum()
+ loss = losses.mean() / len(micro_batches) / world

token: weights of the whole step
- weights[members] = tricks.loss_weights(lengths, cfg.loss_level, keep, cfg.max_new_tokens)
+ weights += 1 / sum((len(r.token_ids) for r in responses))

token filtered: filter ignored
- tricks.loss_weights(lengths, cfg.loss_level, keep,
+ tricks.loss_weights(lengths, cfg.loss_level, None,

token filtered: filtered by length
- r.truncated
+ len(r.token_ids) == 12

token: old log-probs with gradient
- batch.old_logprobs = logprobs.detach()
+ batch.old_logprobs = logprobs

token: old log-probs of the updated weights
- old = batch.old_logprobs
+ old = logprobs.detach()

token: advantage of the next response
- advantages[response_index]
+ advantages.roll(1)[response_index]

a single EOS: end of sequence not trained
- batch.weights * losses
+ batch.weights * (batch.targets != 1) * losses

every option: temperature forgotten
- policy.response_logprobs(batch, cfg.temperature)
+ policy.response_logprobs(batch, 1.0)

token: predicted one token too early
- np.arange(a, b)
+ np.arange(a - 1, b - 1)

every option: KL forgotten
- cfg.kl_coef * tricks.kl_estimate
+ 0 * tricks.kl_estimate

every option: importance weights forgotten
- losses = losses * tricks.truncated_importance_weights
+ tricks.truncated_importance_weights

every option: dual clip forgotten
- cfg.dual_clip or None
+ None
""")
CLIP_MUTANTS = parse_mutants("""
token: sides swapped
- zip(self.clipped, (low, high))
+ zip(self.clipped, (high, low))

token: the token before
- side.index_add_(0, batch.targets,
+ side.index_add_(0, batch.targets.roll(1),

token: last micro-batch only
- zip(self.clipped, (low, high))
+ zip(self.clipped.zero_(), (low, high))
""")
if WORLD > 1:
    GRADIENT_MUTANTS += parse_mutants("""
token: averaged over ranks
- (loss * world).backward()
+ loss.backward()
""")
    CLIP_MUTANTS += parse_mutants("""
token: this rank only
- dist.all_reduce(self.clipped)
+ pass
""")


def test_unchanged_copy_of_the_code_has_the_right_gradient(root):
    """Each mutant below is such a copy with one mistake."""
    found = run_update("token", root, load(SOURCE), micro_batch_tokens=12)
    truth = expected("token", root)
    assert difference(found, truth) <= 1e-5
    assert found.clipped == truth.clipped


@pytest.mark.parametrize("case,right,wrong", GRADIENT_MUTANTS)
def test_named_mutant_changes_the_gradient(case, right, wrong, root):
    mutant = mutate(right, wrong)
    found = run_update(case, root, mutant, micro_batch_tokens=12)
    assert difference(found, expected(case, root)) > 1e-3


@pytest.mark.parametrize("case,right,wrong", CLIP_MUTANTS)
def test_named_mutant_miscounts_clipped_tokens(case, right, wrong, root):
    mutant = mutate(right, wrong)
    found = run_update(case, root, mutant, micro_batch_tokens=12)
    assert found.clipped != expected(case, root).clipped


# ---- micro-batches -------------------------------------------------------------------------------

ORDER = [3, 0, 8, 1, 7, 2]


def pack(responses: list[Response]) -> MicroBatch:
    """The responses of ORDER; response i has the advantage i and the weight 10 i."""
    numbers = torch.arange(9.0)
    return make_micro_batch(responses, ORDER, numbers, 10 * numbers, CPU)


def test_micro_batch_holds_every_response_token_and_no_padding():
    responses = make_responses()
    batch = pack(responses)
    tokens = [(i, token) for i in ORDER for token in responses[i].token_ids]
    assert list(zip(batch.response_index.tolist(), batch.targets.tolist())) == tokens
    assert batch.advantages.tolist() == batch.response_index.tolist()
    assert batch.weights.tolist() == [10 * i for i in batch.response_index.tolist()]
    lengths = [PROMPT_LENGTHS[i] + LENGTHS[i] - 1 for i in ORDER]
    assert batch.lengths == lengths
    assert batch.token_ids.shape == (sum(lengths),)
    assert batch.position_ids.tolist() == [t for length in lengths for t in range(length)]
    assert batch.cu_seqlens.tolist() == [0, *itertools.accumulate(lengths)]
    assert batch.cu_seqlens.dtype == torch.int32


@torch.no_grad()
def test_packed_log_probs_equal_those_of_each_sequence_alone(root):
    responses = make_responses()
    cfg = config(root)
    policy = build_policy(cfg, cfg.model, CPU)
    found, _ = policy.response_logprobs(pack(responses), 0.7)

    model = load_model(cfg.model)
    alone = []
    for i in ORDER:
        prompt, tokens = responses[i].problem.prompt_ids, responses[i].token_ids
        logprobs, _ = predictions(model, prompt, tokens, 0.7)
        alone.append(logprobs)
    assert torch.allclose(found, torch.cat(alone), rtol=0, atol=1e-5)


@torch.no_grad()
def test_packed_sequence_does_not_see_the_other_prompts(root):
    responses = make_responses()
    cfg = config(root)
    policy = build_policy(cfg, cfg.model, CPU)
    before, _ = policy.response_logprobs(pack(responses), 0.7)
    responses[0].problem.prompt_ids[:] = [20] * 4  # the second sequence in the micro-batch
    batch = pack(responses)
    after, _ = policy.response_logprobs(batch, 0.7)

    own = batch.response_index == 0
    assert torch.allclose(after[~own], before[~own], rtol=0, atol=1e-6)
    assert (after[own] - before[own]).abs().max() > 0.01


def test_prompts_count_in_the_budget_of_a_micro_batch():
    cfg = config(Path(), micro_batch_tokens=20)
    minibatches = lite_ppo.make_minibatches(make_responses(), torch.zeros(9), STEP, cfg)
    batches = [batch for micro_batches in minibatches for batch in micro_batches]
    assert len(batches) > 2
    assert all(len(batch.token_ids) <= 20 for batch in batches)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    budget=st.integers(1, 80),
    world=st.integers(1, 5),
)
def test_micro_batch_plan_is_complete_and_within_the_budget(lengths, budget, world):
    plan = packing.plan_micro_batches(lengths, budget, world)
    assert len(plan) == world
    counts = {len(of_rank) for of_rank in plan}
    assert len(counts) == 1  # ranks wait for each other in every backward pass
    assert counts.pop() <= math.ceil(len(lengths) / world)

    micro_batches = [micro_batch for of_rank in plan for micro_batch in of_rank]
    indices = [i for micro_batch in micro_batches for i in micro_batch]
    assert sorted(indices) == list(range(len(lengths)))
    for micro_batch in micro_batches:
        if len(micro_batch) > 1:
            assert sum(lengths[i] for i in micro_batch) <= budget


def test_sequence_longer_than_the_budget_is_alone():
    """And the others are packed as tightly as without it."""
    assert packing.plan_micro_batches([18, 12, 12, 6], 16, 1) == [[[0], [1], [2], [3]]]
    assert packing.plan_micro_batches([160, 1, 1, 1], 16, 1) == [[[0], [1, 2, 3]]]
    assert packing.plan_micro_batches([8, 8, 8, 8], 16, 2) == [[[0, 2]], [[1, 3]]]


def test_ranks_have_micro_batches_of_similar_size_at_the_same_time():
    """The longest first, and from rank to rank: they wait for each other in each layer."""
    plan = packing.plan_micro_batches([1, 1, 10, 9], 10, 2)
    assert plan == [[[2], [0]], [[3], [1]]]


# ---- old log-probs, reference log-probs, dummies -------------------------------------------------


class Constant:
    """A model whose log-probs all have one value; it collects the temperatures."""

    def __init__(self, value: float):
        self.value = value
        self.temperatures = []

    def response_logprobs(self, batch: MicroBatch, temperature: float):
        self.temperatures.append(temperature)
        logprobs = torch.full(batch.targets.shape, self.value)
        return logprobs, logprobs


def test_old_log_probs_are_the_policys_and_the_others_those_of_the_reference():
    """The first mini-batch gets its old log-probs in the update."""
    cfg = config(Path(), minibatches=3, kl_coef=0.1, temperature=0.7)
    minibatches = lite_ppo.make_minibatches(make_responses(), torch.zeros(9), STEP, cfg)
    policy, reference = Constant(-1.0), Constant(-2.0)
    lite_ppo.add_logprobs(policy, reference, minibatches, cfg)
    assert set(policy.temperatures + reference.temperatures) == {0.7}
    for m, batches in enumerate(minibatches):
        for batch in batches:
            assert (batch.old_logprobs is None) == (m == 0)
            assert m == 0 or (batch.old_logprobs == -1).all()
            assert (batch.ref_logprobs == -2).all()


def one_and_none(sizes: list[int], budget: int, world: int) -> list[list[list[int]]]:
    """A plan: the first sequence, then none."""
    return [[[0], []]] * world


def test_dummy_has_neither_advantage_nor_weight(monkeypatch):
    monkeypatch.setattr(lite_ppo, "plan_micro_batches", one_and_none)
    cfg = config(Path(), micro_batch_tokens=20)
    for batches in lite_ppo.make_minibatches(make_responses(), torch.ones(9), STEP, cfg):
        for batch, value in zip(batches, (1, 0), strict=True):
            assert ((batch.response_index >= 0) == value).all()
            assert (batch.advantages == value).all()
            assert ((batch.weights > 0) == value).all()


def metrics_of(indices: list[list[int]], cfg: Config) -> tuple[dict[str, float], list[str]]:
    """Metrics of micro-batches with these responses, and the failures. Every number is made up."""
    responses = make_responses()
    advantages = torch.nn.functional.pad(torch.tensor(ADVANTAGES), (0, 1))
    stats = metrics.UpdateStats(cfg, VOCABULARY)
    stats.norms.append(torch.tensor(1.0))
    batches = [make_micro_batch(responses, i, advantages, advantages.abs(), CPU) for i in indices]
    for batch in batches:
        logprobs = torch.linspace(-3, -1, len(batch.targets))
        batch.old_logprobs = logprobs.flip(0)
        batch.ref_logprobs = logprobs - 0.5
        losses = logprobs.masked_fill(batch.response_index == -1, math.nan)
        loss = torch.where(batch.weights > 0, batch.weights * losses, 0).sum()
        stats.add(batch, logprobs, -logprobs, losses, loss)
    found = stats.reduce(responses) | metrics.check_gap(batches, cfg)
    return found, [response.failure for response in responses]


def test_dummy_counts_in_no_metric():
    cfg = config(Path(), dual_clip=1.3, kl_coef=0.1, max_logprob_gap=1e9)
    found, failures = metrics_of([[0, 1], [2, 3, 4], []], cfg)
    expected, _ = metrics_of([[0, 1], [2, 3, 4]], cfg)
    assert found == pytest.approx(expected, rel=1e-6)
    assert found["policy/clip_dual"] > 0
    assert failures == [""] * 9
