"""The grid: settings, environments and the runs of each question. README.md explains them."""

import statistics
from dataclasses import dataclass

from definitions import DEFINITIONS

# ---- settings: Lite PPO with one change, and the other methods -----------------------------------

SETTINGS = {
    "lite_ppo": "",
    "group std": "--advantage-std group",
    "no std": "--advantage-std none",
    "batch mean": "--advantage-mean batch",
    "no normalisation": "--advantage-mean none --advantage-std none",
    "sequence level": "--loss-level sequence",
    "constant level": "--loss-level constant",
    "neither trick": "--advantage-mean none --advantage-std none --loss-level sequence",
    "clip 0.24": "--clip-high 0.24",
    "clip 0.28": "--clip-high 0.28",
    "clip 0.32": "--clip-high 0.32",
    "overlong filter": "--overlong-filter",
    "soft punishment": "--overlong-buffer 0.2",
    "lite_ppo, -1/1": "--reward-low -1",  # rewards {-1, 1}; all other settings have {0, 1}
    "group std, -1/1": "--advantage-std group --reward-low -1",
    "batch mean, -1/1": "--advantage-mean batch --reward-low -1",
    "no normalisation, -1/1": "--advantage-mean none --advantage-std none --reward-low -1",
    **dict.fromkeys(DEFINITIONS, ""),  # they replace a function, not a flag
}
ISOLATED = [
    "lite_ppo",
    "group std",
    "no std",
    "batch mean",
    "no normalisation",
    "sequence level",
    "neither trick",
    "clip 0.28",
]
SCALED = ["lite_ppo", "group std", "batch mean", "no normalisation"]  # run with both reward scales
CLIPS = {"0.20": "lite_ppo", "0.24": "clip 0.24", "0.28": "clip 0.28", "0.32": "clip 0.32"}

PRESETS = ("lite_ppo", "grpo", "dapo", "dr_grpo", "rloo", "reinforce")
METHODS = {preset: f"--preset {preset}" for preset in PRESETS}
# Without resampling DAPO samples as many responses as the others.
METHODS["dapo, no resampling"] = "--preset dapo --no-dynamic-sampling"
RATES = ("1.25e-4", "2.5e-4", "5e-4", "1e-3")

# Flags in stored results that lite_ppo.py no longer has. They do not change what is learned, and
# the eps is now one of the DEFINITIONS.
RETIRED_FLAGS = ("--samples-per-step 0", "--advantage-eps 1e-4")


def current_flags(stored: str) -> str:
    """The flags of a stored run, without those that no longer exist."""
    for flag in RETIRED_FLAGS:
        stored = stored.replace(flag, "")
    return " ".join(stored.split())


# ---- environments --------------------------------------------------------------------------------

DIFFICULTIES = ("easy", "medium", "hard")
SIZES = ("tiny", "small")
VARIANTS = ("base", "aligned")

TOY = (
    "--sampler transformers --reward exact --reward-workers 1 --prompts-per-step 8 --group-size 8 "
    "--minibatches 4 --steps 20 --warmup-steps 4 --lr 3e-4 --eval-every 10 --eval-size 100"
)


def environment(difficulty: str, size: str, variant: str, flags: str = "") -> str:
    """The flags of a toy environment."""
    model = f"--model toy:{size}:{variant}"
    data = f"--train-data toy:{difficulty} --eval-data toy=toy:{difficulty}:test"
    return f"{TOY} {model} {data} {flags}"


ENVIRONMENTS: dict[str, str] = {}
for _difficulty in DIFFICULTIES:
    for _size in SIZES:
        for _variant in VARIANTS:
            _name = f"{_difficulty} {_size} {_variant}"
            ENVIRONMENTS[_name] = environment(_difficulty, _size, _variant)
GRID = list(ENVIRONMENTS)
PAIR = ["medium small base", "medium small aligned"]

# More optimizer steps per rollout: ratios reach the clip bounds. More responses keep it stable.
STEPS = [f"{name}, 8 steps" for name in PAIR]
for _name, _variant in zip(STEPS, VARIANTS):
    ENVIRONMENTS[_name] = environment(
        "medium", "small", _variant, "--prompts-per-step 16 --minibatches 8"
    )

# One response in eight loops. It is five times as long as a correct one.
LONG = ["medium small looping, long", "medium small aligned-looping, long"]
for _name, _variant in zip(LONG, ("looping", "aligned-looping")):
    ENVIRONMENTS[_name] = environment("medium", "small", _variant, "--max-new-tokens 192")

