"""support/metrics.py by hand: rollout, evaluation, log-prob gap, speed, responses that fail."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from support import metrics
from support.data import Problem
from support.errors import RunError
from support.response import Response
from support.stats import bootstrap_interval
from tests.world import VOCABULARY, config

LOOP = [7] * 64  # the shortest that counts


def response(score: float, tokens=(5, 1), truncated=False, **fields) -> Response:
    ids = np.array(tokens, np.int32)
    return Response(Problem({}, [3, 4]), ids, np.zeros(len(ids)), truncated, "", score, **fields)


# ---- rollout and evaluation ----------------------------------------------------------------------


def test_rollout_metrics_by_hand():
    """Two groups of three. Correct is a score of at least 1, whatever the reward is."""
    responses = [
        response(1.5, LOOP, truncated=True),
        response(1.0, LOOP),
        response(0.5, range(80), truncated=True),
        *(response(0.0) for _ in range(3)),
    ]
    responses[5].failure = "no number"
    dropped = [response(0.0, failure="no number"), response(1.0, range(99))]
    rewards = torch.tensor([[2.0, 2, 2], [0, 1, 2]])  # mean 1.5, squares around it 3.5
    found = metrics.rollout_metrics(responses, dropped, rewards)
    expected = {
        "reward/mean": 1.5,
        "reward/std": (3.5 / 5) ** 0.5,
        "reward/std_within": (2 / 6) ** 0.5,
        "reward/correct": 2 / 6,
        "reward/solve_all": 0,
        "reward/solve_none": 1 / 2,
        "reward/failed": 2 / 8,
        "response/length_mean": (64 + 64 + 80 + 3 * 2) / 6,
        "response/length_max": 80,
        "response/truncated": 2 / 6,
        "response/looping": 1 / 2,
    }
    assert found == pytest.approx(expected)
    solved = [response(score) for score in (1.5, 1.0, 1.0, 1.0, 0.5, 0.0)]
    found = metrics.rollout_metrics(solved, [], rewards)
    assert (found["reward/solve_all"], found["reward/solve_none"]) == (1 / 2, 0)


def test_evaluation_metrics_by_hand():
    """Two problems with three responses each. Both have a correct one."""
    scores = [1.0, 0.5, 0.0, 1.0, 1.5, 0.0]
    found = metrics.eval_metrics([response(score) for score in scores], 2)
    # the means of two draws from 1/3 and 2/3: each end in a quarter of the cases
    expected = dict(accuracy=1 / 2, accuracy_low=1 / 3, accuracy_high=2 / 3, pass_at_k=1)
    expected |= dict(length_mean=2, truncated=0, failed=0)
    assert found == pytest.approx(expected)


def test_interval_of_an_evaluation_is_that_of_its_problems():
    scores = [0.0] * 30 + [1.0] * 10
    found = metrics.eval_metrics([response(score) for score in scores], 20)
    low, high = bootstrap_interval(torch.tensor([0.0] * 15 + [1.0] * 5))
    assert (found["accuracy_low"], found["accuracy_high"]) == (low, high)
    assert found["pass_at_k"] == 1 / 4


# ---- log-prob gap --------------------------------------------------------------------------------


def gap(*gaps: float, **flags) -> dict[str, float]:
    """check_gap() of tokens with these gaps, of a dummy, and of a token without a log-prob."""
    old = torch.tensor([*gaps, 5.0, math.nan])
    index = torch.tensor([*range(len(gaps)), -1, 0])
    batch = SimpleNamespace(
        rollout_logprobs=torch.zeros_like(old), old_logprobs=old, response_index=index
    )
    cfg = SimpleNamespace(**dict(max_logprob_gap=0.0, dtype="auto", top_p=1.0, top_k=0) | flags)
    return metrics.check_gap([batch], cfg)


def test_gap_is_the_mean_absolute_difference():
    found = gap(0.1, -0.3, max_logprob_gap=0.25)
    expected = {"rollout/logprob_gap_mean": 0.2, "rollout/logprob_gap_max": 0.3}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    "flags,bound",
    [(dict(), 1e-3), (dict(dtype="bfloat16"), 0.03), (dict(max_logprob_gap=0.2), 0.2)],
)
def test_gap_has_a_bound_for_each_dtype(flags, bound):
    gap(1.9 * bound, 0, **flags)
    with pytest.raises(RunError, match="--max-logprob-gap"):
        gap(1.05 * bound, -1.05 * bound, **flags)


@pytest.mark.parametrize("flags", [dict(top_p=0.9), dict(top_k=9), dict(top_p=0.9, top_k=9)])
def test_gap_has_no_bound_if_the_sampler_renormalises(flags):
    assert gap(1.0, **flags)["rollout/logprob_gap_mean"] == 1


# ---- an update, speed ----------------------------------------------------------------------------


def test_response_with_a_loss_that_is_not_finite_has_failed(tmp_path):
    """Its failure from before stays, if it has one."""
    responses = [response(0.0), response(0.0), response(0.0), response(0.0, failure="slow")]
    stats = metrics.UpdateStats(config(tmp_path), VOCABULARY)
    stats.norms += [torch.tensor(1.0), torch.tensor(math.inf)]
    logprobs = torch.zeros(5)
    losses = torch.tensor([0, math.inf, 0, math.nan, math.nan])
    batch = SimpleNamespace(
        old_logprobs=logprobs,
        response_index=torch.tensor([0, 1, 2, 3, -1]),
        advantages=torch.ones(5),
        targets=torch.zeros(5, dtype=torch.long),
    )
    stats.add(batch, logprobs, logprobs, losses, losses.sum())
    found = stats.reduce(responses)
    assert [r.failure for r in responses] == ["", metrics.NOT_FINITE, "", "slow"]
    assert found["policy/skipped"] == 1
    assert found["policy/grad_norm"] == math.inf


SHAPE = SimpleNamespace(
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    intermediate_size=16,
    vocab_size=32,
)


def test_operations_of_training_by_hand():
    # a block: 8 x 8 and 8 x 8 for queries and output, 8 x 4 twice for keys and values, 3 x 8 x 16
    weights = 2 * (64 + 64 + 32 + 32 + 384)
    products = 6 * (weights * 10 + 32 * 8 * 4)
    assert metrics.train_flops(SHAPE, 10, 4) == products + 6 * 2 * 8 * 10**2


def test_speed_counts_dropped_responses_in_sampling_only(monkeypatch):
    responses = [response(0.0, range(4), seconds=1.0), response(0.0, range(6))]
    dropped = [response(0.0, range(10), seconds=3.0)]
    clock = SimpleNamespace(
        seconds=dict(rollout=2.0, reward=1.0, logprobs=1.0, update=3.0, sync=1.0, step=8.0),
        memory=dict(rollout=5.0, logprobs=1.0, update=7.0, sync=2.0),
    )
    monkeypatch.setattr(metrics, "peak_flops", lambda: 1e3)
    found = metrics.speed_metrics(responses, dropped, clock, SHAPE)
    assert found["perf/rollout_tokens_per_s"] == (4 + 6 + 10) / 2
    assert found["perf/train_tokens_per_s"] == (2 + 4 + 2 + 6) / (1 + 3)
    assert found["perf/peak_memory_gib"] == 7
    assert found["time/slowest_reward"] == 3
    flops = metrics.train_flops(SHAPE, 6, 4) + metrics.train_flops(SHAPE, 8, 6)
    ranks = torch.distributed.get_world_size()
    assert found["perf/mfu"] == pytest.approx(flops / (3 * 1e3 * ranks))
