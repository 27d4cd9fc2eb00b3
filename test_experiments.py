"""The experiments: the README's numbers are those of the results, the results those of the grid, and the statistics right."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "experiments"), str(HERE / "benchmarks")]

import lite_ppo  # noqa: E402
import plot  # noqa: E402
import run  # noqa: E402
import torch  # noqa: E402
from common import make_model, shape_of  # noqa: E402

README, LINES = (HERE / "README.md").read_text(), run.load(HERE / "experiments/results/toy.jsonl")
ROWS, OTHER = plot.by_cell(LINES), plot.by_cell(run.load(plot.OTHER_MODEL))


# ---- what is written is what was measured ----------------------------------------------------------------------------


def test_every_number_of_the_readme_is_that_of_the_results():
    found = plot.claims(ROWS, LINES, OTHER)
    marks = [(match["text"], match["name"]) for match in plot.MARKED.finditer(README)]
    assert len(marks) >= 30 and len(marks) == README.count("<!-- ") and "not run" not in [text for text, _ in marks]
    assert plot.refresh(README, found) == README, "python experiments/plot.py --readme"
    text, name = marks[0]
    assert plot.refresh(README.replace(f"{text}<!-- {name}", f"9.9<!-- {name}"), found) == README  # a wrong number would be noticed
    with pytest.raises(ValueError, match="no such name"):
        plot.refresh("1.0<!-- no such name -->", found)


def test_the_tables_are_those_of_the_results():
    assert plot.tables(ROWS, LINES, plot.claims(ROWS, LINES, OTHER), "results/toy.jsonl", OTHER) == (HERE / "experiments/results.md").read_text()


def test_every_run_of_the_grid_is_in_the_results_with_its_flags():
    flags = {(row["environment"], row["setting"], row["seed"]): row["flags"] for row in LINES}
    wanted = {(r.environment, r.setting, r.seed): r.flags for runs in run.questions(LINES, False).values() for r in runs}
    assert {key for key, value in wanted.items() if flags.get(key) != value} == set()
    grid = {(r.environment, r.setting, r.seed): r.flags for r in run.cells(run.GRID, run.ISOLATED, range(5))}
    assert {key: row["flags"] for key in grid for row in [OTHER[key[:2]][key[2]]]} == grid
    for question in run.questions(LINES, False).values():
        cells = [(r.environment, r.setting) for r in question if " at " not in r.setting]
        assert all(cells.count(cell) >= 5 for cell in cells)


def test_links_of_the_documents_lead_somewhere():
    for path in ("README.md", "experiments/README.md"):
        links = re.findall(r"\]\((?!http|#)([^)#]+)", (HERE / path).read_text())
        assert links and [link for link in links if not (HERE / path).parent.joinpath(link).exists()] == []
        for link, anchor in re.findall(r"\]\((?!http)([^)#]+)#([^)]+)\)", (HERE / path).read_text()):
            titles = re.findall(r"^#+ (.*)", (HERE / path).parent.joinpath(link).read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], anchor


# ---- settings --------------------------------------------------------------------------------------------------------


def test_a_switch_switches_one_thing():
    of = lambda setting: vars(lite_ppo.parse_config(run.arguments(run.cells([run.PAIR[0]], [setting], [1])[0], Path("x"))))  # noqa: E731
    plain = of("lite_ppo")
    changed = {s: {key: value for key, value in of(s).items() if value != plain[key]} for s in run.SETTINGS}
    assert {key: plain[key] for key in ("preset", "minibatches", "seed", "model")} == dict(preset="lite_ppo", minibatches=4, seed=1, model="toy:small:base")
    assert changed == {
        "lite_ppo": {}, "group std": dict(advantage_std="group"), "no std": dict(advantage_std="none"), "batch mean": dict(advantage_mean="batch"),
        "no normalisation": dict(advantage_mean="none", advantage_std="none"), "sequence level": dict(loss_level="sequence"),
        "constant level": dict(loss_level="constant"), "neither trick": dict(advantage_mean="none", advantage_std="none", loss_level="sequence"),
        "clip 0.24": dict(clip_high=0.24), "clip 0.28": dict(clip_high=0.28), "clip 0.32": dict(clip_high=0.32), "overlong filter": dict(overlong_filter=True),
        "soft punishment": dict(overlong_buffer=0.2), "eps 1e-4": dict(advantage_eps=1e-4), "lite_ppo, -1/1": dict(reward_low=-1),
        "group std, -1/1": dict(advantage_std="group", reward_low=-1), "batch mean, -1/1": dict(advantage_mean="batch", reward_low=-1),
        "no normalisation, -1/1": dict(advantage_mean="none", advantage_std="none", reward_low=-1), **{name: {} for name in run.DEFINITIONS},
    }  # fmt: skip


def test_definitions_of_the_std_by_hand():
    rewards, lengths = torch.tensor([[1.0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]), torch.ones(4, 4)
    assert run._std_ddof_0(rewards[:3], lengths) == pytest.approx(0.471405, abs=1e-6)
    assert run._std_within_groups(rewards[:3], lengths) == pytest.approx(0.353553, abs=1e-6)
    assert run._std_by_tokens(rewards[:3], lengths[:3]) == pytest.approx(0.353553, abs=1e-6)
    lengths[0, 3] = 7  # one wrong response of 7 tokens: deviation .75, and eleven of one token
    assert run._std_by_tokens(rewards[:3], lengths[:3]) == pytest.approx(math.sqrt((7 * 0.75**2 + 3 * 0.25**2 + 0.75**2 + 3 * 0.25**2) / 18), abs=1e-6)
    ranks = run._std_per_rank(rewards, lengths)
    assert ranks[:, 0].tolist() == pytest.approx([0.5, 0, 0.5, 0])


def test_the_best_rate_is_that_of_the_highest_mean():
    rows = [dict(setting=f"grpo at {rate}", final=dict(accuracy=a)) for rate, a in (("2.5e-4", 0.5), ("2.5e-4", 0.7), ("5e-4", 0.9), ("5e-4", 0.5), ("1e-3", 0.69))]
    assert run.best_rate(rows, "grpo") == "5e-4" and run.best_rate(rows[:2] + rows[4:], "grpo") == "1e-3"
    assert run.best_rate([dict(setting=f"rloo at {rate}", final=dict(accuracy=0.5)) for rate in run.RATES], "rloo") == run.RATES[0]


# ---- statistics ------------------------------------------------------------------------------------------------------


def line(setting: str, seed: int, accuracy: float, environment: str = "e") -> dict:
    return dict(environment=environment, setting=setting, seed=seed, final=dict(accuracy=accuracy))


def test_intervals_by_hand():
    assert plot.interval([1, 2, 3, 4, 5]) == pytest.approx((3, 3 - 2.776 * math.sqrt(2.5 / 5), 3 + 2.776 * math.sqrt(2.5 / 5)))
    assert plot.interval([1, 3]) == pytest.approx((2, 2 - 12.706, 2 + 12.706)) and math.isnan(plot.interval([1])[1])
    assert plot.show([1, 2, 3, 4, 5]) == "+3.0 [+1.0, +5.0]" and plot.show([0.5, 0.5], 2, False) == "0.50 [0.50, 0.50]" and plot.show([]) == "not run"
    assert plot.show([1]) == "+1.0 [one seed]" and plot.MARKED.fullmatch("+1.0 [one seed]<!-- a -->")
    for freedom, value in ((9, 2.2622), (10, 2.2281), (19, 2.0930), (30, 2.0423), (120, 1.9799)):  # from the tables
        assert plot.t975(freedom) == pytest.approx(value, abs=3e-4)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(-1, 1)), min_size=1, max_size=8))
def test_an_effect_is_paired_by_seed_and_antisymmetric(pairs):
    rows = plot.by_cell([line(name, seed, pair[i]) for seed, pair in enumerate(pairs) for i, name in enumerate("ab")])
    harder = plot.by_cell([line(name, seed, pair[i] - pair[2]) for seed, pair in enumerate(pairs) for i, name in enumerate("ab")])  # hard for both
    effect, environments = plot.effect(rows, "a", "b", ["e", "absent"])
    assert environments == 1 and effect == pytest.approx([100 * (a - b) for a, b, _ in pairs])
    for same in (plot.effect(harder, "a", "b", ["e"])[0], [-x for x in plot.effect(rows, "b", "a", ["e"])[0]]):
        assert effect == pytest.approx(same, abs=1e-9)


def test_an_effect_over_environments_is_averaged_seed_by_seed_and_leaves_unpaired_seeds_out():
    e = [line("a", 0, 0.5), line("a", 1, 0.9), line("b", 0, 0.4), line("b", 1, 0.5)]
    rows = plot.by_cell([*e, line("a", 0, 0.7, "f"), line("b", 0, 0.3, "f"), line("b", 1, 0.2, "f")])
    assert plot.effect(rows, "a", "b", ["e"])[0] == pytest.approx([10, 40]) and plot.effect(rows, "a", "b", ["e", "f"])[0] == pytest.approx([25])
    assert plot.level(rows, "b", ["e", "f"]) == pytest.approx([35, 35])


def test_accuracy_at_equal_responses_and_the_looping_share_by_hand():
    row = {"curve": {"rollout/responses": [64, 128, 64, 256], "response/truncated": [0.5, 0.25, 0, 0], "response/looping": [1, 0, 0, 0]},
           "evaluation": {"step": [0, 2, 3, 4], "eval/toy/accuracy": [0.1, 0.2, 0.3, 0.4]}}  # fmt: skip
    assert plot.cost(row).tolist() == [0, 192, 256, 512]
    assert [plot.equal_responses(budget)(row) for budget in (0, 96, 192, 224, 256, 384, 512)] == pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4])
    assert plot.looping_share(row) == pytest.approx(2 / 3)


# ---- figures ---------------------------------------------------------------------------------------------------------


def full(setting: str, seed: int, environment: str, steps: int = 4, accuracy: float = 0.5) -> dict:
    """A line as run.py writes it."""
    curve = {key: [0.25 + 0.01 * seed] * steps for key in run.CURVES} | {"rollout/responses": [64] * steps, "reward/std": [0.0] * steps}
    sets = {f"eval/{name}/{key}": [0.2, accuracy] for name in ("toy", "other") for key in ("accuracy", "pass_at_k")}
    means = {key: 0.1 for key in run.CURVES[5:]} | dict(accuracy=accuracy, accuracy_before=0.2, reward=0.3)
    return dict(environment=environment, setting=setting, seed=seed, seconds=1.0, date="2026-01-01", flags="", config=dict(max_new_tokens=56), final=means, curve=curve,
                evaluation={"step": [0, steps]} | sets, clipped=dict(low=[["1", 3]], high=[]))  # fmt: skip


def draw(folder: Path, monkeypatch, rows: list[dict], *flags: str) -> None:
    (folder / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["plot.py", "--results", str(folder / "some.jsonl"), *flags])
    plot.main()


def test_figures_of_other_results_stand_beside_them_and_take_what_there_is(tmp_path, monkeypatch):
    # one seed, a switch without its baseline, rewards that never differ, a run of another length
    rows = [full("lite_ppo", 0, run.GRID[0]), full("group std", 0, run.GRID[0]), full("no std", 0, run.GRID[1]), full("lite_ppo", 1, run.GRID[0], steps=2)]
    rows += [full("overlong filter", s, run.LIMITS[0]) for s in range(2)]
    kept = {path: path.read_bytes() for path in (HERE / "experiments").glob("*.md")}
    draw(tmp_path, monkeypatch, rows)
    text = (tmp_path / "some/results.md").read_text()
    assert "`results/some.jsonl`" in text and f"| {run.GRID[0]} | +0.0 [one seed] | not run |" in text and (tmp_path / "some/overview.png").exists()
    assert kept == {path: path.read_bytes() for path in kept}
    with pytest.raises(SystemExit, match="toy.jsonl"):
        draw(tmp_path, monkeypatch, rows, "--readme")


def test_figures_of_real_models_take_any_path_and_any_number_of_settings_and_seeds(tmp_path, monkeypatch, capsys):
    settings = [*run.ISOLATED[::-1], "clip 0.24", "preset grpo"]  # the baseline comes late: runs end in any order
    rows = [full(s, seed, "/data/a b.jsonl Qwen3-4B", accuracy=0.3 + 0.2 * (s == "lite_ppo") + 0.001 * seed) for s in settings for seed in range(12)]
    draw(tmp_path, monkeypatch, rows)
    assert [path.name for path in (tmp_path / "some").iterdir()] == ["_data_a_b.jsonl_Qwen3-4B.png"]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 9 and all("against lite_ppo: -20.0 [-20.0, -20.0]" in text for text in said)


def test_a_pair_of_reward_scales_has_one_colour_and_names_are_the_fields():
    settings = ["lite_ppo", "lite_ppo, -1/1", "group std", "group std, -1/1"]
    looks = [plot.look(i, s, settings) for i, s in enumerate(settings)]
    assert [look["color"] for look in looks] == [plot.COLOURS[0]] * 2 + [plot.COLOURS[1]] * 2 and looks[0]["linestyle"] != looks[1]["linestyle"]
    many = [str(i) for i in range(20)]
    assert len({(look["color"], str(look["linestyle"])) for i, s in enumerate(many) for look in [plot.look(i, s, many)]}) == 20
    assert [plot.label_of(s) for s in ("tuned dr_grpo", "common lite_ppo", "tuned dapo, no resampling", "lite_ppo, -1/1", "preset grpo", "no std")] == [
        "Dr. GRPO", "Lite PPO, common rate", "DAPO, no resampling", "Lite PPO, -1/1", "GRPO", "no std"]  # fmt: skip


# ---- the runner ------------------------------------------------------------------------------------------------------

TINY = """--sampler transformers --reward exact --reward-workers 1 --prompts-per-step 4 --group-size 4 --steps 2 --minibatches 2 --lr 1e-3 --max-prompt-tokens 32
    --max-new-tokens 6 --eval-size 2 --eval-samples 2 --eval-pass-k 1 --samples-per-step 16 --no-activation-checkpointing"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experiments")
    shape = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=32, vocab_size=21)
    make_model(shape_of(json.dumps(shape)), folder / "model", torch.float32)
    (folder / "data.jsonl").write_text("".join(json.dumps(dict(problem=f"{n}+1", answer=str(n + 1))) + "\n" for n in range(1, 9)))
    return folder


