"""Soft permutations of blocks of tokens, from scores of a small network (Tay et al. 2020, arXiv:2002.11296)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attn_sinkhorn import in_blocks
from .ops_sinkhorn import causal_sinkhorn, gumbel_noise, sinkhorn


class SortingNetwork(nn.Module):
    """Scores of source blocks (b, c, e) for reader blocks (b, c, e): (b, h, c, c)."""

    def __init__(self, config: Any):
        super().__init__()
        self.head_dim = config.head_dim
        self.reader, self.source = (
            # a final bias would shift whole rows or columns of the scores, which normalization cancels
            nn.Sequential(
                nn.Linear(config.hidden_size, config.hidden_size),
                nn.ReLU(),
                nn.Linear(config.hidden_size, config.hidden_size, bias=False),
            )
            for _ in range(2)
        )

    def forward(self, readers: Tensor, sources: Tensor) -> Tensor:
        features = self.reader(readers), self.source(sources)
        reader, source = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in features)
        return reader @ source.transpose(-1, -2) * self.head_dim**-0.5


class BlockSorting:
    """Mixin of a mixer with a `sorting_network`: the order of the blocks of its input."""

    config: Any
    training: bool
    sorting_network: SortingNetwork

    def sort(self, hidden: Tensor, real: Tensor | None) -> Tensor:
        """The soft permutation of the blocks of `hidden` (b, n, e), (b, h, c, c)."""
        blocks, tokens = in_blocks(hidden, self.config.block_size), self.config.block_size
        if real is not None:
            blocks, tokens = blocks * real[..., None], real.sum(2, keepdim=True).clamp(min=1)
        means = (blocks.sum(2, dtype=torch.promote_types(hidden.dtype, torch.float32)) / tokens).to(hidden.dtype)
        real_blocks = None if real is None else real.any(-1)[:, None]
        how = self.config.sinkhorn_iterations, self.config.sinkhorn_temperature
        return sinkhorn(self.with_noise(self.sorting_network(means, means)), *how, real_blocks)

    def pool(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The sum and the first of the tokens of each block, (b, c, e) each, the sum in float32 or wider."""
        blocks = in_blocks(hidden, self.config.block_size)
        return blocks.sum(2, dtype=torch.promote_types(hidden.dtype, torch.float32)), blocks[:, :, 0]

    def sort_causally(self, sums: Tensor, firsts: Tensor) -> Tensor:
        """The soft permutation of a decoder, whose row i mixes blocks before i, from the results of `pool`."""
        size, config = self.config.block_size, self.config
        before = F.pad(sums, (0, 0, 1, 0))[:, :-1].cumsum(1)
        block = torch.arange(sums.shape[1], device=sums.device)[:, None]
        # the paper's reader sums all tokens up to the first one of its block, which then hardly counts
        readers = (before / (block * size).clamp(min=1)).to(firsts.dtype) + firsts
        scores = self.with_noise(self.sorting_network(readers, (sums / size).to(firsts.dtype)))
        return causal_sinkhorn(scores, config.sinkhorn_iterations, config.sinkhorn_temperature)

    def with_noise(self, scores: Tensor) -> Tensor:
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return scores + gumbel_noise(scores) if self.training and self.config.gumbel_noise else scores
