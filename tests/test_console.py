"""What a user sees: --help, the banner, a sample of the model's work, the curves."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import lite_ppo
from lite_ppo import PRESETS, Config
from support import cli, launch
from support.checkpoints import Position
from support.data import Problem
from support.errors import RunError
from support.logs import Log, sample_text
from support.response import Response
from tests.forks import Fork, train_each
from tests.world import ROOT, config

# ---- --help --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def help_text() -> str:
    """The output of --help, without boxes and line breaks."""
    result = Fork(lite_ppo.main, argv=["--help"]).wait()
    assert result.returncode == 0, result.stderr
    return " ".join(result.stdout.replace("│", " ").split())


def test_there_are_at_most_56_flags(help_text):
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(Config)}
    assert len(flags) <= 56
    for flag in flags:
        assert re.search(f"{flag}[ ,]", help_text), flag


def test_help_shows_one_box_for_each_group(help_text):
    for group in Config.__bases__:
        assert f"{group.__name__.lower()} options" in help_text


def test_help_explains_every_flag():
    for group in Config.__bases__:
        source = (ROOT / "lite_ppo.py").read_text().split(f"class {group.__name__}:")[1]
        lines = source.split("@dataclass")[0].splitlines()
        for field in dataclasses.fields(group):
            (i,) = [i for i, line in enumerate(lines) if line.startswith(f"    {field.name}: ")]
            assert "#" in lines[i] or lines[i - 1].startswith("    # "), field.name


def test_help_shows_the_real_defaults_and_names_those_of_the_toy_apart(help_text):
    before, boxes = help_text.split("model options", 1)
    assert "optimizer steps each (default: 500)" in boxes
    assert "constant after the warm-up (default: 1e-06)" in boxes
    assert "--steps 60" in before
    assert "--no-activation-checkpointing" in before
    assert "toy:medium:test" not in boxes


def test_flags_reach_the_config_from_every_group():
    changed = {"--reward-low": -1, "--top-k": 7, "--clip-high": 0.3, "--lr": 0.1, "--seed": 3}
    arguments = [str(word) for pair in changed.items() for word in pair]
    cfg = cli.parse_config(Config, PRESETS, [*arguments, "--save-every", "9"])
    assert (cfg.reward_low, cfg.top_k, cfg.clip_high, cfg.lr) == (-1, 7, 0.3, 0.1)
    assert (cfg.seed, cfg.save_every) == (3, 9)


# ---- the console ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def printed(root, tmp_path_factory) -> tuple[str, str, Path]:
    """What a run of two steps prints on stdout and stderr, and its folder."""
    folder = tmp_path_factory.mktemp("console") / "run"
    dev = folder.with_name("dev.jsonl")
    dev.write_bytes((root / "dev.jsonl").read_bytes() * 3)  # two rows are left out
    cfg = config(root, output_dir=str(folder), steps=2, eval_data=(str(dev),))
    result = Fork(train_each, cfg).wait()
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr, folder


def test_banner_names_model_data_steps_machine_and_folder(printed):
    lines = printed[0].splitlines()
    assert lines[0].endswith("/tied, 87,808 parameters")
    expected = "10 training problems; held out: dev (1; 2 repeated left out)"
    assert lines[1] == f"data       {expected}"
    assert "2 steps of 4 prompts x 4 responses = 16, 2 optimizer step(s) each" in lines[2]
    assert lines[3] == "machine    1 process, CPU, float32"
    assert lines[4] == "sampler    transformers (chosen by --sampler)"
    assert lines[5] == f"output     {printed[2]}"


def test_console_shows_a_sample_before_and_after(printed):
    lines = [line.strip() for line in printed[0].splitlines()]
    problems = [i for i, line in enumerate(lines) if line == "problem    1+1"]
    assert len(problems) == 2
    for i in problems:
        assert lines[i - 1].startswith("step ")
        assert lines[i + 1].startswith("response ")
        assert lines[i + 1].endswith(("(correct)", "(wrong, the answer is 2)"))


def test_bar_starts_without_invented_numbers_and_is_the_only_one(printed):
    states = re.split("[\r\n]", printed[1])
    (first, *_) = [state for state in states if " 0/2 " in state]
    assert "reward" not in first
    assert "model shards" not in printed[1]


def answer(text: str, score: float) -> Response:
    problem = Problem({"problem": "1+1", "answer": "2"}, [3])
    return Response(problem, np.array([1]), np.zeros(1), False, text, score)


def test_sample_is_on_one_line_and_not_endless():
    text = sample_text(answer("a\n\n  b\n" + "c" * 5000, 1.0))
    assert len(text.splitlines()) == 2
    assert "a / b / ccc" in text
    assert len(text) < 600
    assert text.endswith("(correct)")


# ---- curves --------------------------------------------------------------------------------------


def test_curves_show_the_interval_and_start_at_zero(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig

    def keep(figure, *args, **options):
        figures.append(figure)
        return savefig(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    log = Log(tmp_path, Config(), Position(pending={}))
    for step in range(3):
        accuracy = 0.3 + 0.1 * step
        interval = {"eval/dev/accuracy_low": accuracy - 0.1, "eval/dev/accuracy_high": 0.9}
        length = {"response/length_mean": 37 + step}
        log.metrics(step, {"eval/dev/accuracy": accuracy} | interval | length)
    log.curves()
    panels = {axes.get_title(): axes for axes in figures[0].axes}
    accuracy = panels["held-out accuracy, 95 % interval"]
    assert accuracy.get_ylim() == (0, 1)
    (band,) = accuracy.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((0.2, 0.9))
    assert panels["response length (tokens)"].get_ylim()[0] == 0
    assert tmp_path.name in figures[0].get_suptitle()


# ---- the process ---------------------------------------------------------------------------------


BEFORE_TORCH = """
import os, sys
sys.modules["torch"] = None  # its import fails
try:
    import lite_ppo
except ImportError:
    print(os.environ["GOMP_SPINCOUNT"])
"""


@pytest.mark.parametrize("given, expected", [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_idle_openmp_threads_spin_less_unless_the_user_says_otherwise(given, expected):
    """Before torch is imported: it reads the variable."""
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"} | given
    command = [sys.executable, "-c", BEFORE_TORCH]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.stdout.strip() == expected


def test_grading_server_stays_small():
    code = "import support.grading_server, sys; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "False"


def test_broken_torchvision_is_masked(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('built for another torch')")
    code = "import support.models, sys; print(sys.modules['torchvision'])"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.stdout.strip() == "None", result.stderr


# ---- the end of a failed run ---------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, RunError("the sampler holds other weights")])
def test_a_failure_leaves_the_process_group_to_vllm(error, monkeypatch, capsys):
    """vLLM destroys its groups when the process exits, and fails if they are gone."""
    destroy = mock.Mock()
    monkeypatch.setattr(launch, "parse_config", lambda *args: None)
    monkeypatch.setattr(launch, "connect", lambda cfg: None)
    monkeypatch.setattr(launch.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(launch.dist, "destroy_process_group", destroy)
    code = launch.main(Config, PRESETS, mock.Mock(side_effect=error))
    assert code == (1 if error else 0)
    assert destroy.called is not bool(error)
    assert ("other weights" in capsys.readouterr().err) is bool(error)