def start(*command: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=folder, timeout=300)


def test_real_models_run_once_and_what_failed_runs_again(tiny):
    command = [str(HERE / "experiments/run.py"), *"--models model --train-data data.jsonl --eval-data data.jsonl --settings lite_ppo".split(), "group std", "--seeds",
               "3", "--results", "r.jsonl", "--folder", "runs", "--jobs", "2", "--flags"]  # fmt: skip
    broken = start(*command, TINY + " --lr -1", folder=tiny)
    assert broken.returncode == 1 and "--lr -1.0: must be at least 0" in broken.stdout and run.load(tiny / "r.jsonl") == []
    assert start(*command, TINY, folder=tiny).returncode == 0
    rows = run.load(tiny / "r.jsonl")
    found = {(row["environment"], row["setting"], row["seed"]) for row in rows}  # in the order in which they ended: two ran side by side
    assert len(rows) == 2 and found == {("data.jsonl model", s, 3) for s in ("lite_ppo", "group std")}
    for row in rows:
        assert row["config"]["seed"] == 3 and row["config"].get("advantage_std") == (None if row["setting"] == "lite_ppo" else "group")
        assert all(len(row["curve"][key]) == 2 for key in run.CURVES) and row["evaluation"]["step"] == [0, 2]
    (tiny / "r.jsonl").write_text((tiny / "r.jsonl").read_text() + '{"cut off')
    again = start(*command, TINY, folder=tiny)
    assert again.returncode == 0 and "2 runs, 2 of them in r.jsonl" in again.stdout
    assert all((tiny / f"runs/data.jsonl_model-{s}-3/final/config.json").exists() for s in ("lite_ppo", "group_std"))  # real models are kept


