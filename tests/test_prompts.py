"""support/prompts.py: the chat template, its arguments, what it loses, and token ids."""

import inspect
import json
from collections import Counter

import pytest

from lite_ppo import PRESETS, Config  # hides broken packages from transformers
from support import banner, cli, data, prompts, run, toy
from support.errors import UserError
from support.prompts import Template, template_warnings
from tests.test_data import lines, missing_words, write

CHATML = (
    "{% for m in messages %}<user>{{ m.role }}\n{{ m.content | trim }}<eos>{% endfor %}<assistant>"
)
THINKING = "{% if enable_thinking is defined and enable_thinking is false %}0{% else %}1{% endif %}"
USERS_ONLY = toy.CHAT_TEMPLATE
LAST_ONLY = "{{ messages[-1].content }}"
OWN_SYSTEM = "Be good. {{ messages[-1].content }}"
MERGED = (
    "{% set s = messages[0].content + ' ' if messages[0].role == 'system' else '' %}"
    "{{ s }}{{ messages[-1].content }}"
)
WITH_DEFAULT = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}Be good.{% endif %}"
    "{{ messages[-1].content }}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ 1 / 0 }}{% endif %}" + LAST_ONLY
SHOUTING = "{{ messages[0].content }}{{ messages[-1].content | upper }}"


@pytest.fixture
def tokenizer():
    return toy.make_tokenizer()


def user(text) -> dict:
    return {"role": "user", "content": text}


def system(text) -> dict:
    return {"role": "system", "content": text}


def make_template(tokenizer, text: str, **flags) -> Template:
    tokenizer.chat_template = text
    return Template(tokenizer, Config(**{"system_prompt": "Be good."} | flags))


# ---- the messages of a prompt --------------------------------------------------------------------


def test_system_prompt_comes_first_unless_the_messages_have_their_own(tokenizer):
    template = make_template(tokenizer, CHATML)
    turns = [user("1"), {"role": "assistant", "content": "2"}, user("3")]
    assert template.complete(turns) == [system("Be good."), *turns]
    for own in (system("Be bad."), system(""), {"role": "developer", "content": "x"}):
        assert template.complete([own, user("1")]) == [own, user("1")]
    assert make_template(tokenizer, CHATML, system_prompt="").complete(turns) == turns


def test_prompt_of_messages_is_their_rendered_chat(tokenizer, tmp_path):
    tokenizer.chat_template = CHATML
    chat = [system("7"), user("1+1"), {"role": "assistant", "content": "2"}, user("2+2")]
    path = write(tmp_path, lines({"prompt": chat, "answer": 4}, {"prompt": "3+3", "answer": 6}))
    cfg = Config(system_prompt="9", max_prompt_tokens=200)
    problems, _ = data.load_problems(path, tokenizer, cfg)
    for problem, expected in zip(problems, [chat, [system("9"), user("3+3")]], strict=True):
        ids = tokenizer.apply_chat_template(expected, add_generation_prompt=True)["input_ids"]
        assert problem.prompt_ids == ids
        assert problem.chat == expected


# ---- arguments of the template -------------------------------------------------------------------


@pytest.mark.parametrize("text,ending", [("", "1"), ('{"enable_thinking": false}', "0")])
def test_template_gets_the_arguments(text, ending, tokenizer, tmp_path):
    tokenizer.chat_template = CHATML + THINKING
    path = write(tmp_path, lines({"problem": "2", "answer": "3"}))
    cfg = Config(system_prompt="", chat_template_kwargs=text)
    ((problem,), _) = data.load_problems(path, tokenizer, cfg)
    assert tokenizer.decode(problem.prompt_ids).endswith("<assistant>" + ending)


def test_changed_arguments_make_other_problems(tokenizer, tmp_path):
    """A resumed run compares the ids."""
    tokenizer.chat_template = CHATML + THINKING
    path = write(tmp_path, lines({"problem": "2", "answer": "3"}))
    flags = [dict(), dict(chat_template_kwargs='{"enable_thinking": false}')]
    flags += [dict(problem_column="answer"), dict(answer_column="problem")]
    sets = [data.load_problems(path, tokenizer, Config(**f)).problems for f in flags]
    assert len({run.problems_id(problems) for problems in sets}) == 4


BAD_KWARGS = [  # --chat-template-kwargs, words of the message
    ("enable_thinking=false", "not JSON give object enable_thinking"),
    ("{'a': 1}", "not JSON"),
    ("[1]", "not a JSON object"),
    ("null", "not a JSON object"),
    ("[" * 99999, "not JSON"),
    ('{"tokenize": true, "padding": 1}', "sets padding, tokenize itself leave out"),
    ('{"add_generation_prompt": false}', "add_generation_prompt"),
    ('{"messages": []}', "messages"),
    ('{"chat_template": "x"}', "chat_template"),
]


