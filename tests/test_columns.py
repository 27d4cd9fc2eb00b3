r"""support/columns.py: rows as verl, TRL, OpenRLHF and open-instruct publish them, by hand."""

import json
from collections import Counter
from pathlib import Path

import pytest

from support import columns, data
from support.columns import Columns
from support.errors import UserError
from tests.test_data import HUB_ROWS, REAL_SETS, hub, lines, missing_words, write, write_parquet

__all__ = ["hub"]  # a fixture


def user(text) -> dict:
    return {"role": "user", "content": text}


def system(text) -> dict:
    return {"role": "system", "content": text}


def assistant(text) -> dict:
    return {"role": "assistant", "content": text}


def verl(prompt, truth, **others) -> dict:
    """A row with the columns of verl."""
    return {
        "data_source": "openai/gsm8k",
        "prompt": prompt,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"split": "train", "index": 0, "answer": "x", "question": "y"},
    } | others


# ---- the formats ---------------------------------------------------------------------------------

TURNS = [user("1+1?"), assistant("2"), user("and 2+2?")]
TEXTS = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?", "image": None}]
FORMATS = {  # name: row, chat, answer
    "verl": (verl([user("1+1?")], "2"), [user("1+1?")], "2"),
    "verl, own system message": (
        verl([system("S"), user("1+1?")], ["2"]),
        [system("S"), user("1+1?")],
        "2",
    ),
    "verl, own columns of our names": (
        verl([user("1+1?")], "2", problem="sums", answer="a long text", question="no. 7"),
        [user("1+1?")],
        "2",
    ),
    "TRL": ({"prompt": [user("1+1?")], "solution": r"$\frac{4}{2}$"}, None, r"\frac{4}{2}"),
    "TRL, text": ({"prompt": "1+1?", "solution": "2"}, None, "2"),
    "TRL, prompt and completion": (
        {"prompt": [user("1+1?")], "completion": [assistant(r"It is \boxed{2}.")]},
        None,
        "2",
    ),
    "TRL, prompt and completion as texts": ({"prompt": "1+1?", "completion": "2"}, None, "2"),
    "OpenRLHF": ({"input": "1+1?", "label": "2"}, None, "2"),
    "OpenRLHF, number": ({"input": "1+1?", "label": 2.0}, None, "2"),
    "OpenRLHF, messages": ({"input": TURNS, "label": "4"}, TURNS, "4"),
    "open-instruct": (
        {"messages": [user("1+1?")], "ground_truth": "2", "dataset": "gsm8k"},
        None,
        "2",
    ),
    "open-instruct, lists": (
        {"messages": [user("1+1?")], "ground_truth": ["2"], "dataset": ["math"]},
        None,
        "2",
    ),
    "open-instruct, with a text of the prompt": (
        {"messages": TURNS, "prompt": "user: 1+1?", "ground_truth": "4", "dataset": "math"},
        TURNS,
        "4",
    ),
    "worked solution as the last message": (
        {"messages": [user("1+1?"), assistant(r"One and one: $\boxed{2}$.")]},
        [user("1+1?")],
        "2",
    ),
    "the last message is not asked, a column has the answer": (
        {"messages": [*TURNS, assistant("4, I think")], "ground_truth": "4"},
        TURNS,
        "4",
    ),
    "parts": ({"prompt": [user(TEXTS)], "answer": "2"}, [user("1+1?")], "2"),
    "null fields of Parquet": (
        {"prompt": [user("1+1?") | {"tool_calls": None}], "answer": "2"},
        [user("1+1?")],
        "2",
    ),
    "JSON texts": (
        verl(json.dumps([user("1+1?")]), "", reward_model=json.dumps({"ground_truth": "2"})),
        None,
        "2",
    ),
    "ROLL": ({"prompt": "x", "messages": json.dumps(TURNS), "ground_truth": "4"}, TURNS, "4"),
    "Skywork": (verl([user("1+1?")], json.dumps([r"\frac{4}{2}"])), None, r"\frac{4}{2}"),
    "a text that is JSON, but no messages": (
        {"prompt": '[{"role": "x"}]', "answer": "1"},
        [user('[{"role": "x"}]')],
        "1",
    ),
    "no instruction": ({"instruction": "", "input": "1+1?", "label": "2"}, None, "2"),
    "capitals inside": ({"Prompt": "1+1?", "Reward_Model": {"Ground_Truth": 2}}, None, "2"),
    "ours wins": ({"problem": "1+1?", "prompt": "x", "answer": "2", "label": "3"}, None, "2"),
}


def check_row(placed, raw: dict, chat: list, answer: str) -> None:
    assert placed.chat == (chat or [user("1+1?")])
    question = placed.chat[-1]["content"]
    assert placed.row == raw | {"problem": question, "answer": answer}


