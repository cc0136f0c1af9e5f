"""Plain arithmetic, parsed and computed without `eval`.

sympy's own parser for plain expressions ends in Python's `eval`. Here the text is parsed into a syntax tree, of which
only numbers and five operators are accepted, and computed in exact rational numbers of bounded size.
"""

from __future__ import annotations

import ast
from fractions import Fraction

MAX_CHARACTERS = 500
MAX_EXPONENT = 1_000
MAX_BITS = 20_000
"""Of a numerator or denominator: about 6,000 decimal digits."""

_SPELLINGS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "^": "⁑"})


def arithmetic(text: str) -> Fraction:
    """The value of an expression of numbers, ``+ - * / ^ **`` and parentheses.

    Raises:
        ValueError: anything else, too long, too large, or without a value (a division by zero).

    Example: ``arithmetic("3*(1/2+1)") == Fraction(9, 2)``.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{len(text)} characters, at most {MAX_CHARACTERS} are read")
    source = text.strip().translate(_SPELLINGS).replace("⁑", "**").replace("\n", " ")
    try:
        return _value(ast.parse(source, mode="eval").body, source)
    except (SyntaxError, RecursionError, MemoryError, ZeroDivisionError) as error:
        raise ValueError(f"not an expression with a value: {error}") from error


def _value(node: ast.expr, source: str) -> Fraction:
    if isinstance(node, ast.Constant):
        # From the source, since Python reads 0.1 as a binary fraction.
        literal = ast.get_source_segment(source, node) or ""
        if literal.isascii() and literal.replace(".", "", 1).isdigit():
            return Fraction(literal)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand, source)
        return -value if isinstance(node.op, ast.USub) else value
    elif isinstance(node, ast.BinOp):
        return _bounded(_combine(node.op, _value(node.left, source), _value(node.right, source)))
    raise ValueError("only numbers, + - * / ^ and parentheses are read")


def _combine(op: ast.operator, left: Fraction, right: Fraction) -> Fraction:
    if isinstance(op, ast.Add):
        return left + right
    if isinstance(op, ast.Sub):
        return left - right
    if isinstance(op, ast.Mult):
        return left * right
    if isinstance(op, ast.Div):
        return left / right
    if isinstance(op, ast.Pow):
        if right.denominator != 1 or abs(right) > MAX_EXPONENT:
            raise ValueError(f"the exponent is not a whole number up to {MAX_EXPONENT}")
        # Refused before it is computed: the result has at most this many bits.
        if max(left.numerator.bit_length(), left.denominator.bit_length()) * abs(int(right)) > MAX_BITS:
            raise ValueError(f"a number of more than {MAX_BITS} bits")
        return Fraction(left ** int(right))
    raise ValueError("only + - * / and ^ are read")


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise ValueError(f"a number of more than {MAX_BITS} bits")
    return value
