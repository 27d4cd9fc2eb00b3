"""The section "On a real model" of docs/findings.md. As for the toy, its verdicts are checked."""

from dataclasses import dataclass

from claims import Finding
from effects import ACCURACY, GAIN, LENGTH, label_of, level, show, show_effect
from grid import PAIR
from tables import Results, markdown

TITLE = "On a real model"
GSM8K = "GSM8K Qwen2.5-Coder-0.5B-Instruct"
COMPARED = ["lite_ppo", "grpo", "dapo, no resampling"]
FIGURES = "../experiments/figures/real"


@dataclass(frozen=True)
class Takeaway:
    """A claim of the paper on the toy and on the real model. The verdict rests on all findings."""

    paper: str
    toy: Finding
    real: list[Finding]
    carries_over: str
    guideline: str


def here(label: str, sign: str, setting: str, baseline: str = "lite_ppo", measure=ACCURACY):
    return Finding(label, sign, setting, baseline, [GSM8K], measure)


def on_toy(label: str, sign: str, method: str) -> Finding:
    return Finding(label, sign, f"tuned {method}", "tuned lite_ppo", PAIR[:1])


TAKEAWAYS = [
    Takeaway(
        "Lite PPO beats GRPO on base models",
        on_toy("GRPO against Lite PPO, base", "+", "grpo"),
        [here("GRPO against Lite PPO", "0", "grpo")],
        "Not decided: no difference is seen, but the interval is wide in both directions",
        "Three seeds do not decide between methods that are this close. Take more",
    ),
    Takeaway(
        "Lite PPO beats DAPO on base models",
        on_toy("DAPO without resampling against Lite PPO, base", "0", "dapo, no resampling"),
        [
            here("DAPO without resampling against Lite PPO", "0", "dapo, no resampling"),
            here("against GRPO", "-", "dapo, no resampling", "grpo"),
            here("its length, tokens", "-", "dapo, no resampling", measure=LENGTH),
        ],
        "Not decided: no difference from Lite PPO is seen; DAPO is behind GRPO",
        "Watch `response/length_mean` with DAPO. The overlong punishment may be the reason, but "
        "DAPO differs in three more settings, and none was run alone",
    ),
]

BEFORE = """
All methods have the same learning rate and prompts, and as many responses and optimizer steps.
One H200, 2026-11-28: the six runs of seeds 0 and 1 side by side, beside one at a higher rate; then
the three of seed 2. All took 14 minutes.
""".strip()
LIMITS = """
What this comparison cannot say:

- The model is aligned, and the paper's claim is about base models. No base model was at hand; an
  aligned model without its template is none.
- One learning rate for all methods, without a sweep. Another rate may change the order.
- The intervals are over seeds only, and not corrected for their number. All runs use the same test
  problems.
- It is short, and has three seeds. The interval of Lite PPO's own gain contains zero.
- The weights come from a 4-bit file. Dr. GRPO, RLOO, REINFORCE and the single switches have not
  been run on this model.

To repeat it (the recipe is the default of `real.py`):

    LITE_PPO_KV_CACHE_GIB=1.25 python experiments/real.py --model FOLDER \\
        --train-data gsm8k_train.jsonl --eval-data gsm8k=gsm8k_test.jsonl --only methods --jobs 6 \\
        --methods lite_ppo grpo "dapo, no resampling" --machine "--micro-batch-tokens 8192" \\
        --name "GSM8K Qwen2.5-Coder-0.5B-Instruct" --results repeat.jsonl
    python experiments/plot.py --results repeat.jsonl

All numbers are in [real.md](../experiments/real.md). A run with a rate that is too high is in
[operating.md](operating.md#a-healthy-and-an-unhealthy-run).
""".strip()


def what_was_run(real: Results) -> str:
    """The size of the runs, from their settings."""
    cell = real.rows[GSM8K, "lite_ppo"]
    row = next(iter(cell.values()))
    config = row["config"]
    before = 100 * row["final"]["accuracy_before"]
    return (
        f"Qwen2.5-Coder-0.5B-Instruct on GSM8K: {config['steps']} steps of "
        f"{config['prompts_per_step']} prompts with 8 responses each,\n"
        f"{config['minibatches']} optimizer steps per rollout, rate {config['lr']:g}, "
        f"{len(cell)} seeds. Accuracy is greedy,\n"
        f"on the first {config['eval_size']} test problems. Before training it is {before:.1f} %."
    )


def methods(real: Results) -> list[str]:
    body = []
    for name in COMPARED:
        seeds = level(real.rows, name, [GSM8K], ACCURACY)
        line = [label_of(name), show(seeds, signed=False)]
        line.append(", ".join(f"{value:.1f}" for value in seeds))
        line.append(show(level(real.rows, name, [GSM8K], GAIN)))
        effect = show_effect(real.rows, name, "lite_ppo", [GSM8K])
        body.append([*line, effect if name != "lite_ppo" else "baseline"])
    head = ["method", "accuracy, %", "of each seed", "since step 0", "against Lite PPO"]
    return markdown(head, body)


def takeaways(toy: Results, real: Results) -> list[str]:
    body = []
    for line in TAKEAWAYS:
        line.toy.check(toy, line.carries_over)
        for finding in line.real:
            finding.check(real, line.carries_over)
        shown = "; ".join(finding.text(real) for finding in line.real)
        body.append([line.paper, line.toy.text(toy), shown, line.carries_over, line.guideline])
    head = ["the paper", "the toy", "this model", "carries over?", "guideline"]
    return markdown(head, body)


def section(toy: Results, real: Results) -> str:
    """The text below the heading."""
    image = f"![curves of the three methods]({FIGURES}/{GSM8K.replace(' ', '_')}_methods.png)"
    source = f"This section is generated like the first one, from `{real.source}`."
    lines = [source, "", image, "", what_was_run(real), BEFORE, ""]
    lines += [*methods(real), *takeaways(toy, real), LIMITS]
    return "\n".join([*lines, ""])


def headline(real: Results) -> list[str]:
    """The effects that the README quotes."""
    return [show_effect(real.rows, name, "lite_ppo", [GSM8K]) for name in COMPARED[1:]]