# Limits that cut off correct answers; second attempts and loops; loops only.
TOKEN_LIMITS = {"tight": 56, "middle": 96, "loose": 224}
LIMITS = [f"hard small looping, {name}" for name in TOKEN_LIMITS]
for _name, _limit in zip(LIMITS, TOKEN_LIMITS.values()):
    ENVIRONMENTS[_name] = environment("hard", "small", "looping", f"--max-new-tokens {_limit}")


def where(*words: str) -> list[str]:
    """Environments of the main grid whose names contain all these words."""
    return [name for name in GRID if set(words) <= set(name.split())]


# ---- runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run of the grid: lite_ppo.py with these flags and this seed."""

    environment: str
    setting: str
    seed: int
    flags: str

    def __post_init__(self):
        object.__setattr__(self, "flags", " ".join(self.flags.split()))

    @property
    def name(self) -> str:
        return f"{self.environment}/{self.setting}/{self.seed}"


def cells(environments, settings, seeds, flags_of=ENVIRONMENTS) -> list[Run]:
    """Every combination. flags_of: the flags of each environment."""
    runs = []
    for env in environments:
        for setting in settings:
            flags = f"{flags_of[env]} {SETTINGS[setting]}"
            runs += [Run(env, setting, seed, flags) for seed in seeds]
    return runs


def sweep(seeds) -> list[Run]:
    """Every method at every learning rate. No other question uses these seeds."""
    runs = []
    for name, flags in METHODS.items():
        for rate in RATES:
            line = f"{ENVIRONMENTS[PAIR[0]]} {flags} --lr {rate}"
            runs += [Run(PAIR[0], f"{name} at {rate}", seed, line) for seed in seeds]
    return runs


def best_rate(rows: list[dict], method: str) -> str:
    """The rate with the highest mean final accuracy in the sweep; the first one if several tie."""
    best = RATES[0]
    highest = -1.0
    for rate in RATES:
        name = f"{method} at {rate}"
        found = [row["final"]["accuracy"] for row in rows if row["setting"] == name]
        if found and statistics.mean(found) > highest:
            best, highest = rate, statistics.mean(found)
    return best


def methods(rows: list[dict], environments, seeds) -> list[Run]:
    """Each method at its own learning rate, and at the rate that most methods chose.

    A rate picked on three seeds is noisy; the common rate removes that noise from the comparison.
    """
    rates = {f"tuned {name}": best_rate(rows, name) for name in METHODS}
    common = statistics.mode(rates.values())
    rates |= {f"common {name}": common for name in METHODS if rates[f"tuned {name}"] != common}
    runs = []
    for env in environments:
        for name, rate in rates.items():
            method = METHODS[name.split(" ", 1)[1]]
            flags = f"{ENVIRONMENTS[env]} {method} --lr {rate} --eval-every 3"
            runs += [Run(env, name, seed, flags) for seed in seeds]
    return runs


def questions(rows: list[dict]) -> dict[str, list[Run]]:
    """The runs of each question. A run that two questions share is made once."""
    five, ten = range(5), range(10)
    levels = ["lite_ppo", "sequence level", "constant level"]
    return {
        "sweep": sweep((101, 102, 103)),
        "isolated": cells(GRID, ISOLATED, five),
        "scale": cells(PAIR[:1], [f"{name}, -1/1" for name in SCALED], five),
        "clip": cells(STEPS, CLIPS.values(), ten),
        "level": cells(PAIR, ["constant level"], five) + cells(LONG, levels, five),
        "overlong": cells(LIMITS, ["lite_ppo", "overlong filter", "soft punishment"], five),
        "definitions": cells(PAIR[:1], DEFINITIONS, five),
        "methods": methods(rows, PAIR[:1], ten) + methods(rows, PAIR[1:], five),
    }


def reduced_questions(rows: list[dict]) -> dict[str, list[Run]]:
    """One environment of each kind, two seeds."""
    two = range(2)
    levels = ["lite_ppo", "sequence level", "constant level"]
    return {
        "sweep": sweep((101,)),
        "isolated": cells(PAIR[:1], ISOLATED, two),
        "scale": cells(PAIR[:1], [f"{name}, -1/1" for name in SCALED], two),
        "clip": cells(STEPS[:1], CLIPS.values(), two),
        "level": cells(PAIR[:1], ["constant level"], two) + cells(LONG[:1], levels, two),
        "overlong": cells(LIMITS[-1:], ["lite_ppo", "overlong filter", "soft punishment"], two),
        "definitions": cells(PAIR[:1], DEFINITIONS, two),
        "methods": methods(rows, PAIR[:1], two),
    }


QUESTIONS = list(questions([]))
