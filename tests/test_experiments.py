"""The experiments: documents match the results, results match the grid, statistics are right."""

import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import appendix  # noqa: E402
import claims  # noqa: E402
import definitions  # noqa: E402
import drawing  # noqa: E402
import effects  # noqa: E402
import figures  # noqa: E402
import findings  # noqa: E402
import grid  # noqa: E402
import overview  # noqa: E402
import plot  # noqa: E402
import pool  # noqa: E402
import real  # noqa: E402
import real_findings  # noqa: E402
import real_page  # noqa: E402
import records  # noqa: E402
import run  # noqa: E402
import tables  # noqa: E402

import lite_ppo  # noqa: E402
from support import cli, toy  # noqa: E402
from tests import forks  # noqa: E402

STORED = plot.toy_results()
REAL_MODELS = plot.real_results()
FINDINGS = (ROOT / "docs/findings.md").read_text(encoding="utf-8")


# ---- documents match the results -----------------------------------------------------------------


def test_results_md_is_what_the_results_generate():
    assert tables.results_page(STORED) == (EXPERIMENTS / "results.md").read_text(encoding="utf-8")


def test_findings_md_holds_what_the_results_generate():
    sections = findings.generated(STORED, REAL_MODELS)
    assert findings.with_sections(FINDINGS, sections) == FINDINGS
    assert "not run" not in FINDINGS and "nan" not in FINDINGS and "<!--" not in FINDINGS
    assert FINDINGS.count("+8.0") >= 1  # a wrong number and a lost section are noticed
    assert findings.with_sections(FINDINGS.replace("+8.0", "+9.0"), sections) == FINDINGS
    with pytest.raises(ValueError, match="## Measured"):
        findings.with_sections(FINDINGS.replace("## Measured", "## Other"), sections)


def prose(page: str) -> str:
    """The hand-written part of findings.md, on one line."""
    written = re.sub(
        r"^## (Measured|On a real model|Tables)\n.*?(?=^## |\Z)", "", page, flags=re.M | re.S
    )
    return " ".join(written.split())


@pytest.mark.parametrize("sentence", claims.STATEMENTS)
def test_sentences_of_findings_md_agree_with_the_results(sentence):
    assert sentence in prose(FINDINGS)
    for finding in claims.STATEMENTS[sentence]:
        assert finding.holds(STORED), finding.text(STORED)


def test_other_sentences_of_findings_md_agree_with_the_results():
    accuracy = claims.against_lite_ppo("", "", claims.PLAIN, grid.where())
    pass_at_4 = claims.against_lite_ppo("", "", claims.PLAIN, grid.where(), effects.PASS_AT_4)
    means = [effects.interval(found.values(STORED)).mean for found in (pass_at_4, accuracy)]
    assert 0 < means[0] < means[1]
    assert max(map(abs, findings.others_range(STORED))) <= 2.5
    assert "within 2.5 points of zero" in prose(FINDINGS)
    assert len({grid.best_rate(STORED.lines, name) for name in grid.METHODS}) == 1
    assert "All methods have the same best rate here." in prose(FINDINGS)


def test_prose_of_findings_md_holds_no_measured_number():
    assert re.findall(r"[+-]\d+\.\d|\[[-+]?\d", prose(FINDINGS)) == []


def test_a_verdict_that_the_results_contradict_stops_the_page():
    lines = []
    for row in STORED.lines:
        if row["setting"] == "overlong filter":  # hurts at the tight limit; made to help there
            row = row | {"final": row["final"] | {"accuracy": 0.9 + row["seed"] / 1000}}
        lines.append(row)
    changed = tables.Results(STORED.source, lines, STORED.other_lines)
    with pytest.raises(ValueError, match="filter, tight limit"):
        findings.generated(changed, REAL_MODELS)


@pytest.mark.parametrize(
    "changed, message",
    [
        ("lite_ppo", "GRPO falls less by +"),
        ("dapo, no resampling", "'DAPO without resampling against Lite PPO at 3e-6 +"),
        ("grpo", "expects the sign '0' of 'GRPO -"),
        ("reinforce at 1e-5", "reinforce at 1e-5 changes by +"),
    ],
)
def test_a_verdict_on_a_real_model_that_the_results_contradict_stops_the_page(changed, message):
    lines = []
    for row in REAL_MODELS.lines:
        better = row["setting"] == changed
        final = row["final"] | ({"accuracy": 0.9 + row["seed"] / 1000} if better else {})
        lines.append(row | {"final": final})
    with pytest.raises(ValueError, match=re.escape(message)):
        findings.generated(STORED, tables.Results(REAL_MODELS.source, lines))


