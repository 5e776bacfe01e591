"""One vector for each sequence: pooling, optional standardisation, and BERT's dense layer."""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .base_configuration import EtConfig
from .base_mixer import OwnValues


class RunningNorm(OwnValues):
    """Standardizes each feature of vectors (b, e) to mean 0 and variance 1 over the training examples.

    Batch normalisation (Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1) without its gain and offset, which the
    next layer has. The paper normalises a training batch by its own statistics, and so needs large batches; here the
    running statistics are always used, as constants, so that a batch of one is sufficient.
    """

    MEMORY = 10  # examples; few, so that the statistics follow changes of the body
    EPSILON = 1e-5

    mean: Tensor
    variance: Tensor
    seen: Tensor  # examples

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("variance", torch.zeros(size))
        self.register_buffer("seen", torch.zeros(()))

    def reset_parameters(self) -> None:
        init.zeros_(self.mean)
        init.zeros_(self.variance)
        init.zeros_(self.seen)

    def forward(self, vectors: Tensor, follow: bool = False) -> Tensor:
        """The vectors (b, e) by the statistics so far, which `follow` first moves to these vectors."""
        if follow:
            self.watch(vectors.to(self.mean.dtype))
        normal = (vectors - self.mean) * (self.variance + self.EPSILON).rsqrt()
        return torch.where(self.seen > 0, normal.to(vectors.dtype), vectors)  # nothing is known of a body not trained

    @torch.no_grad()
    def watch(self, vectors: Tensor) -> None:
        """Plain averages over the first examples, then such that an example counts 1/e of it MEMORY examples later."""
        count = vectors.shape[0]
        share = (count / (self.seen + count)).clamp(min=1 - (1 - 1 / self.MEMORY) ** count)
        variance, mean = torch.var_mean(vectors, 0, correction=0)
        between = share * (1 - share) * (mean - self.mean).square()
        self.variance.copy_(self.variance.lerp(variance, share) + between)
        self.mean.lerp_(mean, share)
        self.seen += count


class PoolerDense(OwnValues):
    """A linear layer (…, e) -> (…, e) that is new in every classifier, and so never adapted but trained as a whole.

    Not an `nn.Linear`: PEFT would put an adapter on it (`target_modules="all-linear"`) inside the copy that it trains
    of the whole pooler, and save what it cannot load.
    """

    def __init__(self, config: EtConfig):
        super().__init__()
        self.std = config.initializer_range
        self.in_features = self.out_features = config.hidden_size
        linear = nn.Linear(config.hidden_size, config.hidden_size)
        self.weight, self.bias = linear.weight, linear.bias

    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=self.std)
        init.zeros_(self.bias)

    def forward(self, vectors: Tensor) -> Tensor:
        return nn.functional.linear(vectors, self.weight, self.bias)


class EtPooler(OwnValues):
    """One vector per sequence: its mean, first or last real token, then BERT's dense layer and (there) tanh."""

    weight = None  # PEFT asks every module it has trained as a whole for one when it merges IA³ and others

    def __init__(self, config: EtConfig):
        super().__init__()
        self.pooling = config.classifier_pooling
        self.norm = RunningNorm(config.hidden_size) if config.standardize_pooled else nn.Identity()
        self.dense = PoolerDense(config)
        self.activation = ACT2FN[config.pooler_act]

    def forward(self, hidden: Tensor, padding_mask: Tensor | None) -> Tensor:
        if padding_mask is None:
            padding_mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        match self.pooling:
            case "mean":
                pooled = (hidden * padding_mask[..., None]).sum(1) / padding_mask.sum(1, keepdim=True).clamp(min=1)
            case "cls":
                pooled = hidden[torch.arange(hidden.shape[0], device=hidden.device), padding_mask.int().argmax(1)]
            case "last":
                last = (padding_mask * torch.arange(padding_mask.shape[1], device=hidden.device)).argmax(1)
                pooled = hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
        if isinstance(self.norm, RunningNorm):
            pooled = self.norm(pooled, follow=self.training and self.learns)
        return self.activation(self.dense(pooled))
