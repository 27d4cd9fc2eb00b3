"""Checkpoints: runs that continue, settings that may change, and the output directory."""

import contextlib
import io
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import lite_ppo
from lite_ppo import Problem, Response, build_policy, make_micro_batch
from support import checkpoints, models, run
from support.checkpoints import Position, load_checkpoint, open_folder
from support.errors import UserError
from tests import forks
from tests.world import CPU, EOS, REWARDS, config, load_model, predictions, read

MEASURED = ("time/", "perf/", "memory/")  # metrics that differ from run to run


def train(root: Path, name: str, **changes) -> str:
    """A run in the folder `name`; returns what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        lite_ppo.train(config(root, output_dir=str(root / name), **changes))
    return printed.getvalue()


def steps_logged(folder: Path) -> list[int]:
    return [row["step"] for row in read(folder / "metrics.jsonl")]


# ---- a run that continues ------------------------------------------------------------------------

EACH_STEP = dict(steps=4, save_every=1, eval_every=1)


@pytest.fixture(scope="module")
def whole(root) -> Path:
    """A run of four steps that is not interrupted."""
    train(root, "whole", **EACH_STEP)
    return root / "whole"


def test_only_the_newest_checkpoints_are_kept(whole):
    names = sorted(path.name for path in whole.glob("*-*"))
    assert names == ["checkpoint-3", "checkpoint-4"]


def test_resumed_run_equals_the_uninterrupted_one(whole, root):
    """Killed while it saved the last checkpoint: the logs are ahead of the newest complete one."""
    resumed = root / "resumed"
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("checkpoint-4", "final"))
    (resumed / "partial-4").mkdir()
    train(root, "resumed", **EACH_STEP)
    expected = load_model(whole / "final").state_dict()
    found = load_model(resumed / "final").state_dict()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert read(resumed / file, *MEASURED) == read(whole / file, *MEASURED)


def random_responses() -> list[Response]:
    generator = torch.Generator().manual_seed(5)
    responses = []
    for prompt, length in [(4, 1), (1, 5), (6, 12), (2, 3)]:
        tokens = torch.randint(2, 21, (prompt + length,), generator=generator).tolist()
        problem = Problem({}, tokens[:prompt])
        unused = torch.zeros(length).numpy()
        token_ids = torch.tensor(tokens[prompt:]).numpy()
        responses.append(Response(problem, token_ids, unused, False, "", 0.0))
    return responses


@torch.no_grad()
def test_last_checkpoint_and_final_folder_hold_the_same_model(whole, root):
    policy = build_policy(config(root), f"{root}/tied", CPU)
    optimizer = torch.optim.AdamW(policy.parameters())
    position = load_checkpoint(whole / "checkpoint-4", policy, optimizer)
    assert position == Position(step=4, cursor=16, pending=None)

    responses = random_responses()
    unused = torch.zeros(len(responses))
    batch = make_micro_batch(responses, range(len(responses)), unused, unused, CPU)
    found, _ = policy.response_logprobs(batch, 1.0)
    model = load_model(whole / "final")
    expected = [predictions(model, r.problem.prompt_ids, r.token_ids)[0] for r in responses]
    assert torch.allclose(found, torch.cat(expected), rtol=0, atol=1e-5)


def test_final_folder_names_every_end_of_a_response(whole):
    _, eos_ids = models.load_tokenizer(whole / "final", 40)
    assert eos_ids == EOS


def test_run_without_checkpoint_starts_again_and_logs_each_step_once(root):
    for _ in range(2):
        train(root, "again", steps=1)
        shutil.rmtree(root / "again/final")  # as if it was killed before
    assert steps_logged(root / "again") == [0, 1]
    assert len(read(root / "again/samples.jsonl")) == 16


# ---- other ranks, and hybrid sharding ------------------------------------------------------------

SAVED = dict(save_every=2, eval_every=0, max_grad_norm=0.5)


@pytest.fixture(scope="module")
def one_rank_run(root) -> Path:
    """Seven steps on one rank, with a checkpoint after each second one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "KEPT", 9)
        train(root, "one", steps=7, **SAVED)
    return root / "one"


