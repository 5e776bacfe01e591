"""Embeddings of words or patches, positions and token types, and learned tokens before every sequence."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from .base_configuration import EtConfig
from .base_images import PatchEmbeddings
from .base_mixer import OwnValues
from .ops_rotary import rotary_angles


def sinusoidal_embedding(positions: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Vaswani et al. 2017, section 3.5, sines in the first half and cosines in the second: (b, n) -> (b, n, size).

    The paper interleaves the two, which is a permutation of the features.
    """
    cos, sin = rotary_angles(positions, size, 10000.0, dtype)
    return torch.cat([sin, cos], -1).squeeze(2)


class EtEmbeddings(OwnValues):
    """The sum of word or image patch, position and token type embeddings; normalized if the blocks normalize last.

    (b, n, embedding_size) -> (b, n, e), by a dense layer if the two differ.
    """

    position_axes: ClassVar = {"position_embeddings.weight": (0,)}

    def __init__(self, config: EtConfig):
        super().__init__()
        self.config = config
        width = config.embedding_width
        if config.image_size is None:
            # a padding index would freeze one row; padding is masked, so no row needs to be
            self.word_embeddings = nn.Embedding(config.vocab_size, width)
        else:
            sizes = config.image_size, config.patch_size, config.num_channels, width
            self.patch_embeddings = PatchEmbeddings(*sizes)
        if config.position_embedding_type == "learned":
            self.position_embeddings = nn.Embedding(config.num_positions, width)
        if config.type_vocab_size:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        if not config.norm_first:
            self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.projects = config.embedding_size is not None or getattr(config, "embedding_projection", False)
        if self.projects:
            self.projection = nn.Linear(width, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, inputs_embeds: Tensor, positions: Tensor, token_types: Tensor | None) -> Tensor:
        hidden = inputs_embeds
        if self.config.type_vocab_size:
            types = torch.zeros_like(positions) if token_types is None else token_types
            hidden = hidden + self.token_type_embeddings(types)
        if self.config.position_embedding_type == "learned":
            hidden = hidden + self.position_embeddings(positions)
        elif self.config.position_embedding_type == "sinusoidal":
            hidden = hidden + sinusoidal_embedding(positions, self.config.embedding_width, hidden.dtype)
        if not self.config.norm_first:
            hidden = self.norm(hidden)
        if self.projects:
            hidden = self.projection(hidden)
        return self.dropout(hidden)


class ExternalTokens(nn.Module):
    """Learned embeddings before every sequence, removed from the output: (…, n, e) -> (…, count + n, e)."""

    def __init__(self, count: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([self.weight.to(hidden.dtype).expand(*hidden.shape[:-2], -1, -1), hidden], -2)
