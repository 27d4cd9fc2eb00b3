"""Figures and tables of the results of run.py.

    python experiments/plot.py    # figures/*.png, results.md, the generated parts of findings.md
    python experiments/plot.py --results experiments/results/qwen3.jsonl    # results of other runs

For other results, everything goes into a folder beside the file. What an effect and its interval
are is written in effects.py.
"""

import argparse
import re
from pathlib import Path

import appendix
import figures
import findings
from drawing import DPI
from effects import Rows, show_effect
from grid import ENVIRONMENTS
from run import HERE, load
from tables import USUAL, Question, Results, results_page

TOY_RESULTS = HERE / "results/toy.jsonl"
# The main grid from other base models: another CPU made other weights with the same warm-up.
OTHER_MODEL = HERE / "results/other_model.jsonl"
FINDINGS = HERE.parent / "docs/findings.md"


def toy_results() -> Results:
    """The results that the documents are about."""
    return Results("results/toy.jsonl", load(TOY_RESULTS), load(OTHER_MODEL))


def draw_toy() -> None:
    """Figures, results.md and the generated parts of findings.md."""
    results = toy_results()
    folder = HERE / "figures"
    figures.draw_figures(results.rows, folder)
    appendix.draw_appendix(results.rows, folder / "appendix")
    (HERE / "results.md").write_text(results_page(results), encoding="utf-8")
    findings.write_findings(results, FINDINGS)


def draw_other_toy(results: Results, folder: Path) -> None:
    """Figures and results.md for other runs of the toy's grid."""
    figures.draw_figures(results.rows, folder)
    appendix.draw_appendix(results.rows, folder / "appendix")
    (folder / "results.md").write_text(results_page(results, "appendix"), encoding="utf-8")


def baseline_first(rows: Rows) -> list[str]:
    """The settings of the results, Lite PPO first."""
    settings = dict.fromkeys(setting for _, setting in rows)
    return sorted(settings, key=lambda setting: setting != "lite_ppo")


def draw_models(results: Results, folder: Path) -> None:
    """Figures for real models, and the effects on the console."""
    rows = results.rows
    settings = baseline_first(rows)
    environments = list(dict.fromkeys(env for env, _ in rows))
    if figure := figures.overview(rows, environments, settings):
        figure.savefig(folder / "overview.png", dpi=DPI)
    (folder / "appendix").mkdir(exist_ok=True)
    for env in environments:
        question = Question(env, [env], settings, [*USUAL, "truncated"])
        name = re.sub("[^A-Za-z0-9.-]+", "_", env)
        figure = appendix.curves_figure(rows, question)
        figure.savefig(folder / f"appendix/{name}.png", dpi=appendix.DPI)
        for setting in settings[1:]:
            effect = show_effect(rows, setting, settings[0], [env])
            print(f"{env}: {setting} against {settings[0]}: {effect}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=TOY_RESULTS)
    args = parser.parse_args()
    if args.results.resolve() == TOY_RESULTS:
        draw_toy()
        return
    results = Results(f"results/{args.results.name}", load(args.results))
    if not results.lines:
        raise SystemExit(f"--results {args.results}: no results; experiments/run.py makes them")
    folder = args.results.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    if {env for env, _ in results.rows} <= set(ENVIRONMENTS):
        draw_other_toy(results, folder)
    else:
        draw_models(results, folder)


if __name__ == "__main__":
    main()
