r"""Whether two answers to a mathematical problem are equal. docs/answers.md has the rules.

Answers are compared as text, as numbers, and then with math-verify, which parses LaTeX and compares
sympy expressions. The parser and the rules for sets, intervals and equations are math-verify's. How
two values are compared is ours, because math-verify compares with an absolute tolerance:

    exact numbers                   must be equal
    a decimal and another number    must agree in six digits
    formulas                        must agree at points for their variables, to 40 digits

Model text is never evaluated as code. A comparison may take long: see grader.Grader.
"""

import functools
import logging
import re
import zlib
from collections import Counter
from fractions import Fraction

from support.notation import (
    SCALES,
    Quantity,
    as_word,
    compact,
    for_parser,
    is_literal,
    same_unit,
    split_label,
    split_unit,
    tidy,
    trim,
    without_thousands_commas,
)

NUMBER = re.compile(r"[+-]?(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})")
BASE = re.compile(r"\(?(\d[0-9A-F]*)\)?_(?:\{(\d+)\}|(\d+))")
CLOSED_AT_INFINITY = re.compile(r"\[-\\infty|\\infty\]")
MODULUS = re.compile(r"\|[^|]*(?<![A-Za-z\\])[zw](?![A-Za-z])[^|]*\|")
BARE_LOG = r"\\log(?![A-Za-z])(?!\s*_)"
WORD = r"\\text\s*\{{\s*{0}\s*\}}|(?<![A-Za-z\\]){0}(?![A-Za-z])|\\l{0}\b"
OR, AND = re.compile(WORD.format("or")), re.compile(WORD.format("and"))
RELATION = re.compile(
    r"[=<>]|\\(?:[lg]e|ne|in|approx|equiv|sim|cong|subset|subseteq|to)(?![A-Za-z])"
)
NAMED = re.compile(r"\\?[A-Za-z]+(?:\{\w\})?(?:_(?:\w|\{\w+\}))?'*(?:\([\w, ]*\))?\s*=\s*([^=<>]+)")
PERCENT = re.compile(r"-?[^-+,%=<>]+\\%")
ROUNDED = 5e-6  # relative difference of a number and its first six digits


def equal_answers(gold: str, answer: str) -> bool:
    """Whether the answer equals the gold answer. Either may be any text."""
    numbers = plain_number(gold), plain_number(answer)
    if None not in numbers:  # most answers
        return numbers[0] == numbers[1]
    if same_word(trim(gold), trim(answer)):
        return True
    gold, answer = tidy(gold), tidy(answer)
    if not gold or not answer:
        return False
    if same_text(gold, answer):
        return True
    gold_label, gold_rest = split_label(gold)
    label, rest = split_label(answer)
    if gold_label and label:
        return gold_label == label
    if gold_label or label:
        letter, other = (gold_label, answer) if gold_label else (label, gold)
        if other == letter:
            return True
        gold, answer = gold_rest, rest
    pair = without_name(gold, answer), without_name(answer, gold)
    return all(pair) and same_quantity(*map(split_unit, pair))


def without_name(text: str, other: str) -> str:
    """x = 5 as 5, where the other answer has no name or relation."""
    named = NAMED.fullmatch(text)
    return named[1] if named and not RELATION.search(other) else text


def same_text(gold: str, answer: str) -> bool:
    """Whether two tidy answers are the same text, up to spaces and braces."""
    return compact(gold) == compact(answer) or same_word(gold, answer)


def same_word(gold: str, answer: str) -> bool:
    """Whether two answers are the same words, in any case."""
    gold_word, gold_certain = as_word(gold)
    word, certain = as_word(answer)
    return bool(word) and word == gold_word and (certain or gold_certain)


