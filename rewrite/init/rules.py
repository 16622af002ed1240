"""Which scheme a layer gets: rules of a pattern and a scheme, the first that matches wins.

    rules  ::= rule (";" rule)*
    rule   ::= [pattern "="] scheme         no pattern: every layer
    pattern::= shell pattern on "layer" or "layer.parameter" | "@" kind of layer

`head*=zeros;@conv=he:fan_out;*=trunc_normal`
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from rewrite.errors import OptionError
from rewrite.init.gains import gain
from rewrite.init.schemes import MODES, Scheme, parse_scheme
from rewrite.weights.fans import LAYER_KINDS


@dataclass(frozen=True)
class Rule:
    """One pattern and its scheme; `text` is the scheme as the user wrote it."""

    pattern: str
    scheme: Scheme
    text: str

    def matches(self, names: tuple[str, ...], kind: str) -> bool:
        """Return whether one of the names, or the kind of layer, is meant."""
        if self.pattern.startswith("@"):
            return self.pattern[1:] == kind
        return any(fnmatchcase(name, self.pattern) for name in names)


def parse_rules(text: str, mode: str = "", activation: str = "") -> tuple[Rule, ...]:
    """Read rules; `mode` and `activation` stand in where a scheme says neither.

    Raises:
        OptionError: an unknown scheme, mode, activation or kind of layer.
    """
    if mode and mode not in MODES:
        raise OptionError(f"unknown mode {mode!r}; known are {', '.join(MODES)}")
    if activation:
        gain(activation.partition("=")[0])
    rules = tuple(_rule(item, mode, activation) for item in text.split(";") if item.strip())
    if not rules:
        raise OptionError("no scheme is given")
    return rules


def _rule(text: str, mode: str, activation: str) -> Rule:
    head, sign, rest = text.partition("=")
    # In `he:leaky_relu=0.2` the sign belongs to the scheme: names of layers have no colon.
    pattern, scheme = (head.strip(), rest.strip()) if sign and ":" not in head else ("*", text)
    if pattern.startswith("@") and pattern[1:] not in LAYER_KINDS:
        raise OptionError(f"unknown layer kind {pattern[1:]!r}; known are {', '.join(LAYER_KINDS)}")
    parsed = parse_scheme(scheme)
    written = scheme.split(":")[1:]
    if mode and parsed.mode and parsed.family != "standard" and not set(written) & set(MODES):
        parsed = replace(parsed, mode=mode)
    if activation and parsed.family == "he" and parsed.activation is None:
        parsed = replace(parsed, activation=activation)
    return Rule(pattern, parsed, scheme.strip())


def first_match(rules: tuple[Rule, ...], names: tuple[str, ...], kind: str = "") -> Rule | None:
    """Return the first rule that means one of these names."""
    return next((rule for rule in rules if rule.matches(names, kind)), None)


def check_used(rules: tuple[Rule, ...], used: set[Rule], names: list[str]) -> None:
    """Raise OptionError for a pattern that matches nothing, with names that are close."""
    for rule in rules:
        if rule in used or rule.pattern == "*":
            continue
        close = get_close_matches(rule.pattern.strip("*@"), names, n=3, cutoff=0.3) or names[:3]
        raise OptionError(
            f"{rule.pattern}={rule.text}: the pattern matches no layer; "
            f"there are, for example, {', '.join(close)}"
        )
