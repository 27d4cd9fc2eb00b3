"""The values of a run, effects between two settings, and their intervals.

An effect is the difference between two settings in the same environment with the same seed: same
prompts, same seeds of the samples, same test problems. An effect over several environments is the
mean over them, seed by seed. An interval is Student's, 95 %, over the seeds.
"""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

Rows = dict[tuple[str, str], dict[int, dict]]  # (environment, setting) -> seed -> results line


def by_cell(lines: list[dict]) -> Rows:
    """The lines of a results file by cell and seed."""
    found: Rows = defaultdict(dict)
    for line in lines:
        found[line["environment"], line["setting"]][line["seed"]] = line
    return found


# ---- intervals -----------------------------------------------------------------------------------

T_TABLE = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Interval(NamedTuple):
    """A mean and the ends of its interval."""

    mean: float
    low: float
    high: float


def t975(freedom: int) -> float:
    """Student's t, 97.5 %: a table, then its series around the normal quantile (error < 3e-4)."""
    if freedom < len(T_TABLE):
        return T_TABLE[freedom]
    z = statistics.NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def interval(values: list[float]) -> Interval:
    """Mean with its 95 % interval; the ends are nan for a single value."""
    mean = statistics.mean(values)
    n = len(values)
    half = math.nan
    if n > 1:
        half = t975(n - 1) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def sign(values: list[float]) -> str:
    """The interval is above zero: "+"; below: "-"; contains zero: "0"; does not exist: "?"."""
    if len(values) < 2:
        return "?"
    _, low, high = interval(values)
    if low > 0:
        return "+"
    return "-" if high < 0 else "0"


def show(values: list[float], digits: int = 1, signed: bool = True) -> str:
    """+1.2 [-0.3, +2.7]"""
    if not values:
        return "not run"
    plus = "+" if signed else ""
    mean, low, high = (f"{x:{plus}.{digits}f}" for x in interval(values))
    return f"{mean} [{low}, {high}]" if len(values) > 1 else f"{mean} [one seed]"


# ---- values of a run -----------------------------------------------------------------------------


def correct_share(row: dict, reward):
    """A mean reward on the scale from 0 to 1, whatever the reward of a wrong response was."""
    low = row["config"].get("reward_low", 0)
    return (reward - low) / (1 - low)


def final(row: dict, key: str) -> float:
    """A final figure of the run."""
    return row["final"][key]


def final_reward(row: dict) -> float:
    """The mean reward over all steps, from 0 to 1."""
    return correct_share(row, row["final"]["reward"])


def gain(row: dict) -> float:
    """Accuracy at the end minus accuracy before training."""
    return row["final"]["accuracy"] - row["final"]["accuracy_before"]


def pass_at_4(row: dict) -> float:
    """pass@4 at the end."""
    return row["evaluation"]["eval/toy/pass_at_k"][-1]


def curve(row: dict, key: str) -> list[float]:
    """A metric of each step. "looping" is the share of all responses, not of the truncated ones."""
    if key != "looping":
        return row["curve"][key]
    truncated = row["curve"]["response/truncated"]
    looping = row["curve"]["response/looping"]
    return [share * of_these for share, of_these in zip(truncated, looping)]


def curve_mean(row: dict, key: str) -> float:
    """A metric averaged over the steps."""
    return statistics.mean(curve(row, key))


def std_ratio(row: dict) -> float:
    """Spread within groups over the std of all rewards, each averaged over the run."""
    spread = curve_mean(row, "reward/std")
    return curve_mean(row, "reward/std_within") / spread if spread else math.nan


def looping_share(row: dict) -> float:
    """Share of the run's truncated responses that end in a loop."""
    truncated = sum(curve(row, "response/truncated"))
    return sum(curve(row, "looping")) / truncated if truncated else math.nan


def accuracies(row: dict) -> list[float]:
    """The accuracy at each evaluation, averaged over the sets."""
    sets = [values for key, values in row["evaluation"].items() if key.endswith("/accuracy")]
    return [statistics.mean(values) for values in zip(*sets)]


def accuracy_at_step(row: dict, step: int) -> float:
    """The accuracy at the evaluation after this step."""
    return accuracies(row)[row["evaluation"]["step"].index(step)]


def cost(row: dict) -> np.ndarray:
    """Responses sampled for training by each evaluation."""
    total = np.cumsum([0, *row["curve"]["rollout/responses"]])
    return total[row["evaluation"]["step"]]


def sampled(row: dict) -> float:
    """Responses sampled for training in the whole run."""
    return sum(row["curve"]["rollout/responses"])


def accuracy_at(row: dict, budget: int) -> float:
    """Accuracy after so many sampled responses, interpolated between two evaluations."""
    return float(np.interp(budget, cost(row), row["evaluation"]["eval/toy/accuracy"]))


@dataclass(frozen=True)
class Measure:
    """A value of a run, and how to print it."""

    value: Callable[[dict], float]
    scale: float = 100
    digits: int = 1


BUDGET = 20 * 64  # responses that every method but DAPO samples in a run

