"""Judge the texts of an exported program: sizes are arithmetic, names are identifiers.

size = numbers, symbols (s0, u3), + - * / , and functions of a list; it is never evaluated
"""

from __future__ import annotations

import keyword
import re
from typing import Any

from rewrite.errors import CheckpointError

_SYMBOL = re.compile(r"[a-z]+\d{1,9}")
_TOKEN = re.compile(r"'?[A-Za-z_]\w*'?|\d{1,19}(?!\d)|[\s()+\-/,<>=!&|~%]|\*(?!\*)")
_SIZE_WORDS = frozenset(
    {
        *("Symbol", "Integer", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Mod", "Eq", "Ne"),
        *("Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "FloorDiv", "ModularIndexing", "PythonMod"),
        *("CleanDiv", "CeilDiv", "Where", "CeilToInt", "FloorToInt", "IntTrueDiv", "ToFloat"),
        *("TruncToInt", "RoundToInt", "positive", "nonnegative", "integer", "True", "False"),
        *("oo", "int_oo", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan"),
        *("Equality", "Unequality", "PythonFloorDiv", "floor", "ceiling", "negative", "evaluate"),
    }
)
_LONGEST_SIZE, _LARGEST_EXPONENT = 2000, 8


def check_size(text: str) -> None:
    """Raise CheckpointError unless `text` is arithmetic on numbers and symbols."""
    position = 0
    while len(text) <= _LONGEST_SIZE and position < len(text):
        match = _TOKEN.match(text, position)
        word = match[0].strip("'") if match else ""
        if match is None or not (
            word in _SIZE_WORDS
            or _SYMBOL.fullmatch(word)
            or not (word[:1].isalpha() or word.startswith("_"))
        ):
            break
        position = match.end()
    exponents = re.findall(r"Pow\([^,]*,\s*(?:Integer\()?(\w+)", text)
    if position < len(text) or not all(_is_small(found) for found in exponents):
        raise CheckpointError(f"holds the size {text[:80]!r}")


def _is_small(text: str) -> bool:
    return text.isdigit() and int(text) <= _LARGEST_EXPONENT


def identifier(name: Any) -> str:
    """Return `name` if it can stand in source code as a name, or raise CheckpointError."""
    if not (isinstance(name, str) and name.isidentifier() and name.isascii()):
        raise CheckpointError(f"holds a graph with the name {name!r}")
    if keyword.iskeyword(name):
        raise CheckpointError(f"holds a graph with the name {name!r}, a word of Python")
    return name