@pytest.mark.parametrize("text,words", BAD_KWARGS, ids=[text[:20] for text, _ in BAD_KWARGS])
def test_error_names_bad_arguments(text, words):
    with pytest.raises(UserError) as error:
        prompts.parse_template_kwargs(text)
    message = str(error.value)
    assert message.startswith(f"--chat-template-kwargs {text}: ")
    assert missing_words(words, message) == []


def test_reserved_arguments_are_those_of_transformers(tokenizer):
    """All but `tools` and `documents`, which templates use."""
    names = set(inspect.signature(tokenizer.apply_chat_template).parameters)
    assert names - {"tools", "documents", "kwargs"} <= prompts.RESERVED


def test_bad_arguments_are_an_error_before_anything_is_loaded():
    with pytest.raises(UserError, match="--chat-template-kwargs x: not JSON"):
        cli.check_config(Config(train_data="x", chat_template_kwargs="x"), 1)


def test_template_that_writes_the_date_gives_the_same_prompt_every_day(tokenizer):
    """Llama 3.2's gave other prompts on the next day, and the run could not be resumed."""
    text = "{{ strftime_now('%d %b %Y') }} {{ messages[-1].content }}"
    template = make_template(tokenizer, text, system_prompt="")
    assert template.render([user("1")], "a prompt") == "26 Jul 2024 1"


# ---- what a template loses -----------------------------------------------------------------------

WARNINGS = [  # template, --chat-template-kwargs, messages, words of each warning
    (CHATML, "", [user("1")], []),
    (MERGED, "", [user("1")], []),
    (WITH_DEFAULT, "", [user("1")], []),  # its default is the same text
    (CHATML + THINKING, '{"enable_thinking": false}', [user("1")], []),
    (CHATML, "", [user("a\n\n b "), {"role": "assistant", "content": "<think>"}, user("c")], []),
    (USERS_ONLY, "", [user("1")], ["drops the system message 'Be good.' --system-prompt jinja"]),
    (OWN_SYSTEM, "", [user("1")], ["drops the system message 'Be good.' never sees"]),
    (USERS_ONLY, "", [user("Be good. 1")], ["drops the system message"]),
    (LAST_ONLY, "", [system("S"), user("1"), user("2")], ["the system", "the user message '1'"]),
    (
        CHATML,
        "",
        [user("<user>1<eos><assistant>")],
        ["problems contain '<eos>' special token chat template already alone"],
    ),
    (SHOUTING, "", [user("abc")], ["changes the user message 'abc' correct chat_template.jinja"]),
    (CHATML, '{"think": 0}', [user("1")], ["--chat-template-kwargs: think = 0 changes no prompt"]),
    (
        CHATML + THINKING,
        '{"enable_thinking": "false"}',
        [user("1")],
        ['enable_thinking = "false" changes no prompt false, not "false"'],
    ),
]


@pytest.mark.parametrize("text,kwargs,chat,warnings", WARNINGS)
def test_warning_names_what_the_template_loses(text, kwargs, chat, warnings, tokenizer):
    template = make_template(tokenizer, text, chat_template_kwargs=kwargs)
    chats = [template.complete(chat)] * 3 if chat else []
    found = list(template_warnings(template, chats))
    assert len(found) == len(warnings), found
    for words, warning in zip(warnings, found):
        assert missing_words(words, warning) == []


FAILING = [  # template, --system-prompt, messages, words of the error
    (NO_SYSTEM, "Be good.", [user("1")], "system, user; --system-prompt"),
    ("{{ date.year }}", "", [user("1")], "UndefinedError 'date' --chat-template-kwargs"),
    (NO_SYSTEM, "Be good.", [system("S"), user("1")], "system, user; --chat-template-kwargs"),
]


@pytest.mark.parametrize("text,flag,chat,words", FAILING)
def test_error_of_a_template_names_the_remedy(text, flag, chat, words, tokenizer):
    template = make_template(tokenizer, text, system_prompt=flag)
    with pytest.raises(UserError) as error:
        template.render(template.complete(chat), "some.jsonl:1")
    assert missing_words(words, str(error.value)) == []
    own = "--system-prompt" in words  # not the remedy if the messages bring their own
    assert ("--system-prompt" in str(error.value)) == own


