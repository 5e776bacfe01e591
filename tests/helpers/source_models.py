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


SOURCE_HEADS = [
    None,
    "MaskedLM",
    "SequenceClassification",
    "TokenClassification",
    "QuestionAnswering",
    "MultipleChoice",
]


def batch(head, pad, length=17, side="right"):
    """Two rows (of two choices each), one of them padded."""
    ids = torch.randint(4, 99, (2, length))
    mask = torch.ones_like(ids)
    padded = slice(11, None) if side == "right" else slice(None, length - 11)
    ids[1, padded], mask[1, padded] = pad, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    return {name: x[:, None].repeat(1, 2, 1) for name, x in inputs.items()} if head == "MultipleChoice" else inputs


def outputs(model, inputs):
    """All tensors of an output, zero at padding."""
    with torch.no_grad():
        out = model(**inputs)
    mask = inputs["attention_mask"]
    found = {}
    for name in ("last_hidden_state", "pooler_output", "logits", "start_logits", "end_logits"):
        if (x := out.get(name)) is not None:
            at_tokens = mask.dim() == 2 and x.shape[:2] == mask.shape
            found[name] = x * mask.view(*mask.shape, *[1] * (x.dim() - 2)) if at_tokens else x
    return found


def agree(model, source, inputs, source_inputs=None, **tolerance):
    expected = outputs(source, source_inputs or inputs)
    found = outputs(model, inputs)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, **(tolerance or {"rtol": 1e-10, "atol": 1e-10}))