def same_quantity(gold: Quantity, answer: Quantity) -> bool:
    """Whether values are equal, and units where both have one."""
    if gold.unit and answer.unit and not same_unit(gold.unit, answer.unit):
        return False
    if (gold.unit ^ answer.unit) & SCALES:  # five and five million
        return False
    for one, other in ((gold, answer), (answer, gold)):  # 45 degrees and 45 percent
        if one.unit and r"\%" in other.value and r"\%" not in one.value:
            return False
    values = gold.value, answer.value
    if same_text(*values):
        return True
    numbers = [plain_number(without_thousands_commas(value)) for value in values]
    if None not in numbers:
        return numbers[0] == numbers[1]
    bases = [BASE.fullmatch(compact(value)) for value in values]
    if any(bases):
        return same_in_base(values, bases)
    if any(is_literal(for_parser(value)) for value in values):
        return False
    if not (same_brackets(*values) and same_signs(*values) and same_repeats(*values)):
        return False
    return any(answer_comparison()(*reading) for reading in readings(*values))


def plain_number(text: str) -> Fraction | None:
    """The value of a number in digits; None for anything else."""
    return Fraction(text) if NUMBER.fullmatch(text) else None


def same_in_base(values: tuple[str, str], bases: list[re.Match | None]) -> bool:
    """Numerals with a base as index: equal digits. One of the two may leave the base out."""
    numerals = [base[1] if base else compact(value) for base, value in zip(bases, values)]
    radices = {base[2] or base[3] for base in bases if base}
    if None in bases and not numerals[0].isdigit():  # 4A_7 and 4A: the letter is a variable
        return False
    return numerals[0] == numerals[1] and len(radices) == 1


def same_brackets(gold: str, answer: str) -> bool:
    r"""False if one is a list in ( ) and the other in [ ] or \{ \}, also at an infinite end."""
    brackets = {outer_brackets(gold), outer_brackets(answer)} - {""}
    ends = [len(CLOSED_AT_INFINITY.findall(compact(text))) for text in (gold, answer)]
    return len(brackets) < 2 and ends[0] == ends[1]


def same_signs(gold: str, answer: str) -> bool:
    r"""False if one is an equation and the other an approximation or a congruence."""
    signs = [set(re.findall(r"=|\\(?:approx|equiv|propto)\b", text)) for text in (gold, answer)]
    return not all(signs) or bool(signs[0] & signs[1])


def same_repeats(gold: str, answer: str) -> bool:
    """False if an item of a list without brackets occurs more often than in the other list."""
    lists = [Counter(items(compact(without_thousands_commas(text)))) for text in (gold, answer)]
    times = set(lists[0].values()), set(lists[1].values())
    return lists[0] == lists[1] or (times[0] == times[1] and len(times[0]) == 1)


def items(text: str) -> list[str]:
    """The parts between the commas that are in no bracket."""
    depth, begin, parts = 0, 0, []
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(text[begin:place])
            begin = place + 1
    return [*parts, text[begin:]]


def outer_brackets(text: str) -> str:
    """The kind of brackets around a list; "" if there is no list or no bracket around all of it."""
    text = text.replace("\\{", "⟦").replace("\\}", "⟧")
    pairs = {"(": ")", "[": "]", "⟦": "⟧"}
    if "," not in text or text[0] not in "([⟦" or text[-1] not in ")]⟧":
        return ""
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "([⟦") - (character in ")]⟧")
        if depth == 0 and place < len(text) - 1:
            return ""
    closed = text[-1] == pairs[text[0]]
    return text[0] if closed else text[0] + text[-1]


def readings(gold: str, answer: str):
    r"""The pairs to compare: the answers as they are, then with other readings of their notation.

    Where one side says \log and the other \ln, \log may be natural. Where one list has spaces
    after its commas, the commas of the other are not those of thousands.
    """
    pair = without_thousands_commas(gold), without_thousands_commas(answer)
    yield pair
    if any(r"\ln" in text for text in pair) and any(re.search(BARE_LOG, text) for text in pair):
        yield tuple(re.sub(BARE_LOG, r"\\ln", text) for text in pair)
    if ", " in gold + answer and "," in gold and "," in answer:
        yield tuple(re.sub(r",\s*", ", ", text) for text in (gold, answer))
    signs = tuple(both_signs(text) for text in pair)
    if signs != pair:
        yield signs