@pytest.mark.parametrize("name", FORMATS)
def test_row_of_another_framework_needs_no_flag(name):
    raw, chat, answer = FORMATS[name]
    check_row(columns.to_row(raw, "here"), raw, chat, answer)


@pytest.mark.parametrize("name", FORMATS)
def test_row_is_the_same_from_a_file_of_each_kind(name, tmp_path):
    raw, _, answer = FORMATS[name]
    expected = data.load_rows(write(tmp_path, lines(raw)))
    (row,) = data.load_rows(write_parquet(tmp_path, [raw]))
    assert [row["answer"], row["problem"]] == [answer, expected[0]["problem"]]
    assert row.keys() == expected[0].keys() >= raw.keys()


def test_unused_columns_reach_the_reward_unchanged():
    raw = verl([user("1+1?")], "2", answer="a text", label=7)
    row = columns.to_row(raw, "here").row
    assert row["answer"] == "2"  # from reward_model, in place of the file's own column
    assert row.keys() - raw.keys() == {"problem"}
    for name in raw.keys() - {"answer"}:
        assert row[name] is raw[name]


@pytest.mark.parametrize("name", HUB_ROWS)
def test_row_of_a_known_set_is_read_in_the_same_way_again(name, hub):
    """tier_rows reads rows that load_rows has read before."""
    (row,) = data.load_rows(name)
    assert columns.to_row(row, "here").row == row


# ---- columns that flags name ---------------------------------------------------------------------

NAMED = [  # row, --problem-column, --answer-column, problem, answer
    ({"q": "1+1?", "a": "2"}, "q", "a", "1+1?", "2"),
    (verl([user("1+1?")], "2"), "", "reward_model.ground_truth", "1+1?", "2"),
    (verl([user("1+1?")], "2"), "extra_info.question", "", "y", "2"),
    ({"x": {"y": {"z": [user("1+1?")]}}, "x.a": 2}, "x.y.z", "x.a", "1+1?", "2"),
    (
        {"problem": "no. 7", "text": "1+1?", "answer": "x", "s": r"\boxed{2}"},
        "text",
        "s",
        "1+1?",
        "2",
    ),
    ({"A.q": {"x.y": "1+1?"}, "A": {"b.c": {"D": 2}}}, "A.q.x.y", "A.b.c.D", "1+1?", "2"),
    ({"q": "1+1?", "solution": r"\boxed{1} no, \boxed{2}"}, "q", "solution", "1+1?", "2"),
    (
        {"q": "1+1?", "essay": "First. Then second.\nEnd"},
        "q",
        "essay",
        "1+1?",
        "First. Then second.\nEnd",
    ),
]


@pytest.mark.parametrize("raw,problem_column,answer_column,problem,answer", NAMED)
def test_named_column_counts(raw, problem_column, answer_column, problem, answer, tmp_path):
    named = Columns(problem_column, answer_column)
    path = write(tmp_path, lines(raw))
    assert data.load_rows(path, columns=named) == [raw | {"problem": problem, "answer": answer}]
    (row,) = data.load_rows(write_parquet(tmp_path, [raw]), columns=named)
    assert [row["problem"], row["answer"]] == [problem, answer]


WRONG_COLUMNS = [  # --problem-column, --answer-column, words of the message
    ("q", "", "--problem-column q: no such column; this row has"),
    ("", "reward_model.truth", "--answer-column reward_model.truth: no such column; this row has"),
    ("", "reward_model", "--answer-column reward_model: needs a non-empty string {'ground_truth'"),
    ("", "ability.x", "--answer-column ability.x: no such column"),
    ("extra_info.index", "", "--problem-column extra_info.index: needs found 0"),
]


@pytest.mark.parametrize("problem_column,answer_column,words", WRONG_COLUMNS)
def test_error_names_a_wrong_column_and_those_of_the_row(problem_column, answer_column, words):
    with pytest.raises(UserError) as error:
        columns.to_row(
            verl([user("1+1?")], "2"), "some.jsonl:3", Columns(problem_column, answer_column)
        )
    message = str(error.value)
    assert message.startswith("some.jsonl:3: --")
    assert missing_words(words, message) == []
    if "no such" in words:
        assert missing_words("'data_source' 'prompt' 'reward_model.ground_truth'", message) == []


def test_named_columns_do_not_concern_the_sets_that_are_known(hub):
    assert data.load_rows("aime25", columns=Columns("q", "a"))[0]["answer"] == "70"


def test_named_column_that_is_in_no_row_of_a_hub_set(hub):
    hub["me/mine"] = [{"problem": "1+1", "answer": "2"}]
    with pytest.raises(UserError, match="me/mine: holds no problems.*--answer-column a: no such"):
        data.load_rows("me/mine", columns=Columns("", "a"))


