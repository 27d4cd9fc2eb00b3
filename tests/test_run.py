"""Whole runs on a tiny random model: what is learned, what is logged, and that ranks agree."""

import collections
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lite_ppo
from lite_ppo import PRESETS, Config
from support import cli, metrics, toy
from support.actor import Actor
from support.checkpoints import Position
from support.clock import clock
from support.data import Problem, ProblemSet
from support.logs import Log, read_jsonl
from support.response import Response
from support.sampling import Sample, Sampling
from tests.world import ENGINE, HERE, WORLD, command_line, config, load_model, read

# ---- the script, run by the helpers fixture ------------------------------------------------------

METRICS = """
step reward/mean reward/std reward/solve_all reward/solve_none
response/length_mean response/length_max response/truncated response/looping
policy/loss policy/entropy policy/clip_low policy/clip_high policy/approx_kl policy/grad_norm
policy/lr rollout/logprob_gap_mean rollout/logprob_gap_max
time/rollout time/reward time/slowest_reward time/logprobs time/update time/sync time/step
perf/rollout_tokens_per_s perf/train_tokens_per_s perf/peak_memory_gib
""".split()
STEPS, N, K = 16, 8, 8  # of command_line()


@pytest.fixture(scope="module")
def script(helpers, root):
    """The output of `lite_ppo.py` with the flags of command_line()."""
    printed = helpers("script")
    (folder,) = (root / "runs").glob("tied-lite_ppo-seed42-*")
    rows = read(folder / "metrics.jsonl")
    samples = read(folder / "samples.jsonl")
    return SimpleNamespace(printed=printed, folder=folder, rows=rows, samples=samples)


def test_script_logs_every_metric_of_every_step(script):
    assert [row["step"] for row in script.rows] == list(range(STEPS + 1))
    for row in script.rows:
        assert all(math.isfinite(value) for value in row.values())
    for row in script.rows[1:]:
        assert row.keys() >= set(METRICS)
        assert row["rollout/responses"] == N * K


def test_script_evaluates_before_and_after_and_every_tenth_step(script):
    keys = {f"eval/dev/{key}" for key in ("accuracy", "pass_at_k", "length_mean", "truncated")}
    complete = [row["step"] for row in script.rows if keys <= row.keys()]
    partial = [row["step"] for row in script.rows if keys & row.keys()]
    assert complete == partial == [0, 10, 16]


def test_script_prints_the_accuracy_and_the_folder(script, root):
    before, after = (script.rows[i]["eval/dev/accuracy"] for i in (0, -1))
    assert f"dev: accuracy {before:.3f} -> {after:.3f}" in script.printed
    assert str(script.folder.relative_to(root)) in script.printed


def test_script_warms_the_learning_rate_up(script):
    rates = [row["policy/lr"] for row in script.rows[1:6]]
    assert rates == pytest.approx([0.75e-3, 1.5e-3, 2.25e-3, 3e-3, 3e-3])


def test_script_learns(script):
    rewards = [row["reward/mean"] for row in script.rows[1:]]
    assert rewards[0] < 0.2
    assert np.mean(rewards[-3:]) > 0.5


def test_script_samples_have_the_right_reward(script, root):
    golds = {row["problem"]: row["answer"] for row in read(root / "train.jsonl")}
    for sample in script.samples:
        assert sample["gold"] == golds[sample["prompt"]]
        assert sample["reward"] == sample["response"].startswith("7")
        assert sample["length"] == 4 or not sample["truncated"]
        assert sample["failure"] == ""


def test_script_normalizes_by_the_group_mean_and_the_batch_std(script):
    """Trick 1, from the sampled rewards to the logged advantages."""
    rewards = np.array([sample["reward"] for sample in script.samples]).reshape(STEPS, N, K)
    advantages = np.array([sample["advantage"] for sample in script.samples]).reshape(STEPS, N, K)
    centred = rewards - rewards.mean(2, keepdims=True)
    std = rewards.std((1, 2), ddof=1, keepdims=True)
    assert np.allclose(advantages, centred / (std + 1e-6), atol=1e-5)
    within = np.sqrt((centred**2).mean((1, 2)))
    logged = [row["reward/std_within"] for row in script.rows[1:]]
    assert logged == pytest.approx(within.tolist())


