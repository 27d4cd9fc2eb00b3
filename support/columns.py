r"""One row of a data set: its problem and its answer, whatever its columns are called.

The formats are those of this project, verl, TRL, OpenRLHF and open-instruct. docs/using.md lists
them (Data) with the rules of detection. This file must stay fast to import: rewards.py needs it.
"""

import json
import math
import re
from collections.abc import Iterable
from reprlib import repr as short
from typing import Any, NamedTuple

from support.errors import UserError
from support.notation import closing_brace, last_boxed

Row = dict[str, Any]
Chat = list[dict[str, Any]]  # messages, each with "role" and "content", both strings


class Columns(NamedTuple):
    """Where problem and answer are: names of columns, dotted inside objects. "": detect."""

    problem: str = ""  # --problem-column
    answer: str = ""  # --answer-column


DETECTED = Columns()


class PlacedRow(NamedTuple):
    """A row, where it comes from, and the messages of its problem."""

    place: str  # for messages, such as FILE:LINE
    row: Row  # all columns; "problem" and "answer" are non-empty strings
    chat: Chat  # what the model is asked, without --system-prompt


# Accepted names, in any case. The first usable one counts.
PROBLEM_COLUMNS = ("problem", "question", "messages", "prompt", "input")
ANSWER_COLUMNS = ("answer", "final_answer", "expected_answer", "ground_truth", "label")
WORKED_COLUMNS = ("solution", "completion")  # a worked solution, or the answer alone
VERL_ANSWER = "reward_model.ground_truth"  # a row that has it is verl's
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "environment", "ipython")
# Columns that hold a part of the problem (MMLU, SVAMP, DROP), unless the problem shows it itself.
PART_COLUMNS = ("choices", "options", "body", "context", "passage")
NO_ANSWERS = ("proof", "notfound")  # NuminaMath-1.5 writes these where there is no answer
IMAGE = re.compile(r"<image\d*>|<\|image(?:_pad)?\|>")  # what stands for an image in a text
MAX_DEPTH = 64  # pickle, which sends rows to the workers, fails at some hundreds
ABSENT = object()  # the value of a column that does not exist; None is a value

# ---- the row -------------------------------------------------------------------------------------


def to_row(raw: Any, place: str, named: Columns = DETECTED) -> PlacedRow:
    """The row of a raw value: all its columns, and "problem" and "answer" as strings.

    place: where the value comes from, such as FILE:LINE. If the value has columns of these two
    names that hold something else, they are replaced. UserError with the place, the value found
    and the remedy if there is no usable problem or answer.
    """
    check_value(raw, place)
    columns = in_any_case(raw)
    messages = find_problem(columns, raw, place, named.problem)
    chat = list(messages)
    while chat[-1]["role"] == "assistant":  # find_problem has found a user's message
        chat.pop()
    example = messages[-1]["content"] if len(chat) < len(messages) else ""
    answer = find_answer(columns, raw, place, example, named.answer)
    return PlacedRow(place, raw | {"problem": last_question(chat), "answer": answer}, chat)


def find_problem(columns: dict, raw: Row, place: str, named: str) -> Chat:
    """The messages of the problem column. They may end with an assistant's."""
    if named:
        value = named_value(columns, raw, place, "--problem-column", named)
        if messages := to_messages(value, place):
            return messages
        raise UserError(
            f"{place}: --problem-column {named}: needs a non-empty string or a list of messages; "
            f"found {short(value)}"
        )
    names = PROBLEM_COLUMNS
    if look_up(columns, VERL_ANSWER) is not ABSENT:
        names = ("prompt", *names)
    if columns.get("instruction"):  # then "input" is only a part of the problem
        names = [name for name in names if name != "input"]
    values = [columns[name] for name in names if name in columns]
    for value in values:
        if messages := to_messages(value, place):
            check_parts(columns, messages, place)
            return messages
    raise UserError(
        f'{place}: needs "problem" (or {quoted(PROBLEM_COLUMNS[1:])}), a non-empty string or a '
        f"list of messages; found {short(first(values))} in columns {names_in(raw)}; "
        "--problem-column names another"
    )


