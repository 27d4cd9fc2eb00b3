"""What the paper claims, what the toy shows, and the signs that each verdict rests on."""

from collections.abc import Callable
from dataclasses import dataclass, field

from effects import (
    ACCURACY,
    AT_BUDGET,
    AT_STEP_18,
    ENTROPY,
    LENGTH,
    LOOPING,
    TRUNCATED,
    TRUNCATED_LATE,
    Measure,
    clipped_counts,
    effect,
    show,
    sign,
    token_shares,
)
from grid import DEFINITIONS, LIMITS, LONG, PAIR, STEPS, where
from tables import Results

BASE = where("base")
ALIGNED = where("aligned")


@dataclass(frozen=True)
class Finding:
    """An effect, with the sign that the text claims: "+", "-", or "0" for no difference seen."""

    label: str
    sign: str
    setting: str
    baseline: str
    environments: list[str]
    measure: Measure = ACCURACY
    other: bool = False  # from other base models

    def values(self, results: Results) -> list[float]:
        """The effect of each seed."""
        rows = results.other if self.other else results.rows
        return effect(rows, self.setting, self.baseline, self.environments, self.measure)

    def text(self, results: Results) -> str:
        """The label and the effect with its interval."""
        return f"{self.label} {show(self.values(results), self.measure.digits)}"

    def holds(self, results: Results) -> bool:
        """Whether the results have the sign."""
        return sign(self.values(results)) == self.sign

    def check(self, results: Results, verdict: str) -> None:
        """ValueError if the results contradict the sign that the verdict rests on."""
        if not self.holds(results):
            raise ValueError(
                f"the verdict {verdict!r} expects the sign {self.sign!r} of "
                f"{self.text(results)!r}; rewrite the verdict"
            )


def against_lite_ppo(label: str, expected: str, setting: str, environments, measure=ACCURACY):
    """A finding about a setting against Lite PPO."""
    return Finding(label, expected, setting, "lite_ppo", environments, measure)


@dataclass(frozen=True)
class Claim:
    """A line of the main table. The verdict rests on all findings; the first ones are shown."""

    table: str  # the heading of the table with all numbers
    paper: str
    shown: list[Finding]
    carries_over: str
    guideline: str
    unshown: list[Finding] = field(default_factory=list)
    text: Callable[[Results], str] | None = None  # instead of the findings

    def check(self, results: Results) -> None:
        for finding in [*self.shown, *self.unshown]:
            finding.check(results, self.carries_over)

    def measured(self, results: Results) -> str:
        """The cell "measured here" of the table."""
        if self.text:
            return self.text(results)
        return "; ".join(finding.text(results) for finding in self.shown)


def clipped_tokens(results: Results) -> str:
    """What kind of tokens are clipped, and on which side."""
    counts = [clipped_counts(results.rows, env, "lite_ppo") for env in STEPS]
    known, low = token_shares(counts)
    return (
        f"{known:.0f} % of the clipped tokens are digits or `\\boxed{{`; "
        f"{low:.0f} % are clipped on the low side"
    )


# ---- the claims ----------------------------------------------------------------------------------

NO_STD_ELSEWHERE = Finding("no std, aligned", "+", "no std", "lite_ppo", ALIGNED, other=True)