def test_page_and_headline_of_real_models_are_what_the_results_generate():
    page = real_page.page(REAL_MODELS, "figures/real")
    assert page == (EXPERIMENTS / "real.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    gains = effects.level(REAL_MODELS.rows, "lite_ppo", [real_findings.GSM8K], effects.GAIN)
    assert effects.sign(gains) == "0" and "Lite PPO's own gain contains zero" in FINDINGS
    for effect in real_findings.headline(REAL_MODELS):
        assert effect in " ".join(readme.split())


def headings(path: Path) -> list[str]:
    return [findings.anchor(title) for title in re.findall(r"^#+ (.*)", path.read_text(), re.M)]


@pytest.mark.parametrize(
    "name",
    ["docs/findings.md", "experiments/README.md", "experiments/results.md", "experiments/real.md"],
)
def test_links_lead_somewhere(name):
    page = ROOT / name
    links = re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8"))
    assert links
    for path, anchor in links:
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        if anchor:
            assert anchor in headings(target), anchor


def test_every_figure_is_drawn_by_the_code_and_used_by_a_document():
    drawn = {path.stem for path in (EXPERIMENTS / "figures").glob("*.png")}
    assert drawn == set(figures.FIGURES)
    for name in drawn:
        assert f"experiments/figures/{name}.png" in FINDINGS
    curves = {path.stem for path in (EXPERIMENTS / "figures/appendix").glob("*.png")}
    assert curves == set(tables.QUESTIONS)


# ---- results match the grid ----------------------------------------------------------------------


def key(r) -> tuple[str, str, int]:
    return r.environment, r.setting, r.seed


def test_every_run_of_the_grid_is_in_the_results_with_its_flags():
    stored = {
        (row["environment"], row["setting"], row["seed"]): row["flags"] for row in STORED.lines
    }
    runs = [r for question in grid.questions(STORED.lines).values() for r in question]
    assert {key(r): r.flags for r in runs} == stored
    for r in grid.cells(grid.GRID, grid.ISOLATED, range(5)):
        assert STORED.other[r.environment, r.setting][r.seed]["flags"] == r.flags


PRESET_FIELDS = sorted({name for preset in lite_ppo.PRESETS.values() for name in preset})


@pytest.mark.parametrize("method", grid.METHODS)
def test_stored_runs_have_the_presets_of_today(method):
    defaults = vars(lite_ppo.Config())
    today = vars(learning(f"{grid.TOY} {grid.METHODS[method]}"))
    settings = {f"{kind} {method}" for kind in ("tuned", "common")}
    settings |= {f"{method} at {rate}" for rate in grid.RATES}
    rows = [r for r in STORED.lines + STORED.other_lines if r["setting"] in settings]
    assert len(rows) >= 27  # 12 of the sweep, 10 on base, 5 on aligned
    for row in rows:
        for name in PRESET_FIELDS:
            assert row["config"].get(name, defaults[name]) == today[name], (row["setting"], name)


def test_every_cell_has_five_seeds():
    for question in grid.questions(STORED.lines).values():
        cells = [(r.environment, r.setting) for r in question if " at " not in r.setting]
        assert all(cells.count(cell) >= 5 for cell in cells)


def test_retired_flags_of_stored_lines_are_ignored():
    stored = "--steps 20 --samples-per-step 0 --model m --advantage-eps 1e-4"
    assert grid.current_flags(stored) == "--steps 20 --model m"
    text = (EXPERIMENTS / "results/toy.jsonl").read_text()
    assert all(flag in text for flag in grid.RETIRED_FLAGS)
    for row in STORED.lines:
        assert not any(flag in row["flags"] for flag in grid.RETIRED_FLAGS)


def test_the_reduced_grid_is_a_part_of_the_grid_with_98_runs():
    # A method whose rate differs from the common one adds two runs.
    reduced = {key(r) for runs in grid.reduced_questions([]).values() for r in runs}
    whole = {key(r) for runs in grid.questions(STORED.lines).values() for r in runs}
    assert len(reduced) == 98 and reduced <= whole


# ---- settings ------------------------------------------------------------------------------------

NO_NORMALISATION = dict(advantage_mean="none", advantage_std="none")
CHANGES = {  # what each setting changes in the configuration
    "lite_ppo": {},
    "group std": dict(advantage_std="group"),
    "no std": dict(advantage_std="none"),
    "batch mean": dict(advantage_mean="batch"),
    "no normalisation": NO_NORMALISATION,
    "sequence level": dict(loss_level="sequence"),
    "constant level": dict(loss_level="constant"),
    "neither trick": dict(NO_NORMALISATION, loss_level="sequence"),
    "clip 0.24": dict(clip_high=0.24),
    "clip 0.28": dict(clip_high=0.28),
    "clip 0.32": dict(clip_high=0.32),
    "overlong filter": dict(overlong_filter=True),
    "soft punishment": dict(overlong_buffer=0.2),
    "lite_ppo, -1/1": dict(reward_low=-1),
    "group std, -1/1": dict(advantage_std="group", reward_low=-1),
    "batch mean, -1/1": dict(advantage_mean="batch", reward_low=-1),
    "no normalisation, -1/1": dict(NO_NORMALISATION, reward_low=-1),
    "std: ddof 0": {},
    "std: within groups": {},
    "std: by tokens": {},
    "std: per rank": {},
    "eps 1e-4": {},
}


def config_of(setting: str) -> dict:
    (made,) = grid.cells(grid.PAIR[:1], [setting], [1])
    args = pool.arguments(made, Path("x"))
    return vars(cli.parse_config(lite_ppo.Config, lite_ppo.PRESETS, args))


def test_every_setting_is_listed():
    assert set(CHANGES) == set(grid.SETTINGS)


@pytest.mark.parametrize("setting", CHANGES)
def test_a_setting_changes_one_thing(setting):
    plain = config_of("lite_ppo")
    assert (plain["preset"], plain["minibatches"], plain["seed"]) == ("lite_ppo", 4, 1)
    assert plain["model"] == "toy:small:base"
    found = config_of(setting)
    assert {k: value for k, value in found.items() if value != plain[k]} == CHANGES[setting]


REWARDS = torch.tensor([[1.0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])


def test_definitions_of_the_std_by_hand():
    ones = torch.ones(3, 4)
    three = REWARDS[:3]  # 4 of 12 correct
    found = {
        name: make(three, ones)
        for name, make in definitions.DEFINITIONS.items()
        if name != "std: per rank"
    }
    assert found["std: ddof 0"] == pytest.approx(0.471405 + 1e-6, abs=1e-6)
    assert found["std: within groups"] == pytest.approx(0.353553 + 1e-6, abs=1e-6)
    assert found["std: by tokens"] == pytest.approx(0.353553 + 1e-6, abs=1e-6)
    assert found["eps 1e-4"] == pytest.approx(0.492366 + 1e-4, abs=1e-6)
    per_rank = definitions.per_rank(REWARDS, torch.ones(4, 4))
    assert per_rank[:, 0].tolist() == pytest.approx([0.5, 0, 0.5, 0], abs=2e-6)


def test_the_std_by_tokens_counts_long_responses_more():
    lengths = torch.ones(3, 4)
    lengths[0, 3] = 7  # a wrong response of 7 tokens, deviation 0.75, beside 11 of one token
    squares = 7 * 0.75**2 + 3 * 0.25**2 + 0.75**2 + 3 * 0.25**2
    expected = math.sqrt(squares / 18)
    assert definitions.by_tokens(REWARDS[:3], lengths) == pytest.approx(expected, abs=2e-6)


def test_the_best_rate_has_the_highest_mean():
    accuracies = [("2.5e-4", 0.5), ("2.5e-4", 0.7), ("5e-4", 0.9), ("5e-4", 0.5), ("1e-3", 0.69)]
    rows = [dict(setting=f"grpo at {r}", final=dict(accuracy=a)) for r, a in accuracies]
    assert grid.best_rate(rows, "grpo") == "5e-4"
    assert grid.best_rate(rows[:2] + rows[4:], "grpo") == "1e-3"


def test_the_lowest_of_equal_rates_is_chosen():
    rows = [dict(setting=f"rloo at {rate}", final=dict(accuracy=0.5)) for rate in grid.RATES]
    assert grid.best_rate(rows, "rloo") == grid.RATES[0]


# ---- statistics ----------------------------------------------------------------------------------


def line(setting: str, seed: int, accuracy: float, environment: str = "e") -> dict:
    return dict(environment=environment, setting=setting, seed=seed, final=dict(accuracy=accuracy))


def test_intervals_by_hand():
    half = 2.776 * math.sqrt(2.5 / 5)
    assert effects.interval([1, 2, 3, 4, 5]) == pytest.approx((3, 3 - half, 3 + half))
    assert effects.interval([1, 3]) == pytest.approx((2, 2 - 12.706, 2 + 12.706))
    assert math.isnan(effects.interval([1]).low)


@pytest.mark.parametrize(
    "freedom, value", [(9, 2.2622), (10, 2.2281), (19, 2.0930), (30, 2.0423), (120, 1.9799)]
)
def test_students_t_is_that_of_the_printed_tables(freedom, value):
    assert effects.t975(freedom) == pytest.approx(value, abs=3e-4)


def test_an_effect_is_printed_with_its_interval():
    assert effects.show([1, 2, 3, 4, 5]) == "+3.0 [+1.0, +5.0]"
    assert effects.show([0.5, 0.5], 2, signed=False) == "0.50 [0.50, 0.50]"
    assert effects.show([]) == "not run" and effects.show([1]) == "+1.0 [one seed]"


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(-1, 1)), min_size=1, max_size=8)
)
def test_an_effect_is_paired_by_seed_and_antisymmetric(triples):
    lines, harder = [], []
    for seed, (a, b, difficulty) in enumerate(triples):
        lines += [line("a", seed, a), line("b", seed, b)]
        harder += [line("a", seed, a - difficulty), line("b", seed, b - difficulty)]
    rows = effects.by_cell(lines)
    found = effects.effect(rows, "a", "b", ["e", "absent"])
    assert found == pytest.approx([100 * (a - b) for a, b, _ in triples])
    swapped = [-value for value in effects.effect(rows, "b", "a", ["e"])]
    assert found == pytest.approx(swapped, abs=1e-9)
    shifted = effects.effect(effects.by_cell(harder), "a", "b", ["e"])
    assert found == pytest.approx(shifted, abs=1e-9)