# ---- prompts that cannot be used -----------------------------------------------------------------

IMAGE = {"type": "image_url", "image_url": {"url": "data:..."}}
BAD_PROMPTS = [  # value of "prompt", words of the message
    ([user([{"type": "text", "text": "see"}, IMAGE])], "prompt no text image_url only text remove"),
    ([user([{"type": "image"}])], "no text 'image'"),
    ("<image>Find x.", "prompt has an image (<image>) only text remove"),
    ([user("As <image 2> and <image2> show")], "(<image2>)"),
    ([user(7)], "no text: 7;"),
    ([user({"text": 1})], "no text"),
    ([{"role": "user"}], '"role" "content"'),
    ([{"from": "human", "value": "1+1?"}], '"role" "content" \'human\''),
    ([{"role": 1, "content": "x"}], '"role"'),
    ([user("1+1?"), {"role": "gpt", "content": "2"}], '"gpt" known "user" rename "assistant"'),
    ([{"role": "Assistant", "content": "2"}, user("1+1?")], '"Assistant" known "assistant"'),
    ([system("S")], "no user message"),
    ([assistant("2")], "no user message"),
    ([user("1+1?"), user(" ")], "no user message, or an empty one"),
    ([], '"problem" "prompt" [] --problem-column'),
    (["1+1?"], "\"problem\" ['1+1?']"),
    ({"role": "user"}, '"problem"'),
    (None, '"problem" None'),
]
# "input" is not the whole problem where there is an "instruction".
NO_PROBLEM = {"instruction": "Add.", "input": "1, 1", "label": "2"}


def test_error_if_the_problem_is_in_two_columns():
    with pytest.raises(UserError, match="needs \"problem\".*'instruction'.*--problem-column"):
        columns.to_row(NO_PROBLEM, "here")
    named = Columns("instruction")
    assert columns.to_row(NO_PROBLEM, "here", named).row["problem"] == "Add."


@pytest.mark.parametrize("prompt,words", BAD_PROMPTS)
def test_error_names_the_place_of_an_unusable_prompt(prompt, words, tmp_path):
    path = write(tmp_path, lines({"prompt": prompt, "answer": "2"}))
    with pytest.raises(UserError) as error:
        data.load_rows(path)
    message = str(error.value)
    assert message.startswith(f"{path}:1: ")
    assert missing_words(words, message) == []


MMLU = {"question": "What is 1+1?", "choices": ["1", "2"], "answer": 1}


@pytest.mark.parametrize(
    "name,part",
    [("Body", "There are 3."), ("context", "In 1900, 3."), ("options", "a ) 1 , b ) 2")],
)
def test_error_if_the_problem_does_not_show_its_other_part(name, part):
    """SVAMP: the model was asked the question without the text that it is about."""
    row = {"question": "How many?", "answer": 8, name: part}
    with pytest.raises(UserError, match=f"place: the problem does not show its {name.lower()}"):
        columns.to_row(row, "place")
    for whole in (row | {"question": f"{part} How many?"}, row | {name: ""}, row | {name: 3}):
        assert columns.to_row(whole, "place").row["answer"] == "8"


def test_error_if_the_problem_does_not_show_its_options():
    """MMLU: the model was asked without the choices."""
    for row in (MMLU, MMLU | {"choices": {"text": ["one", "2"]}}):
        with pytest.raises(UserError, match="place: the problem does not show its choices"):
            columns.to_row(row | {"question": "What is it?"}, "place")
    for changes in ({}, {"choices": []}, {"choices": None}, {"choices": [3, 4]}):
        assert columns.to_row(MMLU | changes, "place").row["answer"] == "1"
    row = {"question": "What?", "options": ["a", "b"], "answer": "a"}
    assert columns.to_row(row, "place", Columns("question", "")).row["answer"] == "a"


def test_error_names_a_column_of_images(tmp_path):
    picture = {"type": "image", "text": None, "image": {"bytes": b"\xff"}}
    path = write_parquet(tmp_path, [verl([user([picture])], "2")])
    with pytest.raises(UserError, match="row 1: the prompt has content that is no text"):
        data.load_rows(path)
    path = write_parquet(tmp_path, [{"prompt": b"\xff", "answer": "2"}])
    with pytest.raises(UserError, match="some.parquet: the column prompt holds images"):
        data.load_rows(path)


def test_texts_beside_images_are_read(tmp_path):
    """The field of the images made the whole column unreadable."""
    text = {"type": "text", "text": "1+1", "image": {"bytes": b"x"}}
    path = write_parquet(tmp_path, [verl([user([text])], "2")])
    (row,) = data.load_rows(path)
    assert row["problem"] == "1+1"


# ---- duplicates ----------------------------------------------------------------------------------


