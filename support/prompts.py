"""From messages to the text of a prompt: the chat template, and checks of what it makes."""

import json
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

from support.columns import Chat
from support.errors import UserError

FLAG = "--chat-template-kwargs"
# Arguments of apply_chat_template that this trainer sets or that change what it returns.
RESERVED = {
    *("self", "conversation", "conversations", "messages", "chat_template", "tokenize"),
    *("add_generation_prompt", "continue_final_message", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}
CHECKED = 8  # prompts of each set that the warnings look at
# Some templates (Llama 3.2) write today's date into the prompt. Here it is always this one,
# which is Llama 3's default: a run that is resumed on another day must have the same prompts.
DATE = datetime(2024, 7, 26)
ANSWER = "2 + 2 = 4"  # of the chat that shows how a response ends
# How known data sets ask for the answer: GSM8K of verl, DAPO-Math-17k, R1-Zero and Countdown.
OTHER_FORMATS = re.compile(r"""["'`“]####|Answer: \$Answer|<answer>""")


def parse_template_kwargs(text: str) -> dict[str, Any]:
    """The value of --chat-template-kwargs; "" is no arguments. UserError names the remedy."""
    if not text.strip():
        return {}
    example = """such as '{"enable_thinking": false}'"""
    try:
        kwargs = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{FLAG} {text}: not JSON ({error}); give an object {example}") from None
    if not isinstance(kwargs, dict):
        raise UserError(f"{FLAG} {text}: not a JSON object; give one {example}")
    taken = sorted(RESERVED & kwargs.keys())
    if taken:
        raise UserError(
            f"{FLAG} {text}: this program sets {', '.join(taken)} itself; leave it out and give "
            "only variables of the chat template"
        )
    return kwargs


class Template:
    """The chat template of a tokenizer, with the flags that concern it."""

    def __init__(self, tokenizer, cfg):
        self.tokenizer = tokenizer
        self.system_prompt = cfg.system_prompt
        self.kwargs = parse_template_kwargs(cfg.chat_template_kwargs)

    def complete(self, chat: Chat) -> Chat:
        """The messages with --system-prompt in front, unless they have a system message."""
        if has_system_message(chat) or not self.system_prompt:
            return chat
        return [{"role": "system", "content": self.system_prompt}, *chat]

    def render(self, chat: Chat, place: str) -> str:
        """The text of a prompt, up to where the response starts. place: for messages."""
        try:
            return self.apply(chat, self.kwargs)
        except Exception as error:  # a template is a program and can raise anything
            remedies = [f"{FLAG} gives its variables"]
            if chat[0]["role"] == "system" and chat[0]["content"] == self.system_prompt:
                remedies.append('if it takes no system message, give --system-prompt ""')
            raise UserError(
                f"--model: its chat template fails on {place}: {type(error).__name__}: {error}; "
                f"the messages are {', '.join(message['role'] for message in chat)}; "
                f"{'; '.join(remedies)}"
            ) from None

    def apply(self, chat: Chat, kwargs: dict[str, Any]) -> str:
        """The text of a prompt with these arguments. Any exception, because it is a program."""
        options = dict(tokenize=False, add_generation_prompt=True, strftime_now=DATE.strftime)
        return self.tokenizer.apply_chat_template(chat, **options | kwargs)


def has_system_message(chat: Chat) -> bool:
    """Whether one of the messages is the system's (some models call it developer)."""
    return any(message["role"] in ("system", "developer") for message in chat)


# ---- warnings ------------------------------------------------------------------------------------


def template_warnings(template: Template, chats: list[Chat]) -> Iterator[str]:
    """Warnings about these prompts, each a sentence or two. chats: some prompts, complete."""
    texts = [template.render(chat, "a prompt") for chat in chats]
    yield from special_token_warnings(template.tokenizer, chats)
    yield from message_warnings(template, chats, texts)
    yield from argument_warnings(template, chats, texts)


def special_token_warnings(tokenizer, chats: list[Chat]) -> Iterator[str]:
    """Problems that hold a special token: they went through a chat template before."""
    added = tokenizer.added_tokens_decoder.values()
    special = [str(token) for token in added if token.special]
    texts = [message["content"] for chat in chats for message in chat if message["role"] == "user"]
    token = next((token for token in special for text in texts if token in text), None)
    if token:
        yield (
            f"the problems contain {token!r}, a special token of the model, as if they were in "
            "its chat template already; the template is applied on top of it. Give the texts alone"
        )


def message_warnings(template: Template, chats: list[Chat], texts: list[str]) -> Iterator[str]:
    """Messages that the chat template drops or changes. texts: the rendered chats.

    Answers of earlier turns do not count: templates remove their thoughts.
    """
    lost = {}  # (role, verb) -> an example
    for chat, text in zip(chats, texts):
        for message in chat:
            if message["role"] == "assistant":
                continue
            if verb := treatment(template, message, chat, text):
                lost.setdefault((message["role"], verb), message["content"])
    for (role, verb), content in lost.items():
        remedy = "correct chat_template.jinja in the folder of the model"
        if role == "system" and verb == "drops":
            remedy = (
                "the model never sees it. Put the instruction into the problems and give "
                f'--system-prompt "", or {remedy}'
            )
        yield (
            f"the chat template of --model {verb} the {role} message {shorten(content)}; {remedy}"
        )


def argument_warnings(template: Template, chats: list[Chat], texts: list[str]) -> Iterator[str]:
    """Arguments of --chat-template-kwargs without which every prompt is the same."""
    for name in template.kwargs:
        others = {key: value for key, value in template.kwargs.items() if key != name}
        if all(is_same(template, chat, others, text) for chat, text in zip(chats, texts)):
            yield (
                f"{FLAG}: {name} = {json.dumps(template.kwargs[name])} changes no prompt. The "
                "chat template of --model does not use it, or this is its default; check the "
                'spelling and the type (false, not "false"), or leave it out'
            )


def end_warning(template: Template, eos_ids: list[int]) -> str:
    """A warning if the token that ends a response in the chat template does not end one here.

    Then the model was trained to write that token, and writes on after it. Otherwise "".
    """
    tokenizer = template.tokenizer
    chat = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": ANSWER}]
    try:
        kwargs = template.kwargs | dict(add_generation_prompt=False)
        _, found, rest = template.apply(template.complete(chat), kwargs).rpartition(ANSWER)
    except Exception:  # a template is a program and can raise anything
        return ""
    first = tokenizer(rest.strip(), add_special_tokens=False)["input_ids"][:1] if found else []
    added = tokenizer.added_tokens_decoder
    if not first or first[0] in eos_ids or first[0] not in added or not added[first[0]].special:
        return ""
    ends = [tokenizer.convert_ids_to_tokens(i) for i in eos_ids]
    return (
        f"the chat template of --model ends a response with {str(added[first[0]])!r}, and here "
        f"only {', '.join(map(repr, ends))} ends one: the model may write on after its answer. "
        f"Add the id {first[0]} to eos_token_id in generation_config.json"
    )


def format_warning(chats: list[Chat], reward: str) -> str:
    r"""A warning if the prompts ask for the answer in another form than the reward reads, or "".

    "math" and "exact" read the last \boxed{}; "exact" also the last line.
    """
    if reward not in ("math", "exact") or not chats:
        return ""
    reads = f"--reward {reward} reads the last \\boxed{{}}"
    texts = [m["content"] for chat in chats for m in chat if m["role"] == "user"]
    for text in texts:
        if (found := OTHER_FORMATS.search(text)) and "\\boxed" not in text:
            return (
                f"the problems ask for the answer in another form ({found[0]}), and {reads}. "
                "Remove that request from the problems, or give your own reward"
            )
    if reward == "math" and not any("\\boxed" in m["content"] for chat in chats for m in chat):
        return (
            f"no prompt asks for \\boxed{{}}, and {reads}. "
            "Ask for it in the problems or in --system-prompt"
        )
    return ""


def treatment(template: Template, message: dict, chat: Chat, text: str) -> str:
    """What the template does to a message of the chat: "drops", "changes", or "" if it keeps it.

    A message is dropped if another text in its place gives the same prompt. (A prompt without the
    message would not show it: the template may have the same text as its default.) It is changed
    if the prompt does not contain its text, up to white space. An empty message is kept.
    """
    content = message["content"].strip()
    if not content:
        return ""
    changed = [other | {"content": content + " x"} if other is message else other for other in chat]
    if is_same(template, changed, template.kwargs, text):
        return "drops"
    return "" if contains(text, content) else "changes"


def is_same(template: Template, chat: Chat, kwargs: dict[str, Any], text: str) -> bool:
    """Whether the chat with these arguments gives this text. False if the template fails."""
    try:
        return template.apply(chat, kwargs) == text
    except Exception:  # a template is a program and can raise anything
        return False


def contains(text: str, part: str) -> bool:
    """Whether a text contains another one, up to white space."""
    return "".join(part.split()) in "".join(text.split())


def shorten(text: str) -> str:
    """The text in quotes, at most 60 characters of it."""
    return repr(text if len(text) <= 60 else text[:60] + "...")


# ---- token ids -----------------------------------------------------------------------------------


def id_problem(tokenizer, ids: Iterable[int], rows: int) -> str:
    """The largest of the ids and its token, if the embedding has no row for it; otherwise "".

    rows: number of rows of the embedding, vocab_size in config.json. An id beyond them is an
    IndexError on a CPU and undefined on a GPU.
    """
    largest = max(ids, default=-1)
    if largest < rows:
        return ""
    token = tokenizer.convert_ids_to_tokens(largest)
    found = f"its tokenizer has the token {token!r} with id {largest}"
    if token is None:
        found = f"its end-of-sequence id {largest} is no token of its tokenizer"
    return (
        f"{found}, and the embedding has {rows} rows (vocab_size in config.json), ids 0 to "
        f"{rows - 1}; use the tokenizer and generation_config.json of this model, or resize the "
        "embedding and save the model again (resize_token_embeddings)"
    )


def template_ids(tokenizer) -> list[int]:
    """The ids of the added tokens that the chat template names, used by a prompt or not."""
    template = tokenizer.chat_template or ""
    text = template if isinstance(template, str) else "".join(template.values())
    added = tokenizer.added_tokens_decoder.items()
    return [token_id for token_id, token in added if str(token) in text]
