"""Judge every name that a pickle refers to, before any object is built.

held     a name in a container, or below another value      its class may be held
called   a name that the pickle calls                       it may be called with such arguments
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from rewrite.checkpoint.pickles.names import (
    PARTIALS,
    Meaning,
    NameUse,
    has_meaning,
    meaning_of,
)
from rewrite.checkpoint.vetting.names import refuse_unless_allowed
from rewrite.checkpoint.vetting.opcodes import Made, Name, Node, TupleOf
from rewrite.checkpoint.vetting.vet import used_names
from rewrite.errors import CheckpointError


@dataclass
class Judgement:
    """The names of a pickle and what they mean.

    Attributes:
        trust: packages and full names that are allowed beside the lists.
        meanings: by full name.
        judges_itself: the argument tuples, by identity, whose call looks at them as they stand.
        saved_states: the states, by identity, of modules that are written as data.
    """

    trust: tuple[str, ...]
    meanings: dict[str, Meaning] = field(default_factory=dict)
    judges_itself: set[int] = field(default_factory=set)
    saved_states: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, nodes: Sequence[Node], trust: tuple[str, ...]) -> Self:
        """Judge every name that the nodes use.

        Raises:
            CheckpointError: nobody allowed a name, or not this use of it.
        """
        self = cls(trust)
        names = used_names(nodes)
        for node in names:
            refuse_unless_allowed(node.full, self.trust, has_meaning)
        for node in names:
            self.meanings[node.full] = meaning_of(node.full, self.trust)
        for made in nodes:
            if isinstance(made, Made):
                self._check_call(made)
        return self

    def _check_call(self, made: Made) -> None:
        """Raise CheckpointError for a call of what may only be held."""
        if not made.name:
            raise CheckpointError("calls something that is no name")
        if not isinstance(made.args, TupleOf):
            raise CheckpointError(f"calls {made.name} with no arguments")
        use = self.meanings[made.name].use
        classes = (NameUse.LAYER, NameUse.INSTANCE, NameUse.ENUM)
        if made.new and use in classes:
            if made.args.items and not self._is_named_tuple(made):
                raise CheckpointError(f"instantiates {made.name} with arguments of its own")
        elif use in (NameUse.LAYER, NameUse.INSTANCE, NameUse.VALUE, NameUse.FUNCTION):
            raise CheckpointError(
                f"calls {made.name}, which could run anything; a pickled model only holds it"
            )
        elif use is NameUse.SAVED:
            self.saved_states.update(map(id, made.states))
        elif use in (NameUse.MEMBER, NameUse.REBUILD):
            self.judges_itself.add(id(made.args))
        elif use is NameUse.PARTIAL:
            for part in (made.args, *made.states):
                self._check_partial(part)

    def _is_named_tuple(self, made: Made) -> bool:
        kind = self.meanings[made.name].value
        return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")

    def _check_partial(self, part: Any) -> None:
        function = part.items[0] if isinstance(part, TupleOf) and part.items else None
        if not isinstance(function, Name):
            raise CheckpointError("holds a functools.partial of something that is no allowed name")
        if self.meanings[function.full].use not in PARTIALS:
            raise CheckpointError(f"holds a functools.partial of {function.full}")