def test_an_effect_over_environments_is_averaged_seed_by_seed_without_unpaired_seeds():
    e = [line("a", 0, 0.5), line("a", 1, 0.9), line("b", 0, 0.4), line("b", 1, 0.5)]
    f = [line("a", 0, 0.7, "f"), line("b", 0, 0.3, "f"), line("b", 1, 0.2, "f")]
    rows = effects.by_cell(e + f)
    assert effects.effect(rows, "a", "b", ["e"]) == pytest.approx([10, 40])
    assert effects.effect(rows, "a", "b", ["e", "f"]) == pytest.approx([25])
    assert effects.level(rows, "b", ["e", "f"]) == pytest.approx([35, 35])


ROW = {
    "curve": {
        "rollout/responses": [64, 128, 64, 256],
        "response/truncated": [0.5, 0.25, 0, 0],
        "response/looping": [1, 0, 0, 0],
    },
    "evaluation": {"step": [0, 2, 3, 4], "eval/toy/accuracy": [0.1, 0.2, 0.3, 0.4]},
}


def test_accuracy_at_equal_responses_by_hand():
    assert effects.cost(ROW).tolist() == [0, 192, 256, 512]
    budgets = [0, 96, 192, 224, 256, 384, 512]
    found = [effects.accuracy_at(ROW, budget) for budget in budgets]
    assert found == pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4])


def test_accuracy_at_a_step_is_that_of_its_evaluation():
    assert [effects.accuracy_at_step(ROW, step) for step in (0, 2, 3, 4)] == [0.1, 0.2, 0.3, 0.4]
    with pytest.raises(ValueError):  # not evaluated
        effects.accuracy_at_step(ROW, 1)