def test_rows_are_the_same_if_their_whole_chats_are(tmp_path):
    rows = [
        {"prompt": [user("1+1?")], "answer": "2"},
        {"prompt": [system("In base 2."), user("1+1?")], "answer": "10"},
        {"prompt": [user("2+2?"), assistant("4"), user("1+1?")], "answer": "3"},
        {"prompt": [user(" 1+1?")], "answer": "2"},
        {"prompt": "1+1?", "answer": "2"},
    ]
    counts = Counter()
    path = write(tmp_path, lines(*rows))
    assert [row["answer"] for row in data.load_rows(path, counts=counts)] == ["2", "10", "3"]
    assert counts == {"repeated": 2}
    path = write(tmp_path, lines(*rows, {"messages": rows[1]["prompt"], "answer": "2"}))
    with pytest.raises(UserError, match="some.jsonl:2 appears again, with the answer '2' instead"):
        data.load_rows(path)


# ---- answers -------------------------------------------------------------------------------------

MARKED = [  # value of an answer column, gold answer
    (r"$\frac{2}{3}$", r"\frac{2}{3}"),
    ("$$ x $$", "x"),
    (r"\( x+1 \)", "x+1"),
    (r"\[5\]", "5"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"$\boxed{ $x$ }$", "x"),
    (["$2$", r"\boxed{3}"], "2, 3"),
    (["so\n#### $5$", 6.0, [7]], "5, 6, 7"),
    (["5", None], ""),
    ('["$5$", "6"]', "5, 6"),
    ('["\\\\frac{1}{2}"]', r"\frac{1}{2}"),
    (r'["\frac{1}{2}"]', r'["\frac{1}{2}"]'),  # in JSON this is a form feed and "rac"
    ("[5, 6]", "[5, 6]"),  # an interval
    ("[[5, 6], [7, 8]]", "[[5, 6], [7, 8]]"),
    ('["5"', '["5"'),
    (r'["\ud800"]', r'["\ud800"]'),
    ("so\n#### $5$", "5"),
    (r"The answer is $\boxed{5}$.", "5"),
    (r"$x$ and $y$", r"$x$ and $y$"),
    (r"\(x\) or \(y\)", r"\(x\) or \(y\)"),
    (r"\boxed{1}, \boxed{2}", r"\boxed{1}, \boxed{2}"),
    (r"\$18", r"\$18"),
    (r"$\$18$", r"\$18"),
    ("$18", "$18"),
    (r"$5\$", r"$5\$"),
    ("[1,2)", "[1,2)"),
    (r"\boxed{3", r"\boxed{3"),
    ("$", "$"),
    ("$$", "$$"),
    (r"\boxed{}", r"\boxed{}"),
]


@pytest.mark.parametrize("value,expected", MARKED)
def test_marks_around_the_whole_answer_are_removed(value, expected):
    assert columns.gold(value) == expected
    assert columns.gold(expected) == expected


LONG = "The sum of one and one is two because addition says so"
SOLUTIONS = [  # value of "solution", answer or ""
    ("Yes", "Yes"),
    ("does not exist", "does not exist"),
    (r"$x = 2$ or $x = 3$", r"$x = 2$ or $x = 3$"),
    (r"18\text{ eggs and five hens}", r"18\text{ eggs and five hens}"),
    (r"\frac{n! (n-1)!}{2}", r"\frac{n! (n-1)!}{2}"),
    (42, "42"),
    (["1", "2"], "1, 2"),
    ([r"So \boxed{9}"], "9"),
    (r"\boxed{1}, wrong: \boxed{2}", "2"),
    (f"{LONG}\n#### 2", "2"),
    (LONG, ""),
    ([LONG], ""),
    (["1", LONG], ""),
    ("We add. It is 2", ""),
    ("first\nsecond", ""),
    ("x" * 201, ""),
    (r"\boxed 2", "2"),
    (r"so \boxed{3", ""),
    (True, ""),
    (None, ""),
    ("", ""),
    ([], ""),
    ({"a": 1}, ""),
]


@pytest.mark.parametrize("value,expected", SOLUTIONS)
def test_solution_is_the_answer_only_if_it_is_marked_or_short(value, expected):
    raw = {"prompt": "1+1?", "solution": value}
    if expected:
        assert columns.to_row(raw, "here").row["answer"] == expected
    else:
        with pytest.raises(UserError, match='here: needs "answer".*"solution" with .boxed'):
            columns.to_row(raw, "here")


def test_answers_of_the_real_sets_are_short():
    if not REAL_SETS:
        pytest.skip("no data sets in REAL_DATA")
    for path in REAL_SETS:
        golds = {str(json.loads(line)["answer"]) for line in Path(path).open()}
        assert [gold for gold in golds if not columns.is_bare(gold)] == []