def test_long_message_is_shortened(tokenizer):
    template = make_template(tokenizer, USERS_ONLY, system_prompt="x" * 999)
    (warning,) = template_warnings(template, [template.complete([user("1")])])
    assert "'" + "x" * 60 + "...'" in warning


@pytest.mark.parametrize("arguments,count", [([], 0), (["--system-prompt", "Add."], 1)])
def test_toy_run_warns_only_of_a_system_prompt_that_is_given(arguments, count, tokenizer):
    cfg = cli.parse_config(Config, PRESETS, arguments)
    template = Template(tokenizer, cfg)
    training, held_out = (
        data.ProblemSet(
            [data.Problem({"answer": "2"}, [3], template.complete([user(text)]))], Counter()
        )
        for text in ("2+0", "1+1")
    )
    sets = (training, {"toy": held_out})
    lines = list(banner.warnings(cfg, tokenizer, [tokenizer.eos_token_id], *sets))
    assert len(lines) == count
    assert all("warning: the chat template" in line for line in lines)


ENDS = [  # what follows the answer in the template, whether <eos> alone ends a response here
    ("<eos>\n", True),
    ("\n <pad>", False),
    ("", True),
    ("\n", True),
    ("{{ 1 / 0 }}", True),
]


@pytest.mark.parametrize("end,fine", ENDS)
def test_warning_if_the_end_of_the_template_ends_no_response(end, fine, tokenizer):
    """Some base models: their template writes <|im_end|>, and no file names it as an end."""
    text = f"{{% for m in messages %}}<user>{{{{ m.content }}}}{end}{{% endfor %}}"
    template = make_template(tokenizer, text)
    warning = prompts.end_warning(template, [tokenizer.eos_token_id])
    words = "" if fine else "'<pad>' only '<eos>' the id 0 eos_token_id generation_config.json"
    assert bool(warning) != fine
    assert missing_words(words, warning) == []


BOXED = system(r"Use \boxed{}.")
FORMATS = [  # messages, reward, words of the warning
    ([BOXED, user("1+1")], "math", ""),
    ([user("1+1")], "mine.py:score", ""),
    ([user("1+1")], "exact", ""),  # it also reads the last line
    ([user("1+1")], "math", r"no prompt asks for \boxed{} --system-prompt"),
    ([BOXED, user('the final answer after "####".')], "math", '"#### last \\boxed{} Remove'),
    ([BOXED, user('the final answer after "####".')], "exact", "--reward exact"),
    ([BOXED, user("the form Answer: $Answer (without quotes)")], "math", "Answer: $Answer"),
    ([BOXED, user("return it in <answer> </answer> tags")], "math", "<answer>"),
    ([BOXED, user("#### Problem 3\nAnswer: $x$")], "math", ""),
]


@pytest.mark.parametrize("chat,reward,words", FORMATS)
def test_warning_if_the_prompts_ask_for_a_form_that_the_reward_does_not_read(chat, reward, words):
    warning = prompts.format_warning([chat], reward)
    assert bool(warning) == bool(words)
    assert missing_words(words, warning) == []


# ---- token ids -----------------------------------------------------------------------------------


def test_largest_id_is_named_if_the_embedding_has_no_row(tokenizer):
    assert prompts.id_problem(tokenizer, [3, 20], 21) == ""
    assert prompts.id_problem(tokenizer, [], 21) == ""
    problem = prompts.id_problem(tokenizer, [3, 20, 7], 20)
    assert missing_words("'\\n' id 20, 20 rows 0 to 19;", problem) == []


def test_tokens_that_the_template_names_are_known(tokenizer):
    named = {toy.SPECIAL.index(token) for token in ("<user>", "<assistant>", "<eos>")}
    assert set(prompts.template_ids(tokenizer)) == named
    tokenizer.add_tokens(["<new>", "<other>"])
    tokenizer.chat_template += "{% if x %}<new>{% endif %}"
    assert set(prompts.template_ids(tokenizer)) == named | {21}


def test_error_names_a_token_of_a_prompt_without_a_row(tokenizer, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 21}))
    tokenizer.add_tokens("<new>")
    ids = tokenizer("1<new>").input_ids
    cfg = Config(model="mine")
    sound, broken = [data.ProblemSet([data.Problem({}, i)], Counter()) for i in ([20], ids)]
    banner.check_ids(cfg, str(tmp_path), tokenizer, [sound])
    with pytest.raises(UserError, match="--model mine: .*'<new>' with id 21, .*21 rows"):
        banner.check_ids(cfg, str(tmp_path), tokenizer, [sound, broken])
