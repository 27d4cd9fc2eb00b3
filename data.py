"""Problems: what the model is asked, from files and from the hub. Nothing here knows about learning.

A row is a dictionary with "problem" and "answer", both non-empty strings, and every other column of its source. Where it may come from:

    FILE.jsonl, FILE.parquet        an object per line; a row per problem
    OWNER/NAME[:CONFIG][@SPLIT]     a data set of the Hugging Face hub
    easy, medium, hard              the paper's training sets, see `tier_easy` and its neighbours
    math500, aime24, ...            evaluation sets, see BENCHMARKS
"""

import hashlib
import importlib
import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any, Callable, Iterable, Iterator

Row = dict[str, Any]
Placed = tuple[str, Row]  # where a row was found, for messages, and the row


class UserError(Exception):
    """A mistake of the caller's: printed once, without a traceback; exit code 2."""


@dataclass
class Problem:
    row: Row  # as read, "problem" and "answer" made strings
    prompt_ids: list[int]  # chat template applied, up to where the response starts


# Ids, configs, splits and columns are those of public documentation and code; the tests use local copies of the columns and fetch nothing.
GSM8K, MATH, DEEPMATH = "openai/gsm8k:main", "DigitalLearningGmbH/MATH-lighteval", "zwhe99/DeepMath-103K"
BENCHMARKS = {
    "math500": "HuggingFaceH4/MATH-500@test", "minerva": "math-ai/minervamath@test",
    "olympiadbench": "Hothan/OlympiadBench:OE_TO_maths_en_COMP@train",  # open-ended, text only, in English; "train" is its only split
    "aime24": "math-ai/aime24@test", "aime25": "math-ai/aime25@test", "amc23": "math-ai/amc23@test",
    "gsm8k": GSM8K,  # the split that is asked for: train for training, test for evaluation
}  # fmt: skip
HUB = r"(\w[\w.-]*/\w[\w.-]*)(?::([^@]+))?(?:@(.+))?"

# ---- one row ---------------------------------------------------------------------------------------------------------

PROBLEM, ANSWER = ("problem", "question"), ("answer", "final_answer", "expected_answer")  # in any case; the first usable one counts


def gold(value: Any) -> str:
    """An answer column as a string; "" if it holds no answer.

    A list (OlympiadBench) becomes "a, b", which math-verify compares as a set. A worked solution that ends in "#### 1,234" (GSM8K) becomes "1234".
    """
    if isinstance(value, list) and all(isinstance(item, str) and item.strip() for item in value):
        return ", ".join(item.strip() for item in value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or isinstance(value, float) and not math.isfinite(value):
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)  # a table turns integers into floats where one row has none
    text = str(value).strip()
    worked = re.search(r"^####\s*(\S.*)\Z", text, re.MULTILINE)
    return re.sub(r"(?<=\d),(?=\d{3})", "", worked[1]) if worked else text


def too_deep(value: Any, levels: int = 64) -> bool:
    """Whether lists nest deeper: rows travel to the reward workers, and pickle gives up at some hundreds."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(too_deep(part, levels - 1) for part in parts)


def to_row(raw: Any, place: str) -> Row:
    """`raw` with "problem" and "answer"; what cannot be used is an error that names the place, the value found and the remedy."""
    if not isinstance(raw, dict):
        raise UserError(f"{place}: needs a JSON object with problem and answer; found {short(raw)}")
    if too_deep(raw):
        raise UserError(f"{place}: lists or objects nested more than 60 deep; flatten or remove that field")
    try:
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # tokenizers and log files would fail on it much later
        raise UserError(f"{place}: holds half of a surrogate pair, {error.object[error.start]!r}, which is no character; remove it") from None
    columns = {name.lower(): value for name, value in raw.items()} | raw
    problems, answers = ([columns[name] for name in names if name in columns] or [None] for names in (PROBLEM, ANSWER))
    problem = next((text for text in problems if isinstance(text, str) and text.strip()), None)
    if problem is None:
        raise UserError(f'{place}: needs "problem" (or "question"), a non-empty string; found {short(problems[0])} in columns {short(list(raw))}')
    answer = next(filter(None, map(gold, answers)), None)
    if answer is None and isinstance(columns.get("solution"), str):
        from rewards import last_boxed  # here, because rewards imports this file

        answer = last_boxed(columns["solution"])
    if not answer:
        raise UserError(f'{place}: needs "answer", a non-empty string or a finite number, or a "solution" with \\boxed{{}}; found {short(answers[0])}')
    return raw | {"problem": problem, "answer": answer}


# ---- sources ---------------------------------------------------------------------------------------------------------


def read_jsonl(path: str) -> Iterator[tuple[str, Any]]:
    """(FILE:LINE, value) for each line that is not blank. UTF-8, with or without a byte order mark, any line ends."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                place = f"{path}:{number}"
                try:
                    if text := line.decode("utf-8-sig").strip():
                        yield place, json.loads(text)
                except UnicodeDecodeError as error:
                    raise UserError(f"{place}: not UTF-8 text ({error}); save the file as UTF-8") from None
                except (ValueError, RecursionError) as error:  # ValueError: no JSON, or a number of thousands of digits
                    raise UserError(f"{place}: not a JSON object ({str(error).replace('line 1 ', '')}); each line must be one") from None
    except (OSError, ValueError) as error:  # ValueError: a path that cannot exist
        raise UserError(f"{path}: cannot read the data: {error}") from None