@pytest.fixture(scope="module")
def printed_by_resharded_runs(root) -> str:
    """The number of ranks changes after two steps: from 1 to 2 and from 2 to 1."""
    train(root, "one_then_two", steps=2, **SAVED)
    whole = config(root, output_dir=f"{root}/one_then_two", steps=7, shard_ranks=1, **SAVED)
    half = config(root, output_dir=f"{root}/two_then_one", steps=2, **SAVED)
    result = forks.two_ranks(forks.train_each, whole, half).wait()
    assert result.returncode == 0, result.stderr[-6000:]
    return result.stdout + train(root, "two_then_one", steps=7, **SAVED)


def distance(folder: Path, other: Path) -> float:
    """The largest difference between two final models."""
    found = load_model(folder / "final").state_dict()
    expected = load_model(other / "final").state_dict()
    return max((found[name] - expected[name]).abs().max().item() for name in expected)


@pytest.mark.parametrize("name", ["one_then_two", "two_then_one"])
def test_number_of_ranks_may_change(name, printed_by_resharded_runs, one_rank_run, root):
    folder = root / name
    resumed = f"resumed from {folder}/checkpoint-2, 2 of 7 steps done"
    assert resumed in printed_by_resharded_runs
    assert distance(folder, one_rank_run) <= 1e-6
    assert steps_logged(folder) == list(range(8))
    expected = [row["response"] for row in read(one_rank_run / "samples.jsonl")]
    assert len(expected) == 7 * 16  # all of them
    assert [row["response"] for row in read(folder / "samples.jsonl")] == expected


def summaries(printed: str) -> list[str]:
    """The lines of a run's end that name an accuracy."""
    return [line for line in printed.splitlines() if line.startswith("dev: accuracy ")]


def test_run_from_the_checkpoint_of_its_last_step_evaluates_it(one_rank_run, root):
    """It has one accuracy, so that its summary shows no change."""
    settings = dict(steps=7, resume=f"{one_rank_run}/checkpoint-7", **SAVED)
    printed = train(root, "at_the_end", **settings)
    (row,) = read(root / "at_the_end/metrics.jsonl")
    expected = read(one_rank_run / "metrics.jsonl")[-1]["eval/dev/accuracy"]
    assert (row["step"], row["eval/dev/accuracy"]) == (7, expected)
    assert summaries(printed) == [
        f"dev: accuracy {expected:.3f} (1 problems x 2 samples, temperature 1)"
    ]
    assert "resumed from" in train(root, "at_the_end", **settings)
    assert read(root / "at_the_end/metrics.jsonl") == [row]


def test_run_that_becomes_shorter_evaluates_its_last_step(one_rank_run, root):
    others = shutil.ignore_patterns("checkpoint-[467]", "final")
    shutil.copytree(one_rank_run, root / "shorter", ignore=others)
    line = read(root / "shorter/metrics.jsonl")[2]
    assert "eval/dev/accuracy" not in line
    printed = train(root, "shorter", steps=2, **SAVED)
    first, _, last = read(root / "shorter/metrics.jsonl")
    assert last.items() > line.items()
    before, after = first["eval/dev/accuracy"], last["eval/dev/accuracy"]
    assert len(summaries(printed)) == 1
    assert summaries(printed)[0].startswith(f"dev: accuracy {before:.3f} -> {after:.3f} (")
    assert (root / "shorter/final").is_dir()


def load_without_optimizer(path, policy, optimizer) -> Position:
    position = load_checkpoint(path, policy, optimizer)
    optimizer.state.clear()
    return position


def test_optimizer_state_matters(one_rank_run, root, monkeypatch):
    """Without it the comparisons above would fail."""
    monkeypatch.setattr(run, "load_checkpoint", load_without_optimizer)
    train(root, "forgetful", steps=7, resume=f"{one_rank_run}/checkpoint-2", **SAVED)
    assert distance(root / "forgetful", one_rank_run) > 1e-4