def test_the_looping_share_is_that_of_truncated_responses():
    assert effects.looping_share(ROW) == pytest.approx(2 / 3)


# ---- titles --------------------------------------------------------------------------------------

GAIN, LOSS, NOTHING = [2.0, 2.1, 2.2], [-2.0, -2.1, -2.2], [-1.0, 0.0, 1.0]


def test_signs_come_from_the_interval():
    found = [effects.sign(values) for values in (GAIN, LOSS, NOTHING, [1.0], [])]
    assert found == ["+", "-", "0", "?", "?"]


def test_a_verdict_names_the_effects_that_are_clear():
    assert effects.verdict({"a": NOTHING, "b": NOTHING}) == "no difference seen"
    text = effects.verdict({"a": GAIN, "b": NOTHING, "c": LOSS})
    assert text == "a +2.1, c -2.1 points; others: no difference seen"
    assert effects.verdict({"a": GAIN}) == "a +2.1 points"
    assert effects.verdict({"a": [1.0]}) == "one seed, no interval"
    assert effects.verdict({"a": []}) == "not run"


def test_titles_follow_the_results():
    both = {drawing.BASE: [LOSS, NOTHING, LOSS], drawing.ALIGNED: [LOSS, NOTHING, LOSS]}
    labels = ["x", "y", "z"]
    expected = "On the toy, normalisation costs accuracy; token level shows no difference"
    assert figures.parts_answer(both, labels) == expected
    reverse = {drawing.BASE: [GAIN, NOTHING, LOSS], drawing.ALIGNED: [LOSS, NOTHING, LOSS]}
    assert figures.parts_answer(reverse, labels).startswith("Against neither trick: x, base +2.1")
    assert drawing.does(GAIN) == "gains 2.1 points" and drawing.does(LOSS) == "costs 2.1 points"
    assert drawing.does(NOTHING) == "shows no difference"
    methods = {"A": {drawing.BASE: GAIN, drawing.ALIGNED: NOTHING}, "B": {drawing.BASE: LOSS}}
    title = "Against Lite PPO, better on base: A; worse on base: B; otherwise no difference seen"
    assert figures.methods_answer(methods) == title
    assert figures.methods_answer({"C": methods["B"]}) == "Against Lite PPO, worse on base: C"
    nothing = "Against Lite PPO, no difference seen"
    assert figures.methods_answer({"D": {drawing.ALIGNED: NOTHING}}) == nothing


def test_the_title_of_the_overview_names_large_effects_only():
    means = {"a": [5.0, 5.1, 5.2], "b": NOTHING, "c": [0.4, 0.5, 0.6]}
    expected = "A +5.1 points; every other switch between +0.0 and +0.5"
    assert overview.overview_answer(means) == expected
    assert overview.overview_answer({"b": NOTHING}) == "Every switch between +0.0 and +0.0"


# ---- figures -------------------------------------------------------------------------------------


def full(setting: str, seed: int, environment: str, steps: int = 4, accuracy: float = 0.5) -> dict:
    """A line as run.py writes it."""
    curve = {name: [0.25 + 0.01 * seed] * steps for name in records.CURVES}
    curve |= {"rollout/responses": [64] * steps, "reward/std": [0.0] * steps}
    evaluation = {"step": [0, steps]}
    for name in ("toy", "other"):
        for metric in ("accuracy", "pass_at_k"):
            evaluation[f"eval/{name}/{metric}"] = [0.2, accuracy]
    final = dict.fromkeys(records.LATE, 0.1)
    final |= dict(accuracy=accuracy, accuracy_before=0.2, reward=0.3)
    return dict(
        environment=environment,
        setting=setting,
        seed=seed,
        seconds=1.0,
        date="2026-01-01",
        flags="",
        config=dict(max_new_tokens=56),
        final=final,
        curve=curve,
        evaluation=evaluation,
        clipped=dict(low=[["1", 3]], high=[]),
    )


def draw(folder: Path, monkeypatch, rows: list[dict]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "some.jsonl").write_text(text)
    monkeypatch.setattr(sys, "argv", ["plot.py", "--results", str(folder / "some.jsonl")])
    plot.main()


def test_figures_of_other_results_stand_beside_them(tmp_path, monkeypatch):
    # One seed, a switch without baseline, rewards that never differ, a run of another length.
    first, second = grid.GRID[:2]
    rows = [full("lite_ppo", 0, first), full("group std", 0, first), full("no std", 0, second)]
    rows.append(full("lite_ppo", 1, first, steps=2))
    rows += [full("overlong filter", seed, grid.LIMITS[0]) for seed in range(2)]
    documents = [EXPERIMENTS / "results.md", ROOT / "docs/findings.md"]
    before = [path.read_bytes() for path in documents]
    draw(tmp_path, monkeypatch, rows)
    page = (tmp_path / "some/results.md").read_text()
    assert "`results/some.jsonl`" in page
    assert f"| {first} | +0.0 [one seed] | not run |" in page
    assert (tmp_path / "some/overview.png").exists()
    for link in re.findall(r"\((appendix/[^)]+)\)", page):
        assert (tmp_path / "some" / link).exists()
    assert [path.read_bytes() for path in documents] == before


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_can_be_drawn_from_two_seeds_and_has_an_answer(name):
    lines = [row for row in STORED.lines if row["seed"] < 2]
    figure = figures.FIGURES[name](effects.by_cell(lines))
    assert len(figure.get_suptitle()) > 20 and "nan" not in figure.get_suptitle()
    assert len(figure.axes) <= 2 or name == "overview"


