"""Context parallelism: the processes of a group share the tokens of one forward pass.

Each process keeps a consecutive share of the tokens through all blocks; only keys and values are gathered for
self-attention, and the output at the end. Any number of tokens and heads works, because shares may differ by one token.
Knows no network; a group of one does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""The collective under its name of torch 2.13, or its earlier one."""


@dataclass(frozen=True)
class TokenGroup:
    """Who has which tokens of a sequence."""

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None
    """None means torch.distributed's default group."""
    tokens: int = 0
    """Length of the sequence that is shared."""

    def sharing(self, tokens: int) -> TokenGroup:
        """The same processes with a sequence of that many tokens."""
        return replace(self, tokens=tokens)

    @property
    def bounds(self) -> list[int]:
        """First token of each share, and the number of all tokens last."""
        return [self.tokens * rank // self.size for rank in range(self.size + 1)]

    @property
    def share(self) -> slice:
        """This process's tokens."""
        return slice(self.bounds[self.rank], self.bounds[self.rank + 1])

    def own_index(self, index: Int[Tensor, "m"]) -> tuple[Int[Tensor, "k"], slice]:
        """The part of ascending token indices that falls into this share, counted from its start, and where it lies."""
        if self.size == 1:
            return index, slice(None)
        edges = torch.tensor([self.share.start, self.share.stop], device=index.device)
        first, last = torch.searchsorted(index, edges).tolist()
        return index[first:last] - self.share.start, slice(first, last)

    def gather(self, x: Float[Tensor, "*batch"], dim: int) -> Float[Tensor, "*batch"]:
        """All shares of a tensor along `dim`, in order; without gradients.

        Collectives want equal sizes, so shorter shares are padded by one token, which is cut off afterwards.
        """
        if self.size == 1:
            return x
        own = x.movedim(dim, 0)
        counts = [stop - start for start, stop in pairwise(self.bounds)]
        longest = max(counts)
        padded = torch.cat([own, own.new_zeros((longest - len(own), *own.shape[1:]))])
        joined = own.new_empty((self.size * longest, *own.shape[1:]))
        all_gather_single(joined, padded.contiguous(), group=self.process_group)
        if min(counts) < longest:
            parts = joined.split(longest)
            joined = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        return joined.movedim(0, dim)


ALONE = TokenGroup()
"""The group of a single process."""