def test_script_counts_clipped_tokens_by_token(script):
    """clipped.jsonl adds up to the clip fractions in metrics.jsonl."""
    clipped = {row["step"]: row for row in read(script.folder / "clipped.jsonl")}
    assert len(clipped) > 8
    for row in script.rows[1:]:
        tokens = row["response/length_mean"] * N * K
        for side in ("low", "high"):
            counts = [count for _, count in clipped.get(row["step"], {}).get(side, [])]
            assert sum(counts) == round(row[f"policy/clip_{side}"] * tokens)
            assert counts == sorted(counts, reverse=True)
    named = {token for row in clipped.values() for token, _ in row["low"] + row["high"]}
    assert named <= {*"0123456789+=?}\n", "\\boxed{", *toy.SPECIAL}


def test_script_writes_its_flags_curves_and_events(script, root):
    cfg = cli.parse_config(Config, PRESETS, command_line(root))
    written = json.loads((script.folder / "config.json").read_text())
    assert written == json.loads(json.dumps(vars(cfg)))
    assert (script.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list(script.folder.glob("tensorboard/events.out.tfevents*"))


# ---- every preset, on one rank, on two, and with vLLM --------------------------------------------


def preset_model(preset: str, root: Path) -> Path:
    return root / ("untied" if preset in ("paper", "grpo") else "tied")


def run_preset(preset: str, root: Path) -> Path:
    """The folder of a short run, which is made once."""
    folder = root / f"{preset}-{WORLD}-{ENGINE}"
    if not (folder / "final").exists():
        model = str(preset_model(preset, root))
        run = dict(preset=preset, model=model, sampler=ENGINE, output_dir=str(folder))
        lite_ppo.train(config(root, **PRESETS[preset] | run))
    return folder


def expected_reward(sample: dict, preset: str) -> float:
    """1 for an even number of characters. DAPO: else -1; the last 3 of the 12 tokens cost 1."""
    correct = len(sample["response"]) % 2 == 0
    if preset == "dapo":
        return 2 * correct - 1 - max(0, sample["length"] - 9) / 3
    return float(correct)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs(preset, root):
    folder = run_preset(preset, root)
    rows = read(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
    for row in rows[1:]:
        assert row["policy/grad_norm"] > 0
        assert row["policy/skipped"] == 0
        assert preset == "paper" or row["rollout/logprob_gap_max"] < 1e-4
    assert (rows[2]["policy/reference_kl"] > 0) == (preset == "grpo")
    for sample in read(folder / "samples.jsonl"):
        assert sample["reward"] == pytest.approx(expected_reward(sample, preset))
    before = load_model(preset_model(preset, root)).state_dict()
    after = load_model(folder / "final").state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert 1e-5 < (after[name] - before[name]).abs().max() < 0.1


@pytest.mark.parametrize(
    "file,left_out",
    [
        ("metrics.jsonl", ("time/", "perf/", "memory/")),
        ("samples.jsonl", ("prompt", "response", "gold", "failure", "time/")),
    ],
)
def test_two_ranks_train_as_one(file, left_out, helpers, root):
    helpers("two_ranks")
    one = read(run_preset("lite_ppo", root) / file, *left_out)
    two = read(root / "lite_ppo-2-transformers" / file, *left_out)
    assert len(one) == len(two)
    for expected, found in zip(one, two):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_two_ranks_pass_the_same_tests(helpers):
    helpers("two_ranks")


def test_vllm_passes_the_same_tests(helpers):
    printed = helpers("vllm")
    if " passed" not in printed:
        reason = printed.split(": ", 1)[1].split("\n")[0]
        pytest.skip(reason)


def test_equal_rewards_in_each_group_leave_the_weights_as_they_are(root):
    """Not even weight decay moves them: there is none."""
    folder = root / "equal"
    reward = f"{root}/rewards.py:trouble"  # the answer, whatever the response is
    lite_ppo.train(config(root, reward=reward, eval_data=(), output_dir=str(folder)))
    rows = read(folder / "metrics.jsonl")[1:]
    assert [row["policy/grad_norm"] for row in rows] == [0, 0]
    assert rows[0]["reward/std"] > 0
    before = load_model(root / "tied").state_dict()
    after = load_model(folder / "final").state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


# ---- data of other frameworks --------------------------------------------------------------------

STYLES = """
def style(response, row):
    return float(row["reward_model"]["style"] == "rule" and row["extra_info"]["index"] == 7)
"""


def test_run_takes_messages_and_warns_of_a_lost_system_message(root, capfd):
    (root / "tied/styles.py").write_text(STYLES)
    row = {"prompt": [{"role": "user", "content": "1+2"}], "extra_info": {"index": 7}}
    row["reward_model"] = {"style": "rule", "ground_truth": "3"}
    (root / "verl.jsonl").write_text(json.dumps(row) + "\n")
    cfg = config(
        root,
        train_data=f"{root}/verl.jsonl",
        eval_data=(),
        reward=f"{root}/tied/styles.py:style",
        steps=1,
        output_dir=str(root / "verl"),
    )
    lite_ppo.train(cfg)
    (sample, *others) = read(root / "verl/samples.jsonl")
    assert len(others) == 15
    assert (sample["prompt"], sample["gold"], sample["reward"]) == ("1+2", "3", 1)
    printed = capfd.readouterr().out
    assert printed.count("warning: the chat template of --model drops the system message") == 1


# ---- slow rewards --------------------------------------------------------------------------------

LATE = """
def late(response, row):
    while len(response) % 2:
        pass
    return 1.0
"""


def test_slow_rewards_are_logged_with_their_seconds(root, monkeypatch):
    (root / "tied/late.py").write_text(LATE)
    folder = root / "late"
    cfg = config(
        root,
        reward=f"{root}/tied/late.py:late",
        reward_timeout=0.2,
        steps=1,
        output_dir=str(folder),
    )
    monkeypatch.setattr(metrics, "MAX_FAILED", 1)
    lite_ppo.train(cfg)
    rows = read(folder / "samples.jsonl")  # all of the step
    assert {row["failure"] for row in rows} == {"", "no score within 0.2 s (--reward-timeout)"}
    for row in rows:
        late = len(row["response"]) % 2 == 1
        assert bool(row["failure"]) == late
        assert (row["time/reward"] >= 0.2) == late
    slowest = max(row["time/reward"] for row in rows if "eval" not in row)
    assert read(folder / "metrics.jsonl")[1]["time/slowest_reward"] == slowest


# ---- responses that dynamic sampling drops -------------------------------------------------------

UNFAIR = """
def unfair(response, row):
    if row["answer"] in ("3", "4"):
        raise ValueError("no score for this row")
    return float(len(response) % 2)
"""


class WatchedActor(Actor):
    """Collects all responses by step."""

    sampled: dict[int, list[Response]]

    def sample(self, *args):
        responses = super().sample(*args)
        self.sampled[clock.step] += responses
        return responses


def test_logs_cover_the_responses_that_dynamic_sampling_drops(root, monkeypatch):
    """A group without any score scores 0 throughout, so that another one replaces it."""
    (root / "tied/unfair.py").write_text(UNFAIR)
    folder = root / "unfair"
    cfg = config(
        root,
        reward=f"{root}/tied/unfair.py:unfair",
        dynamic_sampling=True,
        eval_data=(),
        steps=3,
        samples_per_step=0,
        output_dir=str(folder),
    )
    by_step = collections.defaultdict(list)
    monkeypatch.setattr(WatchedActor, "sampled", by_step, raising=False)
    monkeypatch.setattr(lite_ppo, "Actor", WatchedActor)
    monkeypatch.setattr(metrics, "MAX_FAILED", 1)
    lite_ppo.train(cfg)

    samples = read(folder / "samples.jsonl")
    for row in read(folder / "metrics.jsonl")[1:]:
        sampled = by_step[row["step"]]
        failed = [r.text for r in sampled if r.failure]
        assert row["rollout/responses"] == len(sampled)
        assert row["reward/failed"] == len(failed) / len(sampled)
        logged = [sample for sample in samples if sample["step"] == row["step"]]
        assert sorted(sample["response"] for sample in logged) == sorted(failed)
        assert all("dropped" in sample or sample["reward"] == 0 for sample in logged)
        assert row["time/slowest_reward"] == max(r.seconds for r in sampled)
        tokens = row["perf/rollout_tokens_per_s"] * row["time/rollout"]
        assert tokens == pytest.approx(sum(len(r.token_ids) for r in sampled))
    assert any("dropped" in sample for sample in samples)


# ---- memory over a long run ----------------------------------------------------------------------

TIDY = """
import atexit, ctypes, gc, weakref
from support.host import reclaim_memory

class Node:
    pass

def resident():  # MiB
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages / 256

def print_freeze_count():
    print(gc.get_freeze_count(), "at the end")

atexit.register(print_freeze_count)  # the first that is registered runs last
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
gc.disable()
for call in range(1, 21):
    node = Node()
    node.itself = node  # a cycle
    watched = weakref.ref(node)
    del node
    blocks = [libc.malloc(2**16) for _ in range(1600)]
    for block in blocks:
        ctypes.memset(block, 1, 2**16)
    for block in blocks[::2]:  # 50 MiB of holes in the heap
        libc.free(block)
    before = resident()
    reclaim_memory()
    print(call, before - resident() > 40, watched() is None, gc.get_freeze_count() > 1000)
    for block in blocks[1::2]:
        libc.free(block)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_every_tenth_step_frees_memory_and_collects_cycles():
    """Without this the memory of a long run grows: benchmarks/soak.py."""
    command = [sys.executable, "-c", TIDY]
    result = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    expected = []
    for call in range(1, 21):
        due = str(call in (1, 2, 10, 20))
        expected.append([str(call), due, due, "True"])
    expected.append(["0", "at", "the", "end"])
    printed = [line.split() for line in result.stdout.splitlines()]
    assert printed == expected, result.stdout + result.stderr


# ---- the log -------------------------------------------------------------------------------------

KEPT = {  # of rows older than five steps, for curves.png and for warnings
    "reward/mean": 0.5,
    "policy/entropy": 1.0,
    "eval/toy/accuracy": 0.5,
    "response/length_mean": 9.0,
}
DROPPED = {"response/truncated": 0.0, "reward/std": 0.1, "reward/failed": 0.0}
DROPPED |= {f"time/{i}": 1.0 for i in range(40)}
VALUES = KEPT | DROPPED


def new_log(folder: Path) -> Log:
    return Log(folder, Config(), Position(pending={}))


def resumed_log(folder: Path, step: int) -> Log:
    return Log(folder, Config(), Position(step))


def write_steps(log: Log, steps) -> None:
    for step in steps:
        log.metrics(step, VALUES)


def check_rows_in_memory(log: Log, steps: int) -> None:
    assert [row["step"] for row in log.rows] == list(range(steps))
    for row in log.rows[:-5]:
        assert row.keys() == {"step", *KEPT}
    for row in log.rows[-5:]:
        assert row.keys() == {"step", *VALUES}


def test_log_keeps_the_last_five_rows_whole(tmp_path):
    log = new_log(tmp_path)
    write_steps(log, range(12))
    check_rows_in_memory(log, 12)
    assert log.rows[-5:] == read_jsonl(tmp_path / "metrics.jsonl")[-5:]


def test_log_of_a_resumed_run_leaves_later_steps_out(tmp_path):
    killed = new_log(tmp_path)  # never closed
    write_steps(killed, range(12))
    check_rows_in_memory(resumed_log(tmp_path, 9), 10)


def test_tensorboard_shows_each_step_once(tmp_path):
    killed = new_log(tmp_path)
    write_steps(killed, range(12))
    write_steps(resumed_log(tmp_path, 9), [10])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == list(range(11))


def test_tensorboard_escapes_html(tmp_path):
    row = {"problem": "</pre><script>1</script>", "answer": "1"}
    hostile = Response(
        problem=Problem(row, [3]),
        token_ids=np.array([1]),
        logprobs=np.zeros(1),
        truncated=False,
        text="<img onerror=x>",
        score=0.0,
    )
    log = new_log(tmp_path)
    log.samples(10, [hostile], [], torch.zeros(1, 1), torch.zeros(1, 1))
    log.metrics(10, VALUES)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = events.Tensors("sample/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert text.startswith("<pre>")
    assert text.endswith("</pre>")
    assert text.count("<") == 2
    assert "&lt;script&gt;" in text


# ---- warnings about the health of a run ----------------------------------------------------------

HEALTHY = {
    "policy/entropy": 1.0,
    "response/length_mean": 100.0,
    "response/truncated": 0.1,
    "reward/correct": 0.5,
    "reward/std": 0.4,
    "reward/failed": 0.0,
}
WARNINGS = [  # metrics from step 10 on, and the warning that they cause
    ({"policy/entropy": 0.001}, ["entropy collapse"]),
    ({"policy/entropy": 0.001, "reward/correct": 0.9}, []),  # solved
    ({"policy/entropy": 5.0}, ["entropy explosion"]),
    ({"response/length_mean": 2.0}, ["short responses"]),
    ({"response/truncated": 0.9}, ["truncated responses"]),
    ({"reward/std": 0.0}, ["nothing to learn"]),
    ({"reward/failed": 0.2}, ["failing rewards"]),
    ({"policy/entropy": 0.5, "response/length_mean": 30.0}, []),
]


def warnings_of_30_steps(folder: Path, change: dict) -> list[str]:
    log = new_log(folder)
    texts = []
    for step in range(30):
        texts += log.metrics(step, HEALTHY | change if step >= 10 else HEALTHY)
    return [text.split(":")[0] for text in texts]


@pytest.mark.parametrize("change,names", WARNINGS)
def test_warning_comes_once(change, names, tmp_path):
    assert warnings_of_30_steps(tmp_path, change) == names


@pytest.mark.parametrize("change,names", WARNINGS)
def test_warnings_accept_metrics_that_are_not_finite(change, names, tmp_path):
    warnings_of_30_steps(tmp_path, change)
    log = resumed_log(tmp_path, 29)
    log.rows[-2]["policy/entropy"] = None  # as metrics.jsonl holds it
    for step in range(30, 37):
        entropy = math.nan if step == 31 else 1.0
        log.metrics(step, HEALTHY | {"policy/entropy": entropy})


# ---- rollout and evaluation with given scores ----------------------------------------------------


class NoRun:
    """A run that logs nothing."""

    def log_evaluation(self, *args) -> None:
        pass


class OneSample:
    """A sampler whose responses are all the same; it collects the seeds and the settings."""

    def __init__(self):
        self.seeds = []
        self.settings = []

    def generate(self, prompts, seeds, sampling) -> list[list[Sample]]:
        self.seeds += seeds
        self.settings.append(sampling)
        sample = Sample(np.array([5, 1]), np.zeros(2), False)
        return [[sample] * sampling.n for _ in prompts]


class GivenScores:
    """A grader with a list of scores for each call; a score may be a pair (score, failure)."""

    def __init__(self, calls):
        self.calls = iter(calls)

    def __call__(self, texts, rows) -> list[tuple[float, str, float]]:
        scores = next(self.calls)
        assert len(scores) == len(texts)
        pairs = [score if isinstance(score, tuple) else (score, "") for score in scores]
        return [(*pair, 0.0) for pair in pairs]


def problem_set(size: int) -> ProblemSet:
    return ProblemSet([Problem({}, [3, i, 4]) for i in range(size)], collections.Counter())


def rollout_scores(*calls, cursor=0, **changes) -> tuple[list[float], int]:
    """The scores that rollout() keeps of two groups of two, and its new cursor."""
    cfg = config(Path(), **dict(prompts_per_step=2, group_size=2) | changes)
    sampler = OneSample()
    actor = Actor(sampler, toy.make_tokenizer(), GivenScores(calls))
    responses, _, cursor = lite_ppo.rollout(actor, problem_set(20), cursor, cfg)
    assert len(set(sampler.seeds)) == len(sampler.seeds)
    return [response.score for response in responses], cursor


def test_rollout_without_dynamic_sampling_keeps_every_group():
    assert rollout_scores([0, 0, 1, 0], cursor=6) == ([0, 0, 1, 0], 8)


@pytest.mark.parametrize(
    "calls,kept,cursor",
    [
        pytest.param([[0, 0, 1, 0], [1, 1, 0, 1]], [1, 0, 0, 1], 4, id="replaced"),
        pytest.param([[0.2, 0.5, 1, 2]], [0.2, 0.5, 1, 2], 2, id="partial credit"),
        pytest.param(
            [[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]], [0, 0, 1, 1], 6, id="none informative"
        ),
        pytest.param(
            [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0]], [1, 0, 0, 0], 6, id="half informative"
        ),
    ],
)
@pytest.mark.parametrize("low", [0.0, -1.0])
def test_dynamic_sampling_replaces_groups_without_signal(calls, kept, cursor, low, monkeypatch):
    monkeypatch.setattr(lite_ppo, "DYNAMIC_ROUNDS", 3)
    found = rollout_scores(*calls, dynamic_sampling=True, reward_low=low)
    assert found == (kept, cursor)


def test_a_group_has_the_responses_to_one_prompt():
    """Two prompts, three responses each."""
    calls = [[1, 1, 1, 0, 1, 0], [0, 0, 0, 1, 0, 0]]
    found = rollout_scores(*calls, dynamic_sampling=True, group_size=3)
    assert found == ([0, 1, 0, 1, 0, 0], 4)
    responses = [scored(score, 1) for score in found[0]]
    rewards = lite_ppo.shape_rewards(responses, config(Path(), group_size=3))
    assert rewards.tolist() == [[0, 1, 0], [1, 0, 0]]


def samplers_of(cfg: Config, cursor: int) -> OneSample:
    """A sampler after a rollout from this place in the stream of prompts."""
    sampler = OneSample()
    scores = [0.0] * cfg.prompts_per_step * cfg.group_size
    actor = Actor(sampler, toy.make_tokenizer(), GivenScores([scores]))
    lite_ppo.rollout(actor, problem_set(20), cursor, cfg)
    return sampler


def test_seeds_of_a_rollout_follow_from_the_seed_and_the_place_in_the_stream():
    cfg = config(Path())
    seeds = samplers_of(cfg, 0).seeds
    assert len(set(seeds)) == 4
    assert samplers_of(cfg, 0).seeds == seeds
    assert samplers_of(cfg, 2).seeds[:2] == seeds[2:]  # so a resumed run needs no generator
    assert not set(samplers_of(cfg, 4).seeds) & set(seeds)
    assert not set(samplers_of(config(Path(), seed=1), 0).seeds) & set(seeds)


def test_rollout_samples_with_its_flags_and_evaluation_with_its_own():
    sampled = dict(temperature=0.7, top_p=0.9, top_k=5)
    cfg = config(Path(), **sampled, eval_samples=3, eval_temperature=0.4)
    (found,) = samplers_of(cfg, 0).settings
    assert found == Sampling(4, 12, 0.7, 0.9, 5)
    sampler = OneSample()
    actor = Actor(sampler, toy.make_tokenizer(), GivenScores([[0.0] * 6, [0.0] * 6] * 2))
    for _ in range(2):
        lite_ppo.evaluate(actor, {"a": problem_set(2), "b": problem_set(2)}, cfg, NoRun())
    assert sampler.settings == [Sampling(3, 12, 0.4)] * 4
    assert sampler.seeds[:4] == sampler.seeds[4:]  # equal in every evaluation
    assert len(set(sampler.seeds)) == 4


ADVANTAGES = {  # mean and std: advantage of the first of [1, 1, 0], [0, 0, 0]
    ("group", "batch"): 0.645497,  # 1/3 over sqrt(4/15)
    ("group", "group"): 0.577350,  # 1/3 over sqrt(1/3)
    ("group", "none"): 1 / 3,
    ("batch", "batch"): 1.290994,
    ("batch", "group"): 1.154701,
    ("batch", "none"): 2 / 3,
    ("none", "batch"): 1.936492,
    ("none", "group"): 1.732051,
    ("none", "none"): 1.0,
    ("leave_one_out", "none"): 0.5,
}


@pytest.mark.parametrize("mean,std", ADVANTAGES)
def test_advantages_follow_the_flags(mean, std):
    cfg = Config(advantage_mean=mean, advantage_std=std)
    found = lite_ppo.compute_advantages(torch.tensor([[1.0, 1, 0], [0, 0, 0]]), cfg)
    assert found[0, 0].item() == pytest.approx(ADVANTAGES[mean, std], rel=1e-5)


def test_presets_have_the_advantages_of_their_papers():
    rewards = torch.tensor([[1.0, 1, 0], [0, 0, 0]])
    found = {}
    for preset, flags in PRESETS.items():
        found[preset] = lite_ppo.compute_advantages(rewards, Config(**flags))[0, 0].item()
    expected = dict.fromkeys(("lite_ppo", "paper"), 0.645497) | dict(reinforce=1.0)
    expected |= dict.fromkeys(("grpo", "dapo"), 0.577350) | dict(dr_grpo=1 / 3, rloo=0.5)
    assert found == pytest.approx(expected, rel=1e-5)


def scored(score: float, length: int) -> Response:
    return Response(Problem({}, [3]), np.zeros(length), np.zeros(length), False, "", score)


def test_dapo_rewards_by_hand():
    """Right 1, wrong -1, and up to -1 for the last 2 of 10 tokens. Accuracy reads the scores."""
    responses = [scored(*pair) for pair in [(1, 8), (0, 8), (1, 9), (0, 10)]]
    cfg = Config(**PRESETS["dapo"], group_size=2, max_new_tokens=10)
    rewards = lite_ppo.shape_rewards(responses, cfg)
    assert rewards.tolist() == [[1, -1], [0.5, -2]]
    found = metrics.rollout_metrics(responses, [], rewards)
    assert found["reward/mean"] == pytest.approx(-0.375)
    assert found["reward/correct"] == 0.5


def test_evaluation_measures_accuracy_and_pass_at_k():
    cfg = config(Path(), eval_samples=4)
    grader = GivenScores([[1, 0, 0, 0, 1, 1, 0.5, 1], [0, 0, 0, 0]])
    sets = {"a": problem_set(2), "b": problem_set(1)}
    actor = Actor(OneSample(), toy.make_tokenizer(), grader)
    found = lite_ppo.evaluate(actor, sets, cfg, NoRun())
    expected = {
        "eval/a/accuracy": 4 / 8,
        "eval/a/pass_at_k": 1,  # k is eval_samples: at least one response is correct
        "eval/a/length_mean": 2,
        "eval/a/truncated": 0,
        "eval/b/accuracy": 0,
        "eval/b/pass_at_k": 0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


@given(st.integers(1, 30), st.integers(0, 2**32))
def test_each_epoch_visits_each_problem_once(size, seed):
    first, second, third = [
        [lite_ppo.nth_problem(i, seed, size) for i in range(start, start + size)]
        for start in (0, size, 2 * size)
    ]
    for epoch in (first, second, third):
        assert sorted(epoch) == list(range(size))
    if size >= 8:
        assert first != second
        assert second != third