def test_page_of_real_models_takes_any_path_and_any_number_of_settings(tmp_path, monkeypatch):
    rates = ["lite_ppo at 1e-6", "grpo at 1e-6", "rloo at 1e-6", "grpo at 1e-5"]
    settings = [*grid.ISOLATED[::-1], "clip 0.24", "grpo", *rates]  # the baseline is late
    rows = []
    for setting in settings:
        for seed in range(12):
            accuracy = 0.3 + 0.2 * setting.startswith("lite_ppo") + 0.002 * seed
            rows.append(full(setting, seed, "/data/a b.jsonl Qwen3-4B", accuracy=accuracy))
    rows[-1]["curve"] = {key: values[:2] for key, values in rows[-1]["curve"].items()}  # stopped
    draw(tmp_path, monkeypatch, rows)
    drawn = {path.name for path in (tmp_path / "some/figures").iterdir()}
    kinds = """methods switches methods_at_1e-6 rates_of_Lite_PPO rates_of_GRPO""".split()
    assert drawn == {"overview.png", *(f"_data_a_b.jsonl_Qwen3-4B_{kind}.png" for kind in kinds)}
    page = (tmp_path / "some/results.md").read_text()
    for link in re.findall(r"\((figures/[^)]+)\)", page):
        assert (tmp_path / "some" / link).exists()
    shown = {}
    for title, table in re.findall(r"^## [^:]+: (.+)\n\n((?:\|.+\n)+)", page, re.M):
        lines = [line.split(" | ")[:4] for line in table.splitlines()[2:]]
        shown[title] = {name.removeprefix("| "): effect for name, _, _, effect in lines}
    lower = "-20.0 [-20.0, -20.0]"
    assert shown.pop("switches").pop("Lite PPO") == ""
    assert shown == {
        "methods": {"Lite PPO": "", "GRPO": lower},
        "methods at 1e-6": {"Lite PPO at 1e-6": "", "GRPO at 1e-6": lower, "RLOO at 1e-6": lower},
        "rates of Lite PPO": {"Lite PPO": "", "Lite PPO at 1e-6": ""},
        # Lite PPO was not run at 1e-5
        "rates of GRPO": {"GRPO": lower, "GRPO at 1e-6": lower, "GRPO at 1e-5": ""},
    }
    assert "| GRPO | 1e-06 | 12 | -20.0 [-20.0, -20.0] | 31.1 [30.6, 31.6] |" in page


