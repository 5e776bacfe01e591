"""Late pooling: many vectors of a long document from one pass, for sentence-transformers' `MultiVectorEncoder`.

    body = Transformer("minilm-local", max_seq_length=4096)
    model = MultiVectorEncoder(modules=[body, LatePooling(span=32)])
    scores = model.similarity(model.encode_query(questions), model.encode_document(documents))

One vector cannot hold a detail of a long document: it is the mean of thousands of tokens. The states of all tokens come
from one pass over the whole document, and pooling them span by span afterwards keeps both their context and the detail
(late chunking: Günther et al. 2024, arXiv:2409.04701). A query is one vector, so that sentence-transformers' MaxSim is
the cosine of the best span.
"""

from collections.abc import Iterable, Sequence
from math import ceil
from typing import Any

import torch
from sentence_transformers.multi_vector_encoder.modules import BaseTokenPooling
from torch import Tensor
from torch.nn import functional as F

from .models.ops_checks import check_at_least


class LatePooling(BaseTokenPooling):
    """Mean of the states in each span of tokens, normalised to length 1; of all tokens for a query.

    Args:
        span: tokens of a span.
        stride: tokens from the start of a span to that of the next; None takes `span`, and less makes spans overlap.
        idf: weight of each token id in the means of documents, (vocab_size,), as `inverse_document_frequencies` returns
            it; None weighs all tokens alike. Queries are never weighed.
        vocab_size: the number of weights, to load them; None has none.

    Its input and output are those of `BaseTokenPooling`: states (b, n, e) become vectors (b, spans, e).
    Raises ValueError for a `span` or `stride` below 1, or a stride that would leave tokens out.
    """

    config_keys = ["span", "stride", "vocab_size"]
    forward_kwargs = {"task"}
    idf: Tensor | None

    def __init__(
        self, span: int = 32, stride: int | None = None, idf: Tensor | None = None, vocab_size: int | None = None
    ):
        super().__init__(tasks=["query", "document"])
        check_at_least("span", span, 1, "a vector is the mean of some tokens")
        stride = span if stride is None else stride
        check_at_least("stride", stride, 1, "the next span begins at a later token")
        if stride > span:
            raise ValueError(f"stride ({stride}) must not exceed span ({span}): tokens between spans would be lost.")
        self.span, self.stride = span, stride
        if idf is None and vocab_size is not None:
            idf = torch.ones(vocab_size)  # the values are loaded
        self.register_buffer("idf", idf)

    @property
    def vocab_size(self) -> int | None:
        return None if self.idf is None else len(self.idf)

    def forward(self, features: dict[str, Tensor], task: str | None = None) -> dict[str, Tensor]:
        states, mask = features["token_embeddings"], features["attention_mask"].bool()
        if not len(states):
            return features
        is_query, pooled = task == "query", []
        for row, (tokens, real) in enumerate(zip(states, mask, strict=True)):
            weights = None if is_query or self.idf is None else self.idf[features["input_ids"][row][real]]
            pooled.append(self.pool_one(tokens[real], weights=weights, span=int(real.sum()) if is_query else None))
        counts = torch.tensor([len(vectors) for vectors in pooled], device=states.device)
        features["token_embeddings"] = torch.nn.utils.rnn.pad_sequence(pooled, batch_first=True)
        features["attention_mask"] = torch.arange(int(counts.max()), device=states.device) < counts[:, None]
        return features

    def pool_one(self, embedding: Tensor, weights: Tensor | None = None, span: int | None = None, **_: Any) -> Tensor:
        """Vectors of one text, (spans, e), from its states (n, e), weighed by `weights` (n,) if there are any."""
        length = len(embedding)
        if not length:
            return embedding.new_zeros(1, embedding.shape[1])
        span, stride = (self.span, self.stride) if span is None else (span, span)
        starts = stride * torch.arange(1 + max(0, ceil((length - span) / stride)), device=embedding.device)
        index = starts[:, None] + torch.arange(span, device=embedding.device)
        inside, index = index < length, index.clamp(max=length - 1)
        of_token = inside.to(embedding.dtype)
        if weights is not None:
            of_token = of_token * weights[index].to(embedding.dtype)
        return F.normalize(torch.einsum("sk,ske->se", of_token, embedding[index]), dim=-1)

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        self.save_config(output_path)
        if self.idf is not None:
            self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> "LatePooling":
        places = {"subfolder", "token", "cache_folder", "revision", "local_files_only"}
        found = {name: value for name, value in kwargs.items() if name in places}
        model = cls(**cls.load_config(model_name_or_path, **found))
        if model.idf is not None:
            cls.load_torch_weights(model_name_or_path, model=model, **found)
        return model


def inverse_document_frequencies(tokenizer: Any, texts: Iterable[str]) -> Tensor:
    r"""Weight of each token id, (vocab_size,) float32, from the texts that hold it.

    .. math:: \log \frac{N + 1}{n_t + 1} + 10^{-3}

    for N texts, n_t of which hold token t (Spärck Jones 1972, smoothed); the constant keeps spans of common tokens
    alone from vanishing. Give texts about as long as a span or a paragraph: in whole books every common word is rare.
    """
    counts, number = torch.zeros(len(tokenizer)), 0
    for text in texts:
        ids: Sequence[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        counts[list(set(ids))] += 1
        number += 1
    if not number:
        raise ValueError("texts must hold at least one text: their words have no frequency otherwise.")
    return torch.log((number + 1) / (counts + 1)) + 1e-3
