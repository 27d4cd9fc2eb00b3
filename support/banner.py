"""What is checked and said about prompts and data before a run starts."""

import itertools
from collections.abc import Iterable, Iterator

from support.data import ProblemSet, long_answers, shared_problems
from support.errors import UserError
from support.prompts import (
    CHECKED,
    Template,
    end_warning,
    format_warning,
    id_problem,
    template_warnings,
)
from support.toy import is_toy


def check_ids(cfg, path: str, tokenizer, sets: Iterable[ProblemSet]) -> None:
    """UserError if a prompt has a token for which the embedding has no row.

    path: the model folder.
    """
    from transformers import AutoConfig  # the import takes seconds

    problems = itertools.chain.from_iterable(part.problems for part in sets)
    largest = (max(problem.prompt_ids, default=0) for problem in problems)
    rows = AutoConfig.from_pretrained(path).vocab_size
    if reason := id_problem(tokenizer, largest, rows):
        raise UserError(f"--model {cfg.model}: {reason}")


def describe_data(train_set: ProblemSet, eval_sets: dict[str, ProblemSet]) -> str:
    """The sizes of the training and evaluation sets, and the rows that are left out."""
    text = f"{len(train_set.problems):,} training problems"
    if left_out := train_set.describe_left_out():
        text += f" ({left_out} left out)"
    held_out = []
    for name, eval_set in eval_sets.items():
        left_out = eval_set.describe_left_out()
        note = f"; {left_out} left out" if left_out else ""
        held_out.append(f"{name} ({len(eval_set.problems)}{note})")
    return f"{text}; held out: {', '.join(held_out) or 'none'}"


def warnings(
    cfg, tokenizer, eos_ids: list[int], train_set: ProblemSet, eval_sets: dict[str, ProblemSet]
) -> Iterator[str]:
    """Lines about what may differ from what the user expects. eos_ids: any ends a response."""
    sets = [part.problems for part in (train_set, *eval_sets.values())]
    chats = [problem.chat for problems in sets for problem in problems[:CHECKED]]
    template = Template(tokenizer, cfg)
    found = [*template_warnings(template, chats), end_warning(template, eos_ids)]
    if not is_toy(cfg.model):
        found.append(format_warning(chats, cfg.reward))
    if cfg.reward in ("math", "exact"):
        found.append(long_answers(sets))
    found += [shared_problems(name, sets[0], held) for name, held in zip(eval_sets, sets[1:])]
    for text in filter(None, found):
        yield f"warning: {text}"
    if cfg.top_p < 1 or cfg.top_k:
        yield (
            "warning: with --top-p or --top-k the samples do not follow the trained distribution; "
            "ratios and log-prob gaps are biased"
        )
    if cfg.minibatches == 1:
        yield (
            "note: with --minibatches 1 the ratio is always 1 and no clip can bind; "
            "use 2 or more to clip"
        )