def both_signs(text: str) -> str:
    r"""Each item of a list that has one \pm as two items: 1 \pm x is 1 + x, 1 - x."""
    inner = re.fullmatch(r"\\\{(.*)\\\}", text)
    if inner:
        return rf"\{{{both_signs(inner[1])}\}}"
    found = []
    for item in items(text):
        one = item.count(r"\pm") == 1
        found += [re.sub(r"\\pm\b", sign, item) for sign in "+-"] if one else [item]
    return ",".join(found)


class AnswerComparison:
    """Compares answers with math-verify.

    It replaces four functions of math_verify.grader in this process, and never restores them.

    sympy turns strings into expressions with `eval`, also the number tokens of an answer. While
    answers are compared, it accepts names and numbers only. The LaTeX grammar of math-verify gives
    it nothing else, but safety must not depend on a grammar.
    """

    # A name, or a number as sympy writes it.
    harmless = re.compile(r"[A-Za-z]*|([\d.\s+\-*/()eE]|sqrt|exp|log|pi)*", re.ASCII)

    def __init__(self):
        import latex2sympy2_extended as parser
        import math_verify
        import sympy.parsing.sympy_parser as sympy_parser
        from math_verify import grader

        # The log warns that the library's time limit is off; the Grader has its own.
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        self.verify = math_verify.verify
        self.equation, self.relation = grader.Eq, (grader.Relational, grader.And)
        self.set = grader.Set
        self.may_be_complex = grader.should_treat_as_complex
        self.last_equation = math_verify.parser.get_last_eq
        self.latex2sympy = parser.latex2sympy2.latex2sympy
        self.normalize_latex = parser.latex2sympy2.normalize_latex
        self.options = parser.latex2sympy2.ConversionConfig(lowercase_symbols=False)
        self.spelling = parser.latex2sympy2.NormalizationConfig(
            basic_latex=True, malformed_operators=True, nits=True, units=False, boxed="none"
        )
        for name, function in (
            ("sympy_numeric_eq", same_value),
            ("sympy_symbolic_eq", never_equal),
            ("sympy_compare_symbols", same_symbol),
            ("sympy_solve_and_compare", same_solutions),
        ):
            getattr(grader, name)  # AttributeError if another version has other names
            setattr(grader, name, function)
        self.running = False  # a custom reward may use sympy without the restriction
        self.sympy_parse_expr = sympy_parser.parse_expr
        sympy_parser.parse_expr = self.parse_expr

    def __call__(self, gold: str, answer: str) -> bool:
        """Whether two tidy answers are equal as expressions."""
        self.running = True
        try:
            real = not any(self.may_be_complex(t) or MODULUS.search(t) for t in (gold, answer))
            pair = [self.parse(gold, real), self.parse(answer, real)]
            return self.same(*pair) or (not real and self.same(*map(imaginary, pair)))
        finally:
            self.running = False

    def same(self, gold, answer) -> bool:
        """math-verify's verdict on two expressions. Intervals and inequalities are comparable.

        A value does not equal an equation, unless the equation only names it: x = 5, f(2) = 5.
        """
        gold, answer = short_chain(gold), short_chain(answer)
        names = common_name(gold), common_name(answer)
        if None not in names and names[0] != names[1]:
            return False
        gold, answer = without_common_name(gold), without_common_name(answer)
        if has_names(gold) != has_names(answer):
            gold, answer = separate(gold), separate(answer)
        if has_names(gold) != has_names(answer):
            return False
        gold, answer = without_arguments(gold, answer), without_arguments(answer, gold)
        if isinstance(gold, self.equation) and isinstance(answer, self.equation):
            if is_identity(gold) or is_identity(answer):
                return same_sides(gold, answer)
        elif isinstance(gold, self.equation) and not isinstance(answer, self.relation):
            if not is_name(gold.lhs):
                return False
            gold = gold.rhs
        sets = [solution_set(expression) for expression in (gold, answer)]
        if None not in sets and not trivial(sets[0]):
            return gold.free_symbols == answer.free_symbols and sets[0] == sets[1]
        if sets[0] is not None and isinstance(answer, self.set):
            gold = sets[0]
        elif sets[1] is not None and isinstance(gold, self.set):
            answer = sets[1]
        options = dict(timeout_seconds=None, allow_set_relation_comp=True)
        return self.verify([gold], [answer], **options)

    def parse(self, answer: str, real: bool):
        """The sympy expression of an answer; its text if the parser does not understand it."""
        from sympy import Mul, Rational, UnevaluatedExpr
        from sympy.logic.boolalg import BooleanAtom

        joined, texts = split_conditions(answer)
        parts = [self.parse(text, real) for text in texts]
        if parts and all(solution_set(part) is not None for part in parts):
            whole = joined(*parts, evaluate=False)
            whole._unsorted_args = parts  # as in the And of a chain
            return whole
        if PERCENT.fullmatch(answer):
            number = self.parse(answer[:-2], real)
            if getattr(number, "is_number", False):
                return Mul(number, UnevaluatedExpr(Rational(1, 100)), evaluate=False)
        text = self.normalize_latex(for_parser(answer), self.spelling)
        for part in dict.fromkeys((text, self.last_equation(text))):
            try:
                found = self.latex2sympy(
                    part, is_real=real, normalization_config=None, conversion_config=self.options
                )
            except Exception:  # the parser raises many types
                continue
            if not isinstance(found, (list, BooleanAtom)):
                return found
        return compact(answer)

    def parse_expr(self, text, *args, **kwargs):
        """sympy's parse_expr; while answers are compared, only for harmless text."""
        if self.running and not self.harmless.fullmatch(text):
            raise ValueError("not a number")
        return self.sympy_parse_expr(text, *args, **kwargs)


