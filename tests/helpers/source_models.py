"""Small random models of transformers, to be converted."""

import torch
import transformers

SOURCE_SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "initializer_range": 0.3,
    "num_labels": 5,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "sep_token_id": 3,
}
SOURCES = {
    "Bert": {"max_position_embeddings": 40, "pad_token_id": 0},
    "Roberta": {"max_position_embeddings": 42, "pad_token_id": 1},
    "Longformer": {"max_position_embeddings": 42, "pad_token_id": 1, "attention_window": [4, 8]},
    "BigBird": {"max_position_embeddings": 96, "pad_token_id": 0, "block_size": 4, "num_random_blocks": 2},
}


def make(stem, head=None, dtype=torch.float64, suffix=None, **changes):
    """A small random model of transformers."""
    config = getattr(transformers, f"{stem}Config")(**{**SOURCE_SIZES, **SOURCES[stem], **changes})
    if head == "QuestionAnswering":
        config.num_labels = 2
    name = suffix or (f"For{head}" if head else "Model")
    model = getattr(transformers, stem + name)(config)
    for parameter in model.parameters():  # transformers initialises biases to 0 and norms to 1, which hides mistakes
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    return model.to(dtype).eval()
