"""Which streams of LayerNorms can be centred, so that each LayerNorm is an RMSNorm.

LN(x) = RMS(x - mean(x)),   x - mean(x) = C x,   C (x + y) = C x + C y
"""

from __future__ import annotations

from torch import nn

from rewrite.graph.spellings import is_plain
from rewrite.observe.labels import Unfollowed
from rewrite.streams.classes import CallKind, ClassReader, ClassSource, ParameterAxis
from rewrite.streams.groups import Stream
from rewrite.streams.plan import StreamPlan, StreamPlanner, source_name
from rewrite.streams.values import Values


class CentrePlanner(StreamPlanner):
    """Decides about streams that a LayerNorm reads."""

    def wants(self, stream: Stream) -> bool:
        """Return whether a LayerNorm reads it."""
        return any(norm.kind == "layer" for _, norm in stream.norms())

    def insert(self, stream: Stream, values: Values, source: ClassSource) -> str | None:
        """Return the module behind which a centring goes, where one may and can."""
        name = source_name(values, source)
        if not self.options.centre or name not in self.captured.tree.names:
            return None
        module = self.captured.module(name)
        if next(module.children(), None) is not None or not is_plain(module):
            return None
        for each in self.calls:
            made = [n for n in each.observed.graph.nodes if name == each.observed.owner(n)]
            last = made[-1] if made else None
            if last is not None and not stream.holds(each, last):
                return None
        return name

    def check_norm_source(self, stream: Stream, values: Values, source: ClassSource) -> None:
        """Refuse a norm that writes to the stream: no parameter of it can be centred."""
        raise Unfollowed(
            f"it is written by {values.observed.called(source.node)}: a norm's output cannot be "
            "centred by its parameters" + self._hint(stream)
        )

    def _hint(self, stream: Stream) -> str:
        linear = any(reader.kind is CallKind.LINEAR for _, reader in stream.readers())
        return "" if linear or self.options.centre else " (centre=True puts a centring behind it)"

    def read(self, stream: Stream, values: Values, reader: ClassReader) -> ParameterAxis | None:
        """Refuse a reader that is no LayerNorm over the channels."""
        said = f"it is also read by {values.observed.called(reader.node)}"
        if reader.kind is not CallKind.NORM or reader.norm is None:
            raise Unfollowed(f"{said}, which is no LayerNorm: it would see another mean")
        if reader.norm.kind != "layer":
            raise Unfollowed(f"{said}, an RMSNorm: it would see another mean")
        return None

    def needs(self, stream: Stream) -> dict[str, float]:
        """Refuse a LayerNorm that cannot be exchanged for an RMSNorm."""
        held = [(values, norm.node) for values, norm in stream.norms()]
        for name in dict.fromkeys(self.name_of(values, norm) for values, norm in stream.norms()):
            module = self.captured.module(name)
            parent = self.captured.tree.names.get(name.rpartition(".")[0])
            if isinstance(parent, nn.TransformerEncoderLayer):
                raise Unfollowed(
                    f"{type(parent).__name__} reads the tensors of {name} itself, as a LayerNorm's"
                )
            if not isinstance(module, nn.LayerNorm) or not is_plain(module):
                raise Unfollowed(
                    f"{name} is a {type(module).__name__}, whose code cannot be made an RMSNorm"
                )
            for values in self.calls:
                for norm in values.norms:
                    if self.name_of(values, norm) == name and (values, norm.node) not in held:
                        raise Unfollowed(f"{name} also normalizes another value")
        return {}


def centred(plan: StreamPlan) -> str:
    """Return in words what was done to a stream."""
    return f"{len(plan.norms)} LayerNorms became RMSNorms, {len(plan.edits)} tensors centred"
