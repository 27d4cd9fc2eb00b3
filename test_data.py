"""data.py: hand-written examples, laws, broken files, named mutants. Run: pytest test_data.py

No hub is needed: hub sets are small copies with the true columns, handed out in place of `data.fetch`.

PYTEST_DONT_REWRITE: mutants fail on purpose, and on some machines pytest would spend minutes on the difference of two lists of 5,000 rows.
"""

import codecs, datetime, decimal, inspect, itertools, json, math, random, subprocess, sys, time, types  # noqa: E401
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

import data, toy  # noqa: E401

settings.register_profile("repeatable", max_examples=60, deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")
HERE = Path(__file__).parent
SHARED = sorted((HERE.parent / "shared" / "data").glob("*.jsonl"))  # real data sets, where there are any
ROWS = [{"problem": f"{i}+1", "answer": str(i + 1)} for i in range(5)]


def lines(*rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write(folder, content: bytes, name: str = "some.jsonl") -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


# ---- one row ---------------------------------------------------------------------------------------------------------


def test_golds_by_hand():
    examples = [
        ("  72 ", "72"), (7, "7"), (-0.5, "-0.5"), (27.0, "27"), (0, "0"), (1e300, "1e+300"), (["8", " 1"], "8, 1"), (["x=2,3"], "x=2,3"), ("1,234", "1,234"),
        ("3 * 4 = <<3*4=12>>12\n#### 12", "12"), ("So much.\n#### 1,234,567", "1234567"), ("#### -5 ", "-5"), ("a\n#### 2,50\n", "2,50"),
        ("#### 5\nis not at the end", "#### 5\nis not at the end"), ("C #### 5", "C #### 5"),
    ]  # fmt: skip
    assert [data.gold(value) for value, _ in examples] == [text for _, text in examples]
    nothing = [None, "", " \n", True, False, math.nan, math.inf, -math.inf, [], [""], ["1", 2], {"a": 1}, b"1"]
    assert [data.gold(value) for value in nothing] == [""] * len(nothing)


COLUMNS = {  # columns of each hub set, with values of their kind: the problem, the answer
    "gsm8k": ({"question": "48+24?", "answer": "48+24 = <<48+24=72>>72\n#### 72"}, "48+24?", "72"),
    data.MATH: ({"problem": "P", "level": "Level 1", "solution": r"\boxed{1} no, $\boxed{\frac{1}{2}}$.", "type": "Algebra"}, "P", r"\frac{1}{2}"),
    data.DEEPMATH: ({"question": "Q", "final_answer": "Yes", "difficulty": 4.5, "topic": "T", **{f"r1_solution_{i}": "long" for i in (1, 2, 3)}}, "Q", "Yes"),
    "math500": ({"problem": "P", "solution": r"\boxed{8}", "answer": "7", "subject": "S", "level": 2, "unique_id": "u"}, "P", "7"),
    "minerva": ({"question": "Q", "answer": "2.5e-3"}, "Q", "2.5e-3"),
    "aime24": ({"id": 60, "problem": "P", "solution": r"\boxed{204}", "url": "u"}, "P", "204"),
    "aime25": ({"problem": "P", "answer": "70", "id": "0"}, "P", "70"),
    "amc23": ({"id": 0, "question": "Q", "answer": "27", "url": "u"}, "Q", "27"),
    "olympiadbench": ({"id": 1606, "question": "Q", "solution": [r"So \boxed{9}"], "final_answer": ["2", "$-3$"], "context": None, "image_1": None,
                       "is_multiple_answer": True, "unit": None}, "Q", "2, $-3$"),
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch):
    """A hub of the sets in COLUMNS, and of what a test adds: hub[NAME] = rows. hub.calls are the arguments of `fetch`."""
    import datasets

    sets = type("Hub", (dict,), {"calls": []})({data.BENCHMARKS.get(name, name).split("@")[0].split(":")[0]: [row] for name, (row, _, _) in COLUMNS.items()})

    def fetch(name, config, split):
        sets.calls.append((name, config, split))
        return datasets.Dataset.from_list(sets[name])

    monkeypatch.setattr(data, "fetch", fetch)
    return sets


@pytest.mark.parametrize("name", COLUMNS)
def test_the_columns_of_every_hub_set(hub, name):
    raw, problem, answer = COLUMNS[name]
    kept = {column: value for column, value in raw.items() if not column.startswith("r1_")}
    assert data.load_rows(name, "train") == [kept | {"problem": problem, "answer": answer}]


def test_names_configs_and_splits_reach_the_hub(hub):
    hub["me/my-set.v1"] = ROWS
    for spec, split in [("me/my-set.v1", "train"), ("me/my-set.v1@test[:9]", "train"), ("me/my-set.v1:a b", "test"), ("me/my-set.v1:all@dev", "test"),
                        ("gsm8k", "train"), ("gsm8k", "test"), ("olympiadbench", "test"), ("math500", "train")]:  # fmt: skip
        data.load_rows(spec, split)
    assert hub.calls == [
        ("me/my-set.v1", None, "train"), ("me/my-set.v1", None, "test[:9]"), ("me/my-set.v1", "a b", "test"), ("me/my-set.v1", "all", "dev"),
        ("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test"), ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"),
        ("HuggingFaceH4/MATH-500", None, "test"),
    ]  # fmt: skip
    for spec in ("nobody/nothing", "a/b/c", "math5000", "", "./x"):  # the first is asked for, and raises KeyError here
        with pytest.raises(
            data.UserError, match=f"^{spec}: (cannot read the data: KeyError|no such file; give FILE.jsonl, .*OWNER/NAME.*easy, medium, hard, math500)"
        ):
            data.load_rows(spec)


def test_fetch_is_the_real_library(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine", lines(*ROWS), "train.jsonl")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "fetch", lambda name, config, split, real=data.fetch: real("mine", config, split))  # a folder instead of a hub
    assert data.load_rows("nobody/mine") == ROWS and data.load_rows("nobody/mine@train[1:3]") == ROWS[1:3]
    with pytest.raises(data.UserError, match="nobody/mine@dev: cannot read the data: .*dev.*check .*SPLIT"):
        data.load_rows("nobody/mine@dev")


# ---- files -----------------------------------------------------------------------------------------------------------


def test_every_encoding_of_the_same_rows(tmp_path):
    rows = [{"problem": "π + 1\u2028?", "answer": "é", "n": {"x": [1, None]}}, {"problem": " 2 ", "answer": "2"}]
    plain = lines(*rows)
    for content in (plain, plain.rstrip(), plain.replace(b"\n", b"\r\n\r\n"), codecs.BOM_UTF8 + plain, b" \n\n" + plain, codecs.BOM_UTF8 + b"\n" + plain,
                    "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()):  # fmt: skip
        assert data.load_rows(write(tmp_path, content)) == rows
    aliases = [
        {"Question": "1+1", "Final_Answer": 2},
        {"problem": 7, "question": "1+2", "answer": None, "expected_answer": "3"},
        {"PROBLEM": "1", "answer": "a", "Answer": "b"},
    ]
    loaded = data.load_rows(write(tmp_path, lines(*aliases), "no_ending"))
    assert [(row["problem"], row["answer"]) for row in loaded] == [("1+1", "2"), ("1+2", "3"), ("1", "a")] and loaded[0].items() > aliases[0].items()


GOOD = lines({"problem": "1+1", "answer": 2})
BROKEN = {  # content after one good line; what the message must say, all of it about line 2
    b'{"problem": "1+2"}': "answer None", b'{"problem": "1+2", "answer": NaN}': "answer finite nan", b'{"problem": "1+2", "answer": 1e999}': "finite inf",
    b'{"problem": "1+2", "answer": true}': "answer True", b'{"problem": "1+2", "answer": " "}': "answer ' '", b'{"problem": "1+2", "answer": [1]}': "answer [1]",
    b'{"problem": "1+2", "solution": "so \\\\boxed{3"}': "solution boxed{}", b'{"answer": "2"}': "problem question None ['answer']",
    b'{"problem": ["1+2"], "answer": "3"}': "problem ['1+2']", b'{"problem": "\\n", "answer": "3"}': "problem non-empty", b'["1+2", "3"]': "JSON object ['1+2', '3']",
    b"null": "JSON object None", b"{'problem': 1}": "JSON object column 2", b'{"problem": "1+2", "answer"': "JSON object column", b"\x00": "JSON object",
    b'{"problem": "1\t2", "answer": "3"}': "control character", b'{"problem": "1+\xff", "answer": "3"}': "UTF-8 0xff save", codecs.BOM_UTF16 + b"{\x00": "UTF-8",
    b'{"problem": "1+2", "answer": "3", "x": "\\ud800"}': "surrogate '\\ud800' remove", b'{"problem": "\\udc00\\ud800", "answer": "3"}': "surrogate '\\udc00'",
    b'{"problem": "1+2", "answer": "3", "\\ud800": 1}': "surrogate", b'{"problem": "1+2", "answer": ' + b"9" * 5000 + b"}": "JSON object digits",
    b'{"problem": "1+2", "answer": "3", "x": ' + b"[" * 99999: "recursion", b'{"problem": "1+2", "answer": "3", "x": ' + b"[" * 99 + b"]" * 99 + b"}": "nested flatten",
    b'{"problem": "1+1 ", "answer": "3"}': "some.jsonl:1 again '3' '2' remove",
}  # fmt: skip


@pytest.mark.parametrize("line", BROKEN, ids=lambda line: line[:40])
def test_a_broken_line_is_named(tmp_path, line):
    path = write(tmp_path, GOOD + line + b"\n" + lines(*ROWS[2:]))
    with pytest.raises(data.UserError) as caught:
        data.load_rows(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ") and [word for word in BROKEN[line].split() if word not in message] == [] and len(message) < len(path) + 400


def test_files_that_are_none(tmp_path):
    for path, words in {write(tmp_path, b""): "holds no problems", write(tmp_path, b" \r\n\n", "blank.jsonl"): "holds no problems", str(tmp_path): "directory",
                        f"{tmp_path}/none.jsonl": "No such file", f"{tmp_path}/none": "no such file", f"{tmp_path}/x\0.jsonl": "cannot read"}.items():  # fmt: skip
        with pytest.raises(data.UserError) as caught:
            data.load_rows(path)
        assert str(caught.value).startswith(path) and words in str(caught.value)


def test_parquet(tmp_path):
    import pyarrow as arrow
    from pyarrow import parquet

    path, when = f"{tmp_path}/some.parquet", datetime.datetime(2025, 8, 11)
    rows = [{"question": f"{i}+1", "answer": float(i + 1), "n": i, "when": when, "cost": decimal.Decimal("1.50"), "image": {"bytes": b"\xff", "path": "p"}, "raw": b"\0",
             "r1_solution_1": "long", "tags": ["a", None], "nothing": None} for i in range(5)]  # fmt: skip
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    expected = [
        row | {"n": i, "when": str(when), "cost": "1.50", "tags": ["a", None], "nothing": None, "question": row["problem"]} for i, row in enumerate(ROWS)
    ]
    assert data.load_rows(path) == expected and json.loads(json.dumps(expected)) == expected
    for change, words in {"answer": 'some.parquet, row 4: needs "answer".*nan', "question": "some.parquet, row 4: needs \"problem\".*''"}.items():
        bad = [row | ({change: math.nan if change == "answer" else ""} if i == 3 else {}) for i, row in enumerate(rows)]
        parquet.write_table(arrow.Table.from_pylist(bad), path)
        with pytest.raises(data.UserError, match=words):
            data.load_rows(path)
    whole = Path(path).read_bytes()
    for content in (whole[:-9], whole[: len(whole) // 2], b"", b"PAR1" * 5, GOOD):
        with pytest.raises(data.UserError, match="some.parquet: cannot read the data"):
            data.load_rows(write(tmp_path, content, "some.parquet"))
    (tmp_path / "folder.parquet").mkdir()
    for name in ("none", "folder"):
        with pytest.raises(data.UserError, match=f"/{name}.parquet: cannot read the data"):
            data.load_rows(f"{tmp_path}/{name}.parquet")


def test_duplicates_are_counted(tmp_path, hub):
    path, counts = write(tmp_path, lines(*ROWS, ROWS[1], {"problem": " 0+1", "answer": 1.0}, ROWS[1])), Counter()
    assert data.load_rows(path, counts=counts) == ROWS and counts == {"repeated": 3} and data.load_rows(path) == ROWS
    hub["me/mine"] = [
        *ROWS,
        ROWS[0],
        ROWS[1] | {"answer": "x"},
        ROWS[1],
        ROWS[1] | {"answer": "y"},
        {"problem": "", "answer": "1"},
        {"problem": "P", "answer": None},
    ]
    counts.clear()
    assert data.load_rows("me/mine", counts=counts) == [ROWS[0], *ROWS[2:]]  # a set of the hub's cannot be mended: what is doubtful is left out
    assert counts == {"repeated": 2, "with contradicting answers": 3, "without a usable problem and answer": 2} and sum(counts.values()) + 4 == len(
        hub["me/mine"]
    )
    hub["me/mine"] = [{"text": "1+1", "label": "2"}]
    with pytest.raises(data.UserError, match="me/mine: holds no problems.*row 1: needs \"problem\".*'text'"):
        data.load_rows("me/mine")


def test_files_do_not_wait_for_libraries(tmp_path):
    code = "import sys, data; data.load_rows(sys.argv[1]); print(sorted({'datasets', 'pyarrow', 'torch', 'transformers', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code, write(tmp_path, GOOD)], cwd=HERE, capture_output=True, text=True).stdout == "[]\n"
    many = write(tmp_path, lines(*({"problem": f"{i} eggs " * 20, "answer": str(i)} for i in range(7473))))
    began = time.process_time()
    assert len(data.load_rows(many)) == 7473 and time.process_time() - began < 1


# ---- 300 broken files ------------------------------------------------------------------------------------------------

SCRAPS = [b"\xff", b"\x00", b"\xed\xa0\x80", b"\\ud800", b"\\udfff", b"\n", b"\r\n", b"\r", b"\t", b'"', b"\\", b"{", b"}", b"[" * 3000, b"]", b",", b"null", b"NaN",
          b"-Infinity", b"1e999", b"9" * 5000, codecs.BOM_UTF8, codecs.BOM_UTF16, "\u2028\x85".encode(), b"\x1b[31m", b"true", b"#### ", b"\\boxed{", b'"answer": []']  # fmt: skip
VALUES = [None, True, 0, -1.5, 10**400, math.nan, math.inf, "", " ", "\0", "x" * 20000, "\ud800", "#### 1,0", [], ["1"], ["1", None], {}, {"a": {"b": []}},
          json.loads("[" * 80 + "]" * 80)]  # fmt: skip


def mutate(rng: random.Random, rows: list[dict]) -> bytes:
    """One to three accidents that happen to files."""
    rows = [dict(row) for row in rows]
    kinds = rng.choices("field drop rename repeat contradict flip scrap cut swap crlf bom again".split(), k=rng.randint(1, 3))
    for kind in kinds:
        row = rng.choice(rows)
        key = rng.choice(list(row) or ["answer"])
        if kind == "field":
            row[key] = rng.choice(VALUES)
        elif kind == "drop":
            row.pop(key, None)
        elif kind == "rename":
            row[rng.choice(["Problem", "question", "Answer", "final_answer", "solution", "", "x"])] = row.pop(key, None)
        elif kind in ("repeat", "contradict"):
            rows.insert(rng.randrange(len(rows)), row | ({"answer": "other"} if kind == "contradict" else {}))
    content = bytearray(lines(*rows))
    for kind in kinds:
        at = rng.randrange(len(content) or 1)
        if kind == "flip":
            for _ in range(rng.choice([1, 1, 1, 20])):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif kind == "scrap":
            content[at:at] = rng.choice(SCRAPS)
        elif kind == "cut":
            del content[at : rng.choice([len(content), at + 9])]
        elif kind == "swap":
            other = rng.randrange(len(content) or 1)
            content[at : at + 30], content[other : other + 30] = content[other : other + 30], content[at : at + 30]
        elif kind == "crlf":
            content = content.replace(b"\n", b"\r\n")
        elif kind == "bom":
            content[:0] = rng.choice([codecs.BOM_UTF8, codecs.BOM_UTF16_LE])
        elif kind == "again":
            content += content[at:]
        content = content or bytearray(b"\n")
    return bytes(content)


def test_300_broken_files_load_or_say_why(tmp_path):
    began, outcomes, reasons, real = time.process_time(), Counter(), Counter(), [json.loads(line) for path in SHARED for line in path.open().readlines()[:9]]
    for seed in range(300):
        rng = random.Random(seed)
        path = write(tmp_path, mutate(rng, rng.sample(real or ROWS, 5)), f"{seed}.jsonl")
        try:
            rows = data.load_rows(path)
        except data.UserError as error:
            place = str(error)[len(path) :]
            number = int(place[1:].split(":")[0]) if place[:2] != ": " else 0
            assert str(error).startswith(path) and place.split(": ")[1] and number <= Path(path).read_bytes().count(b"\n") + 1, error
            assert number or "holds no problems" in place, error
            json.dumps(str(error), ensure_ascii=False).encode()  # can be printed
            reasons[place.split(": ")[1][:12]] += 1
            outcomes["error"] += 1
        else:
            assert rows and all(isinstance(row[key], str) and row[key].strip() for row in rows for key in ("problem", "answer"))
            assert len({row["problem"] for row in rows}) == len(rows) and "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
            outcomes["loaded"] += 1
    assert min(outcomes["loaded"], outcomes["error"]) > 60 and len(reasons) >= 6, (outcomes, reasons)  # the accidents are of many kinds
    assert time.process_time() - began < 20


# ---- the paper's training sets ---------------------------------------------------------------------------------------


def deep(size: int, answer=lambda i: str(i), difficulty=lambda i: 1 + i % 17 / 2) -> list[dict]:
    return [{"problem": f"problem {i}", "answer": answer(i), "difficulty": difficulty(i)} for i in range(size)]


def names(rows) -> set[str]:
    return {row["problem"] for row in rows}


def test_tier_easy():
    gsm8k, levels = [{"problem": f"g{i}", "answer": "1"} for i in range(7473)], ["Level 1", "Level 2", "Level 10", "Level ?", 1, 2, None]
    maths = [{"problem": f"m{i}", "answer": "1", "level": levels[i % 7]} for i in range(7 * 300)]
    rows = data.tier_easy(gsm8k, maths)
    assert len(rows) == len(names(rows)) == 5000 and {row.get("level") for row in rows} == {None, "Level 1", 1}
    share = sum("level" in row for row in rows) / 5000
    assert share == pytest.approx(600 / 8073, abs=0.015)  # 4 standard deviations
    assert len(data.tier_easy(gsm8k[:9], maths[:7])) == 11 and data.tier_easy([], []) == []


def test_tier_medium():
    rows = deep(6000)
    chosen = data.tier_medium(rows)
    values = [row["difficulty"] for row in chosen]
    assert len(chosen) == 5000 and values == sorted(row["difficulty"] for row in rows)[:5000]  # 1 to 8; of those at the limit, some
    invalid = [row | {"problem": f"bad {value!r}", "difficulty": value} for row, value in zip(rows, [None, 0, -1, math.nan, math.inf, "3", True, 10**400])]
    assert data.tier_medium(rows + invalid + [{"problem": "none", "answer": "1"}]) == chosen
    assert data.tier_hard(invalid) == [] and len(data.tier_medium(rows[:7])) == 7
    assert sorted(names(data.tier_medium(deep(5100, difficulty=lambda i: 2)))) != sorted(names(deep(5000)))  # ties: not the first ones of the file


def test_tier_hard_draws_in_proportion_to_difficulty():
    # By hand: of problems with difficulties 1 and 3, three quarters of the first draws are the harder one; of 1, 2 and 5, the orders have these shares.
    first = Counter(data.tier_hard([dict(problem=f"{i}{d}", answer="7", difficulty=d) for d in (1, 3.0)])[0]["difficulty"] for i in range(4000))
    assert first[3] / 4000 == pytest.approx(0.75, abs=0.025)
    orders = Counter(
        tuple(row["difficulty"] for row in data.tier_hard([dict(problem=f"{i} {d}", answer="7", difficulty=d) for d in (1, 2, 5)])) for i in range(4000)
    )
    for order in itertools.permutations((1, 2, 5)):
        assert orders[order] / 4000 == pytest.approx(order[0] / 8 * order[1] / (8 - order[0]), abs=0.025), order
    # Many, without replacement: of weight w a share 1 - e^-wt is drawn. 2 - e^-3t - e^-9t = 1/2 has t = .0498, so that 3612 of the 5000 have weight 9.
    chosen = data.tier_hard(deep(20000, difficulty=lambda i: 9 if i % 2 else 3))
    assert len(chosen) == len(names(chosen)) == 5000 and Counter(row["difficulty"] for row in chosen)[9] == pytest.approx(3612, abs=90)


def test_answers_that_guessing_solves_are_thinned():
    golds = ["Yes", "no", "TRUE", "False.", " yes "]
    rows = deep(1000, answer=lambda i: golds[i % 5] if i % 2 else "None")
    chosen = data.tier_hard(rows)
    assert Counter(row["answer"] == "None" for row in chosen) == {True: 500, False: 50}
    assert (
        len({row["answer"] for row in chosen}) == 6 and max(Counter(row["answer"] for row in chosen if row["answer"] != "None").values()) <= 20
    )  # no kind is spared
    assert len(data.tier_hard(deep(5600, answer=lambda i: "Yes" if i < 600 else "5"))) == 5000  # thinned before the draw


@given(st.lists(st.integers(0, 10**6), unique=True, max_size=40), st.randoms(use_true_random=False))
def test_tiers_depend_on_the_problems_alone(numbers, rng):
    rows = [{"problem": str(i), "answer": ["Yes", "1"][i % 2], "difficulty": 1 + i % 9, "level": f"Level {1 + i % 3}"} for i in numbers]
    state = random.getstate()
    for tier in (data.tier_medium, data.tier_hard, lambda rows: data.tier_easy([], rows), lambda rows: data.tier_easy(rows[::2], rows[1::2])[:0]):
        before = tier(rows)
        assert tier(rng.sample(rows, len(rows))) == before and names(before) <= names(rows) and all(row in rows for row in before)
    assert random.getstate() == state


def test_tiers_by_name(hub):
    hub["openai/gsm8k"] = [{"question": f"g{i}", "answer": f"so\n#### {i}"} for i in range(30)]
    maths = [{"problem": f"m{i}", "solution": f"$\\boxed{{{i}}}$" if i else "$\\boxed 0$", "level": f"Level {1 + i % 5}", "type": "T"} for i in range(30)]
    hub[data.MATH], counts = maths, Counter()
    hub[data.DEEPMATH] = [{"question": f"d{i}", "final_answer": f"{i}", "difficulty": 1.0 + i, "r1_solution_1": "long"} for i in range(20)]
    easy, medium, hard = (data.load_rows(tier, split="test", counts=counts) for tier in ("easy", "medium", "hard"))
    assert names(easy) == {f"g{i}" for i in range(30)} | {f"m{i}" for i in range(5, 30, 5)} and counts == {"without a usable problem and answer": 1}
    assert [row["problem"] for row in medium] == [f"d{i}" for i in range(20)] and names(hard) == names(medium) and hard != medium
    assert {split for _, _, split in hub.calls} == {"train"} and not any("r1_solution_1" in row for row in hard)
    assert (medium[3]["answer"], medium[3]["difficulty"], easy[0]["answer"].isdigit()) == ("3", 4.0, True)


def test_real_data():
    began, sets = time.process_time(), {path.stem: data.load_rows(str(path)) for path in SHARED}
    sizes = dict(aime24=30, aime25=15, amc23=40, deepmath_5k=4990, gsm8k_test=1319, gsm8k_train=7473, math500=500)  # of DeepMath's 4,994, four repeat others
    assert {name: len(rows) for name, rows in sets.items() if name in sizes}.items() <= sizes.items() and time.process_time() - began < 3
    if rows := sets.get("deepmath_5k"):
        hard, mean = data.tier_hard(rows), lambda rows: sum(row["difficulty"] for row in rows) / len(rows)
        assert len(data.tier_medium(rows)) == 4990 and len(hard) == 4198  # of 880 that say yes or no, 88 stay
        assert mean(hard[:1000]) > mean(hard) + 0.1 > mean(hard[-1000:]) + 0.3
    if rows := sets.get("gsm8k_train"):
        assert len(names(data.tier_easy(rows, []))) == 5000


# ---- prompts ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return toy.make_tokenizer()


def test_prompts_are_the_chat_template_applied(tmp_path, tokenizer):
    rows = [{"problem": "+".join("1" * (1 + i % 9)) + f"+{i}", "answer": str(i)} for i in range(600)]  # more than are tokenised at once
    path, counts = write(tmp_path, lines(*rows, rows[0])), Counter()
    for system in ("", "7"):
        problems, left_out = data.load_problems(path, tokenizer, system, 16, counts=counts)
        chats = [[{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": row["problem"]}] for row in rows]
        ids = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
        short = [(row, prompt) for row, prompt in zip(rows, ids) if len(prompt) <= 16]
        assert [(problem.row, problem.prompt_ids) for problem in problems] == short and left_out == 600 - len(short) > 0
    assert counts == {"repeated": 2}
    problems, left_out = data.load_problems(path, tokenizer, "", 16, 5)
    assert [problem.row for problem in problems] == rows[:5] and left_out == 0
    with pytest.raises(data.UserError, match="some.jsonl: every prompt is longer than --max-prompt-tokens 2"):
        data.load_problems(path, tokenizer, "", 2)


def test_memory_of_the_tokenizer_is_bounded(tmp_path):
    sizes = []

    class Tokenizer:
        def apply_chat_template(self, chat, tokenize, add_generation_prompt):
            return chat[-1]["content"]

        def __call__(self, texts, add_special_tokens):
            sizes.append(len(texts))
            return {"input_ids": [[1]] * len(texts)}

    problems, _ = data.load_problems(write(tmp_path, lines(*deep(3000))), Tokenizer(), "", 9)
    assert len(problems) == sum(sizes) == 3000 and max(sizes) <= 1000


def test_a_chat_template_that_fails_is_named(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path, lines(ROWS[0]) + b"\n" + lines(*ROWS[1:]))
    for template, words in {"{{ raise_exception('no system here') }}": r"some.jsonl:1: TemplateError: no system here; .*--system-prompt \"\"",
                            "{% if messages[-1].content == '1+1' %}{{ 1 / 0 }}{% endif %}x": "some.jsonl:3: ZeroDivisionError",
                            "{% for x in %}": "some.jsonl:1: TemplateSyntaxError"}.items():  # fmt: skip
        monkeypatch.setattr(tokenizer, "chat_template", template)
        with pytest.raises(data.UserError, match=f"--model: its chat template fails on {tmp_path}/{words}"):
            data.load_problems(path, tokenizer, "", 16)


# ---- tests of the tests ----------------------------------------------------------------------------------------------

MUTANTS = {  # mistake: the test that notices it, a part of data.py, and what it becomes
    "true is a number": ("golds_by_hand", "isinstance(value, bool) or not", "not"),
    "thousands commas stay": ("golds_by_hand", r'r"(?<=\d),(?=\d{3})"', 'r"^,"'),
    "any decimal comma goes": ("golds_by_hand", r"(?=\d{3})", r"(?=\d)"),
    "#### anywhere": ("golds_by_hand", r"(\S.*)\Z", r"(\S.*)"),
    "a NaN is an answer": ("golds_by_hand", "not math.isfinite(value)", "False"),
    "blank lines are not counted": ("a_broken_line_is_named", "enumerate(file, 1)", "enumerate(file)"),
    "surrogates pass": ("a_broken_line_is_named", "except UnicodeEncodeError as error:", "except UnicodeEncodeError as error:\n        return raw"),
    "byte order mark": ("every_encoding_of_the_same_rows", "utf-8-sig", "utf-8"),
    "first column, usable or not": ("every_encoding_of_the_same_rows", "for text in problems if", "for text in problems[:1] if"),
    "the last duplicate": ("duplicates_are_counted", "first.setdefault(key, (place, row))", "first.pop(key, (place, row)); first[key] = place, row"),
    "contradictions stay": ("duplicates_are_counted", "if key not in disputed]", "]"),
    "spaces make problems": ("duplicates_are_counted", 'row["problem"].strip()', 'row["problem"]'),
    "images travel along": ("parquet", '"binary" not in str(field.type) and', ""),
    "rows from zero": ("parquet", "enumerate(rows, 1):\n        yield", "enumerate(rows):\n        yield"),
    "not proportional": ("tier_hard_draws_in_proportion_to_difficulty", "/ weight(row)", "/ weight(row) ** 2"),
    "weights without the logarithm": ("tier_hard_draws_in_proportion_to_difficulty", "-math.log(chance(row, purpose))", "chance(row, purpose)"),
    "not thinned": ("answers_that_guessing_solves_are_thinned", "draw(thin(", "draw(list("),
    "thinned after the draw": ("answers_that_guessing_solves_are_thinned", 'draw(thin(list(filter(difficulty, deepmath))), "hard", difficulty)',
                               'thin(draw(list(filter(difficulty, deepmath)), "hard", difficulty))'),
    "every level": ("tier_easy", 'if str(row.get("level")) in ("Level 1", "1")', ""),
    "level 10": ("tier_easy", 'str(row.get("level")) in ("Level 1", "1")', 'str(row.get("level")).startswith(("Level 1", "1"))'),
    "hardest first": ("tier_medium", "(difficulty(row), chance", "(-difficulty(row), chance"),
    "ties in the order of the file": ("tier_medium", ', chance(row, "medium"), row["problem"])', ")"),
    "order of the rows": ("tiers_depend_on_the_problems_alone", 'sorted(binary, key=lambda row: chance(row, "thin"))', "binary"),
    "template without system": ("prompts_are_the_chat_template_applied", "tokenize=False, add_generation_prompt=True", "tokenize=False, add_generation_prompt=False"),
    "limit after": ("prompts_are_the_chat_template_applied", "[:limit]", "[:6]"),
    "at once": ("memory_of_the_tokenizer_is_bounded", "256", "10**6"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MUTANTS)
def test_named_mutants(mistake, request, monkeypatch):
    name, right, wrong = MUTANTS[mistake]
    source, test = Path(data.__file__).read_text(), globals()[f"test_{name}"]
    assert right in source, f"the line of the mutant {mistake!r} has changed"
    fixtures = {key: request.getfixturevalue(key) for key in inspect.signature(test).parameters if key != "line"}
    mutant = types.ModuleType("mutant")
    exec(compile(source.replace(right, wrong), "mutant", "exec"), vars(mutant))
    mutant.fetch = data.fetch
    monkeypatch.setitem(globals(), "data", mutant)
    with pytest.raises((AssertionError, mutant.UserError, pytest.fail.Exception)):
        for case in [{"line": line} for line in BROKEN] if name == "a_broken_line_is_named" else [{}]:
            test(**fixtures, **case)
