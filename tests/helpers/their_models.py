"""Longformer and BigBird of transformers, small, and what compares ours with them."""

import pytest
import torch
import transformers

THEIR_SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
}
HEADS = ["MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"]
PAD = 1
exact = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)


def close(actual, expected, tolerance):
    """Within `tolerance` of the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(1, expected.abs().max().item()))


def longformer(head=None, dtype=torch.float64, windows=(8, 16)):
    """Theirs pads to the widest window, which must be a multiple of the others, and knows no window of 2."""
    config = transformers.LongformerConfig(
        **THEIR_SIZES, max_position_embeddings=202, attention_window=list(windows), pad_token_id=PAD, type_vocab_size=2,
        sep_token_id=2,
    )  # fmt: skip
    config.num_labels = 2 if head == "QuestionAnswering" else 3
    name = f"LongformerFor{head}" if head else "LongformerModel"
    return getattr(transformers, name)(config).to(dtype).eval()


def big_bird(head=None, dtype=torch.float64, block_size=8):
    config = transformers.BigBirdConfig(
        **THEIR_SIZES, max_position_embeddings=256, block_size=block_size, num_random_blocks=2, pad_token_id=PAD,
        num_labels=3,
    )  # fmt: skip
    name = f"BigBirdFor{head}" if head else "BigBirdModel"
    return getattr(transformers, name)(config).to(dtype).eval()


def padded_batch(length=61):
    """Ids and masks of three rows: whole, padded on the right, padded on the left."""
    ids, mask = torch.randint(3, 99, (3, length)), torch.ones(3, length, dtype=torch.long)
    mask[1, length - 17 :] = mask[2, :11] = 0
    return ids.masked_fill(mask == 0, PAD), mask


def compare_gradients(theirs, ours, tolerance):
    """Compare the gradients of all weights, within `tolerance` of the largest one; return the names of those in use.

    Weights that theirs does not use get no gradient there and zeros here.
    """
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    largest = max(grad.abs().max().item() for grad in grads.values())
    compared = []
    for name, parameter in ours.model.named_parameters():
        if (actual := parameter.grad) is None:
            continue
        if (expected := grads.get(ours.report.copied[name])) is None:
            assert not actual.any(), name
            continue
        compared.append(name)
        if len(actual) < len(expected):  # positions: the rows that no token reads
            expected = expected[len(expected) - len(actual) :]
        if name.endswith("word_embeddings.weight"):  # the row of the padding token, which gets none there
            expected, actual = expected[PAD + 1 :], actual[PAD + 1 :]
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * largest)
    return compared


def compare_logits(theirs, ours, mask):
    """All logits, those of tokens at real tokens only."""
    names = [name for name in ("logits", "start_logits", "end_logits") if name in theirs]
    assert names
    for name in names:
        expected, actual = theirs[name], ours[name]
        if expected.shape[:2] == mask.shape and mask.dim() == 2 and expected.shape[1] > 3:
            expected, actual = expected[mask.bool()], actual[mask.bool()]
        close(actual, expected, 1e-10)
