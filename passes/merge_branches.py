"""Merging parallel linear branches into one convolution (RepVGG, https://arxiv.org/abs/2101.03697).

    conv3x3(x) + conv1x1(x) + x  =  conv(x),   W = W3 + pad(W1) + dirac,   c = c3 + c1

Each branch may end in norms (eval mode) and constants per channel. The kernel is added up in
float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from rewrite.fold.branches.find import Branches
from rewrite.fold.branches.kernel import Merge
from rewrite.fold.branches.merge import merge_site
from rewrite.graph.captured import Captured
from rewrite.graph.editable import Editable
from rewrite.outcomes import Change, Contract, Declined, Site, Skip
from rewrite.protocol import Pass


@dataclass(frozen=True)
class MergeBranches(Pass):
    """Make one convolution of branches that begin at one value and end in one sum.

    Rewrites:
      1. Sums and differences of convolutions of one value, each with the norms behind it.
      2. The value itself, or its norm, as a further branch: a Dirac kernel.

    Declines: different stride, dilation, groups or padding mode; kernels that see different windows
    (a 1x1 beside a 3x3 without padding); branches that something else reads; norms in training
    mode; hooks; a sum on a line that cannot be edited.
    """

    name: ClassVar[str] = "merge-branches"
    contract: ClassVar[Contract] = Contract.EXACT_IN_EVAL

    def find(self, captured: Captured) -> Iterable[Site | Skip]:
        """Yield every sum of parallel branches in data-flow order."""
        for outcome in Branches(captured).find():
            if isinstance(outcome, Declined):
                yield Skip(captured.owner(outcome.nodes[0]), "parallel branches", outcome.reason)
            else:
                yield Site(outcome.owner, outcome.before, outcome.root, outcome)

    def rewrite(self, captured: Editable, site: Site) -> Change:
        """Put one convolution in place of the branches."""
        assert isinstance(site.plan, Merge)
        change, exact = merge_site(captured, site.target, site.plan, {})
        captured.keep_exact(exact)
        return change