ACCURACY = Measure(partial(final, key="accuracy"))
GAIN = Measure(gain)
PASS_AT_4 = Measure(pass_at_4)
REWARD = Measure(final_reward)
ENTROPY = Measure(partial(final, key="policy/entropy"), 1, 4)
LENGTH = Measure(partial(final, key="response/length_mean"), 1)
CLIP_HIGH = Measure(partial(final, key="policy/clip_high"), 100, 3)
CLIP_LOW = Measure(partial(final, key="policy/clip_low"), 100, 3)
TRUNCATED_LATE = Measure(partial(final, key="response/truncated"))
TRUNCATED = Measure(partial(curve_mean, key="response/truncated"))
LOOPING = Measure(looping_share, 100, 0)
REWARD_STD = Measure(partial(curve_mean, key="reward/std"), 1, 2)
STD_RATIO = Measure(std_ratio, 1, 2)
SAMPLED = Measure(sampled, 1, 0)
AT_BUDGET = Measure(partial(accuracy_at, budget=BUDGET))
AT_STEP_18 = Measure(partial(accuracy_at_step, step=18))  # the methods' last evaluation but one


# ---- effects -------------------------------------------------------------------------------------


def shared_seeds(found: Iterable[dict[int, dict]]) -> list[int]:
    """Seeds that all these cells have."""
    sets = [set(seeds) for seeds in found]
    return sorted(set.intersection(*sets)) if sets else []


def level(
    rows: Rows, setting: str, environments: Iterable[str], measure: Measure = ACCURACY
) -> list[float]:
    """The value of each seed, averaged over the environments."""
    found = [rows[env, setting] for env in environments if (env, setting) in rows]
    values = []
    for seed in shared_seeds(found):
        mean = statistics.mean(measure.value(cell[seed]) for cell in found)
        values.append(measure.scale * mean)
    return values


def effect(
    rows: Rows,
    setting: str,
    baseline: str,
    environments: Iterable[str],
    measure: Measure = ACCURACY,
) -> list[float]:
    """Setting minus baseline for each seed, averaged over the environments that have both.

    Seeds that lack a run are left out.
    """
    pairs = []
    for env in environments:
        if (env, setting) in rows and (env, baseline) in rows:
            pairs.append((rows[env, setting], rows[env, baseline]))
    values = []
    for seed in shared_seeds([cell for pair in pairs for cell in pair]):
        found = [measure.value(a[seed]) - measure.value(b[seed]) for a, b in pairs]
        values.append(measure.scale * statistics.mean(found))
    return values


def show_level(rows: Rows, setting: str, environments, measure: Measure = ACCURACY) -> str:
    """level() as text."""
    values = level(rows, setting, environments, measure)
    return show(values, measure.digits, signed=False)


def show_effect(
    rows: Rows,
    setting: str,
    baseline: str,
    environments: Iterable[str],
    measure: Measure = ACCURACY,
) -> str:
    """effect() as text."""
    return show(effect(rows, setting, baseline, environments, measure), measure.digits)


def at_common_rate(rows: Rows, environment: str, method: str) -> str:
    """The setting of a method at the learning rate that most methods chose."""
    common = f"common {method}"
    return common if (environment, common) in rows else f"tuned {method}"


# ---- clipped tokens ------------------------------------------------------------------------------


def clipped_counts(rows: Rows, environment: str, setting: str) -> dict[str, Counter]:
    """How often each token was clipped on each side, summed over seeds."""
    counts = {"low": Counter(), "high": Counter()}
    for row in rows.get((environment, setting), {}).values():
        for side, tokens_of_run in row["clipped"].items():
            counts[side].update(dict(tokens_of_run))
    return counts


def token_shares(counts: list[dict[str, Counter]]) -> tuple[float, float]:
    """(% of the clipped tokens that are digits or "boxed", % clipped on the low side)."""
    both = sum((sides["low"] + sides["high"] for sides in counts), Counter())
    low = sum(sides["low"].total() for sides in counts)
    known = sum(n for token, n in both.items() if token.isdigit() or token == "\\boxed{")
    return 100 * known / both.total(), 100 * low / both.total()


def most_clipped(counts: list[dict[str, Counter]], number: int) -> list[str]:
    """The tokens with the largest share of the clipped ones, summed over environments."""
    shares = Counter()
    for sides in counts:
        both = sides["low"] + sides["high"]
        for token, times in both.items():
            shares[token] += times / both.total()
    return [token for token, _ in shares.most_common(number)]


# ---- words ---------------------------------------------------------------------------------------

NAMES = {
    "lite_ppo": "Lite PPO",
    "grpo": "GRPO",
    "dapo": "DAPO",
    "dr_grpo": "Dr. GRPO",
    "rloo": "RLOO",
    "reinforce": "REINFORCE",
}


def label_of(setting: str) -> str:
    """A setting as figures and tables name it."""
    name = setting
    for prefix in ("tuned ", "common ", "preset "):
        name = name.removeprefix(prefix)
    name, at, rate = name.partition(" at ")
    method, comma, rest = name.partition(",")
    suffix = ", common rate" if setting.startswith("common ") else ""
    return NAMES.get(method, method) + comma + rest + at + rate + suffix


def in_brackets(label: str) -> str:
    """DAPO, no resampling -> DAPO (no resampling)"""
    name, comma, rest = label.partition(", ")
    return f"{name} ({rest})" if comma else name


def verdict(effects: dict[str, list[float]], digits: int = 1, unit: str = "points") -> str:
    """The answer in words: the effects whose interval excludes zero, then the others."""
    effects = {label: values for label, values in effects.items() if values}
    if not effects:
        return "not run"
    if all(len(values) == 1 for values in effects.values()):
        return "one seed, no interval"
    clear = [label for label, values in effects.items() if sign(values) in "+-"]
    if not clear:
        return "no difference seen"
    texts = [f"{label} {interval(effects[label]).mean:+.{digits}f}" for label in clear]
    rest = "" if len(clear) == len(effects) else "; others: no difference seen"
    return f"{', '.join(texts)} {unit}{rest}"