@functools.cache
def answer_comparison() -> AnswerComparison:
    """The only AnswerComparison of the process: it patches sympy, and its imports take seconds."""
    return AnswerComparison()


# ---- values --------------------------------------------------------------------------------------

DIGITS = 60
AGREE = 1e-40  # relative difference of equal formulas
LARGEST = 20_000  # digits of an integer that is still calculated exactly


def never_equal(gold, answer) -> bool:
    """Replaces a comparison of math-verify that same_value() has already made."""
    return False


def same_symbol(gold, answer) -> bool:
    """A name and any expression: the same name, or the same value."""
    return gold == answer or same_value(gold, answer)


def short_chain(expression):
    """S = 1 + 2 = 3 as S = 3, if every member but the first is a number.

    A chain of variables, such as a = b = c, becomes a tuple of its equations.
    """
    from sympy import Eq, Tuple
    from sympy.logic.boolalg import And

    parts = getattr(expression, "_unsorted_args", ())
    if not isinstance(expression, And) or not all(isinstance(part, Eq) for part in parts):
        return expression
    if any(part.rhs.free_symbols for part in parts):
        return Tuple(*parts)
    return Eq(parts[0].lhs, parts[-1].rhs, evaluate=False)


def is_name(expression) -> bool:
    """Whether a left side only names the right one: x, f(2), (x, y)."""
    from sympy import Tuple

    parts = expression.args if isinstance(expression, Tuple) else (expression,)
    return all(part.is_Symbol or part.is_Function for part in parts)


def common_name(expression):
    """x, if the expression is a list x = 2, x = 3; otherwise None."""
    from sympy import Eq, FiniteSet

    parts = expression.args if isinstance(expression, FiniteSet) else ()
    names = {part.lhs if isinstance(part, Eq) else None for part in parts}
    name = names.pop() if len(names) == 1 else None
    return name if getattr(name, "is_Symbol", False) else None


def without_common_name(expression):
    """The list x = 2, x = 3 as the list 2, 3."""
    from sympy import FiniteSet

    if common_name(expression) is None:
        return expression
    return FiniteSet(*[part.rhs for part in expression.args])


def separate(expression):
    """(x, y) = (1, 2) as the list x = 1, y = 2."""
    from sympy import Eq, FiniteSet, Interval, Tuple

    if not isinstance(expression, Eq) or not isinstance(expression.lhs, Tuple):
        return expression
    values = expression.rhs  # the parser takes (1, 2) for an interval
    is_open = isinstance(values, Interval) and values.left_open and values.right_open
    values = values.args[:2] if is_open else values.args
    if len(values) != len(expression.lhs):
        return expression
    return FiniteSet(*[Eq(*pair, evaluate=False) for pair in zip(expression.lhs, values)])