SCALE = Claim(
    "Reward scale and batch mean",
    "1. Group normalisation is safe at any reward scale. "
    "Batch normalisation is fragile with {0, 1}",
    [
        Finding(
            "{-1, 1} instead of {0, 1} with batch mean",
            "0",
            "batch mean, -1/1",
            "batch mean",
            PAIR[:1],
        ),
        against_lite_ppo("batch mean instead of group mean", "0", "batch mean", where()),
    ],
    "No. By the formulas it cannot: [why](#why-the-reward-scale-cannot-matter)",
    "Use any normalisation. The reward scale matters only without one",
)
NO_STD = Claim(
    "No std on concentrated rewards",
    "2. Concentrated rewards: leave the std out. Hard data: no difference",
    [
        against_lite_ppo("no std, easy aligned", "0", "no std", where("easy", "aligned")),
        against_lite_ppo("all aligned", "0", "no std", ALIGNED),
        against_lite_ppo("hard", "0", "no std", where("hard")),
    ],
    "Not reproduced. Other base models showed a gain on aligned; these do not",
    "The paper: `--advantage-std none` where most groups are all right or all wrong. "
    "Here no difference is seen there",
    [NO_STD_ELSEWHERE],
)
GROUP_STD = Claim(
    "Group std instead of batch std",
    "3. Group mean with batch std beats group std on base models",
    [
        against_lite_ppo("group std, base", "0", "group std", BASE),
        against_lite_ppo("aligned", "0", "group std", ALIGNED),
    ],
    "Not reproduced: no difference on either",
    "Keep the default. It does not inflate groups that are nearly all right or all wrong",
)
CLIP_HIGHER = Claim(
    "Clip-higher, ten seeds",
    "4. Clip-higher slows entropy collapse and helps aligned models. "
    "On base models it is neutral to harmful",
    [
        against_lite_ppo("0.28, base", "0", "clip 0.28", STEPS[:1]),
        against_lite_ppo("its entropy", "0", "clip 0.28", STEPS[:1], ENTROPY),
        against_lite_ppo("aligned", "0", "clip 0.28", STEPS[1:]),
        against_lite_ppo("its entropy", "0", "clip 0.28", STEPS[1:], ENTROPY),
    ],
    "Not reproduced: neither accuracy nor entropy changes. On aligned the bound can hardly act: "
    "entropy is so low that few ratios leave the interval",
    "Look at `policy/clip_high` first. Where almost nothing is clipped, the bound changes nothing",
)
CLIPPED = Claim(
    "Clipped tokens, all seeds",
    "5. At 0.20 mostly connectives are clipped, at 0.28 function words",
    [],
    "Cannot be asked: the toy has no such words",
    "`clipped.jsonl` of every run lists its clipped tokens",
    text=clipped_tokens,
)
BEST_BOUND = Claim(
    "Clip-higher, ten seeds",
    "6. Aligned models: 4B is best at 0.32, 8B at 0.28",
    [
        against_lite_ppo("0.24, aligned", "0", "clip 0.24", STEPS[1:]),
        against_lite_ppo("0.32, aligned", "0", "clip 0.32", STEPS[1:]),
        against_lite_ppo("0.24, base", "0", "clip 0.24", STEPS[:1]),
        against_lite_ppo("0.32, base", "0", "clip 0.32", STEPS[:1]),
    ],
    "Not reproduced",
    "As for 4",
)
LEVEL = Claim(
    "Loss level against token level",
    "7. Token level suits base models, sequence level aligned ones",
    [
        against_lite_ppo(
            "sequence level where some responses loop, base", "0", "sequence level", LONG[:1]
        ),
        against_lite_ppo("aligned", "0", "sequence level", LONG[1:]),
        against_lite_ppo(
            "its truncated responses, base", "+", "sequence level", LONG[:1], TRUNCATED
        ),
        against_lite_ppo("aligned", "+", "sequence level", LONG[1:], TRUNCATED),
    ],
    "Not in accuracy. Token level unlearns long failures sooner",
    "Token level where long failures should disappear soon, otherwise either",
    [
        against_lite_ppo("equal lengths, base", "0", "sequence level", BASE),
        against_lite_ppo("equal lengths, aligned", "0", "sequence level", ALIGNED),
    ],
)
OVERLONG = Claim(
    "Overlong filter and soft punishment",
    "8. The overlong filter helps at a tight limit and little at a loose one. "
    "Without it, more of the truncated responses loop",
    [
        against_lite_ppo("filter, tight limit", "-", "overlong filter", LIMITS[:1]),
        against_lite_ppo("middle", "0", "overlong filter", LIMITS[1:2]),
        against_lite_ppo("loose", "0", "overlong filter", LIMITS[2:]),
        against_lite_ppo(
            "truncated at the end, loose", "+", "overlong filter", LIMITS[2:], TRUNCATED_LATE
        ),
        against_lite_ppo("looping share, middle", "-", "overlong filter", LIMITS[1:2], LOOPING),
        against_lite_ppo("soft punishment, tight", "-", "soft punishment", LIMITS[:1]),
    ],
    "Accuracy: no. It hurts where correct answers are cut off and shows no gain elsewhere. "
    "More responses stay truncated, because filtered responses are never unlearned. "
    "Loops: at the middle limit only, where they are a smaller share of the truncated responses",
    "Raise the limit first. Use the filter only while you watch `response/truncated`. Use the "
    "punishment only if its zone begins above the length of correct answers: at the tight limit "
    "it covers them, and responses became too short to be correct",
    [
        against_lite_ppo("truncated, tight", "+", "overlong filter", LIMITS[:1], TRUNCATED_LATE),
        against_lite_ppo("truncated, middle", "+", "overlong filter", LIMITS[1:2], TRUNCATED_LATE),
        against_lite_ppo("length, tight", "-", "soft punishment", LIMITS[:1], LENGTH),
    ],
)
RIVALS = Claim(
    "Methods against Lite PPO",
    "Lite PPO beats GRPO and DAPO on base models",
    [
        Finding("GRPO against Lite PPO, base", "+", "tuned grpo", "tuned lite_ppo", PAIR[:1]),
        Finding("DAPO", "0", "tuned dapo", "tuned lite_ppo", PAIR[:1]),
        Finding(
            "DAPO at equal responses", "-", "tuned dapo", "tuned lite_ppo", PAIR[:1], AT_BUDGET
        ),
        Finding(
            "DAPO without resampling",
            "0",
            "tuned dapo, no resampling",
            "tuned lite_ppo",
            PAIR[:1],
        ),
    ],
    "In part. Behind GRPO at the last step; no difference seen two steps earlier, nor from another "
    "base model at one rate. "
    "No difference from DAPO at equal steps. "
    "Ahead of DAPO at equal responses, because resampling costs responses "
    "([figure](../experiments/figures/responses.png))",
    "Sweep the learning rate of each method separately, with more than three seeds. "
    "Compare from more than one base model",
    [
        Finding("GRPO, step 18", "0", "tuned grpo", "tuned lite_ppo", PAIR[:1], AT_STEP_18),
        Finding(
            "GRPO, other base model", "0", "tuned grpo", "common lite_ppo", PAIR[:1], other=True
        ),
    ],
)
BOTH_TRICKS = Claim(
    "Each trick against neither",
    "The two tricks together make the difference",
    [
        Finding("Lite PPO against neither trick, base", "-", "lite_ppo", "neither trick", BASE),
        Finding("aligned", "-", "lite_ppo", "neither trick", ALIGNED),
    ],
    "No, the opposite: [see below](#what-stands-out)",
    "Compare with `--preset reinforce` before anything else",
    [
        Finding("normalisation alone, base", "-", "sequence level", "neither trick", BASE),
        Finding("normalisation alone, aligned", "-", "sequence level", "neither trick", ALIGNED),
        Finding("token level alone, base", "0", "no normalisation", "neither trick", BASE),
        Finding("token level alone, aligned", "0", "no normalisation", "neither trick", ALIGNED),
    ],
)
CLAIMS = [
    SCALE,
    NO_STD,
    GROUP_STD,
    CLIP_HIGHER,
    CLIPPED,
    BEST_BOUND,
    LEVEL,
    OVERLONG,
    RIVALS,
    BOTH_TRICKS,
]


