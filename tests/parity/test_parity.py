"""Longformer and BigBird against transformers' own: whole models, random weights imported, values and gradients.

Where transformers breaks one of our promises, the test that meets it says so.
"""

import pytest
import torch
from their_models import HEADS, PAD, big_bird, close, compare_gradients, compare_logits, exact, longformer, padded_batch
from transformers.models.longformer import modeling_longformer as their_longformer
from zoo import probed

from efficient_transformers.conversion import convert


@pytest.fixture
def softmax_in_float64(monkeypatch):
    """transformers' Longformer always takes its softmax in float32, which costs a float64 model half its digits."""
    real = torch.nn.functional.softmax
    monkeypatch.setattr(
        their_longformer.nn.functional, "softmax", lambda x, dim=None, dtype=None, **kwargs: real(x, dim=dim)
    )


def marks(mask, *per_row):
    """1 at the given real tokens of each row."""
    marked = torch.zeros_like(mask)
    for row, tokens in enumerate(per_row):
        marked[row, mask[row].nonzero().flatten()[list(tokens)]] = 1
    return marked


# Longformer ----------------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("windows", [(8, 16), (4, 40), (100, 100)], ids=str)
@pytest.mark.parametrize("tokens", [None, ([0], [0], [0]), ([0, 1, 30], [5], [])], ids=["local", "first", "some"])
def test_longformer_is_theirs(windows, tokens, dtype, tolerance, softmax_in_float64):
    """Hidden states of all layers and gradients of all weights; theirs pads 61 tokens to the window and cuts again."""
    theirs = longformer(dtype=dtype, windows=windows)
    ours = convert(theirs, "longformer")
    ids, mask = padded_batch()
    marked = None if tokens is None else marks(mask, *tokens)
    real, hidden = mask.bool(), []
    for model in (theirs, ours.model):
        states = model(ids, attention_mask=mask, global_attention_mask=marked, output_hidden_states=True).hidden_states
        hidden.append([state[real] for state in states])
        probed(states[-1][real]).backward()
    for actual, expected in zip(hidden[1], hidden[0], strict=True):
        close(actual, expected, tolerance)
    compared = compare_gradients(theirs, ours, tolerance)
    assert any("global_k_proj.weight" in name for name in compared) == (tokens is not None)


@pytest.mark.parametrize("head", HEADS)
def test_longformer_heads_are_theirs(head, softmax_in_float64):
    theirs = longformer(head)
    ours = convert(theirs, "longformer").model
    assert type(ours).__name__ == f"EtLongformerFor{head}"
    ids, mask = padded_batch()
    marked = marks(mask, [0, 9], [0], [0])
    if head == "MultipleChoice":
        ids, mask, marked = (x[:, None].expand(3, 2, -1).contiguous() for x in (ids, mask, marked))
    if head in ("SequenceClassification", "MultipleChoice"):
        # theirs reads the first place of a row, which may be padding; ours its first token
        ids, mask, marked = ids[:2], mask[:2], marked[:2]
    arguments = {"attention_mask": mask, "global_attention_mask": marked}
    compare_logits(theirs(ids, **arguments), ours(ids, **arguments), mask)


def test_longformer_heads_choose_the_same_global_tokens(softmax_in_float64):
    """Without a mask of the caller's: the first token of a sequence, the question of question answering."""
    ids = torch.randint(3, 99, (2, 61))
    ids[0, [7, 8, 60]] = ids[1, [12, 13, 60]] = 2  # <s> question </s></s> context </s>
    for head in ("SequenceClassification", "QuestionAnswering", "TokenClassification", "MaskedLM"):
        theirs = longformer(head)
        ours = convert(theirs, "longformer").model
        compare_logits(theirs(ids), ours(ids), torch.ones_like(ids))


def test_their_longformer_counts_holes_and_ours_does_not(softmax_in_float64):
    """Padding between tokens: theirs keeps its place in the window; ours gives what the tokens alone give."""
    theirs = longformer()
    ours = convert(theirs, "longformer").model
    ids, hole = torch.randint(3, 99, (1, 40)), torch.arange(20, 30)
    mask = torch.ones_like(ids).index_fill(1, hole, 0)
    ids = ids.masked_fill(mask == 0, PAD)
    real = mask[0].bool()
    alone = ours(ids[:, real]).last_hidden_state[0]
    close(alone, theirs(ids[:, real]).last_hidden_state[0], 1e-10)
    close(ours(ids, attention_mask=mask).last_hidden_state[0, real], alone, 1e-10)
    with pytest.raises(AssertionError):
        close(theirs(ids, attention_mask=mask).last_hidden_state[0, real], alone, 1e-3)


# BigBird -------------------------------------------------------------------------------------------------------------


LONG = (5 + 2 * 2) * 8 + 1  # from here on theirs is block-sparse at block size 8 with 2 random blocks