def test_results_of_real_models_have_a_page_and_figures(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(plot.real_page, "draw", lambda *files: calls.append(files))
    monkeypatch.setattr(plot, "REAL_RESULTS", tmp_path / "real.jsonl")
    (tmp_path / "real.jsonl").write_text(json.dumps(full("lite_ppo", 0, "gsm8k Qwen")) + "\n")
    plot.draw_real()
    ((results, path, folder),) = calls
    assert len(results.lines) == 1 and path == EXPERIMENTS / "real.md"
    assert folder == EXPERIMENTS / "figures/real"


def test_missing_results_are_named(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="no results; run.py and real.py make them"):
        draw(tmp_path, monkeypatch, [])


def test_a_pair_of_reward_scales_has_one_colour():
    settings = ["lite_ppo", "lite_ppo, -1/1", "group std", "group std, -1/1"]
    looks = [appendix.look(i, setting, settings) for i, setting in enumerate(settings)]
    first, second = drawing.COLOURS[:2]
    assert [look["color"] for look in looks] == [first, first, second, second]
    assert looks[0]["linestyle"] != looks[1]["linestyle"]


def test_twenty_settings_look_different():
    names = [str(i) for i in range(20)]
    looks = [appendix.look(i, name, names) for i, name in enumerate(names)]
    assert len({(look["color"], str(look["linestyle"])) for look in looks}) == 20


@pytest.mark.parametrize(
    "setting, label",
    [
        ("tuned dr_grpo", "Dr. GRPO"),
        ("common lite_ppo", "Lite PPO, common rate"),
        ("tuned dapo, no resampling", "DAPO, no resampling"),
        ("lite_ppo, -1/1", "Lite PPO, -1/1"),
        ("preset grpo", "GRPO"),
        ("no std", "no std"),
    ],
)
def test_settings_are_named_as_in_the_field(setting, label):
    assert effects.label_of(setting) == label


# ---- the runner ----------------------------------------------------------------------------------

TINY = """--sampler transformers --reward exact --reward-workers 1 --prompts-per-step 4
    --group-size 4 --steps 2 --minibatches 2 --lr 1e-3 --max-prompt-tokens 32 --max-new-tokens 6
    --eval-size 2 --eval-samples 4 --no-activation-checkpointing"""
DATA = "--model model --train-data data.jsonl --eval-data data.jsonl"


def save_tiny_model(folder: Path) -> None:
    """A Qwen3 model with random weights and the toy's tokenizer."""
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    tokenizer = toy.make_tokenizer()
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = Qwen3Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=32,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=None,
        **ends,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experiments")
    save_tiny_model(folder / "model")
    problems = [dict(problem=f"{n}+1", answer=str(n + 1)) for n in range(1, 9)]
    (folder / "data.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    return folder


def test_real_models_run_once_and_failed_runs_are_repeated(tiny, monkeypatch):
    monkeypatch.chdir(tiny)
    data = f"--model model --train-data {tiny}/data.jsonl --eval-data one={tiny}/data.jsonl"
    which = "--only switches --switches lite_ppo --seeds 3 --steps 2 --lr 1e-3"
    files = "--results r.jsonl --folder runs --jobs 2 --stagger 0"
    words = f"{data} {which} {files}".split()
    tiny_flags = TINY.replace("--steps 2 ", "").replace("--lr 1e-3 ", "")
    script = EXPERIMENTS / "real.py"
    results = tiny / "r.jsonl"

    broken = forks.run_script(script, *words, "--flags", tiny_flags + " --top-p 0").wait()
    assert broken.returncode == 1
    kept = (tiny / "r/failed/data_model-lite_ppo-3.txt").read_text()
    for text in (broken.stdout, kept):  # the reason is printed, and kept
        assert "--top-p 0.0: must be positive" in text
    assert records.load(results) == []

    words.insert(words.index("lite_ppo"), "group std")
    made = forks.run_script(script, *words, "--flags", tiny_flags).wait()
    assert made.returncode == 0, made.stdout
    rows = {
        row["setting"]: row for row in records.load(results)
    }  # in any order: two ran side by side
    assert set(rows) == {"lite_ppo", "group std"}
    assert "advantage_std" not in rows["lite_ppo"]["config"]
    assert rows["group std"]["config"]["advantage_std"] == "group"
    for row in rows.values():
        assert row["environment"] == "data model" and row["seed"] == 3
        assert row["config"]["seed"] == 3 and row["evaluation"]["step"] == [0, 1, 2]
        assert all(len(row["curve"][name]) == 2 for name in records.CURVES)
        assert row["config"]["eval_data"] == ["one=data.jsonl"]  # without the folder
        assert str(tiny) not in json.dumps(row)

    results.write_text(results.read_text() + '{"cut off')
    again = forks.run_script(script, *words, "--flags", tiny_flags).wait()
    assert again.returncode == 0 and "2 runs, 2 of them in r.jsonl" in again.stdout
    for setting in ("lite_ppo", "group_std"):  # the logs are kept, the weights are not
        left = {path.name for path in (tiny / f"runs/data_model-{setting}-3").iterdir()}
        assert "metrics.jsonl" in left and "final" not in left


class Recorder:
    """Stands in for Pool.run_all: keeps the runs, and returns the failures that it was given."""

    def __init__(self, *failures: str):
        self.failures = list(failures)
        self.calls: list[list] = []

    def __call__(self, runs: list) -> list[str]:
        self.calls.append(runs)
        return self.failures


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(pool.Pool, "run_all", recorder)
    return recorder


def call_run(monkeypatch, folder: Path, *flags: str) -> int:
    """run.py with these flags."""
    monkeypatch.setattr(sys, "argv", ["run.py", "--results", str(folder / "r.jsonl"), *flags])
    return run.main()


REAL = "--model runs/a/final --train-data /d/gsm.jsonl --eval-data t=/d/t.jsonl".split()


def call_real(monkeypatch, folder: Path, *flags: str) -> int:
    """real.py with these flags."""
    words = ["real.py", *REAL, "--results", str(folder / "r.jsonl"), *flags]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return real.main()


def values_of(flags: str, flag: str) -> list[str]:
    """Every value that a flag is given; the last one counts."""
    words = flags.split()
    return [words[i + 1] for i, word in enumerate(words) if word == flag]


def learning(flags: str) -> lite_ppo.Config:
    """The settings of a run."""
    words = flags.split()
    return cli.parse_config(lite_ppo.Config, lite_ppo.PRESETS, ["--train-data", "f", *words])


def test_methods_on_a_real_model_have_equal_responses_and_optimizer_steps(
    recorder, tmp_path, monkeypatch
):
    words = "--only methods --steps 14 --seeds 4 5 --flags".split()
    assert call_real(monkeypatch, tmp_path, *words, "--prompts-per-step 32") == 0
    (runs,) = recorder.calls
    assert {r.setting for r in runs} == set(grid.METHODS) - {"dapo"} and len(runs) == 12
    assert [r.seed for r in runs] == [4] * 6 + [5] * 6  # seed by seed
    assert {r.environment for r in runs} == {"gsm final"}
    budgets = set()
    for found in (learning(r.flags) for r in runs):
        assert not found.dynamic_sampling
        sizes = found.prompts_per_step, found.group_size, found.max_new_tokens
        budgets.add((*sizes, found.steps, found.minibatches, found.lr, found.eval_every))
    assert budgets == {(32, 8, 512, 14, 2, 3e-6, 7)}


def test_questions_on_a_real_model_change_one_thing(recorder, tmp_path, monkeypatch):
    words = "--only methods switches clip overlong --seeds 0 --limits 100 900".split()
    assert call_real(monkeypatch, tmp_path, *words) == 0
    (runs,) = recorder.calls
    names = [r.name for r in runs]
    assert len(names) == len(set(names)) and names.count("gsm final/lite_ppo/0") == 1
    plain = {r.environment: learning(r.flags) for r in runs if r.setting == "lite_ppo"}
    assert plain["gsm final, 8 steps"].minibatches == 8
    limits = [plain[f"gsm final, {n} tokens"].max_new_tokens for n in (100, 900)]
    assert limits == [100, 900]
    changes = {}
    for r in runs:
        baseline = vars(plain[r.environment])
        found = vars(learning(r.flags))
        changes[r.setting] = {key for key in found if found[key] != baseline[key]}
    assert changes["overlong filter"] == {"overlong_filter"}
    assert changes["clip 0.28"] == {"clip_high"}
    assert changes["group std"] == changes["no std"] == {"advantage_std"}
    assert changes["sequence level"] == {"loss_level"}


def test_rates_on_a_real_model_change_the_rate_alone(recorder, tmp_path, monkeypatch):
    words = "--methods grpo lite_ppo --seeds 7 8 --lr 1e-6 --rates 1.0e-06 0.00001 --only".split()
    assert call_real(monkeypatch, tmp_path, *words, "methods", "rates") == 0
    (runs,) = recorder.calls
    assert [r.seed for r in runs] == [7] * 4 + [8] * 4  # those of --lr are made once
    flags = {r.setting: r.flags for r in runs}
    rates = {setting: values_of(text, "--lr") for setting, text in flags.items()}
    assert rates == {
        "grpo": ["1e-6"],
        "grpo at 1e-5": ["1e-5"],
        "lite_ppo": ["1e-6"],
        "lite_ppo at 1e-5": ["1e-5"],
    }
    assert flags["grpo at 1e-5"].replace("1e-5", "1e-6") == flags["grpo"]


def test_failed_runs_on_a_real_model_are_the_exit_code(recorder, tmp_path, monkeypatch):
    recorder.failures = ["gsm final/grpo/0: exit code 1"]
    assert call_real(monkeypatch, tmp_path, "--only", "methods") == 1


def test_runs_beyond_the_time_are_not_started(tmp_path):
    runs = grid.cells(grid.PAIR[:1], ["lite_ppo"], [1, 2])
    some_runs = pool.Pool(tmp_path / "r.jsonl", tmp_path, jobs=2, deadline=0)
    assert some_runs.run_all(runs) == [f"{r.name}: not started, the time is over" for r in runs]


def test_unfinished_runs_can_be_read(tmp_path, monkeypatch):
    folder = tmp_path / "runs/gsm_final-lite_ppo-0"
    folder.mkdir(parents=True)
    step = dict.fromkeys([*records.CURVES, "time/step"], 0.5)
    log = [{"step": 0, "eval/t/accuracy": 0.2}, {"step": 1, **step}, {"step": 2, **step}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    (folder / "config.json").write_text(json.dumps({"model": "/a/b", "steps": 30}))
    words = ["--only", "methods", "--folder", str(tmp_path / "runs"), "--partial"]
    assert call_real(monkeypatch, tmp_path, *words, str(tmp_path / "p.jsonl")) == 0
    (row,) = records.load(tmp_path / "p.jsonl")
    assert row["curve"]["policy/entropy"] == [0.5, 0.5] and row["seconds"] == 1
    assert row["evaluation"] == {"step": [0], "eval/t/accuracy": [0.2]}
    assert row["config"]["model"] == "b"
    assert not (tmp_path / "r.jsonl").exists()  # the run is still to be made


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--methods", "ppo"], "invalid choice: 'ppo'"),
        (["--switches", "std: ddof 0"], "invalid choice: 'std: ddof 0'"),
        (["--jobs", "0"], "--jobs 0 --steps 20: must be at least 1"),
        (["--flags", "--group-size 4 --lr 1"], "--flags --lr: real.py sets it"),
        (["--flags", "--group-size 4 --lr=1"], "--flags --lr: real.py sets it"),
        (["--machine", "--lr 1"], "--machine --lr: real.py sets it"),
        (["--rates", "3e-6", "high"], "argument --rates: invalid rate value: 'high'"),
    ],
)
def test_mistakes_in_the_flags_of_real_models_are_refused(
    tmp_path, monkeypatch, capsys, flags, message
):
    with pytest.raises(SystemExit):
        call_real(monkeypatch, tmp_path, *flags)
    assert message in capsys.readouterr().err


def test_unknown_questions_are_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call_run(monkeypatch, tmp_path, "--only", "clap")
    assert "--only clap: the questions are sweep" in capsys.readouterr().err


def test_an_incomplete_sweep_gives_no_rate(recorder, tmp_path, monkeypatch):
    recorder.failures = ["medium small base/grpo at 5e-4/101: exit code 1"]
    monkeypatch.setattr(run.toy, "resolve_model", str)
    assert call_run(monkeypatch, tmp_path, "--only", "methods") == 1
    (sweep,) = recorder.calls
    assert all(" at " in r.setting for r in sweep)


def exit_without_logs(made, folder):
    sys.exit(0)


def test_a_run_with_unreadable_logs_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "child", exit_without_logs)
    some_runs = pool.Pool(tmp_path / "r.jsonl", tmp_path, jobs=2)
    failures = some_runs.run_all(grid.cells(grid.PAIR[:1], ["lite_ppo"], [1, 2]))
    assert len(failures) == 2 and all("cannot be read" in text for text in failures)
    assert records.load(tmp_path / "r.jsonl") == []