def test_models_of_one_name_are_two_and_flags_that_would_be_ignored_are_refused(tmp_path, monkeypatch, capsys):
    def call(*flags: str) -> list:
        asked = []
        monkeypatch.setattr(run, "run_all", lambda runs, *rest: asked.extend(runs) or [])
        monkeypatch.setattr(sys, "argv", ["run.py", "--results", str(tmp_path / "r.jsonl"), *flags])
        run.main()
        return asked

    data = "--train-data a.jsonl --eval-data b.jsonl c.jsonl --seeds 7".split()
    runs = call("--models", "runs/a/final", "runs/b/final", "Qwen/Qwen3-4B", *data, "--settings", "lite_ppo", "preset dapo")
    assert [r.environment for r in runs] == [f"a.jsonl {name}" for name in ("runs/a/final", "runs/b/final", "Qwen3-4B") for _ in range(2)]
    assert runs[1].flags == "--model runs/a/final --train-data a.jsonl --eval-data b.jsonl c.jsonl --preset dapo" and runs[1].seed == 7
    for flags, words in ((["--launch", "torchrun"], "--launch goes with --models"), (["--seeds", "1"], "--seeds goes with --models"), (["--only", "clap"], "clap"),
                         (["--models", "m", *data, "--reduced"], "without --only and --reduced"), (["--models", "m"], "goes with --train-data"),
                         (["--models", "m", *data, "--settings", "std: ddof 0"], "real models take")):  # fmt: skip
        with pytest.raises(SystemExit):
            call(*flags)
        assert words in capsys.readouterr().err


