"""support/data.py: examples by hand, laws, broken files, the paper's training sets, mutants.

No test needs the hub. Copies of its columns with a few rows take the place of `data.fetch`.

PYTEST_DONT_REWRITE: mutants fail on purpose, and pytest can then take minutes to show the
difference of two lists of 5,000 rows.
"""

import codecs
import datetime
import decimal
import inspect
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
import types
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lite_ppo import Config  # hides broken packages from transformers
from support import columns, data, prompts, toy
from support.errors import UserError
from tests.checks import parse_mutants

ROOT = Path(__file__).parent.parent
# A folder with complete data sets. Where there is none, the tests of these sets are skipped.
REAL_DATA = Path(os.environ.get("REAL_DATA", ROOT.parent / "shared" / "data"))
REAL_SETS = sorted(REAL_DATA.glob("*.jsonl"))
ROWS = [{"problem": f"{i}+1", "answer": str(i + 1)} for i in range(5)]


def lines(*rows) -> bytes:
    """The rows as the content of a JSONL file."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write(folder: Path, content: bytes, name: str = "some.jsonl") -> str:
    """Write a file. Returns its path."""
    (folder / name).write_bytes(content)
    return str(folder / name)


def names(rows: list[dict]) -> set[str]:
    """The problems of the rows."""
    return {row["problem"] for row in rows}


def missing_words(words: str, message: str) -> list[str]:
    return [word for word in words.split() if word not in message]


# ---- gold answers --------------------------------------------------------------------------------

GOLDS = [  # value of the answer column, gold answer
    ("  72 ", "72"),
    (7, "7"),
    (-0.5, "-0.5"),
    (27.0, "27"),
    (0, "0"),
    (1e300, "1e+300"),
    (["8", " 1"], "8, 1"),
    (["x=2,3"], "x=2,3"),
    (["1", 2], "1, 2"),
    ("1,234", "1,234"),
    ("3 * 4 = <<3*4=12>>12\n#### 12", "12"),
    ("So much.\n#### 1,234,567", "1234567"),
    ("#### -5 ", "-5"),
    ("a\n#### 2,50\n", "2,50"),
    ("#### 5\nis not at the end", "#### 5\nis not at the end"),
    ("C #### 5", "C #### 5"),
    ("a proof", "a proof"),
]
NO_GOLDS = [
    "proof",
    " notfound ",
    *(None, "", " \n", True, False, math.nan, math.inf, -math.inf),
    *([], [""], ["1", True], {"a": 1}, b"1"),
]


@pytest.mark.parametrize("value,expected", GOLDS)
def test_gold_answer_equals_the_one_by_hand(value, expected):
    assert columns.gold(value) == expected


@pytest.mark.parametrize("value", NO_GOLDS)
def test_value_without_an_answer_has_an_empty_gold_answer(value):
    assert columns.gold(value) == ""


# ---- hub sets ------------------------------------------------------------------------------------


class HubRow(NamedTuple):
    raw: dict  # with the columns of the hub set
    problem: str
    answer: str


HUB_ROWS = {
    "gsm8k": HubRow(
        {"question": "48+24?", "answer": "48+24 = <<48+24=72>>72\n#### 72"}, "48+24?", "72"
    ),
    data.MATH: HubRow(
        {
            "problem": "P",
            "level": "Level 1",
            "solution": r"\boxed{1} no, $\boxed{\frac{1}{2}}$.",
            "type": "Algebra",
        },
        "P",
        r"\frac{1}{2}",
    ),
    data.DEEPMATH: HubRow(
        {
            "question": "Q",
            "final_answer": "Yes",
            "difficulty": 4.5,
            "topic": "T",
            "r1_solution_1": "long",
            "r1_solution_2": "long",
            "r1_solution_3": "long",
        },
        "Q",
        "Yes",
    ),
    "math500": HubRow(
        {
            "problem": "P",
            "solution": r"\boxed{8}",
            "answer": "7",
            "subject": "S",
            "level": 2,
            "unique_id": "u",
        },
        "P",
        "7",
    ),
    "minerva": HubRow({"question": "Q", "answer": "2.5e-3"}, "Q", "2.5e-3"),
    "aime24": HubRow(
        {"id": 60, "problem": "P", "solution": r"\boxed{204}", "url": "u"}, "P", "204"
    ),
    "aime25": HubRow({"problem": "P", "answer": "70", "id": "0"}, "P", "70"),
    "amc23": HubRow({"id": 0, "question": "Q", "answer": "27", "url": "u"}, "Q", "27"),
    "olympiadbench": HubRow(
        {
            "id": 1606,
            "question": "Q",
            "solution": [r"So \boxed{9}"],
            "final_answer": ["2", "$-3$"],
            "context": None,
            "image_1": None,
            "is_multiple_answer": True,
            "unit": None,
        },
        "Q",
        "2, -3",
    ),
}


def hub_name(name: str) -> str:
    """OWNER/NAME of a data set, without the configuration and the split."""
    return data.BENCHMARKS.get(name, name).split("@")[0].split(":")[0]


class Hub(dict):
    """Rows by OWNER/NAME. `fetch` takes the place of data.fetch; `calls` are its arguments."""

    def __init__(self):
        super().__init__({hub_name(name): [row.raw] for name, row in HUB_ROWS.items()})
        self.calls = []

    def fetch(self, name: str, config: str | None, split: str):
        import datasets

        self.calls.append((name, config, split))
        return datasets.Dataset.from_list(self[name])


@pytest.fixture
def hub(monkeypatch) -> Hub:
    """A hub with the sets of HUB_ROWS. Tests add more: hub[NAME] = rows."""
    hub = Hub()
    monkeypatch.setattr(data, "fetch", hub.fetch)
    return hub


@pytest.mark.parametrize("name", HUB_ROWS)
def test_problem_and_answer_come_from_the_columns_of_the_hub_set(name, hub):
    raw, problem, answer = HUB_ROWS[name]
    kept = {column: value for column, value in raw.items() if not column.startswith("r1_")}
    assert data.load_rows(name, "train") == [kept | {"problem": problem, "answer": answer}]


OLYMPIAD_CALL = ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train")
CALLS = [  # name and split that are asked for; name, configuration and split that reach the hub
    ("me/my-set.v1", "train", ("me/my-set.v1", None, "train")),
    ("me/my-set.v1@test[:9]", "train", ("me/my-set.v1", None, "test[:9]")),
    ("me/my-set.v1:a b", "test", ("me/my-set.v1", "a b", "test")),
    ("me/my-set.v1:all@dev", "test", ("me/my-set.v1", "all", "dev")),
    ("gsm8k", "train", ("openai/gsm8k", "main", "train")),
    ("gsm8k", "test", ("openai/gsm8k", "main", "test")),
    ("olympiadbench", "test", OLYMPIAD_CALL),
    ("math500", "train", ("HuggingFaceH4/MATH-500", None, "test")),
]


@pytest.mark.parametrize("spec,split,call", CALLS)
def test_name_configuration_and_split_reach_the_hub(spec, split, call, hub):
    hub["me/my-set.v1"] = ROWS
    data.load_rows(spec, split)
    assert hub.calls == [call]


NO_SUCH_FILE = "no such file; give FILE.jsonl, OWNER/NAME easy, medium, hard, math500"
UNKNOWN_SETS = [  # name, words of the message
    ("nobody/nothing", "cannot read the data: KeyError"),  # the hub has no such set
    ("a/b/c", NO_SUCH_FILE),
    ("math5000", NO_SUCH_FILE),
    ("", NO_SUCH_FILE),
    ("./x", NO_SUCH_FILE),
]


@pytest.mark.parametrize("spec,words", UNKNOWN_SETS)
def test_error_names_an_unknown_set(spec, words, hub):
    with pytest.raises(UserError) as error:
        data.load_rows(spec)
    message = str(error.value)
    assert message.startswith(f"{spec}: {words.split()[0]} ")
    assert missing_words(words, message) == []


real_fetch = data.fetch


def fetch_folder(name: str, config: str | None, split: str):
    """data.fetch, but from the folder "mine" instead of the hub."""
    return real_fetch("mine", config, split)


def test_fetch_reads_with_the_datasets_library(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine", lines(*ROWS), "train.jsonl")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "fetch", fetch_folder)
    assert data.load_rows("nobody/mine") == ROWS
    assert data.load_rows("nobody/mine@train[1:3]") == ROWS[1:3]
    with pytest.raises(
        UserError, match="nobody/mine@dev: cannot read the data: .*dev.*check .*SPLIT"
    ):
        data.load_rows("nobody/mine@dev")


# ---- JSONL files ---------------------------------------------------------------------------------

TWO_ROWS = [
    {"problem": "π + 1\u2028?", "answer": "é", "n": {"x": [1, None]}},
    {"problem": " 2 ", "answer": "2"},
]
PLAIN = lines(*TWO_ROWS)
BOM = codecs.BOM_UTF8
UNESCAPED = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TWO_ROWS).encode()
ENCODINGS = {
    "plain": PLAIN,
    "no line end at the end": PLAIN.rstrip(),
    "Windows line ends and blank lines": PLAIN.replace(b"\n", b"\r\n\r\n"),
    "CR alone as line end": UNESCAPED.replace(b"\n", b"\r"),
    "every line end in one file": PLAIN.replace(b"\n", b"\r", 1) + b"\r\n\n",
    "byte order mark": BOM + PLAIN,
    "blank lines first": b" \n\n" + PLAIN,
    "byte order mark in a blank line": BOM + b"\n" + PLAIN,
    "characters without escapes": UNESCAPED,
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_file_in_any_encoding_has_the_same_rows(name, tmp_path):
    assert data.load_rows(write(tmp_path, ENCODINGS[name])) == TWO_ROWS


ALIASES = [  # row of the file, problem, answer
    ({"Question": "1+1", "Final_Answer": 2}, "1+1", "2"),
    ({"problem": 7, "question": "1+2", "answer": None, "expected_answer": "3"}, "1+2", "3"),
    ({"PROBLEM": "1", "answer": "a", "Answer": "b"}, "1", "a"),
]


@pytest.mark.parametrize("row,problem,answer", ALIASES)
def test_first_usable_column_counts(row, problem, answer, tmp_path):
    loaded = data.load_rows(write(tmp_path, lines(row), "no_ending"))
    assert loaded == [row | {"problem": problem, "answer": answer}]


GOOD = lines({"problem": "1+1", "answer": 2})
LONG_NUMBER = b'{"problem": "1+2", "answer": ' + b"9" * 5000 + b"}"
OPEN_LISTS = b'{"problem": "1+2", "answer": "3", "x": ' + b"[" * 99999
DEEP_LISTS = b'{"problem": "1+2", "answer": "3", "x": ' + b"[" * 99 + b"]" * 99 + b"}"
BROKEN_LINES = [  # the line after GOOD, words of the message
    (b'{"problem": "1+2"}', "answer None"),
    (b'{"problem": "1+2", "answer": NaN}', "answer finite nan"),
    (b'{"problem": "1+2", "answer": 1e999}', "finite inf"),
    (b'{"problem": "1+2", "answer": true}', "answer True"),
    (b'{"problem": "1+2", "answer": " "}', "answer ' '"),
    (b'{"problem": "1+2", "answer": [true]}', "answer [True]"),
    (b'{"problem": "1+2", "solution": "so \\\\boxed{3"}', "solution boxed{}"),
    (b'{"answer": "2"}', "problem question None ['answer']"),
    (b'{"problem": ["1+2"], "answer": "3"}', "problem ['1+2']"),
    (b'{"problem": "\\n", "answer": "3"}', "problem non-empty"),
    (b'["1+2", "3"]', "JSON object ['1+2', '3']"),
    (b"null", "JSON object None"),
    (b"{'problem': 1}", "JSON object column 2"),
    (b'{"problem": "1+2", "answer"', "JSON object column"),
    (b"\x00", "JSON object"),
    (b'{"problem": "1\t2", "answer": "3"}', "control character"),
    (b'{"problem": "1+\xff", "answer": "3"}', "UTF-8 0xff save"),
    (codecs.BOM_UTF16 + b"{\x00", "UTF-8"),
    (b'{"problem": "1+2", "answer": "3", "x": "\\ud800"}', "surrogate '\\ud800' remove"),
    (b'{"problem": "\\udc00\\ud800", "answer": "3"}', "surrogate '\\udc00'"),
    (b'{"problem": "1+2", "answer": "3", "\\ud800": 1}', "surrogate"),
    (LONG_NUMBER, "JSON object digits"),
    (OPEN_LISTS, "recursion"),
    (DEEP_LISTS, "nested flatten"),
    (b'{"problem": "1+1 ", "answer": "3"}', "some.jsonl:1 again '3' '2' remove"),
]
BROKEN_IDS = [repr(line[:40]) for line, _ in BROKEN_LINES]


@pytest.mark.parametrize("line,words", BROKEN_LINES, ids=BROKEN_IDS)
def test_error_names_the_broken_line(line, words, tmp_path):
    path = write(tmp_path, GOOD + line + b"\n" + lines(*ROWS[2:]))
    with pytest.raises(UserError) as error:
        data.load_rows(path)
    message = str(error.value)
    assert message.startswith(f"{path}:2: ")
    assert missing_words(words, message) == []
    assert len(message) < len(path) + 400


UNUSABLE_FILES = [  # name, content, part of the message
    ("some.jsonl", b"", "holds no problems"),
    ("blank.jsonl", b" \r\n\n", "holds no problems"),
    ("some.parq", b"PAR1\x15\x04", "Parquet; give it a name that ends in .parquet"),
    ("some.jsonl.gz", b"\x1f\x8b\x08\x00", "compressed (gzip); decompress it"),
    ("some.zst", b"\x28\xb5\x2f\xfd\x04", "compressed (zstd)"),
    ("", None, "directory"),
    ("none.jsonl", None, "No such file"),
    ("none", None, "no such file"),
    ("x\0.jsonl", None, "cannot read"),
]


@pytest.mark.parametrize("name,content,part", UNUSABLE_FILES)
def test_error_names_a_file_without_problems(name, content, part, tmp_path):
    path = str(tmp_path / name)
    if content is not None:
        write(tmp_path, content, name)
    with pytest.raises(UserError) as error:
        data.load_rows(path)
    message = str(error.value)
    assert message.startswith(path)
    assert part in message


PRINT_IMPORTS = """
import sys
from support import data
data.load_rows(sys.argv[1])
slow = {"datasets", "pyarrow", "torch", "transformers", "pandas"}
print(sorted(slow & set(sys.modules)))
"""


def test_file_is_read_without_slow_imports(tmp_path):
    command = [sys.executable, "-c", PRINT_IMPORTS, write(tmp_path, GOOD)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stdout + result.stderr


def test_7473_rows_load_within_a_second(tmp_path):
    rows = [{"problem": f"{i} eggs " * 20, "answer": str(i)} for i in range(7473)]
    path = write(tmp_path, lines(*rows))
    began = time.process_time()
    assert len(data.load_rows(path)) == 7473
    assert time.process_time() - began < 1


# ---- Parquet files -------------------------------------------------------------------------------

WHEN = datetime.datetime(2025, 8, 11)


def parquet_row(i: int) -> dict:
    """Row i of ROWS, with columns of many types."""
    return {
        "question": f"{i}+1",
        "answer": float(i + 1),
        "n": i,
        "when": WHEN,
        "cost": decimal.Decimal("1.50"),
        "image": {"bytes": b"\xff", "path": "p"},
        "raw": b"\0",
        "extra_info": {"is_binary": True, "binary": "x"},
        "r1_solution_1": "long",
        "tags": ["a", None],
        "nothing": None,
    }


def loaded_row(i: int) -> dict:
    """What load_rows makes of parquet_row(i)."""
    return ROWS[i] | {
        "question": f"{i}+1",
        "n": i,
        "when": str(WHEN),
        "cost": "1.50",
        "image": {"path": "p"},
        "extra_info": {"is_binary": True, "binary": "x"},
        "r1_solution_1": "long",
        "tags": ["a", None],
        "nothing": None,
    }


def write_parquet(folder: Path, rows: list[dict]) -> str:
    import pyarrow
    from pyarrow import parquet

    path = f"{folder}/some.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_parquet_rows_become_json_values(tmp_path):
    path = write_parquet(tmp_path, [parquet_row(i) for i in range(5)])
    expected = [loaded_row(i) for i in range(5)]
    assert data.load_rows(path) == expected
    assert json.loads(json.dumps(expected)) == expected


def test_columns_are_skipped_by_their_types_and_not_by_names():
    import pyarrow as pa

    text = ("text", pa.string())
    leaves = [pa.binary(), pa.large_binary(), pa.binary(3), pa.binary_view()]
    for leaf in leaves:
        kinds = [leaf, pa.dictionary(pa.int32(), leaf)]
        kinds += [pa.list_(leaf), pa.large_list(leaf), pa.list_(leaf, 2), pa.map_("string", leaf)]
        for kind in kinds:
            assert data.without_bytes(kind) is None
            assert (
                data.without_bytes(pa.struct([("x", pa.list_(pa.struct([("y", kind)])))])) is None
            )
            for make in (pa.list_, pa.large_list):
                nested = pa.struct([("x", make(pa.struct([text, ("y", kind)]))), ("z", kind)])
                rest = pa.struct([("x", make(pa.struct([text])))])
                assert data.without_bytes(nested) == rest
    for leaf in (pa.string(), pa.bool_(), pa.dictionary(pa.int32(), "string"), pa.null()):
        for kind in (leaf, pa.list_(leaf), pa.map_("string", leaf), pa.struct([("binary", leaf)])):
            whole = pa.struct([("binary", kind), ("empty", pa.struct([]))])
            assert data.without_bytes(whole) == whole


def test_only_the_bytes_of_a_parquet_column_are_skipped(tmp_path):
    """The whole column was left out, and with it the answer."""
    picture = {"bytes": b"\xff", "path": "a.png"}
    row = {"prompt": "1+1", "info": {"answer": "2", "pictures": [picture], "thumb": b"x"}}
    path = write_parquet(tmp_path, [row, row | {"prompt": "1+2", "info": None, "answer": "3"}])
    columns_ = columns.Columns(answer="info.answer")
    with pytest.raises(UserError, match=r"row 2: --answer-column info.answer: no such column"):
        data.load_rows(path, columns=columns_)
    path = write_parquet(tmp_path, [row, row | {"prompt": "1+2"}])
    first, second = data.load_rows(path, columns=columns_)
    assert first["info"] == second["info"] == {"answer": "2", "pictures": [{"path": "a.png"}]}


def test_parquet_file_of_verl_may_have_a_field_called_binary(tmp_path):
    chat = [{"role": "user", "content": "1+1"}]
    model = {"ground_truth": "2", "style": "rule", "binary": False}
    path = write_parquet(tmp_path, [{"prompt": chat, "reward_model": model}])
    (row,) = data.load_rows(path)
    assert (row["problem"], row["answer"], row["reward_model"]) == ("1+1", "2", model)


BROKEN_CELLS = [  # column, value in row 4, pattern of the message
    ("answer", math.nan, 'some.parquet, row 4: needs "answer".*nan'),
    ("question", "", "some.parquet, row 4: needs \"problem\".*''"),
]


@pytest.mark.parametrize("column,value,pattern", BROKEN_CELLS)
def test_error_names_the_row_of_a_parquet_file(column, value, pattern, tmp_path):
    rows = [parquet_row(i) for i in range(5)]
    rows[3][column] = value
    path = write_parquet(tmp_path, rows)
    with pytest.raises(UserError, match=pattern):
        data.load_rows(path)


def test_error_names_a_damaged_parquet_file(tmp_path):
    path = write_parquet(tmp_path, [parquet_row(i) for i in range(5)])
    whole = Path(path).read_bytes()
    for content in (whole[:-9], whole[: len(whole) // 2], b"", b"PAR1" * 5, GOOD):
        write(tmp_path, content, "some.parquet")
        with pytest.raises(UserError, match="some.parquet: cannot read the data"):
            data.load_rows(path)


@pytest.mark.parametrize("name", ["none", "folder"])
def test_error_names_a_path_that_is_no_parquet_file(name, tmp_path):
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(UserError, match=f"/{name}.parquet: cannot read the data"):
        data.load_rows(f"{tmp_path}/{name}.parquet")


# ---- repeated and doubtful rows ------------------------------------------------------------------


def test_repeated_rows_of_a_file_are_counted(tmp_path):
    repeated = [ROWS[1], {"problem": " 0+1", "answer": 1.0}, ROWS[1]]
    path = write(tmp_path, lines(*ROWS, *repeated))
    counts = Counter()
    assert data.load_rows(path, counts=counts) == ROWS
    assert counts == {"repeated": 3}
    assert data.load_rows(path) == ROWS


def test_doubtful_rows_of_a_hub_set_are_left_out(hub):
    """The user cannot correct a set of the hub."""
    hub["me/mine"] = [
        *ROWS,
        ROWS[0],
        ROWS[1] | {"answer": "x"},
        ROWS[1],
        ROWS[1] | {"answer": "y"},
        {"problem": "", "answer": "1"},
        {"problem": "P", "answer": None},
    ]
    counts = Counter()
    assert data.load_rows("me/mine", counts=counts) == [ROWS[0], *ROWS[2:]]
    assert counts == {
        "repeated": 2,
        "with contradicting answers": 3,
        "without a usable problem and answer": 2,
    }
    assert sum(counts.values()) + 4 == len(hub["me/mine"])


def test_error_names_the_first_row_of_an_unusable_hub_set(hub):
    hub["me/mine"] = [{"text": "1+1", "label": "2"}]
    pattern = "me/mine: holds no problems.*row 1: needs \"problem\".*'text'"
    with pytest.raises(UserError, match=pattern):
        data.load_rows("me/mine")


# ---- 300 broken files ----------------------------------------------------------------------------

SCRAPS = [
    *(b"\xff", b"\x00", b"\xed\xa0\x80", b"\\ud800", b"\\udfff", b"\n", b"\r\n", b"\r", b"\t"),
    *(b'"', b"\\", b"{", b"}", b"[" * 3000, b"]", b",", b"null", b"NaN", b"-Infinity", b"1e999"),
    *(b"9" * 5000, codecs.BOM_UTF8, codecs.BOM_UTF16, "\u2028\x85".encode(), b"\x1b[31m"),
    *(b"true", b"#### ", b"\\boxed{", b'"answer": []'),
]
VALUES = [
    *(None, True, 0, -1.5, 10**400, math.nan, math.inf, "", " ", "\0", "x" * 20000, "\ud800"),
    *("#### 1,0", [], ["1"], ["1", None], {}, {"a": {"b": []}}),
    json.loads("[" * 80 + "]" * 80),
]
COLUMNS = ["Problem", "question", "Answer", "final_answer", "solution", "", "x"]
ROW_ACCIDENTS = ["field", "drop", "rename", "repeat", "contradict"]
BYTE_ACCIDENTS = ["flip", "scrap", "cut", "swap", "crlf", "bom", "again"]


def damage_rows(rng: random.Random, rows: list[dict], kind: str) -> None:
    """Change the rows; a kind of BYTE_ACCIDENTS changes nothing."""
    row = rng.choice(rows)
    key = rng.choice(list(row) or ["answer"])
    if kind == "field":
        row[key] = rng.choice(VALUES)
    elif kind == "drop":
        row.pop(key, None)
    elif kind == "rename":
        row[rng.choice(COLUMNS)] = row.pop(key, None)
    elif kind == "repeat":
        rows.insert(rng.randrange(len(rows)), dict(row))
    elif kind == "contradict":
        rows.insert(rng.randrange(len(rows)), row | {"answer": "other"})


def damage_bytes(rng: random.Random, content: bytearray, kind: str) -> bytearray:
    """A changed content; a kind of ROW_ACCIDENTS changes nothing."""
    at = rng.randrange(len(content))
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 1, 20])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "scrap":
        content[at:at] = rng.choice(SCRAPS)
    elif kind == "cut":
        del content[at : rng.choice([len(content), at + 9])]
    elif kind == "swap":
        other = rng.randrange(len(content))
        here, there = content[at : at + 30], content[other : other + 30]
        content[at : at + 30], content[other : other + 30] = there, here
    elif kind == "crlf":
        content = content.replace(b"\n", b"\r\n")
    elif kind == "bom":
        content[:0] = rng.choice([codecs.BOM_UTF8, codecs.BOM_UTF16_LE])
    elif kind == "again":
        content += content[at:]
    return content or bytearray(b"\n")


def broken_file(rng: random.Random, rows: list[dict]) -> bytes:
    """A file with the rows, after one to three accidents."""
    kinds = rng.choices(ROW_ACCIDENTS + BYTE_ACCIDENTS, k=rng.randint(1, 3))
    rows = [dict(row) for row in rows]
    for kind in kinds:
        damage_rows(rng, rows, kind)
    content = bytearray(lines(*rows))
    for kind in kinds:
        content = damage_bytes(rng, content, kind)
    return bytes(content)


def reason_for(error: UserError, path: str) -> str:
    """Check that the error names a line of the file. Returns the beginning of the reason."""
    message = str(error)
    assert message.startswith(path), message
    place, reason = message[len(path) :].split(": ")[:2]
    assert reason, message
    if place:
        assert 1 <= int(place[1:]) <= len(Path(path).read_bytes().splitlines()), message
    else:
        assert "holds no problems" in message
    json.dumps(message, ensure_ascii=False).encode()  # raises if it cannot be printed
    return reason[:12]


def check_loaded_rows(rows: list[dict]) -> None:
    """Each problem is there once. Problem and answer are texts, and all rows can be stored."""
    assert rows
    assert len(names(rows)) == len(rows)
    for row in rows:
        for key in ("problem", "answer"):
            assert isinstance(row[key], str)
            assert row[key].strip()
        json.dumps(row, ensure_ascii=False).encode()


def rows_to_break() -> list[dict]:
    """The first rows of the real sets; without these, ROWS with columns that are not used."""
    if not REAL_SETS:
        return [row | {"id": i, "level": 2, "topic": "T"} for i, row in enumerate(ROWS)]
    rows = []
    for path in REAL_SETS:
        with path.open() as file:
            rows += [json.loads(line) for line in itertools.islice(file, 9)]
    return rows


def test_300_broken_files_load_or_have_a_named_error(tmp_path):
    began = time.process_time()
    source = rows_to_break()
    reasons = Counter()
    for seed in range(300):
        rng = random.Random(seed)
        content = broken_file(rng, rng.sample(source, 5))
        path = write(tmp_path, content, f"{seed}.jsonl")
        try:
            rows = data.load_rows(path)
        except UserError as error:
            reasons[reason_for(error, path)] += 1
        else:
            check_loaded_rows(rows)
    assert 60 < reasons.total() < 240, reasons
    assert len(reasons) >= 6, reasons  # the accidents are of many kinds
    assert time.process_time() - began < 20


# ---- the paper's training sets -------------------------------------------------------------------


def deepmath(size: int, answers: list | None = None, difficulties: list | None = None) -> list:
    """Rows with the columns of DeepMath; by default with different answers, difficulty 1 to 9."""
    answers = answers or [str(i) for i in range(size)]
    difficulties = difficulties or [1 + i % 17 / 2 for i in range(size)]
    rows = []
    for i in range(size):
        row = {"problem": f"problem {i}", "answer": answers[i], "difficulty": difficulties[i]}
        rows.append(row)
    return rows


LEVELS = ["Level 1", "Level 2", "Level 10", "Level ?", 1, 2, None]


def gsm8k_and_math(gsm8k_size: int, math_size: int) -> tuple[list[dict], list[dict]]:
    """Rows with the columns of the two sets. Two sevenths of the MATH rows have level 1."""
    gsm8k = [{"problem": f"g{i}", "answer": "1"} for i in range(gsm8k_size)]
    math_rows = []
    for i in range(math_size):
        math_rows.append({"problem": f"m{i}", "answer": "1", "level": LEVELS[i % 7]})
    return gsm8k, math_rows


def test_tier_easy_is_uniform_over_gsm8k_and_level_1_of_math():
    rows = data.tier_easy(*gsm8k_and_math(7473, 2100))
    assert len(rows) == len(names(rows)) == 5000
    assert {row.get("level") for row in rows} == {None, "Level 1", 1}
    share = sum("level" in row for row in rows) / 5000
    assert share == pytest.approx(600 / 8073, abs=0.015)  # 4 standard deviations


@pytest.mark.parametrize("gsm8k_size,math_size,expected", [(9, 7, 11), (0, 0, 0)])
def test_tier_easy_of_small_sets_has_all_rows(gsm8k_size, math_size, expected):
    rows = data.tier_easy(*gsm8k_and_math(gsm8k_size, math_size))
    assert len(rows) == expected


def test_tier_medium_has_the_easiest_problems_in_order():
    rows = deepmath(6000)
    difficulties = [row["difficulty"] for row in data.tier_medium(rows)]
    assert len(difficulties) == 5000
    assert difficulties == sorted(row["difficulty"] for row in rows)[:5000]
    assert len(data.tier_medium(rows[:7])) == 7


def test_tier_medium_does_not_prefer_the_first_of_equal_problems():
    chosen = data.tier_medium(deepmath(5100, difficulties=[2] * 5100))
    assert names(chosen) != names(deepmath(5000))


NO_DIFFICULTIES = [None, 0, -1, math.nan, math.inf, "3", True, 10**400]


def test_problems_without_a_difficulty_are_left_out():
    rows = deepmath(6000)
    invalid = [{"problem": "none", "answer": "1"}]
    for value in NO_DIFFICULTIES:
        invalid.append({"problem": f"bad {value!r}", "answer": "1", "difficulty": value})
    assert data.tier_medium(rows + invalid) == data.tier_medium(rows)
    assert data.tier_hard(invalid) == []


def drawn_orders(difficulties: list[float]) -> Counter:
    """How often tier_hard has 4,000 sets of such problems in each order of difficulties."""
    orders = Counter()
    for i in range(4000):
        rows = []
        for difficulty in difficulties:
            problem = f"{i} {difficulty}"
            rows.append({"problem": problem, "answer": "7", "difficulty": difficulty})
        orders[tuple(row["difficulty"] for row in data.tier_hard(rows))] += 1
    return orders


def test_tier_hard_prefers_one_of_two_in_proportion_to_difficulty():
    # The problem with difficulty 3 of 1 + 3 is the first in three quarters of the draws.
    share = drawn_orders([1, 3.0])[3, 1] / 4000
    assert share == pytest.approx(0.75, abs=0.025)


def test_tier_hard_has_every_order_of_three_with_its_probability():
    orders = drawn_orders([1, 2, 5])
    for order in itertools.permutations((1, 2, 5)):
        first, second, _ = order
        expected = first / 8 * second / (8 - first)
        assert orders[order] / 4000 == pytest.approx(expected, abs=0.025), order


def test_tier_hard_draws_without_replacement():
    # Of the problems with weight w, the share 1 - e^-wt is drawn. There are 10,000 with weight 3
    # and 10,000 with weight 9, and 5,000 are drawn: 2 - e^-3t - e^-9t = 1/2, so t = 0.0498.
    # Then 3,612 of the 5,000 have weight 9.
    chosen = data.tier_hard(deepmath(20000, difficulties=[3, 9] * 10000))
    assert len(chosen) == len(names(chosen)) == 5000
    hard = sum(row["difficulty"] == 9 for row in chosen)
    assert hard == pytest.approx(3612, abs=90)


def test_tier_hard_has_every_tenth_answer_that_can_be_guessed():
    guessable = ["Yes", "no", "TRUE", "False.", " yes "]
    answers = ["None"] * 500 + guessable * 100
    chosen = data.tier_hard(deepmath(1000, answers))
    counts = Counter(row["answer"] for row in chosen)
    assert counts.pop("None") == 500
    assert counts.total() == 50
    assert set(counts) == set(guessable)
    assert max(counts.values()) <= 20  # no answer is exempt


def test_tier_hard_thins_before_it_draws():
    answers = ["Yes"] * 600 + ["5"] * 5000
    assert len(data.tier_hard(deepmath(5600, answers))) == 5000


def easy_from_math(rows: list[dict]) -> list[dict]:
    return data.tier_easy([], rows)


def easy_from_both(rows: list[dict]) -> list[dict]:
    even = [row for row in rows if int(row["problem"]) % 2 == 0]
    odd = [row for row in rows if int(row["problem"]) % 2 == 1]
    return data.tier_easy(even, odd)


@given(st.lists(st.integers(0, 10**6), unique=True, max_size=40), st.randoms(use_true_random=False))
def test_tiers_depend_only_on_the_problems(numbers, rng):
    rows = []
    for i in numbers:
        row = {"problem": str(i), "answer": ["Yes", "1"][i % 2]}
        row |= {"difficulty": 1 + i % 9, "level": f"Level {1 + i % 3}"}
        rows.append(row)
    state = random.getstate()
    for tier in (data.tier_medium, data.tier_hard, easy_from_math, easy_from_both):
        chosen = tier(rows)
        assert tier(rng.sample(rows, len(rows))) == chosen
        assert names(chosen) <= names(rows)
        assert all(row in rows for row in chosen)
    assert random.getstate() == state


@pytest.fixture
def training_sets(hub) -> Hub:
    """A hub with small copies of the sets that the tiers are made of."""
    hub["openai/gsm8k"] = [{"question": f"g{i}", "answer": f"so\n#### {i}"} for i in range(30)]
    hub[data.MATH] = []
    for i in range(30):
        row = {"problem": f"m{i}", "solution": f"$\\boxed{{{i}}}$"}
        row |= {"level": f"Level {1 + i % 5}", "type": "T"}
        hub[data.MATH].append(row)
    hub[data.MATH][0]["solution"] = "It is easy to see.\nSo it is 0."  # no box
    hub[data.DEEPMATH] = []
    for i in range(20):
        row = {"question": f"d{i}", "final_answer": f"{i}"}
        row |= {"difficulty": 1.0 + i, "r1_solution_1": "long"}
        hub[data.DEEPMATH].append(row)
    return hub


def test_tier_easy_by_name_reads_gsm8k_and_math(training_sets):
    counts = Counter()
    rows = data.load_rows("easy", split="test", counts=counts)
    level_1 = range(5, 30, 5)  # problem 0 has no usable answer
    assert names(rows) == {f"g{i}" for i in range(30)} | {f"m{i}" for i in level_1}
    assert rows[0]["answer"].isdigit()
    assert counts == {"without a usable problem and answer": 1}


def test_tiers_medium_and_hard_by_name_read_deepmath(training_sets):
    counts = Counter()
    medium = data.load_rows("medium", split="test", counts=counts)
    hard = data.load_rows("hard", split="test", counts=counts)
    assert [row["problem"] for row in medium] == [f"d{i}" for i in range(20)]
    assert (medium[3]["answer"], medium[3]["difficulty"]) == ("3", 4.0)
    assert names(hard) == names(medium)
    assert hard != medium
    assert not any("r1_solution_1" in row for row in hard)
    assert counts == {}


def test_tiers_read_the_training_split(training_sets):
    for tier in ("easy", "medium", "hard"):
        data.load_rows(tier, split="test")
    assert {split for _, _, split in training_sets.calls} == {"train"}


# ---- complete data sets --------------------------------------------------------------------------

REAL_SIZES = dict(
    aime24=30,
    aime25=15,
    amc23=40,
    deepmath_5k=4990,  # 4,994 rows, four of which repeat others
    gsm8k_test=1319,
    gsm8k_train=7473,
    math500=500,
)


def load_real_set(name: str) -> list[dict]:
    path = REAL_DATA / f"{name}.jsonl"
    if path not in REAL_SETS:
        pytest.skip(f"no {path.name} in REAL_DATA")
    return data.load_rows(str(path))


def mean_difficulty(rows: list[dict]) -> float:
    return sum(row["difficulty"] for row in rows) / len(rows)


@pytest.mark.parametrize("name", REAL_SIZES)
def test_real_set_has_its_known_size(name):
    assert len(load_real_set(name)) == REAL_SIZES[name]


def test_real_sets_load_within_three_seconds():
    if not REAL_SETS:
        pytest.skip("no data sets in REAL_DATA")
    began = time.process_time()
    for path in REAL_SETS:
        assert data.load_rows(str(path))
    assert time.process_time() - began < 3


def test_tiers_of_the_real_deepmath():
    rows = load_real_set("deepmath_5k")
    assert len(data.tier_medium(rows)) == 4990
    hard = data.tier_hard(rows)
    assert len(hard) == 4198  # 880 answers are yes, no, true or false; 88 of them remain
    mean = mean_difficulty(hard)
    assert mean_difficulty(hard[:1000]) > mean + 0.1
    assert mean + 0.1 > mean_difficulty(hard[-1000:]) + 0.3


def test_tier_easy_of_the_real_gsm8k():
    rows = load_real_set("gsm8k_train")
    assert len(names(data.tier_easy(rows, []))) == 5000


# ---- prompts -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return toy.make_tokenizer()


def sums(count: int) -> list[dict]:
    """Problems with one to nine summands before the last one."""
    rows = []
    for i in range(count):
        summands = ["1"] * (1 + i % 9) + [str(i)]
        rows.append({"problem": "+".join(summands), "answer": str(i)})
    return rows


def settings(system_prompt: str = "", max_prompt_tokens: int = 16, **others) -> Config:
    """The flags that prompts depend on."""
    return Config(system_prompt=system_prompt, max_prompt_tokens=max_prompt_tokens, **others)


def make_chat(system_prompt: str, problem: str) -> list[dict]:
    chat = [{"role": "user", "content": problem}]
    if system_prompt:
        chat.insert(0, {"role": "system", "content": system_prompt})
    return chat


@pytest.mark.parametrize("system_prompt", ["", "7"])
def test_prompts_equal_the_chat_template(system_prompt, tmp_path, tokenizer):
    rows = sums(600)  # more than the tokenizer gets at once
    path = write(tmp_path, lines(*rows, rows[0]))
    problems, left_out = data.load_problems(path, tokenizer, settings(system_prompt))

    expected = []
    for row in rows:
        chat = make_chat(system_prompt, row["problem"])
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        if len(ids) <= 16:
            expected.append((row, ids))
    assert [(problem.row, problem.prompt_ids) for problem in problems] == expected
    assert left_out == {"repeated": 1, "too long": 600 - len(expected)}
    assert left_out["too long"] > 0


def test_limit_takes_the_first_rows(tmp_path, tokenizer):
    rows = sums(600)
    path = write(tmp_path, lines(*rows, rows[0]))
    problems, left_out = data.load_problems(path, tokenizer, settings(), 5)
    assert [problem.row for problem in problems] == rows[:5]
    assert left_out["too long"] == 0


def test_rows_left_out_are_counted_for_each_set(tmp_path, tokenizer, hub):
    hub["me/mine"] = [ROWS[0], ROWS[0], ROWS[1], ROWS[1] | {"answer": "x"}, {"problem": "P"}]
    long = {"problem": "1+" * 9 + "1", "answer": "10"}
    train = write(tmp_path, lines(*ROWS, ROWS[3], ROWS[0], long))
    once = write(tmp_path, lines(*ROWS), "once.jsonl")
    twice = write(tmp_path, lines(*ROWS, *ROWS), "twice.jsonl")
    cfg = settings(train_data=train, eval_data=(once, f"dev={twice}", "me/mine"))
    train_set, eval_sets = data.load_sets(tokenizer, cfg)
    sizes = {name: len(found.problems) for name, found in eval_sets.items()}
    assert sizes == dict(once=5, dev=5, mine=1)
    assert train_set.describe_left_out() == "2 repeated, 1 too long"
    assert {name: found.describe_left_out() for name, found in eval_sets.items()} == {
        "once": "",
        "dev": "5 repeated",
        "mine": "1 without a usable problem and answer, 1 repeated, 2 with contradicting answers",
    }


def test_warning_counts_answers_that_are_long_texts():
    """orca-math: `answer` is a worked solution without a mark, which no response equals."""
    worked = "He has 2 apples and buys 3 more of them.\nSo he has 5 apples in the end."
    rows = [{"answer": text} for text in ("5", r"\begin{pmatrix} 1 \\" + "\n" + r"2 \end{pmatrix}")]
    problems = [data.Problem(row, [3]) for row in rows]
    assert data.long_answers([problems]) == ""
    warning = data.long_answers([problems, [data.Problem({"answer": worked}, [3])] * 2])
    assert missing_words("2 of 4 answers 'He has ####, --answer-column", warning) == []
    constraint = data.Problem({"answer": '{"func_name": "f"}'}, [3])  # open-instruct's IFEval
    assert "1 of 3 answers" in data.long_answers([problems, [constraint]])


def test_warning_counts_evaluation_problems_that_are_trained():
    first, second = ([{"role": "user", "content": text}] for text in ("1+1", "1+2"))
    problems = [data.Problem({}, [3], chat) for chat in (first, second)]
    assert data.shared_problems("dev", problems[:1], problems[1:]) == ""
    spaced = data.Problem({}, [3], [first[0] | {"content": "1+1 "}])
    warning = data.shared_problems("dev", problems, [spaced, data.Problem({}, [3], [])])
    assert missing_words("1 of the 2 problems of dev also training problems", warning) == []


def test_error_if_every_prompt_is_too_long(tmp_path, tokenizer):
    path = write(tmp_path, lines(*sums(600)))
    pattern = "some.jsonl: every prompt is longer than --max-prompt-tokens 2"
    with pytest.raises(UserError, match=pattern):
        data.load_problems(path, tokenizer, settings("", 2))


class CountingTokenizer:
    """Makes one token of every text. `sizes` are the numbers of texts per call."""

    def __init__(self):
        self.sizes = []

    def apply_chat_template(self, chat, **kwargs):
        return chat[-1]["content"]

    def __call__(self, texts, add_special_tokens):
        self.sizes.append(len(texts))
        return {"input_ids": [[1]] * len(texts)}


def test_tokenizer_gets_at_most_1000_texts_at_once(tmp_path):
    tokenizer = CountingTokenizer()
    path = write(tmp_path, lines(*deepmath(3000)))
    problems, _ = data.load_problems(path, tokenizer, settings())
    assert len(problems) == sum(tokenizer.sizes) == 3000
    assert max(tokenizer.sizes) <= 1000


BROKEN_TEMPLATES = [  # chat template, pattern of the message after the folder of the data
    (
        "{{ raise_exception('no system here') }}",
        r"some.jsonl:1: TemplateError: no system here; the messages are user; --chat-template",
    ),
    (
        "{% if messages[-1].content == '1+1' %}{{ 1 / 0 }}{% endif %}x",
        "some.jsonl:3: ZeroDivisionError",
    ),
    ("{% for x in %}", "some.jsonl:1: TemplateSyntaxError"),
]


@pytest.mark.parametrize("template", ["", "{{ '' }}"])
def test_error_if_the_template_makes_an_empty_prompt(template, tmp_path, tokenizer):
    """The first rollout ended with a traceback about the types of the embedding's indices."""
    tokenizer.chat_template = template
    path = write(tmp_path, lines({"problem": "1+1", "answer": "2"}))
    with pytest.raises(UserError, match=r"--model: .* an empty prompt of .*:1; correct chat_temp"):
        data.load_problems(path, tokenizer, Config())