SEVEN = """
def seven(response, row):
    return float(sum(map(ord, response)) % 3 == 0)
"""
FORKED_GRID = """
import sys
from pathlib import Path

import torch

sys.path.insert(0, EXPERIMENTS)
import grid
import pool

make = pool.lite_ppo.make_minibatches


def keep(responses, advantages, step, cfg):
    scores = torch.tensor([r.score for r in responses]).view(advantages.shape)
    torch.save((scores, advantages), Path(cfg.output_dir) / f"step{step}.pt")
    return make(responses, advantages, step, cfg)


pool.lite_ppo.make_minibatches = keep
grid.ENVIRONMENTS["tiny"] = FLAGS
runs = grid.cells(["tiny"], ["lite_ppo", "std: within groups", "eps 1e-4"], [5])
assert pool.Pool(Path("f.jsonl"), Path("forks"), jobs=2, keep=True).run_all(runs) == []
"""


def batch_std(rewards, lengths):
    return rewards.std() + definitions.EPS


DIVISORS = {
    "lite_ppo": batch_std,
    "std:_within_groups": definitions.within_groups,
    "eps_1e-4": definitions.larger_eps,
}


@pytest.fixture(scope="module")
def forked(tiny) -> Path:
    """Three runs that are forks of a grid, and the first one again by lite_ppo.py."""
    (tiny / "seven.py").write_text(SEVEN)
    flags = f"{TINY} {DATA} --reward {tiny}/seven.py:seven"
    script = FORKED_GRID.replace("FLAGS", repr(flags))
    (tiny / "grid_of_three.py").write_text(script.replace("EXPERIMENTS", repr(str(EXPERIMENTS))))
    plain = f"{flags} --seed 5 --output-dir plain"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tiny)
        runs = forks.run_script(tiny / "grid_of_three.py")
        alone = forks.run_script(ROOT / "lite_ppo.py", *plain.split())
    for done in (runs.wait(), alone.wait()):
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return tiny


