"""The generated parts of docs/findings.md: the paper's claims against the measured effects.

The texts stand here, the numbers come from the results. Every verdict names the sign of the effects
it rests on. If the results disagree with a sign, the page is not written.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import real_findings
from claims import CLAIMS, Claim
from effects import (
    ACCURACY,
    AT_BUDGET,
    AT_STEP_18,
    CLIP_HIGH,
    ENTROPY,
    LENGTH,
    LOOPING,
    PASS_AT_4,
    REWARD_STD,
    STD_RATIO,
    TRUNCATED,
    TRUNCATED_LATE,
    at_common_rate,
    clipped_counts,
    effect,
    in_brackets,
    interval,
    label_of,
    show_effect,
    show_level,
)
from grid import (
    CLIPS,
    DEFINITIONS,
    LIMITS,
    LONG,
    METHODS,
    PAIR,
    SCALED,
    STEPS,
    TOKEN_LIMITS,
    best_rate,
    where,
)
from tables import Results, markdown

VARIANTS = {"base": where("base"), "aligned": where("aligned")}


@dataclass
class Table:
    """A table of the page, with the figure that shows the same."""

    title: str
    head: list[str]
    body: list[list[str]]
    figure: str = ""
    notes: list[str] = field(default_factory=list)


# ---- the tables, by claim ------------------------------------------------------------------------


def scale_table(results: Results) -> Table:
    body = []
    for name in SCALED:
        cells = show_effect(results.rows, f"{name}, -1/1", name, PAIR[:1])
        body.append([f"{label_of(name)}: rewards {{-1, 1}} instead of {{0, 1}}", PAIR[0], cells])
    for label, these in {"all": where(), **VARIANTS}.items():
        cells = show_effect(results.rows, "batch mean", "lite_ppo", these)
        body.append(["batch mean instead of group mean", label, cells])
    return Table("Reward scale and batch mean", ["change", "environments", "effect"], body, "scale")


def std_table(results: Results) -> Table:
    groups = {
        "easy small aligned": where("easy", "small", "aligned"),
        "easy aligned": where("easy", "aligned"),
        "all aligned": where("aligned"),
        "hard": where("hard"),
        "all": where(),
    }
    body = []
    for label, these in groups.items():
        spread = show_level(results.rows, "lite_ppo", these, REWARD_STD)
        body.append([label, spread, show_effect(results.rows, "no std", "lite_ppo", these)])
    for label, these in {"all aligned": where("aligned"), "all": where()}.items():
        cells = show_effect(results.other, "no std", "lite_ppo", these)
        body.append([f"{label}, other base models", "not stored", cells])
    head = ["environments", "std of the rewards", "effect of no std"]
    return Table("No std on concentrated rewards", head, body, "std")


def group_std_table(results: Results) -> Table:
    body = []
    for label, these in {"all": where(), **VARIANTS}.items():
        here = show_effect(results.rows, "group std", "lite_ppo", these)
        other = show_effect(results.other, "group std", "lite_ppo", these)
        body.append([label, here, other])
    head = ["environments", "effect of group std", "from other base models"]
    return Table("Group std instead of batch std", head, body)


def clip_table(results: Results) -> Table:
    rows = results.rows
    body = []
    for env in STEPS:
        for bound, name in CLIPS.items():
            line = [env, bound]
            for measure in (ACCURACY, ENTROPY):
                changed = show_effect(rows, name, "lite_ppo", [env], measure)
                line.append(changed if bound != "0.20" else "baseline")
            body.append([*line, show_level(rows, name, [env], CLIP_HIGH)])
    head = ["environment", "upper bound", "accuracy", "entropy, nats", "clipped high, % of tokens"]
    return Table("Clip-higher, ten seeds", head, body, "clip")


def tokens_table(results: Results) -> Table:
    body = []
    for env in STEPS:
        for bound in ("0.20", "0.28"):
            counts = clipped_counts(results.rows, env, CLIPS[bound])
            line = [env, bound]
            for side in ("low", "high"):
                common = [token for token, _ in counts[side].most_common(5)]
                line += [f"{counts[side].total():,}", " ".join(f"`{token}`" for token in common)]
            body.append(line)
    head = [
        "environment",
        "upper bound",
        "clipped low",
        "most often",
        "clipped high",
        "most often",
    ]
    return Table("Clipped tokens, all seeds", head, body, "tokens")


def level_table(results: Results) -> Table:
    measures = (ACCURACY, TRUNCATED)
    lines = [
        ("base, equal lengths, mean of six", where("base"), "sequence level"),
        ("aligned, equal lengths, mean of six", where("aligned"), "sequence level"),
    ]
    for env in [*PAIR, *LONG]:
        lines += [(env, [env], name) for name in ("sequence level", "constant level")]
    body = []
    for label, these, name in lines:
        cells = [show_effect(results.rows, name, "lite_ppo", these, m) for m in measures]
        body.append([label, name, *cells])
    head = ["environment", "level", "accuracy", "truncated responses, whole run"]
    return Table("Loss level against token level", head, body, "level")


def overlong_table(results: Results) -> Table:
    rows = results.rows
    body = []
    for env, (label, limit) in zip(LIMITS, TOKEN_LIMITS.items()):
        for name in ("lite_ppo", "overlong filter", "soft punishment"):
            line = [f"{label}, {limit}", label_of(name)]
            changed = show_effect(rows, name, "lite_ppo", [env])
            line.append(changed if name != "lite_ppo" else "baseline")
            line.append(show_level(rows, name, [env], TRUNCATED_LATE))
            line.append(show_level(rows, name, [env], LOOPING) if limit > 64 else "not detected")
            line.append(show_level(rows, name, [env], LENGTH))
            body.append(line)
    looping = show_effect(rows, "overlong filter", "lite_ppo", LIMITS[1:2], LOOPING)
    notes = [f"Effect of the filter on the looping share at the middle limit: {looping} points."]
    head = [
        "limit, tokens",
        "setting",
        "accuracy",
        "truncated at the end, %",
        "of these looping, %",
        "length at the end",
    ]
    return Table("Overlong filter and soft punishment", head, body, "overlong", notes)


def methods_table(results: Results) -> Table:
    rows = results.rows
    body = []
    for env in PAIR:
        for name in METHODS:
            if name == "lite_ppo":
                continue
            pair = (rows, f"tuned {name}", "tuned lite_ppo", [env])
            effect, budget = show_effect(*pair), show_effect(*pair, AT_BUDGET)
            body.append(
                [
                    env,
                    in_brackets(label_of(name)),
                    effect,
                    show_effect(*pair, AT_STEP_18),
                    budget if budget != effect else "the same",
                ]
            )
    head = [
        "environment",
        "method",
        "at equal steps",
        "after 18 of the 20 steps",
        "at 1,280 sampled responses",
    ]
    return Table("Methods against Lite PPO", head, body, "methods")


def parts_table(results: Results) -> Table:
    settings = {
        "normalisation alone": "sequence level",
        "token level alone": "no normalisation",
        "both: Lite PPO": "lite_ppo",
    }
    body = []
    for label, name in settings.items():
        cells = [show_effect(results.rows, name, "neither trick", t) for t in VARIANTS.values()]
        body.append([label, *cells])
    return Table("Each trick against neither", ["tricks", "base", "aligned"], body, "parts")


def others_range(results: Results) -> tuple[float, float]:
    """Lowest and highest end of the intervals of the switches that keep a mean."""
    ends = []
    for name in ("group std", "no std", "batch mean", "sequence level", "clip 0.28"):
        _, low, high = interval(effect(results.rows, name, "lite_ppo", where()))
        ends += [low, high]
    return min(ends), max(ends)


def plain_table(results: Results) -> Table:
    """The reward without normalisation, and the agreement with other base models."""
    rows = results.rows
    plain = "no normalisation"
    base = where("base")
    low, high = others_range(results)
    body = [
        [f"{plain}, all environments", show_effect(rows, plain, "lite_ppo", where())],
        [f"{plain}, pass@4", show_effect(rows, plain, "lite_ppo", where(), PASS_AT_4)],
        [f"{plain}, base, entropy", show_effect(rows, plain, "lite_ppo", base, ENTROPY)],
        [f"{plain} with rewards {{-1, 1}}, {PAIR[0]}", scaled_effect(results)],
        ["switches that keep a mean: ends of all intervals", f"{low:+.1f} to {high:+.1f}"],
    ]
    for env, label in zip(PAIR, VARIANTS):
        settings = [at_common_rate(rows, env, name) for name in ("reinforce", "lite_ppo")]
        body.append([f"REINFORCE at the same rate, {label}", show_effect(rows, *settings, [env])])
    repeated = {
        f"{plain}, all": (plain, where()),
        "group std, base": ("group std", base),
        "no std, aligned": ("no std", where("aligned")),
        "sequence level, base": ("sequence level", base),
    }
    for label, (name, these) in repeated.items():
        cells = show_effect(results.other, name, "lite_ppo", these)
        body.append([f"other base models: {label}", cells])
    return Table("The plain reward", ["what", "effect against Lite PPO"], body)


def scaled_effect(results: Results) -> str:
    return show_effect(results.rows, "no normalisation, -1/1", "lite_ppo", PAIR[:1])


def rates_table(results: Results) -> Table:
    rows = results.other
    common = at_common_rate(rows, PAIR[0], "lite_ppo")
    body = []
    for name in METHODS:
        there = ["not stored"] * 3
        if (PAIR[0], f"tuned {name}") in rows:
            there = [
                best_rate(results.other_lines, name),
                show_effect(rows, f"tuned {name}", "tuned lite_ppo", PAIR[:1]),
                show_effect(rows, at_common_rate(rows, PAIR[0], name), common, PAIR[:1]),
            ]
        body.append([label_of(name), best_rate(results.lines, name), *there])
    head = [
        "method",
        "chosen rate",
        "chosen rate, other base model",
        "there, against Lite PPO",
        "there, all at one rate",
    ]
    return Table("Chosen learning rates", head, body)


def definitions_table(results: Results) -> Table:
    body = []
    for name in DEFINITIONS:
        changed = show_effect(results.rows, name, "lite_ppo", PAIR[:1])
        body.append([name.removeprefix("std: "), changed])
    ratio = show_level(results.rows, "lite_ppo", PAIR[:1], STD_RATIO)
    notes = [f"Spread within groups over the std of the raw rewards, {PAIR[0]}: {ratio}."]
    return Table(
        "Definitions of the batch std", ["definition", "effect"], body, "definitions", notes
    )


TABLES = [
    scale_table,
    std_table,
    group_std_table,
    clip_table,
    tokens_table,
    level_table,
    overlong_table,
    methods_table,
    parts_table,
    plain_table,
    rates_table,
    definitions_table,
]


# ---- the page ------------------------------------------------------------------------------------


def anchor(title: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")


def claim_line(claim: Claim, results: Results) -> list[str]:
    claim.check(results)
    link = f"[table](#{anchor(claim.table)})"
    return [
        claim.paper,
        f"{claim.measured(results)} ({link})",
        claim.carries_over,
        claim.guideline,
    ]


def measured(results: Results) -> str:
    """The section "Measured": one line for each claim of the paper."""
    head = ["the paper", "measured here", "carries over?", "guideline"]
    body = [claim_line(claim, results) for claim in CLAIMS]
    lines = [
        "This section is generated by `python experiments/plot.py` from the "
        f"{len(results.lines)} runs in `experiments/results/toy.jsonl`.",
        "Five seeds per cell; ten for clip-higher and for the methods on base.",
        "",
    ]
    return "\n".join([*lines, *markdown(head, body)])


def numbers(tables: list[Table]) -> str:
    """The section "Tables": every number, with its figure."""
    lines = [
        "This section is generated like the one above.",
        "Effects are in percentage points of accuracy, unless a column says otherwise.",
        "",
    ]
    for table in tables:
        lines += [f"### {table.title}", ""]
        if table.figure:
            lines += [f"![{table.title}](../experiments/figures/{table.figure}.png)", ""]
        lines += markdown(table.head, table.body)
        for note in table.notes:
            lines += [note, ""]
    return "\n".join(lines)


def generated(results: Results, real: Results) -> dict[str, str]:
    """Heading -> text of the generated sections of docs/findings.md."""
    tables = [make(results) for make in TABLES]
    return {
        "Measured": measured(results),
        real_findings.TITLE: real_findings.section(results, real),
        "Tables": numbers(tables),
    }


def with_sections(page: str, sections: dict[str, str]) -> str:
    """The page with the text below these headings replaced."""
    for title, text in sections.items():
        pattern = re.compile(rf"^## {title}\n.*?(?=^## |\Z)", re.M | re.S)
        if len(pattern.findall(page)) != 1:
            raise ValueError(f"docs/findings.md needs exactly one heading '## {title}'")
        section = f"## {title}\n\n{text}\n"
        page = pattern.sub(section.replace("\\", r"\\"), page)
    return page.rstrip("\n") + "\n"


def write_findings(results: Results, real: Results, path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    path.write_text(with_sections(page, generated(results, real)), encoding="utf-8")
