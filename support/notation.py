r"""The notation of an answer: one spelling for one meaning, before anything is calculated.

tidy() rewrites what a model or a data set writes into plain LaTeX. split_unit(), split_label() and
as_word() take an answer apart. for_parser() keeps the marks that the LaTeX parser of math-verify
would lose. docs/answers.md says what counts as equal.

This file imports nothing but the standard library.
"""

import re
import unicodedata
from typing import NamedTuple

BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is none
BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
FONT = r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|math(?:bf|it|rm|sf|tt)|mbox|hbox|boldsymbol|bm|emph)"
SPACE = r"(?:\s|~|(?<!\\)\\[ ,;:!>]|\\q?quad(?![A-Za-z]))"

# ---- the box -------------------------------------------------------------------------------------


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` or `\fbox{...}`, without spaces around it.

    Braces are balanced. Without braces, as in `\boxed 42`, the content is the text up to the next
    space or the end of the formula. None if there is no box, or if the last one is not closed.
    """
    box = None
    for found in BOX.finditer(text):
        box = found
    if not box:
        return None
    if text[box.end() : box.end() + 1] != "{":
        rest = text[box.end() : box.end() + 200]
        bare = re.match(r"(?:\\(?![\])])|\{[^{}]*\}|[^\s$\\{}])*", rest)[0]
        return bare.rstrip(".,;:") or None
    end = closing_brace(text, box.end())
    return None if end is None else text[box.end() + 1 : end].strip()


def closing_brace(text: str, opening: int) -> int | None:
    """Position of the brace that closes the one at `opening`; None if nothing closes it."""
    depth = 0
    for brace in BRACE.finditer(text, opening):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return brace.start()
    return None


# ---- one spelling --------------------------------------------------------------------------------

REPLACEMENTS = {  # characters: LaTeX or ASCII for each of them
    "−–—‐‑﹣": "-",
    "×✕": r"\times ",
    "·⋅∙•": r"\cdot ",
    "÷": r"\div ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "≤⩽": r"\le ",
    "≥⩾": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "≡": r"\equiv ",
    "∞": r"\infty ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∖": r"\setminus ",
    "∣": "|",
    "⟂⊥": r"\perp ",
    "∥": r"\parallel ",
    "∼": r"\sim ",
    "≅": r"\cong ",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "∂": r"\partial ",
    "∇": r"\nabla ",
    "ℓ": r"\ell ",
    "ħℏ": r"\hbar ",
    "∧": r"\land ",
    "∨": r"\lor ",
    "¬": r"\neg ",
    "⇒": r"\Rightarrow ",
    "⇔": r"\Leftrightarrow ",
    "∀": r"\forall ",
    "∃": r"\exists ",
    "⊕": r"\oplus ",
    "⊗": r"\otimes ",
    "∘": r"\circ ",
    "∈": r"\in ",
    "∉": r"\notin ",
    "⊂": r"\subset ",
    "⊆": r"\subseteq ",
    "∅": r"\emptyset ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℚ": r"\mathbb{Q}",
    "ℕ": r"\mathbb{N}",
    "ℂ": r"\mathbb{C}",
    "°": r"^\circ ",
    "′’ʹ": "'",
    "″": "''",
    "…": r"\ldots ",
    "→⟶": r"\to ",
    "⁄∕": "/",
    "∠": r"\angle ",
    "△": r"\triangle ",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    "∫": r"\int ",
    "∑": r"\sum ",
    "∏": r"\prod ",
    "。": ".",
    "，、": ",",
    "；": ";",
    "\u00a0\u2009\u202f\u2002\u2003\u200b": " ",
}
# Code point: replacement, as str.translate() takes it.
CHARACTERS = {ord(c): new for characters, new in REPLACEMENTS.items() for c in characters}
NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
NUMBER_WORDS = {word: str(number) for number, word in enumerate(NUMBER_WORDS)}
NAMES = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau"
NAMES = f"{NAMES} upsilon phi chi psi omega".split()  # Greek letters, but omicron
SMALL = "αβγδεζηθικλμνξπρστυφχψω"
CAPITAL = "ΑΒΓΔΕΖΗΘΙΚΛΜΝΞΠΡΣΤΥΦΧΨΩ"
CHARACTERS |= {ord(letter): rf"\{name} " for name, letter in zip(NAMES, SMALL)}
CHARACTERS |= {ord(letter): rf"\{name.capitalize()} " for name, letter in zip(NAMES, CAPITAL)}
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ", "0123456789+-ni")
LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋ₙᵢ", "0123456789+-ni")
RAISED_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ]+")
LOWERED_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋ₙᵢ]+")
FUNCTIONS = (
    "arcsin arccos arctan sinh cosh tanh sqrt sin cos tan cot sec csc log ln exp gcd lcm max min"
).split()
ACCENTS = "bar|hat|vec|dot|ddot|tilde|overline|widehat|widetilde"
ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}

TWO_ARGUMENTS = ("frac", "dfrac", "tfrac", "cfrac", "binom", "dbinom", "tbinom")
ONE_ARGUMENT = f"sqrt|math(?:bb|cal|frak|scr|bf|rm)|{ACCENTS}"
COMMAND = re.compile(rf"\\({'|'.join(TWO_ARGUMENTS)}|{ONE_ARGUMENT})(?![A-Za-z])(?:\s*\[[^][]*\])?")
TOKEN = re.compile(
    rf"\s*(\{{|\d|[A-Za-z]|\\(?!(?:{'|'.join(TWO_ARGUMENTS)}|{ONE_ARGUMENT}|text|begin))[A-Za-z]+)"
)

SPELLINGS = [  # pattern, replacement: in this order
    (r"\\(?:left|right|middle)\s*\.", ""),
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])", ""),
    (r"\\(?:displaystyle|textstyle|limits|nolimits|strut)(?![A-Za-z])", ""),
    (r"\\(?:tiny|small|large|Large|LARGE|huge|Huge)(?![A-Za-z])", ""),
    (r"\\(?:textcolor|color)\s*\{\w+\}", ""),
    (r"\\(?:[dtcs]|nice)frac(?![A-Za-z])", r"\\frac"),
    (r"\\(?:tag|[hv]space|[hv]?phantom)\*?\s*\{[^{}]*\}", ""),
    (r"\\(?:blacksquare|checkmark|therefore|enspace|bf)(?![A-Za-z])|[✓✔“”]", " "),
    (r"\\abs\s*\{([^{}]*)\}", r"|\1|"),
    (r"\\norm\s*\{([^{}]*)\}", r"\\|\1\\|"),
    (r"\\(begin|end)\{bmatrix\}", r"\\\1{pmatrix}"),
    (r"\\\\\[\d*\.?\d+\s*(?:pt|em|ex|mm|cm)\]", r"\\\\"),
    (r"\\(?:varnothing)(?![A-Za-z])", r"\\emptyset"),
    (r"\\var(epsilon|phi|theta|rho|sigma|kappa)(?![A-Za-z])", r"\\\1"),
    (r"\\(?:leq|leqslant)(?![A-Za-z])|<=", r"\\le "),
    (r"\\(?:geq|geqslant)(?![A-Za-z])|>=", r"\\ge "),
    (r"\\neq(?![A-Za-z])|!=", r"\\ne "),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\\(?:dots|cdots|dotsc|dotsb|dotso)(?![A-Za-z])|(?<!\.)\.\.\.(?!\.)", r"\\ldots "),
    (r"\\lbrace(?![A-Za-z])", r"\\{"),
    (r"\\rbrace(?![A-Za-z])", r"\\}"),
    (r"\\[lr]?vert(?![A-Za-z])", "|"),
    (r"\\[lr]?Vert(?![A-Za-z])|‖", r"\\|"),
    (r"\{?([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}?", r"\\binom{\1}{\2}"),
    (r"(\\mathbb\{[A-Z]\})\s*-\s*(?=\\\{)", r"\1\\setminus "),
    (r"\\backslash(?![A-Za-z])", r"\\setminus "),
    (r"(?<=[)\]}])\s*U\s*(?=[(\[])", r"\\cup "),
    (r"\\dag(?![A-Za-z])", r"\\dagger"),
    (r"(?<=[A-Za-z])\^\{([23])\}(?=\s*\})", r"^\1"),
    (r"\\colon(?![A-Za-z])", ":"),
    (r"\\wedge(?![A-Za-z])", r"\\land "),
    (r"\\vee(?![A-Za-z])", r"\\lor "),
    (r"\\lnot(?![A-Za-z])", r"\\neg "),
    (r"\\(?:implies|Longrightarrow)(?![A-Za-z])", r"\\Rightarrow "),
    (r"\\(?:iff|Longleftrightarrow)(?![A-Za-z])", r"\\Leftrightarrow "),
    (r"\\(?:rightarrow|longrightarrow)(?![A-Za-z])", r"\\to "),
    (r"\\lbrack(?![A-Za-z])", "["),
    (r"\\rbrack(?![A-Za-z])", "]"),
    (r"\\(?:degree|degrees)(?![A-Za-z])|\\text\{\s*°\s*\}", r"^\\circ "),
    (r"\^\s*\{\s*\\circ\s*\}", r"^\\circ "),
    (r"\^\s*(?:\{\s*)?\\(?:top|intercal)(?![A-Za-z])(?:\s*\})?", "^T"),
    (r"\^\s*\{\s*(?:\\(?:mathsf|mathrm|text|mathbf)\{\s*|\\rm\s*)?T\s*\}(?:\s*\})?", "^T"),
    (r"\^\s*\\(?:mathsf|mathrm|text)\{\s*T\s*\}", "^T"),
    (r"\^\s*(?:\{\s*)?(?:\\ast|\\star|\*)(?![A-Za-z])(?:\s*\})?", "^*"),
    (r"\^\s*\{\s*((?:\\prime\s*|')+)\}", r"^\1"),
    (r"\^\s*((?:\\prime(?![A-Za-z])\s*)+)", lambda found: "'" * found[1].count("prime")),
    (r"\^\s*('+)", r"\1"),
    (r"(?<=\d)(?<!\b0)(?:,\\!|\{,\}|\\[,!; ])(?=\d{3}(?!\d))", ""),
    (r"^-?[1-9]\d{0,2}(?: \d{3})+$", lambda found: found[0].replace(" ", "")),
    (r"(?<!\\)\\[,;:>! ]|~|\\q?quad(?![A-Za-z])", " "),
    (r"\*\*(?!$)", "^"),
    (r"\^\s*-\s*(\d+|[A-Za-z])", r"^{-\1}"),
    (r"(?<=\d)\s*x\s*(?=10\s*\^)", r"\\times "),
    (r"(?<![\d./^_])(\d+)\s+(\d+)/(\d+)(?![\d/])", r"\1\\frac{\2}{\3}"),
    (r"(?<=[\d}])\s*(?:percent|\\text\s*\{\s*(?:percent|\\?%)\s*\})\s*$", r"\\%"),
    (r"\\mathrm\s*\{\s*([ei])\s*\}", r"\1"),
    (r"(?<![A-Za-z])([AaPp])\.\s?[Mm](?![A-Za-z])\.?", r"\1m"),
    (
        r"^(?:\\text\s*\{\s*)?(?:[Tt]he )?(?:[Ff]inal )?[Aa]nswer(?: is)?:?\s*\}?(?=[\s\d$\\:-]):?",
        "",
    ),
    (r"^(?:=|\\approx|\\Rightarrow)\s*", ""),
    (r"\\log\s*_\s*(?:e|\{\s*e\s*\})(?![A-Za-z])", r"\\ln "),
    (
        rf"_\s*(?:\{{\s*)?\\(?:text|mathrm)\s*\{{\s*({'|'.join(NUMBER_WORDS)})\s*\}}(?:\s*\}})?",
        lambda found: f"_{{{NUMBER_WORDS[found[1]]}}}",
    ),
    (
        r"\(\s*(?:\\[bp]?|\\text\s*\{\s*)?mod(?:\s*\})?\s*(\w+)\s*\)"
        r"|\\p?mod(?![A-Za-z])\s*\{?\s*(\w+)\s*\}?",
        r"\\pmod{\1\2}",
    ),
    (r"\\mathcal\s*\{O\}(?=\s*\()", "O"),
    (r"^(?:\\text\s*\{\s*)?[Aa]ll real numbers(?:\s*\})?$", r"\\mathbb{R}"),
    (r"(?<![A-Za-z])([Nn]o (?:real )?solution)s(?![A-Za-z])", r"\1"),
    (
        rf"\\(?:operatorname\*?|mathrm|text)\s*\{{\s*({'|'.join(FUNCTIONS)}|ker|dim|deg|det)\s*\}}",
        r"\\\1 ",
    ),
]
SPELLINGS = [(re.compile(pattern), new) for pattern, new in SPELLINGS]

# {x | -2 < x < 7}: the variable and the condition
SET_BUILDER = re.compile(
    r"\\\{\s*([A-Za-z])\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?:\\mid|:|\|)\s*([^:{}|]*(?:[<>]|\\[lg]e )"
    r"[^:{}|]*)\\\}"
)
FUNCTION = re.compile(rf"(?<![\\A-Za-z])({'|'.join(FUNCTIONS)})(?=\s*\()")
CALLS = {  # code before a bracket: LaTeX in place of the brackets
    r"\\sqrt": (r"\sqrt{", "}"),
    r"\^": ("^{", "}"),
    r"(?<![\\A-Za-z])[Aa]bs": ("|", "|"),
    r"(?<![\\A-Za-z])floor": (r"\lfloor ", r"\rfloor "),
    r"(?<![\\A-Za-z])ceil(?:ing)?": (r"\lceil ", r"\rceil "),
    r"(?<![\\A-Za-z])cbrt": (r"\sqrt[3]{", "}"),
    r"(?<![\\A-Za-z])factorial": ("(", ")!"),
}
CALLS = {re.compile(name + r"\s*\("): marks for name, marks in CALLS.items()}
PLAIN_NAME = re.compile(rf"(?<![\\A-Za-z{{_])({'|'.join(NAMES)})(?![A-Za-z])")
INFINITE = re.compile(r"(?<![\\A-Za-z{])(?:infinity|inf|oo)(?![A-Za-z])", re.IGNORECASE)
E_NOTATION = re.compile(r"(?<![\w.\\])(\d+(?:\.\d+)?|\.\d+)[eE]([+-]?\d+)(?![\w.])")
REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\(?:overline|bar|dot)\{(\d{1,30})\}")
THOUSANDS = re.compile(r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")


def tidy(text: str) -> str:
    """The answer in plain LaTeX, without spaces, full stops and math delimiters around it."""
    text = with_braces(unwrap(from_unicode(text)))
    for pattern, new in SPELLINGS:
        text = pattern.sub(new, single_spaces(text))  # long runs of spaces take long to search
    text = from_code(unwrap(single_spaces(text)))
    text = trim(REPEATING.sub(repeating_decimal, text))
    text = NUMBER_WORDS.get(text.lower(), text)
    condition = SET_BUILDER.fullmatch(text)
    return condition[2] if condition and condition[1] in condition[2] else text


def with_braces(text: str) -> str:
    r"""Arguments without braces get them, as TeX reads them: `\frac\pi2` is `\frac{\pi}{2}`.

    An argument is a letter, a digit or a command. Two digits, as in `\sqrt12`, stay: many people
    mean both. A fraction or a root gets braces as an exponent.
    """
    for command in reversed(list(COMMAND.finditer(text))):  # inner ones first
        end = command.end()
        count = 2 if command[1] in TWO_ARGUMENTS else 1
        for left in reversed(range(count)):
            token = TOKEN.match(text, end)
            if not token or (left == 0 and re.match(r"\d\d", text[token.end() - 1 :])):
                break
            if token[1] != "{":
                text = f"{text[: token.start()]}{{{token[1]}}}{text[token.end() :]}"
            closing = closing_brace(text, text.index("{", token.start()))
            if closing is None:
                break
            end = closing + 1
        else:
            if text[: command.start()].rstrip()[-1:] == "^":
                text = f"{text[: command.start()]}{{{text[command.start() : end]}}}{text[end:]}"
    return text


def single_spaces(text: str) -> str:
    """Each run of white space as one space."""
    return " ".join(text.split())


def from_unicode(text: str) -> str:
    """Mathematical characters as LaTeX: superscripts, roots, fractions, full-width forms."""
    text = RAISED_RUN.sub(lambda found: "^{" + found[0].translate(RAISED) + "}", text)
    text = LOWERED_RUN.sub(lambda found: "_{" + found[0].translate(LOWERED) + "}", text)
    text = re.sub(r"[√∛∜]\s*(\d+(?:\.\d+)?|[A-Za-z]|(?=[({]))", unicode_root, text)
    text = text.translate(CHARACTERS)
    return "".join(fraction_or_letter(c) for c in text)


def unicode_root(found: re.Match) -> str:
    """√3 as a command. A bracket or brace after the sign stays."""
    return ROOTS[found[0][0]] + ("{" + found[1] + "}" if found[1] else "")


def fraction_or_letter(character: str) -> str:
    """½ as a command; full-width and mathematical letters as ASCII; all else as it is."""
    if character.isascii():
        return character
    plain = unicodedata.normalize("NFKC", character)
    upper, slash, lower = plain.partition("\u2044")
    if slash:
        return rf"\frac{{{upper}}}{{{lower}}}"
    return plain if plain.isascii() else character


def trim(text: str) -> str:
    """Without spaces around it and without a full stop, comma, colon or semicolon at the end."""
    text = single_spaces(text)
    before = None
    while text != before:
        before = text
        text = re.sub(rf"^{SPACE}+", "", text)
        text = re.sub(rf"(?:{SPACE}|\\\\|(?<!\\)\\$)+$", "", text)
        text = re.sub(r"(?<![.\\])[.,;:]$|\\text\s*\{\s*[.,;]?\s*\}$", "", text)
    return text


DELIMITERS = (("**", "**"), ("`", "`"), ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))


def unwrap(text: str) -> str:
    """Without math delimiters, boxes, fonts and braces that enclose all of it."""
    before = None
    while text != before:
        before = text = trim(text)
        for left, right in DELIMITERS:
            inner = text[len(left) : len(text) - len(right)]
            if len(text) > len(left + right) and text == left + inner + right:
                text = inner if left not in inner else text
        wrapper = re.match(rf"(?:{FONT}|\\boxed|\\fbox)?\s*(?=\{{)", text)
        if wrapper and closing_brace(text, wrapper.end()) == len(text) - 1:
            text = text[wrapper.end() + 1 : -1]
    return text


def from_code(text: str) -> str:
    r"""Program code as LaTeX: sqrt(2), pi/2, x^(1/2), 1.6e-19. LaTeX stays as it is."""
    if re.search(r"\\text|\\math|\\operatorname", text):
        return text
    text = FUNCTION.sub(r"\\\1", re.sub(r"(?<![\\A-Za-z])a(sin|cos|tan)(?=\s*\()", r"arc\1", text))
    text = INFINITE.sub(r"\\infty ", PLAIN_NAME.sub(r"\\\1 ", text))
    text = E_NOTATION.sub(r"\1 \\times 10^{\2}", text)
    for opening, (left, right) in CALLS.items():
        text = replace_brackets(text, opening, left, right)
    return text


def replace_brackets(text: str, opening: re.Pattern, left: str, right: str) -> str:
    """Each match, which ends in a bracket, as `left`, and the bracket that closes it as `right`."""
    begin = 0
    while found := opening.search(text, begin):
        depth = 1
        end = found.end()
        while end < len(text) and depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        begin = found.end()
        if not depth:
            inner = text[found.end() : end - 1]
            text = text[: found.start()] + left + inner + right + text[end:]
            begin = found.start() + len(left)
    return text


def repeating_decimal(found: re.Match) -> str:
    r"""0.1\overline{6} as a fraction."""
    whole, fixed, repeated = found.groups()
    below = 10 ** len(fixed) * (10 ** len(repeated) - 1)
    above = int(whole + fixed + repeated or 0) - int(whole + fixed or 0)
    return rf"\frac{{{above}}}{{{below}}}"


def without_thousands_commas(text: str) -> str:
    """1,234 as 1234, where no other comma and no bracket makes it a list."""
    plain = THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)
    return text if "," in plain or re.search(r"[(\[]|\\\{", text) else plain


def compact(text: str) -> str:
    r"""Without spaces, upright fonts and braces around a single character: `x^{2}` is `x^2`."""
    text = re.sub(r"\\(?:text|textrm|mathrm|operatorname)\s*\{\s*([A-Za-z]+)\s*\}", r" \1", text)
    text = re.sub(r"(\\[A-Za-z]+)\s+(?=[A-Za-z])", r"\1{}", text)
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)
    return re.sub(r"([_^])\{([\w+*-]|\\[A-Za-z]+)\}", r"\1\2", text)


# ---- units, labels, words ------------------------------------------------------------------------


class Quantity(NamedTuple):
    """An answer without its unit, and the unit."""

    value: str
    unit: frozenset[str]  # words with powers, such as {"km", "h-1"}; empty: no unit


UNIT_NAMES = {
    "m": "meter metre",
    "cm": "centimeter centimetre",
    "mm": "millimeter millimetre",
    "km": "kilometer kilometre",
    "in": "inch inche",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "g": "gram gm",
    "kg": "kilogram",
    "mg": "milligram",
    "lb": "pound",
    "oz": "ounce",
    "l": "liter litre L",
    "ml": "milliliter millilitre",
    "s": "sec second",
    "min": "minute",
    "h": "hr hour",
    "yr": "year",
    "$": "dollar usd",
    "¢": "cent",
    "€": "euro",
    "deg": "degree",
    "kw": "",
    "hz": "",
    "ev": "",
    "nm": "",
    "mol": "",
    "rad": "radian",
    "pm": "",
    "am": "",
    "F": "fahrenheit",
    "C": "celsius",
}
UNIT = {name: unit for unit, names in UNIT_NAMES.items() for name in [unit, *names.split()]}
SPEEDS = re.compile(r"(?<![A-Za-z])(?:(mph)|kph|kmh)(?![A-Za-z])")
POWERS = {"sq": 2, "square": 2, "cu": 3, "cubic": 3}
NOT_UNITS = set(
    "if and or for when where is not no odd even only otherwise but with all any every none mod "
    "iff then while both either such that exists least most more less fewer than sin cos tan cot "
    "sec csc log exp sqrt max min gcd lcm inf infinity squared cubed factorial".split()
) | set(NAMES)
IN_TEXT = r"\\(?:text(?:bf|it|rm|normal)?|mathrm|mbox|hbox|operatorname)\s*\{([^{}]*)\}"
SCALES = set(
    "dozen hundred thousand million billion trillion half halve third quarter fourth fifth tenth "
    "hundredth thousandth k".split()
)
POWER = r"(?:\s*\^\s*\{?\s*-?\d(?:\s*\})?)?"  # each space in one place: fast on long texts
TEXT_UNIT = re.compile(
    rf"(?:\s*(?:(?:/|\\cdot|\\times|\^\\circ)\s*)?{IN_TEXT}{POWER})+$"
    rf"|\s*\\frac\s*\{{\s*{IN_TEXT}{POWER}\s*\}}\s*\{{\s*{IN_TEXT}{POWER}\s*\}}$"
)
WORD_UNIT = re.compile(rf"(?<=[\d}})\s])\s*([A-Za-z]+(?:[ /]+[A-Za-z]+)*{POWER})$")
DEGREES = re.compile(r"\s*\^\\circ\s*([CFK]?)$")
CURRENCY = re.compile(
    r"^(-?)\s*(?:\\?\$|\\text\{\s*\\?\$\s*\}|(€|\\euro)|(£|\\pounds)|([¥₹₽₩]))\s*"
)
CURRENCY_BEHIND = re.compile(r"^(.*\d)\s*(?:\\text\{\s*)?([€£¥₹₽₩])(?:\s*\})?$")
CALCULATION = re.compile(r"\\(?:frac|sqrt|pi|cdot|times|div|infty)(?![A-Za-z])|\\[%$]")


def is_number(text: str) -> bool:
    r"""Whether the text holds numbers and \pi only, no variable and no list."""
    rest = CALCULATION.sub("", text)
    return bool(re.search(r"\d|\\pi|\\infty", text)) and not re.search(r"[A-Za-z,;=<>\\]", rest)


def split_unit(text: str) -> Quantity:
    r"""The answer without its unit, and the unit.

    A unit is a currency sign before a number; degrees after it; a text such as `\text{ cm}^2` at
    the end; a plain word of three or more letters, or a common abbreviation, after a number. A
    single letter without `\text` is a variable.
    """
    text = CURRENCY_BEHIND.sub(r"\2\1", text)
    currency = CURRENCY.match(text)
    if currency and is_number(text[currency.end() :]):
        sign = "€" if currency[2] else "£" if currency[3] else currency[4] or "$"
        return Quantity(currency[1] + text[currency.end() :], frozenset({sign}))
    degrees = DEGREES.search(text)
    if degrees and is_number(text[: degrees.start()]):
        return Quantity(text[: degrees.start()], frozenset({"deg", *degrees[1]}))
    for pattern in (TEXT_UNIT, WORD_UNIT):
        found = pattern.search(text)
        value = trim(text[: found.start()]) if found else ""
        words = unit_words(found[0]) if value else frozenset()
        if words and (is_number(value) or pattern is TEXT_UNIT and not value.endswith(("=", ","))):
            if pattern is TEXT_UNIT or not has_short_name(found[1]):
                return Quantity(value, words)
    return Quantity(text, frozenset())


def has_short_name(text: str) -> bool:
    """Whether a word of the text may be a variable: short, and no known unit.

    A single letter is a unit only beside a longer one, as in km/h.
    """
    words = re.findall(r"[A-Za-z]+", text)
    unknown = any(len(word) < 3 and word.lower() not in UNIT for word in words)
    return unknown or all(len(word) == 1 for word in words)


def unit_words(text: str) -> frozenset[str]:
    r"""The words of a unit in one spelling; empty if a word shows that the text is no unit.

    A word has its power behind it, negative after a slash or "per": `km/h` is {"km", "h-1"}.
    """
    if r"\frac" in text:
        text = re.sub(r"\}\s*\{", " / ", text)
    text = re.sub(rf"{FONT}|\\operatorname|\\frac|\\cdot|\\times|\\circ|\^(?=\s*\\circ)", " ", text)
    text = re.sub(r"[\s}]*\^\s*\{?\s*(-?\d)\s*\}?", r"\1", text)
    text = SPEEDS.sub(lambda found: "mi/h" if found[1] else "km/h", re.sub(r"[{}]", " ", text))
    words = re.findall(r"/|[A-Za-z]+-?\d?", text)
    if any(word.lower() in NOT_UNITS for word in words) or re.search(r"[^A-Za-z\d\s/.-]", text):
        return frozenset()
    spelled, sign, size = [], 1, 1
    for place, word in enumerate(words):
        if word in ("/", "per"):
            sign = -1
        elif word in POWERS and place < len(words) - 1:
            size = POWERS[word]
        else:
            spelled.append(spell_unit(word, sign * size))
            size = 1
    return frozenset(spelled)


def spell_unit(word: str, factor: int) -> str:
    """A unit in one spelling: singular, abbreviated, with its power times the factor.

    It is in lower case, unless it has one letter or begins with M for mega.
    """
    name, power = re.fullmatch(r"([A-Za-z]+)(-?\d?)", word).groups()
    if len(name) > 2 or len(name) == 2 and name[0] != "M":
        name = name.lower()
        if name not in UNIT and name.endswith("s") and len(name) > 2:
            name = name[:-1]
    power = int(power or 1) * factor
    return UNIT.get(name, name) + (str(power) if power != 1 else "")


def same_unit(one: frozenset[str], other: frozenset[str]) -> bool:
    """Whether one has the words of the other, and the same measures such as km and h-1.

    Fahrenheit and Celsius may be left out beside degrees.
    """
    units = [{word.rstrip("-1234567890"): word for word in unit} for unit in (one, other)]
    measures = [{u[name] for name in u if name in UNIT and name not in ("F", "C")} for u in units]
    return (one <= other or other <= one) and (not all(measures) or measures[0] == measures[1])


LABEL = re.compile(rf"(?:{FONT}\s*\{{\s*)?\(?\s*([A-J])\s*\)\s*(\}}?)\s*")


def split_label(text: str) -> tuple[str, str]:
    r"""The letter of a choice and the rest: `\textbf{(B) } 5` is ("B", "5"), `(B)` is ("B", "").

    ("", text) if the text does not begin with a capital letter in brackets, or if the brackets may
    be a product: a rest needs a font or a space before it.
    """
    label = LABEL.match(text)
    if not label or bool(label[2]) != ("{" in label[0]):
        return "", text
    rest = text[label.end() :]
    marked = label[2] or label[0][-1].isspace()
    if rest and not marked:
        return "", text
    return label[1], trim(rest)


WORDS = set("yes no true false odd even none east west north south left right up down".split())


def as_word(text: str) -> tuple[str, bool]:
    r"""The answer as words in lower case, or "", and whether it is certainly no product of letters.

    It is certain inside `\text{}`, for yes, no and the like, for several words, and from five
    letters on if one is a vowel.
    """
    plain = re.sub(rf"{FONT}\s*\{{([^{{}}]*)\}}", r"\1", text)
    plain = " ".join(re.sub(r"\\?\s+", " ", plain).split()).rstrip(".").lower()
    if not re.fullmatch(r"[a-z][a-z '-]+", plain):
        return "", False
    long = len(plain) >= 5 and re.search("[aeiou]", plain) and re.search("^.[a-z ]", text)
    return plain, bool(re.search(FONT, text) or plain in WORDS or long)


# ---- marks that the parser loses -----------------------------------------------------------------

LETTER = r"(\\[A-Za-z]+(?:\{[^{}]*\})?|[A-Za-z])"
INDEX = r"(?:_\s*(?:\{([^{}]*)\}|(\w|\\[A-Za-z]+)))?"
PRIMES = re.compile(rf"{LETTER}{INDEX}('+){INDEX}")
ORDER = re.compile(rf"(?<![\d)}}]){LETTER}{INDEX}\^\s*\{{\s*\(\s*(\w+)\s*\)\s*\}}")
INVERSE = re.compile(r"(?<![A-Za-z\\])([fghFGH])\s*\^\s*\{\s*-\s*1\s*\}\s*(?=\()")
LETTERFORM = re.compile(
    r"\\(mathcal|mathfrak|mathscr|mathds|mathbb|mathsf|mathtt)\s*\{?([A-Za-z])\}?"
)
LEIBNIZ = re.compile(
    r"\\frac\{\s*(?:d|\\partial)\s*((?:\^\{?\d\}?)?\s*\\?[A-Za-z]+)\s*\}"
    r"\{\s*(?:d|\\partial)\s*(\\?[A-Za-z]+)\s*(?:\^\{?\d\}?)?\s*\}"
)
CAPITAL_I = re.compile(r"\\(?!d?frac|sqrt)[A-Za-z]+\{[^{}]*\}|(?<![A-Za-z\\])I(?![A-Za-z])")
NO_RELATION = r"\\(?!(?:[lg]e|ne|in|notin|text)(?![A-Za-z]))[A-Za-z]+(?![A-Za-z])"
VECTOR = r"\\(?:vec|mathbf|boldsymbol|bm)"
INVERTED = r"[A-Z]\s*\^\s*\{\s*-\s*1\s*\}"
LITERAL = re.compile(
    r"'|\^T|!\s*!|\\ldots|\\(?:nabla|angle|triangle|parallel|perp|sim|cong|simeq|subset|subseteq"
    r"|supset|supseteq|otimes|oplus|rtimes|ltimes|[pb]?mod|mid|nmid)(?![A-Za-z])"
    r"|(?<![_^\d])\d+\s+\d"  # numbers without a sign between them
    r"|[A-Za-z]\^\\circ"  # the interior of a set, degrees of a variable
    r"|:[^:]*:|\d/\d+/\d"  # 3:4:5, a date
    r"|^[A-Z]{3,}$"  # an order of letters
    r"|[A-Z]\}?\s*\["  # E[X], Z[i]
    # [x] may be a floor, [x+1] is a sum in brackets
    r"|(?<!\\sqrt)\[(?!\s*\\begin)(?=[^][(),+-]*\])[^][(),A-Za-z]*[A-Za-z]"
    r"|(?<![\^\d])\d+\s*_|\\(?:(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|ln|exp)\s*_"  # 12_5 + 1
    rf"|{VECTOR}\s*\{{\w\}}(?:_\{{?\w\}}?)?\s*\\times|\\times\s*{VECTOR}"
    rf"|{INVERTED}\s*[A-Z]|(?<![A-Za-z])[A-Z]\s*{INVERTED}"  # matrices do not commute
    r"|(?<![\d.}])\d+/\d+\s*(?:(?!\s*(?:or|and)\b)[A-Za-z(]|\\(?:pi|sqrt|ln|sin|cos|frac)\b)"
    r"|\\\{[^{}]*\\\{|\([^()]*\\\{"  # sets in a set or in a tuple
    rf"|\\\{{(?:{NO_RELATION}|[^,={{}}<>|:\\A-Za-z])*[A-Za-z]"  # the fractional part of a variable
    rf"(?:{NO_RELATION}|[^,={{}}<>|:\\])*\\\}}"
)


INDEXED_SUM = re.compile(r"\\(?:sum|prod)\s*_\{\s*([A-Za-z])\s*=.*_(?:\1|\{[^{}]*\1)", re.DOTALL)


def is_literal(text: str) -> bool:
    r"""Whether the text has marks for which the parser has no meaning. Compare such text as text.

    They are the marks of LITERAL, sums over an index of a variable, such as sum_i x_i, and lists
    of equations that name one of several variables twice: x=1, y=2 or x=2, y=1. LITERAL
    also has cross products, products with the inverse of a matrix, the fractional part \{x\}, and
    1/2x, which may be x/2 or 1/(2x).
    """
    names = set(re.findall(r"([A-Za-z])\s*=", text))
    repeated = len(names) > 1 and len(re.findall(r"[A-Za-z]\s*=", text)) > len(names)
    return bool(repeated or LITERAL.search(text) or INDEXED_SUM.search(text))


def for_parser(text: str) -> str:
    r"""Marks that the parser ignores become part of a name, so that they count.

    f' and f'' become names of their own; so do f^{(3)}, the inverse f^{-1}, script letters, dy/dx,
    Gamma and gamma (which the parser takes for Euler's constant), I (for the imaginary unit), and
    gcd and lcm of variables (which sympy takes for polynomials).
    """
    text = PRIMES.sub(
        lambda m: named(m[1], first(m[2], m[3], m[5], m[6]), "prime" * len(m[4])), text
    )
    text = ORDER.sub(lambda m: named(m[1], first(m[2], m[3]), f"order{m[4]}"), text)
    text = INVERSE.sub(lambda m: named(m[1], "", "inverse"), text)
    text = LEIBNIZ.sub(lambda m: rf"\hat{{d{letters(m[1])}d{letters(m[2])}}}", text)
    text = LETTERFORM.sub(letterform, text)
    if re.search(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])", text):
        text = re.sub(r"(\d+(?:\.\d+)?)\s*\^\s*\\circ", r"(\1 \\cdot \\frac{\\pi}{180})", text)
    text = re.sub(r"\\([gG]amma)(?![A-Za-z])(?!\s*\()", r"\\hat{\1}", text)
    text = CAPITAL_I.sub(lambda m: m[0] if m[0] != "I" else r"\hat{I}", text)
    if re.search(r"\\(?:gcd|lcm)[^A-Za-z]*[A-Za-z]", text):
        text = re.sub(r"\\(gcd|lcm)\s*(?=\()", r"g_{\1}", text)
    return text


def first(*groups: str | None) -> str:
    """The groups of an index that were found, one after the other."""
    return "".join(group for group in groups if group)


def named(letter: str, index: str, mark: str) -> str:
    """A letter whose index holds the mark."""
    return f"{letter}_{{{letters(index)}{mark}}}"


def letters(text: str) -> str:
    """The letters and digits of a text."""
    return re.sub(r"[^A-Za-z0-9]", "", text)


def letterform(found: re.Match) -> str:
    r"""A script or blackboard letter as a name. \mathbb{R}, Z, N, Q and C stay: they are sets."""
    if found[1] == "mathbb" and found[2] in "RZNQC":
        return rf"\mathbb{{{found[2]}}}"
    return rf"\hat{{{found[1]}{found[2]}}}"