def without_arguments(expression, other):
    """y(x) = 2 x as y = 2 x, if the other expression is an equation for y."""
    from sympy import Eq
    from sympy.core.function import AppliedUndef

    if not isinstance(expression, Eq) or not isinstance(other, Eq):
        return expression
    if not isinstance(expression.lhs, AppliedUndef) or not other.lhs.is_Symbol:
        return expression
    is_same = str(expression.lhs.func) == other.lhs.name
    is_same = is_same and all(argument.is_Symbol for argument in expression.lhs.args)
    return Eq(other.lhs, expression.rhs, evaluate=False) if is_same else expression


def has_names(expression) -> bool:
    """Whether the expression is a list with equations, such as x = 2, y = 3."""
    from sympy import Eq, FiniteSet, Tuple

    is_list = isinstance(expression, (FiniteSet, Tuple))
    return is_list and any(isinstance(part, Eq) for part in expression.args)


def split_conditions(text: str) -> tuple:
    """(Or, parts) of "x < 2 or x > 3"; (And, parts) likewise; (None, []) without inequalities."""
    from sympy import And, Or

    for kind, word in ((Or, OR), (And, AND)):
        parts = word.split(text)
        if len(parts) > 1:
            relations = all(re.search(r"[<>]|\\(?:[lg]e|ne) ", part) for part in parts)
            return (kind, parts) if relations else (None, [])
    return None, []


def solution_set(expression):
    """The numbers that satisfy inequalities in one variable; None for anything else."""
    from sympy import And, Eq, Intersection, Or, Union
    from sympy.core.relational import Relational

    if len(getattr(expression, "free_symbols", ())) != 1:
        return None
    if isinstance(expression, (And, Or)):
        parts = [solution_set(part) for part in expression.args]
        whole = Union if isinstance(expression, Or) else Intersection
        return None if None in parts else whole(*parts)
    if not isinstance(expression, Relational) or isinstance(expression, Eq):
        return None
    try:
        return expression.as_set()
    except Exception:  # sympy raises many types for what it cannot solve
        return None


def is_identity(equation) -> bool:
    """Whether an equation has no variables, or holds for all of their values."""
    from sympy import Expr

    if not isinstance(equation.lhs, Expr) or not isinstance(equation.rhs, Expr):
        return False
    return not equation.free_symbols or same_value(equation.lhs, equation.rhs)


def same_sides(gold, answer) -> bool:
    """Whether two equations have the same left and right sides, or each other's."""
    sides = (answer.lhs, answer.rhs), (answer.rhs, answer.lhs)
    return any(same_value(gold.lhs, a) and same_value(gold.rhs, b) for a, b in sides)


def trivial(numbers) -> bool:
    """Whether a set holds all real numbers or none: many different inequalities have it."""
    from sympy import EmptySet, Reals

    return numbers in (EmptySet, Reals)


def same_solutions(gold, answer, float_rounding, precision) -> bool:
    """Whether two equations, or two inequalities, have the same solutions.

    Equations in one variable are solved. Else both sides may differ by a constant factor only.
    """
    from math_verify.grader import sympy_expr_eq
    from sympy import Eq, FiniteSet, solve

    if gold.free_symbols != answer.free_symbols or not gold.free_symbols:
        return False
    kinds = {type(gold), type(answer)}
    if len(gold.free_symbols) == 1 and kinds == {Eq}:
        solutions = [FiniteSet(*solve(part, *gold.free_symbols)) for part in (gold, answer)]
        return bool(solutions[0]) and sympy_expr_eq(*solutions, float_rounding, precision)
    ratio = (gold.lhs - gold.rhs) / (answer.lhs - answer.rhs)
    names = sorted(ratio.free_symbols, key=lambda symbol: symbol.name)
    factors = [value_at(stand_in(exact(ratio)), point) for point in points_for(names)]
    if (
        None in factors
        or not factors[0]
        or not all(close(factor, factors[0], AGREE) for factor in factors)
    ):
        return False
    if kinds == {Eq}:
        return True
    return factors[0].imag == 0 and (type(gold) is type(answer)) == (factors[0].real > 0)