@exact
@pytest.mark.parametrize("length", [LONG, 90, 128, 200], ids=str)
@pytest.mark.parametrize("block_size", [4, 8])
def test_big_bird_is_theirs_in_eval_mode(length, block_size, dtype, tolerance):
    """Any length; in eval mode theirs has no random blocks but reads the first one again for each of them."""
    theirs = big_bird(dtype=dtype, block_size=block_size)
    ours = convert(theirs, "big_bird")
    ids = torch.randint(3, 99, (2, length))
    expected, actual = (model(ids, output_hidden_states=True) for model in (theirs, ours.model))
    for one, other in zip(actual.hidden_states[1:], expected.hidden_states[1:], strict=True):
        close(one, other[:, :length], tolerance)
    close(actual.pooler_output, expected.pooler_output, tolerance)
    for output in (expected, actual):
        probed(output.last_hidden_state).backward()
    compare_gradients(theirs, ours, tolerance)


@pytest.mark.parametrize("length", [80, 128, 200], ids=str)
def test_big_bird_is_theirs_with_its_random_blocks(length, monkeypatch):
    """In training mode (without dropout) theirs draws from numpy, seeded with the layer; the same blocks imported.

    It draws other blocks for other lengths, so these are the ones of one length.
    """
    theirs, tables = big_bird(), []
    attention = theirs.encoder.layer[0].attention.self
    real = type(attention)._create_rand_mask_from_inputs

    def note(from_mask, to_mask, blocks, *rest):
        tables.append(blocks[0])
        return real(from_mask, to_mask, blocks, *rest)

    monkeypatch.setattr(type(attention), "_create_rand_mask_from_inputs", staticmethod(note))
    ids = torch.randint(3, 99, (2, length))
    theirs.train()
    expected = theirs(ids)
    theirs.eval()
    assert any(table.any() for table in tables)
    full = [torch.full((4, 32, 2), -1) for _ in tables]
    for mine, table in zip(full, tables, strict=True):
        mine[:, 1 : 1 + table.shape[1]] = table  # the first and the last block read everything
    ours = convert(theirs, "big_bird", block_tables=full)
    actual = ours.model(ids)
    close(actual.last_hidden_state, expected.last_hidden_state, 1e-10)
    ours.model.set_attn_implementation("eager")
    close(ours.model(ids).last_hidden_state, expected.last_hidden_state, 1e-10)
    ours.model.set_attn_implementation("sdpa")
    for output in (expected, actual):
        probed(output.last_hidden_state).backward()
    compare_gradients(theirs, ours, 1e-10)


@pytest.mark.parametrize("head", [head for head in HEADS if head != "QuestionAnswering"])
def test_big_bird_heads_are_theirs(head):
    """All but question answering, whose head has an MLP of its own there."""
    theirs = big_bird(head)
    ours = convert(theirs, "big_bird").model
    ids = torch.randint(3, 99, (3, 2, 90) if head == "MultipleChoice" else (3, 90))
    close(ours(ids).logits, theirs(ids).logits, 1e-10)


def test_their_big_bird_changes_with_padding_and_ours_does_not():
    """Theirs counts positions and blocks from the left edge of a batch and takes its last block for the last one."""
    theirs = big_bird()
    ours = convert(theirs, "big_bird").model
    alone = torch.randint(3, 99, (1, 90))
    expected = theirs(alone).last_hidden_state[0]
    for place in (torch.arange(90), torch.arange(90) + 30):
        ids, mask = torch.full((2, 120), PAD), torch.zeros(2, 120, dtype=torch.long)
        ids[0, place], mask[0, place] = alone[0], 1
        ids[1], mask[1] = torch.randint(3, 99, (120,)), 1
        close(ours(ids, attention_mask=mask).last_hidden_state[0, place], expected, 1e-10)
        with pytest.raises(AssertionError):
            close(theirs(ids, attention_mask=mask).last_hidden_state[0, place], expected, 1e-3)


def test_their_big_bird_turns_into_full_attention_and_ours_does_not():
    """Theirs switches to full attention at a short input, and does not switch back."""
    theirs = big_bird()
    ours = convert(theirs, "big_bird").model
    short, long = torch.randint(3, 99, (1, LONG - 1)), torch.randint(3, 99, (1, 128))
    before, ours_before = theirs(long).last_hidden_state, ours(long).last_hidden_state
    close(ours_before, before, 1e-10)
    as_full = convert(theirs, "full").model
    close(theirs(short).last_hidden_state, as_full(short).last_hidden_state, 1e-10)
    ours(short)
    close(ours(long).last_hidden_state, ours_before, 1e-10)
    with pytest.raises(AssertionError):
        close(theirs(long).last_hidden_state, before, 1e-3)