# ---- settings that change ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(clip_high=0.3), "clip_high: 0.2 -> 0.3"),
        (dict(lr=1.0), "lr: 0.001 -> 1.0"),
        (dict(steps=3), "--steps 3: .*7 steps"),
        (dict(dtype="bfloat16"), "dtype in use: torch.float32 -> torch.bfloat16"),
        (dict(train_data="ROOT/dev.jsonl"), "training problems: 10 problems.* -> 1 problems"),
        (dict(resume="ROOT/tied"), "not a checkpoint folder"),
        (dict(resume="ROOT/one/checkpoint-2"), "holds another checkpoint, checkpoint-7"),
    ],
)
def test_changed_setting_is_one_message(changes, message, one_rank_run, root):
    changes = {key: put_root(value, root) for key, value in changes.items()}
    with pytest.raises(UserError, match=message):
        train(root, "one", **dict(steps=7, **SAVED) | changes)
    assert steps_logged(one_rank_run) == list(range(8))


def test_compilation_may_change(one_rank_run, root):
    """The message about a failed compilation advises --compile off."""
    train(root, "one", steps=7, compile="off", **SAVED)
    assert steps_logged(one_rank_run) == list(range(8))


def put_root(value, root: Path):
    return value.replace("ROOT", str(root)) if isinstance(value, str) else value


