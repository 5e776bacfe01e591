"""Longformer and BigBird as sources: windows, global tokens and random blocks are kept."""

import numpy
import pytest
import torch
from source_models import SOURCE_HEADS, SOURCE_SIZES, agree, batch, make
from transformers import AutoModel

from efficient_transformers.conversion import convert

LONGFORMER = {"rtol": 0, "atol": 1e-5}  # transformers takes its softmax in float32


def test_longformer_becomes_local():
    """Without global tokens Longformer is local attention, with half its window to each side."""
    source = make("Longformer", "MaskedLM")
    conversion = convert(source, "local")
    assert conversion.model.config.window_size == [2, 4]
    assert len(conversion.report.left) == 2 * 6
    assert "query_global.weight (2 layers): the variant has no projections of its own" in str(conversion.report)
    agree(conversion.model, source, batch(None, 1), **LONGFORMER)


@pytest.mark.parametrize("head", SOURCE_HEADS)
def test_big_bird_becomes_full(head):
    """Up to some blocks BigBird reads everything. Its answers have a head of their own."""
    source = make("BigBird", head, hidden_act="relu")
    conversion = convert(source, "full")
    if head == "QuestionAnswering":
        assert set(conversion.report.created) == {"qa_outputs.weight", "qa_outputs.bias"}
        assert all(name.startswith("qa_classifier.") for name in conversion.report.left)
        return
    assert not conversion.report.created
    agree(conversion.model, source, batch(head, 0))


def test_big_bird_without_biases_and_with_a_scale():
    source = make("BigBird", use_bias=False, rescale_embeddings=True)
    conversion = convert(source, "full")
    assert len(conversion.report.created) == 2 * 3
    assert "q_proj.bias (2 layers): zero: the source has no bias" in str(conversion.report)
    assert "√hidden_size" in conversion.report.notes[0]
    agree(conversion.model, source, batch(None, 0))
    source = make("BigBird", "MaskedLM", rescale_embeddings=True, tie_word_embeddings=False)
    agree(convert(source, "full").model, source, batch(None, 0))


@pytest.mark.parametrize("head", SOURCE_HEADS)
def test_longformer_becomes_longformer(head):
    source = make("Longformer", head)
    conversion = convert(source, "longformer")
    assert not conversion.report.created
    assert not conversion.report.left
    assert conversion.model.config.attention_window == [4, 8]
    assert conversion.model.config.sep_token_id == SOURCE_SIZES["sep_token_id"]
    inputs = batch(head, 1)
    if head in ("SequenceClassification", "QuestionAnswering"):  # these choose their global tokens themselves, too
        inputs["input_ids"][:, [5, 6, 10]] = SOURCE_SIZES["sep_token_id"]
        agree(conversion.model, source, inputs, **LONGFORMER)
    assert any("global tokens" in note for note in conversion.report.notes) == (head == "MultipleChoice")
    inputs["global_attention_mask"] = torch.zeros_like(inputs["input_ids"])
    inputs["global_attention_mask"][..., [0, 3]] = 1
    agree(conversion.model, source, inputs, **LONGFORMER)


def test_bert_becomes_longformer():
    conversion = convert(make("Bert"), "longformer", attention_window=80)
    assert len(conversion.report.created) == 2 * 6
    assert "mixer.global_q_proj.weight (2 layers): copied from the local projections" in str(conversion.report)
    mixer = conversion.model.layers[1].mixer
    assert torch.equal(mixer.global_v_proj.weight, mixer.v_proj.weight)


def test_big_bird_becomes_big_bird(tmp_path):
    """In eval mode transformers reads block 0 in place of random blocks, and so does the converted model."""
    source = make("BigBird")
    conversion = convert(source, "big_bird")
    config = conversion.model.config
    assert (config.block_size, config.num_random_blocks, config.random_blocks) == (4, 2, "stored")
    assert ["random_blocks=drawn" in note or "up to 36 tokens" in note for note in conversion.report.notes] == [
        True
    ] * 2
    ids = torch.randint(4, 99, (2, 61))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    agree(conversion.model, source, inputs)
    conversion.save(tmp_path)
    agree(AutoModel.from_pretrained(tmp_path, dtype=torch.float64).eval(), source, inputs)


def test_random_blocks_are_drawn_unless_transformers_can_be_followed():
    for stem, fields in [("Bert", {}), ("BigBird", {"random_blocks": "drawn"}), ("BigBird", {"num_window_blocks": 5})]:
        conversion = convert(make(stem), "big_bird", **fields)
        assert conversion.model.config.random_blocks == "drawn"
        assert not conversion.report.notes
    conversion = convert(make("Bert"), "big_bird", random_blocks="stored", block_size=4)
    assert conversion.report.created["layers.1.mixer.random_blocks"] == "drawn by pattern_seed"
    assert len(conversion.model.layers[1].mixer.random_blocks.unique()) > 2
    full = make("BigBird", attention_type="original_full")
    assert convert(full, "big_bird").model.config.random_blocks == "drawn"


def test_random_blocks_of_training_are_stored():
    """The tables transformers draws while it trains; without dropout its outputs then are those of eval mode."""
    source, length, tables = make("BigBird", attention_probs_dropout_prob=0.0), 64, []
    for number, layer in enumerate(source.encoder.layer):
        attention = layer.attention.self.train()
        assert attention.seed == number
        plan = attention._get_rand_attn_plan(length, 4, 2)
        numpy.random.seed(number)  # noqa: NPY002 as transformers does
        drawn = attention._bigbird_block_rand_mask_with_head(length, length, 4, 4, 4, *plan)
        table = torch.full((4, 24, 2), -1)
        table[:, 1:15] = torch.tensor(numpy.stack(drawn))
        tables.append(table)
    conversion = convert(source, "big_bird", block_tables=tables)
    assert [torch.equal(x.mixer.random_blocks, y) for x, y in zip(conversion.model.layers, tables, strict=True)]
    assert not conversion.report.notes
    ids = torch.randint(4, 99, (2, length))
    agree(conversion.model, source, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


TABLE = torch.zeros(4, 24, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("tables", "fields", "message"),
    [
        ([TABLE], {}, "block_tables has 1 entries and num_hidden_layers is 2"),
        ([TABLE, TABLE], {"max_position_embeddings": 48}, r"block_tables\[0\] must have shape .* = \(4, 12, 3\)"),
        ([TABLE, TABLE + 24], {}, r"block_tables\[1\] holds 24: blocks are numbered 0 to 23"),
        ([TABLE, TABLE], {"random_blocks": "drawn"}, r"random_blocks \('drawn'\) must be 'stored'"),
    ],
)
def test_block_tables_that_do_not_fit(tables, fields, message):
    with pytest.raises(ValueError, match=message):
        convert(make("BigBird"), "big_bird", block_tables=tables, **fields)
