"""Turn a residual stream: an orthogonal change of its basis, which nothing outside can see.

    rms(x Q) = rms(x) Q       W h  ->  (W Q) (Q' h) of a reader       W h  ->  Q' W h of a writer

Exact where only RMSNorms without weight, linear readers and linear writers touch the stream. A
random Hadamard matrix spreads outlier channels over all of them, so that activations quantize with
less loss (Ashkboos et al. 2024, QuaRot, there R1).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from rewrite.errors import OptionError
from rewrite.graph.captured import Captured
from rewrite.graph.editable import Editable
from rewrite.observe.stream_matrices import KINDS
from rewrite.outcomes import Change, Contract, Site, Skip
from rewrite.protocol import Pass
from rewrite.streams.execute import carry_out
from rewrite.streams.outcomes import stream_outcomes
from rewrite.streams.plan import StreamOptions
from rewrite.streams.rotate import RotatePlanner


@dataclass(frozen=True)
class RotateStream(Pass):
    """Put every writer and every reader of a residual stream through one orthogonal matrix.

    Rewrites, one site a stream:
      1. Embeddings, positions and class tokens: their rows times Q.
      2. Output projections of attention and MLP, and their biases; a layer scale behind them is
         absorbed first, and becomes one.
      3. The layers that read what the norms of the stream make, or the stream itself.

    The report's recipe holds the tensors, the kind and the seed: the same pass with `inverse` turns
    the stream back.

    Declines: streams of LayerNorms (run ln-to-rms first) or of norms with a weight that is not one
    (run fold first); readers that are not linear; streams, or outputs of their norms, that the
    model returns; parameters that something else reads.
    """

    name: ClassVar[str] = "rotate-stream"
    contract: ClassVar[Contract] = Contract.EXACT_IN_EVAL

    kind: str = field(
        default="hadamard",
        metadata={"help": "hadamard (where the size allows, its odd part at random), orthogonal"},
    )
    seed: int = field(default=0, metadata={"help": "of the signs, and of what is random"})
    inverse: bool = field(
        default=False, metadata={"help": "turn back what the same options turned"}
    )
    strict_outputs: bool = field(
        default=False,
        metadata={"help": "leave a stream alone that another call would return"},
    )

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OptionError(f"{self.name}: kind is {self.kind!r}; pass {' or '.join(KINDS)}")
        if not 0 <= self.seed < 2**63:
            raise OptionError(
                f"{self.name}: seed is {self.seed}; pass a number from 0 to 2**63 - 1"
            )

    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield every residual stream that a norm over channels reads."""
        kinds = {type(module).__name__ for module in captured.model.modules()}
        if any("RMSNorm" in kind or "LayerNorm" in kind for kind in kinds):
            options = StreamOptions(False, self.strict_outputs)
            yield from stream_outcomes(captured, RotatePlanner, options)

    def rewrite(self, captured: Editable, site: Site) -> Change:
        """Turn one stream."""
        plan = site.plan.plan
        spec = {"kind": self.kind, "seed": self.seed, "inverse": self.inverse}
        way = "back " if self.inverse else ""
        words = f"{len(plan.edits)} tensors turned {way}by {self.kind}, seed {self.seed}"
        return carry_out(captured, plan, spec, site.before, words)
