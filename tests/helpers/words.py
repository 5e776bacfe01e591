"""A tokenizer of fifty words, and small models that read it."""

import torch
from zoo import SETTINGS, build

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", *(f"word{i}" for i in range(50))]


def small(variant, head, **changes):
    fields = {"vocab_size": len(WORDS), "dtype": torch.float32, "initializer_range": 0.05, **changes}
    return build(variant, SETTINGS[variant.slug][0], head, **fields)