def check_parts(columns: dict, messages: Chat, place: str) -> None:
    """UserError if another column has a part of the problem that the messages do not show."""
    for name in PART_COLUMNS:
        part = from_json(columns.get(name))
        if isinstance(part, dict):
            part = part.get("text")
        parts = part if isinstance(part, list) else [part]
        texts = [text for text in parts if isinstance(text, str) and text.strip()]
        if texts and not any(text in message["content"] for text in texts for message in messages):
            raise UserError(
                f"{place}: the problem does not show its {name} {short(part)}; write it into the "
                "problem. If that is complete without it, --problem-column names its column"
            )


def find_answer(columns: dict, raw: Row, place: str, example: str, named: str) -> str:
    """The answer, never empty. example: the last message if it is an assistant's, or ""."""
    if named:
        value = named_value(columns, raw, place, "--answer-column", named)
        if answer := worked_answer(value) or gold(value):
            return answer
        raise UserError(
            f"{place}: --answer-column {named}: needs a non-empty string, a list of these or a "
            f"finite number; found {short(value)}"
        )
    names = (VERL_ANSWER, *ANSWER_COLUMNS)
    values = [value for name in names if (value := look_up(columns, name)) is not ABSENT]
    worked = [columns[name] for name in WORKED_COLUMNS if name in columns]
    found = [*map(gold, values), *map(worked_answer, worked), worked_answer(example)]
    if answer := first([text for text in found if text]):
        return answer
    raise UserError(
        f'{place}: needs "answer" (or {quoted(ANSWER_COLUMNS[1:])}), a non-empty string or a '
        f'finite number, or a "solution" with \\boxed{{}}; found {short(first(values + worked))} '
        f"in columns {names_in(raw)}; --answer-column names another"
    )


def named_value(columns: dict, raw: Row, place: str, flag: str, name: str) -> Any:
    """The value of a column that a flag names. UserError with the columns that the row has."""
    value = look_up(columns, name)
    if value is ABSENT:
        raise UserError(
            f"{place}: {flag} {name}: no such column; this row has {names_in(raw)}; give one of "
            'these, or "" to detect it'
        )
    return value


def look_up(value: Any, name: str) -> Any:
    """The value of a column; a dotted name reaches into objects. ABSENT if there is none.

    Objects may be JSON texts. Their names may be in any case, and may have dots themselves.
    """
    value = from_json(value)
    if not isinstance(value, dict):
        return ABSENT
    columns = in_any_case(value)
    if name in columns:
        return columns[name]
    for dot in re.finditer(r"\.", name):
        first = columns.get(name[: dot.start()], ABSENT)
        found = look_up(first, name[dot.end() :])
        if found is not ABSENT:
            return found
    return ABSENT


def in_any_case(row: Row) -> Row:
    """The row, with each value under its name in lower case too."""
    return {name.lower(): value for name, value in row.items()} | row