@pytest.mark.parametrize("setting", DIVISORS)
def test_a_definition_of_the_std_divides_the_advantage(forked, setting):
    for step in (1, 2):
        rewards, advantages = torch.load(forked / f"forks/tiny-{setting}-5/step{step}.pt")
        centred = rewards - rewards.mean(1, keepdim=True)
        assert rewards.std() > 0
        assert torch.allclose(
            advantages, centred / DIVISORS[setting](rewards, None), atol=1e-6, rtol=1e-6
        )


def samples(path: Path) -> list[dict]:
    """samples.jsonl without its times."""
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def test_a_fork_is_an_ordinary_run(forked):
    plain = samples(forked / "plain/samples.jsonl")
    assert plain and plain == samples(forked / "forks/tiny-lite_ppo-5/samples.jsonl")
    rows = {row["setting"]: row for row in records.load(forked / "f.jsonl")}
    assert "advantage" not in rows["lite_ppo"] and rows["eps 1e-4"]["advantage"] == "eps 1e-4"


def test_ranges_of_a_rate_that_is_a_little_too_high_are_those_of_the_results():
    page = (ROOT / "docs/operating.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `([\w/]+)`.*\| (\S+) to (\S+) \| (\S+) to (\S+) \| (.+) \|$", page, re.M
    )
    assert len(rows) == 7
    for key, *numbers, relation in rows:
        factor = {"policy/approx_kl": 1000, "policy/clip_low": 100, "policy/clip_high": 100}.get(
            key, 1
        )
        ends = []
        for setting in ("lite_ppo", "lite_ppo at 1e-5"):
            runs = [row["curve"] for row in REAL_MODELS.lines if row["setting"] == setting]
            values = [factor * value for curves in runs for value in curves[key][3:]]
            ends += [min(values), max(values)]
        digits = [len(number.partition(".")[2]) for number in numbers]
        assert [float(number) for number in numbers] == [
            round(end, places) for end, places in zip(ends, digits)
        ], key
        assert (relation == "**apart**") == (ends[2] > ends[1]), key


def test_what_operating_md_says_of_the_two_rates_is_in_the_results():
    page = " ".join((ROOT / "docs/operating.md").read_text(encoding="utf-8").split())
    curves, late = {}, {}
    for setting in ("lite_ppo", "lite_ppo at 1e-5", "grpo at 1e-5"):
        runs = REAL_MODELS.rows[real_findings.GSM8K, setting]
        curves[setting] = [runs[seed] for seed in (0, 1, 2)]
        late[setting] = [sum(run["curve"]["reward/mean"][15:]) / 5 for run in curves[setting]]
    low, high = late["lite_ppo"], late["lite_ppo at 1e-5"]
    ends = [min(low), max(low), min(high), max(high)]
    assert "{:.2f} to {:.2f} at 3e-6 and {:.2f} to {:.2f} at 1e-5".format(*ends) in page
    ends = [min(late["grpo at 1e-5"]), max(late["grpo at 1e-5"])]
    assert "for GRPO at 1e-5 it is {:.2f} to {:.2f}".format(*ends) in page
    middle = {
        setting: [100 * run["evaluation"]["eval/gsm8k/accuracy"][1] for run in runs]
        for setting, runs in curves.items()
    }
    before = 100 * curves["lite_ppo"][0]["final"]["accuracy_before"]
    since = [value - before for value in middle["lite_ppo at 1e-5"]]
    assert effects.show(since).replace(" ", " points ", 1) in page
    mean, first, last = effects.interval(
        [b - a for a, b in zip(middle["lite_ppo at 1e-5"], middle["lite_ppo"])]
    )
    assert f"{mean:.1f} points [{first:.1f}, {last:.1f}] below" in page
    highest = max(max(run["curve"]["policy/approx_kl"][3:]) for run in curves["lite_ppo"])
    assert all(
        min(run["curve"]["policy/approx_kl"][3:]) > highest for run in curves["grpo at 1e-5"]
    )


def test_healthy_ranges_of_operating_md_are_those_of_the_results():
    """The smallest and the largest value of all steps of Lite PPO at 3e-6."""
    runs = [row["curve"] for row in REAL_MODELS.lines if row["setting"] == "lite_ppo"]
    page = (ROOT / "docs/operating.md").read_text(encoding="utf-8")
    ranges = {
        "policy/grad_norm": (1, 2),
        "policy/entropy": (1, 2),
        "policy/clip_high": (100, 3),
        "response/length_mean": (1, 0),
        "rollout/logprob_gap_mean": (1, 3),
    }
    for key, (factor, digits) in ranges.items():
        values = [factor * value for curves in runs for value in curves[key]]
        low, high = re.search(rf"`{key}`[^|]*\| ([\d.]+) to ([\d.]+) \|", page).groups()
        assert float(low) == round(min(values), digits), key
        assert float(high) == round(max(values), digits), key