# ---- sentences of docs/findings.md ---------------------------------------------------------------


def method(expected: str, name: str, environment: str, measure=ACCURACY, other=False) -> Finding:
    """A method at its own learning rate against Lite PPO."""
    label = f"{name}, {environment}"
    settings = (f"tuned {name}", "tuned lite_ppo")
    return Finding(label, expected, *settings, [environment], measure, other)


PLAIN = "no normalisation"
CENTRED = ("grpo", "dr_grpo", "rloo")
DAPOS = ("dapo", "dapo, no resampling")
STATEMENTS = {  # sentence -> the findings that it rests on
    "Training without normalisation reaches a higher accuracy than Lite PPO.": [
        against_lite_ppo(PLAIN, "+", PLAIN, where())
    ],
    "`reinforce` is ahead of every other method, on base and on aligned.": [
        Finding(f"reinforce, {env}", "+", "tuned reinforce", f"tuned {name}", [env])
        for name in ("lite_ppo", *CENTRED, *DAPOS)
        for env in PAIR
    ],
    "On base, GRPO, Dr. GRPO and RLOO are ahead of Lite PPO too.": [
        method("+", name, PAIR[0]) for name in CENTRED
    ],
    "Two steps before the end they show no difference from it: their intervals contain zero.": [
        method("0", name, PAIR[0], AT_STEP_18) for name in CENTRED
    ],
    "On aligned they show none at the end either.": [
        method("0", name, PAIR[1]) for name in CENTRED
    ],
    "DAPO shows no difference from Lite PPO at equal steps, with or without resampling.": [
        method("0", name, env) for name in DAPOS for env in PAIR
    ],
    "With resampling it is behind on base at equal responses.": [
        method("-", "dapo", PAIR[0], AT_BUDGET)
    ],
    "With {-1, 1} rewards, which do push down, it still leads.": [
        against_lite_ppo("-1/1", "+", f"{PLAIN}, -1/1", PAIR[:1])
    ],
    "Entropy falls, and pass@4 rises less than accuracy.": [
        against_lite_ppo("entropy", "-", PLAIN, BASE, ENTROPY)
    ],
    "One of these intervals excludes zero: leaving out the std costs a little.": [
        against_lite_ppo("no std", "-", "no std", where()),
        against_lite_ppo("group std", "0", "group std", where()),
        against_lite_ppo("batch mean", "0", "batch mean", where()),
        against_lite_ppo("sequence level", "0", "sequence level", where()),
        against_lite_ppo("clip 0.28", "0", "clip 0.28", where()),
    ],
    "Over all environments, leaving out the std shows no difference.": [
        Finding("no std", "0", "no std", "lite_ppo", where(), other=True)
    ],
    "Training without normalisation is better there too.": [
        Finding(PLAIN, "+", PLAIN, "lite_ppo", where(), other=True)
    ],
    "Group std on base and sequence level on base show no difference.": [
        Finding("group std", "0", "group std", "lite_ppo", BASE, other=True),
        Finding("sequence level", "0", "sequence level", "lite_ppo", BASE, other=True),
    ],
    "On aligned models it gains there, but not here.": [
        NO_STD_ELSEWHERE,
        against_lite_ppo("no std, aligned", "0", "no std", ALIGNED),
    ],
    "GRPO and Dr. GRPO came out ahead of it.": [
        method("+", name, PAIR[0], other=True) for name in ("grpo", "dr_grpo")
    ],
    "On the ten other seeds this rate was too high.": [
        Finding("own rate", "-", "tuned lite_ppo", "common lite_ppo", PAIR[:1], other=True)
    ],
    "With all methods at one rate, GRPO and Dr. GRPO show no difference from Lite PPO there.": [
        Finding(name, "0", f"tuned {name}", "common lite_ppo", PAIR[:1], other=True)
        for name in ("grpo", "dr_grpo")
    ],
    "No definition shows a difference on the toy.": [
        against_lite_ppo(name, "0", name, PAIR[:1]) for name in DEFINITIONS
    ],
}
