"""Depth-weighted averaging of past block outputs (DenseFormer)."""

import torch
from torch import Tensor, nn

from vot_kernels.ops.checks import check_size
from vot_kernels.ops.dense_residual import dense_residual


class DenseResidual(nn.Module):
    """Feeds the next block Σ α_{l,i} h_i over past states instead of h_l alone.

    State 0 is the embedding, state l the output of block l (from 1). After every `period`-th block l the
    output becomes a weighted sum of the states l, l - dilation, l - 2 dilation, ... ≥ 0; after the others it
    is unchanged. α_{l,l} starts at 1 and the rest at 0, so the untrained module is the identity.

        memory = dense.start(x)
        for index, block in enumerate(blocks, start=1):
            x = dense(block(x), index, memory)

    `memory` belongs to one forward pass; it drops a state as soon as no later block reads it.

    Args:
        num_blocks: blocks of the network.
        dilation: spacing of the states that a block reads.
        period: number of blocks from one mixing to the next.

    Source: Pagliardini et al., DenseFormer, NeurIPS 2024 (arXiv 2402.02622), section 3.
    """

    def __init__(self, num_blocks: int, dilation: int = 1, period: int = 1) -> None:
        super().__init__()
        for name, value, least in (
            ("num_blocks", num_blocks, 0),
            ("dilation", dilation, 1),
            ("period", period, 1),
        ):
            check_size(name, value, least)
        self.num_blocks, self.dilation, self.period = num_blocks, dilation, period
        self.sources = {
            block: tuple(range(block % dilation, block + 1, dilation))
            for block in range(period, num_blocks + 1, period)
        }
        self._last_read = {state: block for block, sources in self.sources.items() for state in sources}
        self.weights = nn.ParameterDict(
            {str(block): nn.Parameter(self._identity(block)) for block in self.sources}
        )

    def start(self, embedding: Tensor) -> dict[int, Tensor]:
        """Return the memory of a new forward pass, with the embedding if any block reads it."""
        return {0: embedding} if 0 in self._last_read else {}

    def forward(self, state: Tensor, block: int, memory: dict[int, Tensor]) -> Tensor:
        """Return the input of the block after `block`, in the shape of `state`.

        Args:
            state: output of `block`, any shape.
            block: 1 .. num_blocks, in order.
            memory: from `start`; updated in place.

        Raises:
            ValueError: there is no such block, or the memory lacks a state that it reads.
        """
        if not 1 <= block <= self.num_blocks:
            raise ValueError(f"block must be from 1 to {self.num_blocks}, got {block}.")
        if block in self._last_read:
            memory[block] = state
        if block in self.sources:
            if missing := [i for i in self.sources[block] if i not in memory]:
                raise ValueError(
                    f"Block {block} reads the state {missing[0]}, which the memory does not have: "
                    "begin with start() and give the blocks in order."
                )
            state = dense_residual([memory[i] for i in self.sources[block]], self.weights[str(block)])
        for index in [i for i in memory if self._last_read[i] <= block]:
            del memory[index]
        return state

    def reset_parameters(self) -> None:
        """Reset the module to the identity."""
        with torch.no_grad():
            for block in self.sources:
                self.weights[str(block)].copy_(self._identity(block))

    def extra_repr(self) -> str:
        return f"num_blocks={self.num_blocks}, dilation={self.dilation}, period={self.period}"

    def _identity(self, block: int) -> Tensor:
        weights = torch.zeros(len(self.sources[block]))
        weights[-1] = 1.0
        return weights
