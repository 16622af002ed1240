"""Which streams can be turned: RMSNorms without weight hand a rotation on, linear readers undo it.

rms(x Q) = rms(x) Q,     y = W h  ->  (W Q) (Q' h),     x = x + W h  ->  x Q + (Q' W) h
"""

from __future__ import annotations

from rewrite.graph.captured import TensorRef
from rewrite.observe.labels import Unfollowed
from rewrite.streams.classes import CallKind, ClassReader, ClassSource, ParameterAxis
from rewrite.streams.groups import Stream
from rewrite.streams.plan import StreamPlanner
from rewrite.streams.values import Values


class RotatePlanner(StreamPlanner):
    """Decides about streams that a norm reads."""

    def wants(self, stream: Stream) -> bool:
        """Return whether a norm reads it: every stream is a candidate."""
        return True

    def widen(self, stream: Stream) -> None:
        """Add what the norms of a stream make, and what the norms that write to it are given."""
        pending = list(stream.classes)
        while pending:
            values, top = pending.pop()
            made = [r.norm.node for r in values.readers(top) if r.kind is CallKind.NORM and r.norm]
            given = [s.norm.value for s in values.sources(top) if s.norm is not None]
            for node in (*made, *given):
                if node in values.labels and not stream.holds(values, node):
                    stream.classes.append((values, values.top(node)))
                    pending.append(stream.classes[-1])

    def check_norm_source(self, stream: Stream, values: Values, source: ClassSource) -> None:
        """Refuse a norm of a value that is not turned."""
        if source.norm is None or not stream.holds(values, source.norm.value):
            raise Unfollowed(
                f"it is written by {values.observed.called(source.node)}, a norm of another value"
            )

    def read(self, stream: Stream, values: Values, reader: ClassReader) -> ParameterAxis | None:
        """Return the weight of a linear reader; refuse what is neither that nor an RMSNorm."""
        said = f"it is read by {values.observed.called(reader.node)}"
        if reader.kind is CallKind.LINEAR:
            return reader.use
        if reader.kind is not CallKind.NORM or reader.norm is None:
            raise Unfollowed(f"{said}, which is neither linear nor an RMSNorm")
        if reader.norm.kind == "layer":
            raise Unfollowed(f"{said}, a LayerNorm, which subtracts the mean: run ln-to-rms first")
        return None

    def needs(self, stream: Stream) -> dict[str, float]:
        """Return what the weights of the norms have to be; refuse one that is not."""
        found: dict[str, float] = {}
        for values, norm in stream.norms():
            if norm.weight is None:
                continue
            name, wanted = norm.weight.tensor, (1.0 - norm.weight.offset) / norm.weight.factor
            tensor = self.captured.values(TensorRef.of(name))
            if tensor.device.type != "meta" and not bool((tensor == wanted).all()):
                raise Unfollowed(
                    f"{self.name_of(values, norm)} has a weight that is not one: fold it first"
                )
            found[name] = wanted
        return found
