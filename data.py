"""Problems: what the model is asked, from files and from the hub. Nothing here knows about learning."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class UserError(Exception):
    """A mistake of the caller's: printed once, without a traceback; exit code 2."""


@dataclass
class Problem:
    row: Row  # as read, "answer" made a string
    prompt_ids: list[int]  # chat template applied, up to where the response starts


def load_rows(path: str) -> list[Row]:
    """Read a JSONL file; a row that is no problem with an answer is an error that names file and line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the data: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not a JSON object ({error}); each line must be one") from None
        problem, answer = (row.get("problem"), row.get("answer")) if isinstance(row, dict) else (None, None)
        if not isinstance(problem, str) or not problem.strip():
            raise UserError(f'{path}:{number}: needs "problem", a non-empty string; found {line.strip()[:80]}')
        if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
            raise UserError(f'{path}:{number}: needs "answer", a non-empty string or a number; found {answer!r}')
        rows.append(row | {"answer": str(answer).strip()})
    if not rows:
        raise UserError(f"{path}: holds no problems; each line must be a JSON object with problem and answer")
    return rows


def load_problems(path: str, tokenizer, system_prompt: str, max_prompt_tokens: int, limit: int | None = None) -> tuple[list[Problem], int]:
    """The first `limit` rows with their prompts as token ids, and how many of them were left out as too long."""
    rows = load_rows(path)[:limit]
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    chats = [system + [{"role": "user", "content": row["problem"]}] for row in rows]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]  # the template has written the special tokens already
    problems = [Problem(row, prompt) for row, prompt in zip(rows, ids) if len(prompt) <= max_prompt_tokens]
    if not problems:
        raise UserError(f"{path}: every prompt is longer than --max-prompt-tokens {max_prompt_tokens}")
    return problems, len(rows) - len(problems)