def from_json(value: Any) -> Any:
    """The object or list of a JSON text; any other value as it is.

    Tables often store what is nested as JSON texts (ROLL, Skywork-OR1).
    """
    if not isinstance(value, str) or not value.strip().startswith(("{", "[")):
        return value
    try:
        decoded = json.loads(value)
        json.dumps(decoded, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # ValueError: not JSON, or an unpaired surrogate
        return value
    return decoded


def names_in(raw: Row) -> str:
    """The names of the columns, dotted inside objects, as a list for a message."""
    names = []
    for name, value in raw.items():
        inner = value if isinstance(value, dict) else {}
        names += [f"{name}.{part}" for part in inner] or [name]
    shown = ", ".join(map(short, names[:12]))
    return f"[{shown}, ...]" if len(names) > 12 else f"[{shown}]"


def quoted(names: Iterable[str]) -> str:
    """The names in quotes, with commas between."""
    return ", ".join(f'"{name}"' for name in names)


def first(values: list) -> Any:
    """The first value, or None."""
    return values[0] if values else None


def check_value(raw: Any, place: str) -> None:
    """UserError unless the value is an object that can be pickled and encoded as UTF-8."""
    if not isinstance(raw, dict):
        raise UserError(f"{place}: needs a JSON object with problem and answer; found {short(raw)}")
    if too_deep(raw):
        raise UserError(
            f"{place}: lists or objects are nested more than 60 deep; flatten or remove that field"
        )
    try:
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # tokenizers and log files would fail much later
        character = error.object[error.start]
        raise UserError(
            f"{place}: contains the unpaired surrogate {character!r} (invalid Unicode); remove it"
        ) from None


def too_deep(value: Any, levels: int = MAX_DEPTH) -> bool:
    """Whether lists and dictionaries are nested deeper than `levels`."""
    if levels == 0:
        return True
    if isinstance(value, dict):
        return any(too_deep(part, levels - 1) for part in value.values())
    if isinstance(value, list):
        return any(too_deep(part, levels - 1) for part in value)
    return False


# ---- the problem: a text or messages -------------------------------------------------------------


def to_messages(value: Any, place: str) -> Chat | None:
    """The messages of a problem column: a text is one user's message. None if it is neither.

    The JSON text of a list of messages is that list. UserError if the value is a list of messages
    that cannot be used.
    """
    decoded = from_json(value)
    if decoded and isinstance(decoded, list) and all(map(is_message, decoded)):
        value = decoded
    if isinstance(value, str) and value.strip():
        return [to_message({"role": "user", "content": value}, place)]
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        return None
    chat = [to_message(message, place) for message in value]
    if not last_question(chat).strip():
        raise UserError(
            f"{place}: the prompt has no user message, or an empty one at the end; "
            f"found {short(value)}"
        )
    return chat


def is_message(value: Any) -> bool:
    """Whether a value is an object with a role and a content."""
    return isinstance(value, dict) and "role" in value and "content" in value


def to_message(message: dict, place: str) -> dict[str, Any]:
    """A message with its content as one text. Empty fields, which Parquet adds, are left out."""
    role = message.get("role")
    if not isinstance(role, str) or "content" not in message:
        raise UserError(
            f'{place}: a message of the prompt needs "role" and "content"; found {short(message)}'
        )
    if role not in ROLES:
        raise UserError(
            f'{place}: a message of the prompt has the role "{role}"; known are {quoted(ROLES)}; '
            'rename it. The role of answers is "assistant": they are removed at the end'
        )
    others = {name: value for name, value in message.items() if value is not None}
    text = text_of(message["content"], place)
    if role == "user" and (found := IMAGE.search(text)):
        raise UserError(
            f"{place}: the prompt has an image ({found[0]}); only text is supported, remove the row"
        )
    return others | {"content": text}


def text_of(content: Any, place: str) -> str:
    """The text of a message: a string, nothing, or a list of text parts, which are joined."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text" or not isinstance(text, str):
            raise UserError(
                f"{place}: the prompt has content that is no text: {short(part)}; "
                "only text is supported, remove the row"
            )
        texts.append(text)
    return "".join(texts)


def last_question(chat: Chat) -> str:
    """The last user message; "" if there is none."""
    return next((m["content"] for m in reversed(chat) if m["role"] == "user"), "")


# ---- the answer ----------------------------------------------------------------------------------

MATH_MARKS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
LONGEST_BARE = 200  # characters; the longest answer of DeepMath, GSM8K and MATH-500 has 161
MOST_WORDS = 5  # the answers of these sets have at most 3
SENTENCE_END = re.compile(r"[.?]\s|[。？].")


def gold(value: Any) -> str:
    r"""The value of an answer column as a string; "" if it holds no answer.

    A list becomes "a, b", which math-verify compares as a set (OlympiadBench); so does the JSON
    text of a list of texts (Skywork-OR1). A worked solution that ends in "#### 1,234" becomes
    "1234" (GSM8K), and a text with exactly one \boxed{} what is in it. Dollar signs, \(...\) and
    \boxed{...} around the whole are removed. Numbers must be finite.
    """
    decoded = from_json(value)
    if isinstance(decoded, list) and (decoded is value or is_texts(decoded)):
        answers = [gold(item) for item in decoded]
        return ", ".join(answers) if all(answers) else ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return ""
    if isinstance(value, float):
        if not math.isfinite(value):
            return ""
        if value.is_integer() and abs(value) < 2**53:
            value = int(value)  # a table stores integers as floats if a row has none
    text = str(value).strip()
    if text in NO_ANSWERS:
        return ""
    if marked := after_hashes(text):
        return unwrap(marked)
    if text.count("\\boxed{") == 1:
        text = last_boxed(text) or text
    return unwrap(text)


def is_texts(values: list) -> bool:
    """Whether these are texts without control characters, as of "\\frac" in careless JSON."""
    return all(isinstance(text, str) and text.isprintable() for text in values)


def after_hashes(text: str) -> str:
    """What follows "####" in the last line, without commas between digits; "" if nothing does."""
    worked = re.search(r"^####\s*(\S.*)\Z", text.strip(), re.MULTILINE)
    return re.sub(r"(?<=\d),(?=\d{3})", "", worked[1]) if worked else ""


def worked_answer(value: Any) -> str:
    r"""The answer in the value of a solution column; "" if there is none.

    It is the last \boxed{}, or what follows "####" at the end. Without these, the text itself if
    it is short (is_bare); a longer one is a worked solution whose answer is not marked. A list of
    messages (TRL's completion) counts as its last message.
    """
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    texts = value if isinstance(value, list) else [value]
    if isinstance(value, str):
        if boxed := last_boxed(value):
            return unwrap(boxed)
        if after_hashes(value):
            return gold(value)
    return gold(value) if all(not isinstance(t, str) or is_bare(t) for t in texts) else ""


def is_bare(text: str) -> bool:
    """Whether a text is an answer alone, such as "$x = 2$" or "no solution", and not its reasons.

    It is one line of at most LONGEST_BARE characters with at most MOST_WORDS words outside of
    formulas, and not more than one sentence. It has no box, not even one that is never closed.
    """
    text = text.strip()
    one_line = len(text.splitlines()) == 1 and len(text) <= LONGEST_BARE
    if not one_line or "\\boxed" in text:
        return False
    prose = re.sub(r"\$[^$]*\$|\\\(.*?\\\)", "$", text)
    words = [word.strip(".,;:!?()'\"").replace("'", "") for word in prose.split()]
    count = sum(len(word) > 1 and word.isalpha() for word in words)
    return count <= MOST_WORDS and not SENTENCE_END.search(prose)


def unwrap(text: str) -> str:
    r"""A text without dollar signs, \(...\), \[...\] or \boxed{...} around the whole of it.

    "$x$ and $y$" and "\$18" stay as they are. So does a text that would become empty.
    """
    inner = text
    while inner:
        text = inner
        inner = unwrap_once(text)
        if inner == text:
            break
    return text


def unwrap_once(text: str) -> str:
    """The text without the outermost marks; the text itself if it has none."""
    for opening, closing in MATH_MARKS:
        inner = text[len(opening) : -len(closing)]
        if text != opening + inner + closing or inner.endswith("\\"):
            continue
        if not re.search(r"(?<!\\)\$" if "$" in opening else r"\\[()\[\]]", inner):
            return inner.strip()
    box = "\\boxed"
    if text.startswith(box + "{") and closing_brace(text, len(box)) == len(text) - 1:
        return text[len(box) + 1 : -1].strip()
    return text