@pytest.mark.parametrize("template,pattern", BROKEN_TEMPLATES)
def test_error_names_the_row_on_which_the_template_fails(
    template, pattern, tmp_path, tokenizer, monkeypatch
):
    path = write(tmp_path, lines(ROWS[0]) + b"\n" + lines(*ROWS[1:]))
    monkeypatch.setattr(tokenizer, "chat_template", template)
    message = f"--model: its chat template fails on {tmp_path}/{pattern}"
    with pytest.raises(UserError, match=message):
        data.load_problems(path, tokenizer, settings())


# ---- named mutants -------------------------------------------------------------------------------

MUTANTS = parse_mutants(r"""
value_without_an_answer_has_an_empty_gold_answer: true is a number
- isinstance(value, bool) or not
+ not

gold_answer_equals_the_one_by_hand: thousands commas stay
- r"(?<=\d),(?=\d{3})"
+ r"^,"

gold_answer_equals_the_one_by_hand: any decimal comma goes
- (?=\d{3})
+ (?=\d)

gold_answer_equals_the_one_by_hand: #### anywhere
- (\S.*)\Z
+ (\S.*)

value_without_an_answer_has_an_empty_gold_answer: a NaN is an answer
- not math.isfinite(value)
+ False

error_names_the_broken_line: lines from zero
- enumerate(lines, 1)
+ enumerate(lines)

error_names_the_broken_line: surrogates pass
- json.dumps(raw, ensure_ascii=False).encode()
+ json.dumps(raw).encode()

file_in_any_encoding_has_the_same_rows: CR is no line end
- in line.splitlines())
+ in [line])

file_in_any_encoding_has_the_same_rows: other characters are line ends
- line.splitlines()
+ map(str.encode, line.decode().splitlines())

file_in_any_encoding_has_the_same_rows: byte order mark not removed
- utf-8-sig
+ utf-8

first_usable_column_counts: first column, usable or not
- for value in values:
+ for value in values[:1]:

repeated_rows_of_a_file_are_counted: the last duplicate
- by_problem.setdefault(key, placed)
+ by_problem.pop(key, placed); by_problem[key] = placed

doubtful_rows_of_a_hub_set_are_left_out: contradictions stay
- if key not in disputed
+ if True

repeated_rows_of_a_file_are_counted: spaces make another problem
- message["content"].strip())
+ message["content"])

parquet_rows_become_json_values: images are kept
- skipped = set(binary)
+ skipped = set()

parquet_rows_become_json_values: the names of DeepMath are skipped everywhere
- if re.split("[:@]", name)[0] == DEEPMATH:
+ if True:

error_names_the_row_of_a_parquet_file: rows from zero
- enumerate(rows, 1)
+ enumerate(rows)

tier_hard_prefers_one_of_two_in_proportion_to_difficulty: not proportional
- / weight(row)
+ / weight(row) ** 2

tier_hard_prefers_one_of_two_in_proportion_to_difficulty: weights without the logarithm
- -math.log(uniform(row, purpose))
+ uniform(row, purpose)

tier_hard_has_every_tenth_answer_that_can_be_guessed: not thinned
- draw(thin(
+ draw(list(

tier_hard_thins_before_it_draws: thinned after the draw
- draw(thin(rated), "hard", difficulty)
+ thin(draw(rated, "hard", difficulty))

tier_easy_is_uniform_over_gsm8k_and_level_1_of_math: every level
- if str(row.get("level")) in ("Level 1", "1")
+ if True

tier_easy_is_uniform_over_gsm8k_and_level_1_of_math: level 10
- str(row.get("level")) in ("Level 1", "1")
+ str(row.get("level")).startswith(("Level 1", "1"))

tier_medium_has_the_easiest_problems_in_order: hardest first
- (difficulty(row), uniform
+ (-difficulty(row), uniform

tier_medium_does_not_prefer_the_first_of_equal_problems: ties in the order of the file
- , uniform(row, "medium"), row["problem"])
+ )

tiers_depend_only_on_the_problems: order of the rows
- sorted(binary, key=lambda row: uniform(row, "thin"))
+ binary

prompts_equal_the_chat_template: without the generation prompt
- tokenize=False, add_generation_prompt=True
+ tokenize=False, add_generation_prompt=False

limit_takes_the_first_rows: another limit
- [:limit]
+ [:6]

tokenizer_gets_at_most_1000_texts_at_once: all texts at once
- 256
+ 10**6
""")


