"""Figures and tables of the results of run.py.

    python experiments/plot.py    # figures, results.md, real.md, generated parts of findings.md
    python experiments/plot.py --results experiments/results/other.jsonl    # results of other runs

For other results, everything goes into a folder beside the file. effects.py says what an effect and
its interval are.
"""

import argparse
from pathlib import Path

import appendix
import figures
import findings
import real_page
from grid import ENVIRONMENTS
from records import HERE, load
from tables import Results, results_page

TOY_RESULTS = HERE / "results/toy.jsonl"
REAL_RESULTS = HERE / "results/real.jsonl"
# The main grid from other base models: another CPU made other weights with the same warm-up.
OTHER_MODEL = HERE / "results/other_model.jsonl"
FINDINGS = HERE.parent / "docs/findings.md"


def toy_results() -> Results:
    """The results that the documents are about."""
    return Results("results/toy.jsonl", load(TOY_RESULTS), load(OTHER_MODEL))


def real_results() -> Results:
    """Those of real models."""
    return Results("experiments/results/real.jsonl", load(REAL_RESULTS))


def draw_toy() -> None:
    """Figures, results.md and the generated parts of findings.md."""
    results = toy_results()
    folder = HERE / "figures"
    figures.draw_figures(results.rows, folder)
    appendix.draw_appendix(results.rows, folder / "appendix")
    (HERE / "results.md").write_text(results_page(results), encoding="utf-8")
    findings.write_findings(results, real_results(), FINDINGS)


def draw_other_toy(results: Results, folder: Path) -> None:
    """Figures and results.md for other runs of the toy's grid."""
    figures.draw_figures(results.rows, folder)
    appendix.draw_appendix(results.rows, folder / "appendix")
    (folder / "results.md").write_text(results_page(results, "appendix"), encoding="utf-8")


def draw_real() -> None:
    """real.md and its figures."""
    real_page.draw(real_results(), HERE / "real.md", HERE / "figures/real")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=TOY_RESULTS)
    args = parser.parse_args()
    if args.results.resolve() == TOY_RESULTS:
        draw_toy()
        draw_real()
        return
    results = Results(f"results/{args.results.name}", load(args.results))
    if not results.lines:
        raise SystemExit(f"--results {args.results}: no results; run.py and real.py make them")
    folder = args.results.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    if {env for env, _ in results.rows} <= set(ENVIRONMENTS):
        draw_other_toy(results, folder)
    else:
        real_page.draw(results, folder / "results.md", folder / "figures")


if __name__ == "__main__":
    main()