def test_edited_reward_file_is_one_message(root, tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(REWARDS)
    train(root, "edited", reward=f"{file}:even", **SAVED)
    file.write_text(REWARDS + "# an edit\n")
    with pytest.raises(UserError, match="reward file: [0-9a-f]{12} -> "):
        train(root, "edited", reward=f"{file}:even", **SAVED)


def test_checkpoint_of_another_version_is_one_message(root):
    checkpoint = root / "old/checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"step": 3, "cursor": 12}')
    message = "checkpoint-3: not a checkpoint of this version .*config.*move it away"
    with pytest.raises(UserError, match=message):
        train(root, "old")


@pytest.fixture(scope="module")
def fork(one_rank_run, root) -> dict:
    """Settings of a run that started from a checkpoint of another run, with another clip_high."""
    settings = dict(resume=f"{one_rank_run}/checkpoint-6", clip_high=0.3, **SAVED)
    train(root, "fork", steps=7, **settings)
    assert steps_logged(root / "fork") == [7]
    return settings


def test_resume_flag_allows_other_settings_in_another_folder(fork, root):
    """The same command then continues the new run."""
    printed = train(root, "fork", steps=9, **fork)
    assert f"resumed from {root}/fork/checkpoint-7, 7 of 9" in printed


@pytest.mark.parametrize("spelling", ["{}/", "{}/../checkpoint-6", "relative"])
def test_resume_flag_may_be_spelled_in_another_way(spelling, fork, root, monkeypatch):
    monkeypatch.chdir(root)
    path = fork["resume"]
    spelled = os.path.relpath(path) if spelling == "relative" else spelling.format(path)
    newest = checkpoints.checkpoints(root / "fork")[-1]
    identity = checkpoints.read_state(newest)["identity"]
    cfg = config(root, steps=9, **fork | dict(resume=spelled))
    assert checkpoints.find_checkpoint(root / "fork", cfg, identity) == newest


def test_paths_may_be_spelled_in_another_way_from_another_folder(one_rank_run, root, monkeypatch):
    """--resume was recorded as it was given, and then counted as another checkpoint."""
    monkeypatch.chdir(one_rank_run)
    train(root, "relative", steps=7, **SAVED | dict(resume="checkpoint-6"))
    monkeypatch.chdir(root)
    settings = SAVED | dict(resume="one/checkpoint-6", reward="rewards.py:even", model="tied/")
    newest = checkpoints.checkpoints(root / "relative")[-1]
    saved = checkpoints.read_state(newest)
    cfg = config(root, steps=9, **settings)
    assert checkpoints.find_checkpoint(root / "relative", cfg, saved["identity"]) == newest


def test_resume_flag_allows_no_second_change_in_that_folder(fork, root):
    with pytest.raises(UserError, match="clip_high: 0.3 -> 0.4"):
        train(root, "fork", steps=9, **fork | dict(clip_high=0.4))


# ---- errors of a checkpoint ----------------------------------------------------------------------


class Raise:
    """A function that only raises this error."""

    def __init__(self, error: Exception):
        self.error = error

    def __call__(self, *args, **kwargs):
        raise self.error


@pytest.mark.parametrize(
    "error,raised",
    [
        (MemoryError(), MemoryError),
        (RuntimeError("can't allocate memory: 9 GiB"), RuntimeError),
        (RuntimeError("Connection closed by peer"), RuntimeError),
        (OSError("cut off"), UserError),
    ],
)
def test_only_errors_of_the_checkpoint_are_blamed_on_it(error, raised, root, tmp_path, monkeypatch):
    policy = build_policy(config(root), f"{root}/tied", CPU)
    optimizer = torch.optim.AdamW(policy.parameters())
    (tmp_path / "state.json").write_text('{"step": 1, "cursor": 4, "pending": null}')
    monkeypatch.setattr(dcp, "load", Raise(error))
    with pytest.raises(raised):
        load_checkpoint(tmp_path, policy, optimizer)


# ---- the output directory ------------------------------------------------------------------------


@pytest.fixture
def finished(root, tmp_path) -> Path:
    """The folder of a finished run that was not empty before."""
    folder = tmp_path / "run"
    for name in ("partial_results", "partial-7", "checkpoint-best-2", "checkpoint-old3"):
        (folder / name).mkdir(parents=True)
    (folder / "partial.csv").write_text("mine")
    lite_ppo.train(config(root, output_dir=str(folder), steps=1, eval_every=0))
    return folder


def test_files_of_others_are_not_touched(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {"partial_results", "partial.csv", "checkpoint-best-2", "checkpoint-old3"}
    assert names >= {"final", "metrics.jsonl"}
    assert (finished / "partial.csv").read_text() == "mine"


def test_files_of_a_killed_run_are_deleted(finished):
    assert not (finished / "partial-7").exists()
    assert not list(finished.glob(".seen*"))


def test_final_model_is_not_overwritten(finished, root):
    before = (finished / "metrics.jsonl").read_bytes()
    message = f"--output-dir {finished}: holds the final model of a run and no checkpoint"
    with pytest.raises(UserError, match=message):
        lite_ppo.train(config(root, output_dir=str(finished), steps=1, eval_every=0, seed=7))
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_folder_in_use_is_one_message(root, tmp_path):
    cfg = config(root, output_dir=str(tmp_path / "shared"))
    with contextlib.ExitStack() as held:
        open_folder(cfg, held)
        with pytest.raises(UserError, match="shared: another run uses it"):
            lite_ppo.train(cfg)
    with contextlib.ExitStack() as held:
        open_folder(cfg, held)  # free again


def rank_of_another_machine() -> int:
    return 1


def test_folder_that_ranks_do_not_share_is_one_message(root, tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "get_rank", rank_of_another_machine)
    cfg = config(root, output_dir=str(tmp_path / "local"))
    message = r"ranks \[0\] do not see the files of rank 0; give a folder .* all machines share"
    monkeypatch.setattr(checkpoints, "PATIENCE", 0.2)
    with contextlib.ExitStack() as held, pytest.raises(UserError, match=message):
        open_folder(cfg, held)


def test_finished_run_may_be_repeated(whole, root):
    printed = train(root, "whole", **EACH_STEP)
    assert "resumed from" in printed
    assert "pass@" not in printed  # its last step is evaluated already
    assert steps_logged(whole) == [0, 1, 2, 3, 4]
    assert (whole / "final").is_dir()