def table_rows(name: str, read: Callable[[], Any]) -> Iterator[tuple[str, Any]]:
    """(NAME, row N) for each row of the Arrow table that `read` returns, made JSON: dates and decimals become strings."""
    try:
        table = read()
        # Images and sounds are no text; DeepMath's three worked solutions are 2 GB that nobody asks for.
        keep = [field.name for field in table.schema if "binary" not in str(field.type) and not field.name.startswith("r1_solution")]
        rows = table.select(keep).to_pylist()
    except Exception as error:  # no library, no network, no permission, no such split, a damaged file: all with exceptions of their own
        raise UserError(f"{name}: cannot read the data: {type(error).__name__}: {str(error)[:300]}; check file or name, CONFIG and SPLIT") from None
    for number, row in enumerate(rows, 1):
        yield f"{name}, row {number}", json.loads(json.dumps(row, default=str))


def fetch(name: str, config: str | None, split: str) -> Any:
    """A split of a hub data set, a datasets.Dataset: the only call that needs a network (or the library's cache)."""
    return importlib.import_module("datasets").load_dataset(name, config, split=split)  # takes a second or two, which files do not need


def collect(found: Iterable[tuple[str, Any]], name: str, editable: bool, counts: Counter) -> list[Placed]:
    """Rows, each problem once. In a file of the user's, what is wrong or contradictory is an error; in a hub set it is left out, and counted."""
    first: dict[str, Placed] = {}
    disputed, reason = set(), ""
    for place, raw in found:
        try:
            row = to_row(raw, place)
        except UserError as error:
            if editable:
                raise
            counts["without a usable problem and answer"] += 1
            reason = reason or f": {error}"
            continue
        key = row["problem"].strip()
        earlier, other = first.setdefault(key, (place, row))
        if other is row:
            continue
        if other["answer"] == row["answer"]:
            counts["repeated"] += 1
        elif editable:
            raise UserError(f"{place}: the problem of {earlier} again, with answer {row['answer']!r} instead of {other['answer']!r}; remove one of the two")
        else:
            counts["with contradicting answers"] += 1 + (key not in disputed)  # the first one goes, too
            disputed.add(key)
    kept = [placed for key, placed in first.items() if key not in disputed]
    if not kept:
        raise UserError(f"{name}: holds no problems; each line or row must be an object with problem and answer{reason}")
    return kept


# ---- the paper's training sets ---------------------------------------------------------------------------------------

TIER_SIZE = 5000
SEED = 42  # the sets are the same whatever --seed is


def chance(row: Row, purpose: str) -> float:
    """A number in (0, 1], uniform over problems, that depends on the problem alone: not on the order of rows, not on a generator."""
    digest = hashlib.blake2b(f"{SEED} {purpose} {row['problem']}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") + 1) / 2**64


def draw(rows: list[Row], purpose: str, weight: Callable[[Row], float]) -> list[Row]:
    """TIER_SIZE rows (or all) one by one without replacement, each time with probability proportional to weight, in the order drawn."""
    # Alarm clocks that ring after exponential times of rate `weight` ring in such an order.
    return sorted(rows, key=lambda row: (-math.log(chance(row, purpose)) / weight(row), row["problem"]))[:TIER_SIZE]


def difficulty(row: Row) -> float:
    """The row's difficulty; 0 if it has none that is a positive finite number."""
    value = row.get("difficulty")
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e300 else 0