def same_value(gold, answer, *unused) -> bool:
    """Whether two expressions or matrices have the same value at every point that is tried."""
    from sympy import MatrixBase, MatrixExpr

    if isinstance(gold, (MatrixBase, MatrixExpr)) or isinstance(answer, (MatrixBase, MatrixExpr)):
        return same_matrix(gold.doit(), answer.doit())
    percents = [percentage(expression) for expression in (gold, answer)]
    if (percents[0] is None) != (percents[1] is None):
        number, other = (percents[0], answer) if percents[1] is None else (percents[1], gold)
        if abs(number) >= 1 and same_value(number, other):
            return True  # the sign may be left out
    numbers = [exact_number(expression) for expression in (gold, answer)]
    rounded = [has_decimal(expression) for expression in (gold, answer)]
    if None not in numbers:
        if numbers[0] == numbers[1] or rounded[0] == rounded[1]:
            return numbers[0] == numbers[1]
    return same_at_points(gold, answer, ROUNDED if rounded[0] != rounded[1] else AGREE)


def same_matrix(gold, answer) -> bool:
    """Equal shapes and equal entries."""
    if getattr(gold, "shape", None) != getattr(answer, "shape", None):
        return False
    return all(same_value(a, b) for a, b in zip(gold.flat(), answer.flat()))


def percentage(expression):
    """The number before a percent sign; None without one."""
    from sympy import Mul, Rational, UnevaluatedExpr

    is_percent = isinstance(expression, Mul) and len(expression.args) == 2
    if is_percent and expression.args[1] == UnevaluatedExpr(Rational(1, 100)):
        return expression.args[0] if expression.args[0].is_number else None
    return None


def has_decimal(expression) -> bool:
    """Whether the expression holds a number with a decimal point."""
    from sympy import Float

    return expression.has(Float)


def exact(expression):
    """The expression with its decimals as fractions, as they were typed, and without percents."""
    from sympy import Float, Rational, UnevaluatedExpr

    values = {number: Rational(str(number)) for number in expression.atoms(Float)}
    values |= {part: part.args[0] for part in expression.atoms(UnevaluatedExpr)}
    return expression.xreplace(values)


def exact_number(expression):
    """The rational number that an expression is; None if it is none, or if it is huge."""
    from sympy import Abs, log

    if expression.free_symbols:
        return None
    expression = exact(expression)
    try:
        if not expression.is_Rational:
            size = Abs(log(Abs(expression.evalf(15)), 10)).evalf(15)
            if not (size.is_number and size < LARGEST):
                return expression if expression.is_zero else None
            expression = expression.doit()
    except (ArithmeticError, AttributeError, TypeError, ValueError, NotImplementedError):
        return None
    return expression if expression.is_Rational else None


def same_at_points(gold, answer, tolerance: float) -> bool:
    """Whether two expressions agree at points with positive and negative values of the variables.

    Points where neither is real do not count, unless the imaginary unit occurs. z and w are complex
    beside a modulus. If no point can be calculated, the expressions must be equal after doit().
    """
    from sympy import Abs, I

    pair = [stand_in(exact(expression)) for expression in (gold, answer)]
    names = sorted({s for e in pair for s in e.free_symbols}, key=lambda s: s.name)
    wide = [s for s in names if not s.is_real and s.name[0] in "zw"]
    wide = wide if any(expression.has(Abs) for expression in pair) else []
    is_complex = bool(wide) or any(expression.has(I) for expression in pair)
    pair = pair if is_complex else [with_real_roots(expression) for expression in pair]
    counted = []
    for signs, point in enumerate(points_for(names)):
        point |= {name: point[name] + I for name in wide}
        values = [value_at(expression, point) for expression in pair]
        if None in values:
            continue
        if not close(*values, tolerance):
            if is_complex or signs == 0 or any(abs(v.imag) < AGREE for v in values):
                return False
            continue
        counted.append(point)
    if counted and tolerance == AGREE:
        return not certainly_differ(*pair, counted[0])
    return bool(counted) or pair[0].doit() == pair[1].doit()


