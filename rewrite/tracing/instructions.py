"""Which instruction of the model's code runs: `x += y` reaches a proxy as `x + y`, like any sum.

y += x       BINARY_OP +=         the value is written into y
y = y + x    BINARY_OP +          it is not
"""

from __future__ import annotations

import dis
from types import FrameType

_OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "@", "&", "|", "^", "<<", ">>")

_AUGMENTED = frozenset(
    instruction.arg
    for operator in _OPERATORS
    for instruction in dis.get_instructions(compile(f"x {operator}= y", "", "exec"))
    if instruction.opname == "BINARY_OP"
)


def is_augmented(frame: FrameType) -> bool:
    """Return whether a frame is at an augmented assignment."""
    code, place = frame.f_code.co_code, frame.f_lasti
    return code[place] == dis.opmap["BINARY_OP"] and code[place + 1] in _AUGMENTED