def thin(rows: list[Row]) -> list[Row]:
    """All rows but those with a True/False/Yes/No answer, which guessing solves, and every tenth of those. The paper gives no rate."""
    binary, others = [], []
    for row in rows:
        (binary if row["answer"].strip(" .").lower() in ("true", "false", "yes", "no") else others).append(row)
    return others + sorted(binary, key=lambda row: chance(row, "thin"))[::10]


def tier_easy(gsm8k: list[Row], math_rows: list[Row]) -> list[Row]:
    """5,000 drawn uniformly from GSM8K's and MATH's level 1 training problems together."""
    return draw(gsm8k + [row for row in math_rows if str(row.get("level")) in ("Level 1", "1")], "easy", lambda row: 1.0)


def tier_medium(deepmath: list[Row]) -> list[Row]:
    """The 5,000 easiest of DeepMath-103K, easiest first; equally difficult ones in a shuffled but fixed order."""
    return sorted(filter(difficulty, deepmath), key=lambda row: (difficulty(row), chance(row, "medium"), row["problem"]))[:TIER_SIZE]


def tier_hard(deepmath: list[Row]) -> list[Row]:
    """5,000 of DeepMath-103K, drawn with probability proportional to difficulty after the answers that guessing solves are thinned."""
    return draw(thin(list(filter(difficulty, deepmath))), "hard", difficulty)


TIERS: dict[str, tuple[Callable[..., list[Row]], tuple[str, ...]]] = {
    "easy": (tier_easy, (GSM8K, MATH)), "medium": (tier_medium, (DEEPMATH,)), "hard": (tier_hard, (DEEPMATH,)),
}  # fmt: skip

# ---- what the trainer calls ------------------------------------------------------------------------------------------


def placed_rows(spec: str, split: str, counts: Counter) -> list[Placed]:
    if spec in TIERS:
        tier, sources = TIERS[spec]
        return [(f"{spec}, row {n}", row) for n, row in enumerate(tier(*(load_rows(source, "train", counts) for source in sources)), 1)]
    spec = BENCHMARKS.get(spec, spec)
    hub = re.fullmatch(HUB, spec)
    if spec.endswith(".parquet"):
        return collect(table_rows(spec, lambda: importlib.import_module("pyarrow.parquet").ParquetFile(spec).read()), spec, True, counts)
    if spec.endswith((".jsonl", ".json")) or os.path.exists(spec):
        return collect(read_jsonl(spec), spec, True, counts)
    if not hub:
        raise UserError(f"{spec}: no such file; give FILE.jsonl, FILE.parquet, OWNER/NAME[:CONFIG][@SPLIT], or one of {', '.join([*TIERS, *BENCHMARKS])}")
    name, config, hub_split = hub.groups()
    return collect(table_rows(spec, lambda: fetch(name, config, hub_split or split).with_format("arrow")[:]), spec, False, counts)


def load_rows(spec: str, split: str = "train", counts: Counter | None = None) -> list[Row]:
    """All rows of a source, see the top of this file. `split` counts for hub sets that name none; `counts` gets how many rows were left out, by reason."""
    return [row for _, row in placed_rows(spec, split, Counter() if counts is None else counts)]


def load_problems(path: str, tokenizer, system_prompt: str, max_prompt_tokens: int, limit: int | None = None,
                  split: str = "train", counts: Counter | None = None) -> tuple[list[Problem], int]:  # fmt: skip
    """The first `limit` rows with their prompts as token ids, and how many of them were left out as too long; else as `load_rows`."""
    rows = placed_rows(path, split, Counter() if counts is None else counts)[:limit]
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    problems = []
    for start in range(0, len(rows), 256):  # a tokenizer returns several objects per token: not for all rows at once
        texts, chunk = [], rows[start : start + 256]
        for place, row in chunk:
            try:
                texts.append(tokenizer.apply_chat_template(system + [{"role": "user", "content": row["problem"]}], tokenize=False, add_generation_prompt=True))
            except Exception as error:  # a template is a program of the model's author, which may raise anything
                raise UserError(f"--model: its chat template fails on {place}: {type(error).__name__}: {error}; "
                                'if it takes no system message, give --system-prompt ""') from None  # fmt: skip
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]  # the template has written the special tokens already
        problems += [Problem(row, prompt) for (_, row), prompt in zip(chunk, ids) if len(prompt) <= max_prompt_tokens]
    if not problems:
        raise UserError(f"{path}: every prompt is longer than --max-prompt-tokens {max_prompt_tokens}")
    return problems, len(rows) - len(problems)