def cases_of(test) -> list[dict]:
    """The arguments of each case of a test with at most one `parametrize`."""
    for mark in getattr(test, "pytestmark", []):
        parameters, table = mark.args
        if "," not in parameters:
            return [{parameters: value} for value in table]
        return [dict(zip(parameters.split(","), row, strict=True)) for row in table]
    return [{}]


def run_all_cases(test, fixtures: dict) -> None:
    for case in cases_of(test):
        test(**fixtures, **case)


@pytest.mark.parametrize("name,right,wrong", MUTANTS)
def test_named_mutant_fails_its_test(name, right, wrong, request, monkeypatch):
    sources = {module: Path(module.__file__).read_text() for module in (columns, prompts, data)}
    module = next((module for module in sources if right in sources[module]), None)
    assert module, "no file contains this code any longer"
    test = globals()[f"test_{name}"]
    parameters = set(inspect.signature(test).parameters) - set(cases_of(test)[0])
    fixtures = {name: request.getfixturevalue(name) for name in parameters}

    mutant = types.ModuleType("mutant")
    exec(compile(sources[module].replace(right, wrong), "mutant", "exec"), vars(mutant))
    if module is data:
        mutant.fetch = data.fetch  # the fixture `hub` has replaced it
    else:
        for name in ("to_row", "Template"):  # what data imports from it
            if name in vars(module):
                monkeypatch.setattr(data, name, getattr(mutant, name))
    monkeypatch.setitem(globals(), module.__name__.split(".")[1], mutant)
    with pytest.raises((AssertionError, UserError, pytest.fail.Exception)):
        run_all_cases(test, fixtures)