def test_no_rate_is_chosen_from_a_sweep_with_holes_and_unreadable_logs_cost_one_run(tmp_path, monkeypatch):
    stages = []
    monkeypatch.setattr(run, "run_all", lambda runs, *rest: stages.append(runs) or ["medium small base/grpo at 5e-4/101: exit code 1"])
    monkeypatch.setattr(run.toy, "resolve_model", lambda name: name)
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "methods", "--results", str(tmp_path / "r.jsonl")])
    assert run.main() == 1 and len(stages) == 1 and all(" at " in r.setting for r in stages[0])
    monkeypatch.undo()
    monkeypatch.setattr(run, "child", lambda r, folder: sys.exit(0))  # it leaves no log
    failed = run.run_all(run.cells(run.PAIR[:1], ["lite_ppo"], [1, 2]), tmp_path / "r.jsonl", tmp_path, 2, "", False)
    assert len(failed) == 2 and all("cannot be read" in text for text in failed) and run.load(tmp_path / "r.jsonl") == []


def test_a_fork_is_an_ordinary_run_and_another_std_divides(tiny):
    script = f"""if True:
        import sys; sys.path.insert(0, {str(HERE / "experiments")!r})
        import run
        run.ENVIRONMENTS["tiny"] = '''{TINY} --model model --train-data data.jsonl --eval-data data.jsonl --reward {tiny}/seven.py:seven'''
        assert run.run_all(run.cells(["tiny"], ["lite_ppo", "std: within groups"], [5]), run.Path("f.jsonl"), run.Path("forks"), 2, "", True) == []"""
    (tiny / "seven.py").write_text("def seven(response, row):\n    return float(sum(map(ord, response)) % 3 == 0)\n")
    assert (done := start("-c", script, folder=tiny)).returncode == 0, done.stderr[-3000:]
    for name, std in (("lite_ppo", lambda r: r.std()), ("std:_within_groups", lambda r: run._std_within_groups(r, None))):
        samples = [json.loads(text) for text in (tiny / f"forks/tiny-{name}-5/samples.jsonl").read_text().splitlines()]
        for step in (1, 2):
            rewards, advantages = (torch.tensor([s[key] for s in samples if s["step"] == step]).view(4, 4) for key in ("reward", "advantage"))
            assert rewards.std() > 0 and torch.allclose(advantages, (rewards - rewards.mean(1, keepdim=True)) / (std(rewards) + 1e-6), atol=1e-5)
    flags = f"{TINY} --model model --train-data data.jsonl --eval-data data.jsonl --reward {tiny}/seven.py:seven --seed 5 --output-dir plain"
    plain = start(str(HERE / "lite_ppo.py"), *flags.split(), folder=tiny)
    assert plain.returncode == 0, plain.stderr[-3000:]
    without = lambda path: [{k: v for k, v in json.loads(text).items() if not k.startswith("time/")} for text in (tiny / path).read_text().splitlines()]  # noqa: E731
    assert without("plain/samples.jsonl") == without("forks/tiny-lite_ppo-5/samples.jsonl")  # the same run without a fork