def with_real_roots(expression):
    """The expression with real cube roots, fifth roots and so on of negative numbers."""
    from sympy import Abs, Pow, sign

    values = {}
    for power in expression.atoms(Pow):
        base, exponent = power.args
        if exponent.is_Rational and exponent.q % 2 and exponent.q > 1:
            values[power] = sign(base) ** (exponent.p % 2) * Abs(base) ** exponent
    return expression.xreplace(values)


def certainly_differ(gold, answer, point) -> bool:
    """Whether the difference of two values that agree in 40 digits is certainly not 0.

    It may be tiny beside a large part that both have: 1 + 2^{-1000} and 1 + 2^{-2000}.
    """
    from sympy import expand

    rest = expand(gold - answer)
    value = value_at(rest, point) if rest != 0 else 0
    return bool(value)


def points_for(names: list) -> list[dict]:
    """Points for variables: all positive, all negative, then with both signs.

    Any two variables have different signs at two points, each of them positive once: |a| b is not
    a |b|.
    """
    if not names:
        return [{}]
    places = range(len(names))
    negative = [[False for _ in places], [True for _ in places]]
    for bit in range(max(1, (len(names) - 1).bit_length())):
        negative += [[(i >> bit) % 2 == parity for i in places] for parity in (0, 1)]
    return [
        {name: coordinate(name.name, number, minus) for name, minus in zip(names, signs)}
        for number, signs in enumerate(negative)
    ]


def coordinate(name: str, number: int, negative: bool):
    """A fraction between 0.3 and 3.3, or below 0, that depends on the name and the number."""
    from sympy import Rational

    size = Rational(3001 + zlib.crc32(f"{number} {name}".encode()) % 30011, 10007)
    return -size if negative else size


def stand_in(expression):
    """The expression with variables in place of what has no value at a point.

    These are unknown functions, their derivatives, and sums, products, limits and integrals that
    depend on a variable and that sympy cannot calculate.
    """
    from sympy import Derivative, Integral, Limit, Product, Sum, Symbol, oo
    from sympy.core.function import AppliedUndef

    values = {}
    for part in expression.atoms(Sum, Product, Limit, Integral, Derivative):
        infinite = isinstance(part, Sum) and part.has(oo)  # evalf() would take seconds
        unknown = part.has(AppliedUndef)
        found = part.doit() if part.free_symbols or infinite or unknown else part
        left = found.has(Sum, Product, Limit, Integral, Derivative)
        if left and (found.free_symbols or unknown):
            found = Symbol(f"value of {part}")
        elif isinstance(part, Derivative) and not found.free_symbols:
            found = Symbol(f"value of {part}")
        values[part] = found
    expression = expression.xreplace(values)
    unknown = expression.atoms(AppliedUndef)
    return expression.xreplace({part: Symbol(f"value of {part}") for part in unknown})


def value_at(expression, point):
    """The value as an mpmath number of 60 digits; None if it cannot be calculated.

    A result that is rounding noise is 0: it changes with the number of digits.
    """
    import mpmath

    values = []
    for digits in (DIGITS, DIGITS + 30):
        found = expression.evalf(digits, subs=point, maxn=400)
        try:
            with mpmath.workdps(digits):
                values.append(mpmath.mpmathify(found))
        except TypeError:  # not a number
            return None
    if not all(mpmath.isfinite(value) for value in values):
        return None
    with mpmath.workdps(DIGITS):
        if abs(values[0] - values[1]) > AGREE * abs(values[1]):
            return mpmath.mpc(0) if abs(values[1]) < 1e-50 else None
        return mpmath.mpc(values[1])


def close(a, b, tolerance: float) -> bool:
    """Whether two numbers differ by at most a share of the larger one."""
    return abs(a - b) <= tolerance * max(abs(a), abs(b))


def imaginary(expression):
    """The expression with i as the imaginary unit; text stays."""
    from sympy import Basic, I

    if not isinstance(expression, Basic):
        return expression
    letters = {s: I for s in expression.free_symbols if s.name == "i"}
    try:
        return expression.xreplace(letters)
    except (TypeError, ValueError):  # i is the index of a sum
        return expression
