"""Every kind of source with every head: the converted model computes the outputs of transformers."""

import pytest
import torch
import transformers
from transformers import AutoModel, AutoTokenizer

from efficient_transformers.conversion import SOURCES, convert

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 42,
    "initializer_range": 0.3,
    "num_labels": 5,
}
DISTILBERT = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 37, "max_position_embeddings": 42}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 37, "n_positions": 42, "pad_token_id": 0}
COMMON = {"vocab_size": 99, "initializer_range": 0.3, "num_labels": 5}
# name of a case -> stem of the class names, config
CASES = {
    "xlm-roberta": ("XLMRoberta", {**SMALL, "pad_token_id": 1}),
    "camembert": ("Camembert", {**SMALL, "pad_token_id": 1}),
    "distilbert": ("DistilBert", {**COMMON, **DISTILBERT}),
    "distilbert-relu": ("DistilBert", {**COMMON, **DISTILBERT, "activation": "relu", "sinusoidal_pos_embds": True}),
    "electra": ("Electra", {**SMALL, "embedding_size": 14}),
    "electra-same-width": ("Electra", {**SMALL, "embedding_size": 32, "summary_activation": "tanh"}),
    "albert": ("Albert", {**SMALL, "embedding_size": 14}),
    "albert-groups": ("Albert", {**SMALL, "embedding_size": 14, "num_hidden_groups": 2, "inner_group_num": 2}),
    "albert-same-width": ("Albert", {**SMALL, "embedding_size": 32, "hidden_act": "relu"}),
    "gpt2": ("GPT2", {**COMMON, **GPT2}),
    "gpt2-scaled": ("GPT2", {**COMMON, **GPT2, "n_inner": None, "scale_attn_by_inverse_layer_idx": True}),
    "gpt2-unscaled": ("GPT2", {**COMMON, **GPT2, "activation_function": "relu", "scale_attn_weights": False}),
    "gpt2-untied": ("GPT2", {**COMMON, **GPT2, "tie_word_embeddings": False}),
}
ENCODER_HEADS = ["MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"]
DECODER_HEADS = ["CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"]
TABLE = [
    pytest.param(case, head, id=f"{case}-{head or 'Model'}")
    for case, (stem, _) in CASES.items()
    for head in [None, *(DECODER_HEADS if stem == "GPT2" else ENCODER_HEADS)]
]


def make(case, head=None, dtype=torch.float64, **changes):
    """A small random model of transformers."""
    stem, fields = CASES[case]
    config = getattr(transformers, f"{stem}Config")(**{**fields, **changes})
    if head == "QuestionAnswering":
        config.num_labels = 2
    suffix = "LMHeadModel" if (stem, head) == ("GPT2", "CausalLM") else f"For{head}" if head else "Model"
    model = getattr(transformers, stem + suffix)(config)
    for parameter in model.parameters():  # transformers initialises biases to 0 and norms to 1, which hides mistakes
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    return model.to(dtype).eval()


def batch(source, head, side, length=17, real=11):
    """Inputs for the two models: two rows (of two choices each), the second padded on `side` or not at all."""
    pad = source.config.pad_token_id
    ids = torch.randint(4, 99, (2, length))
    mask = torch.ones_like(ids)
    if side is not None:
        ids[1, real:], mask[1, real:] = pad, 0
    inputs = theirs = {"input_ids": ids, "attention_mask": mask}
    if side == "left":
        inputs = {name: torch.stack([x[0], x[1].roll(length - real)]) for name, x in inputs.items()}
        if head not in ("SequenceClassification", "MultipleChoice"):  # their [CLS] is the first column, padding or not
            offset = pad + 1 if SOURCES[source.config.model_type].offset_positions else 0
            mask = inputs["attention_mask"]  # positions are counted from the first column, too
            theirs = {**inputs, "position_ids": (mask.cumsum(1) - 1) * mask + offset * mask}
    if head == "MultipleChoice":
        inputs, theirs = ({name: x[:, None].repeat(1, 2, 1) for name, x in of.items()} for of in (inputs, theirs))
    return inputs, theirs


def outputs(model, inputs):
    """All tensors of an output, zero at padding."""
    with torch.no_grad():
        out = model(**inputs)
    mask, found = inputs["attention_mask"], {}
    for name in ("last_hidden_state", "pooler_output", "logits", "start_logits", "end_logits"):
        if (x := out.get(name)) is not None:
            at_tokens = mask.dim() == 2 and x.shape[:2] == mask.shape
            found[name] = x * mask.view(*mask.shape, *[1] * (x.dim() - 2)) if at_tokens else x
    return found


def agree(model, source, inputs, source_inputs, tolerance=1e-10):
    expected, found = outputs(source, source_inputs), outputs(model, inputs)
    if "pooler_output" not in expected:
        found.pop("pooler_output", None)  # the source has no pooler: ours is new
    elif not inputs["attention_mask"][:, 0].all():
        del expected["pooler_output"], found["pooler_output"]  # theirs pools the first column, padding or not
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_every_kind_of_source_has_a_case():
    here = {case.split("-")[0] for case in CASES} | {"xlm-roberta"}
    elsewhere = {"bert", "roberta", "longformer", "big_bird", "fnet"}  # test_conversion.py, test_fnet.py
    assert here - {"xlm"} | elsewhere == set(SOURCES)


@pytest.mark.parametrize(("case", "head"), TABLE)
def test_a_converted_model_computes_the_outputs_of_the_source(case, head):
    """Without padding, and with padding on either side."""
    source = make(case, head)
    conversion = convert(source, "full")
    assert type(conversion.model).__name__ == (f"EtFullFor{head}" if head else "EtFullModel")
    new = {name.removeprefix("model.").split(".")[0] for name in conversion.report.created}
    scored = case.startswith("gpt2") and head == "SequenceClassification"  # by a matrix alone
    assert new == ({"pooler", "classifier"} if scored else {"pooler"} if new and head is None else set())
    assert {*conversion.report.copied, *conversion.report.created} == set(conversion.model.state_dict())
    assert all(".pooler." in name for name in conversion.report.left), "unread by the head"
    for side in (None, "right", "left"):
        agree(conversion.model, source, *batch(source, head, side))


@pytest.mark.parametrize("case", CASES)
def test_longer_positions_are_the_sources_tiled(case):
    """Rows that no token of RoBERTa reads, the first `pad_token_id + 1`, are not repeated."""
    source = make(case)
    rows = 40 if SOURCES[source.config.model_type].offset_positions else 42
    conversion = convert(source, "full", max_position_embeddings=2 * rows + 9)
    assert f"positions: {rows} rows tiled to {2 * rows + 9}" in conversion.report.notes
    table = conversion.model.embeddings.position_embeddings.weight
    assert table[rows : 2 * rows].equal(table[:rows])
    agree(conversion.model, source, *batch(source, None, "right", length=rows))


@pytest.mark.parametrize("case", CASES)
def test_a_window_as_wide_as_the_text_gives_what_the_source_gives(case):
    source = make(case)
    inputs = batch(source, None, "right")
    agree(convert(source, "local", window_size=17).model, source, *inputs)
    narrow = outputs(convert(source, "local", window_size=2).model, inputs[0])["last_hidden_state"]
    assert not torch.allclose(narrow, outputs(source, inputs[1])["last_hidden_state"])


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("gpt2")])
def test_gpt2_generates_what_transformers_generates(case):
    source = make(case, "CausalLM")
    model = convert(source, "full").model
    inputs, _ = batch(source, "CausalLM", "left")
    how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert model.generate(**inputs, **how).equal(source.generate(**inputs, **how))


CAUSAL = ("local", "stride", "global", "mixed", "longformer", "efficient", "linear", "rfa", "performer", "sinkhorn")


@pytest.mark.parametrize("variant", CAUSAL)
def test_gpt2_becomes_every_causal_variant_with_its_projections(variant):
    source = make("gpt2", "CausalLM")
    conversion = convert(source, variant)
    assert type(conversion.model).__name__.endswith("ForCausalLM")
    one_token = torch.randint(4, 99, (3, 1))  # that is read with weight 1, however weights are made
    inputs = {"input_ids": one_token, "attention_mask": torch.ones_like(one_token)}
    agree(conversion.model, source, inputs, inputs)


FIELDS = {
    "distilbert": (
        {"dropout": 0.3, "attention_dropout": 0.2, "seq_classif_dropout": 0.4},
        {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2, "classifier_dropout": 0.4},
    ),
    "albert": ({"classifier_dropout_prob": 0.3}, {"classifier_dropout": 0.3, "hidden_act": "gelu_new"}),
    "electra": ({"classifier_dropout": 0.3}, {"classifier_dropout": 0.3, "embedding_size": 14}),
    "electra-same-width": ({}, {"embedding_size": None}),
    "gpt2": (
        {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.2, "layer_norm_epsilon": 1e-3},
        {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2, "layer_norm_eps": 1e-3,
         "classifier_pooling": "last", "is_decoder": True, "norm_first": True, "type_vocab_size": 0},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("case", "theirs", "ours"), [(case, *fields) for case, fields in FIELDS.items()], ids=FIELDS)
def test_fields_have_the_names_that_they_have_here(case, theirs, ours):
    config = convert(make(case, **theirs), "full").model.config
    assert {name: getattr(config, name) for name in ours} == ours


NOTES = {
    "albert": ("albert-groups", {}, "layers: the source shares 4 among 6; here each has a copy"),
    "gpt2 scores": ("gpt2-scaled", {}, "scale_attn_weights is True, scale_attn_by_inverse_layer_idx is True"),
    "gpt2 dropout": ("gpt2", {"embd_pdrop": 0.2}, r"embd_pdrop (0.2) becomes hidden_dropout_prob (0.1)"),
}


@pytest.mark.parametrize(("case", "changes", "note"), NOTES.values(), ids=NOTES)
def test_what_a_variant_does_otherwise_is_noted(case, changes, note):
    (found,) = convert(make(case, **changes), "full").report.notes
    assert note in found


REFUSED = {
    "discriminator": (
        "electra",
        "PreTraining",
        {},
        "full",
        {},
        r"the source's head \('PreTraining'\).*'Model' for the",
    ),
    "summary": (
        "electra",
        "MultipleChoice",
        {"summary_type": "mean"},
        "full",
        {},
        r"\('mean', True\) must be \('first'",
    ),
    "generator": ("electra", "MaskedLM", {"hidden_act": "relu"}, "full", {}, r"hidden_act \('relu'\) must be 'gelu'"),
    "decoder": ("electra", None, {"is_decoder": True}, "full", {}, "is_decoder=True: only encoders"),
    "width": ("albert", None, {}, "full", {"embedding_size": None}, r"embedding_size \(None\) must be 14"),
    "sharing": ("albert", None, {}, "full", {"num_hidden_layers": 1}, r"num_hidden_layers \(1\) must be 3"),
    "not causal": (
        "gpt2",
        "CausalLM",
        {},
        "linformer",
        {},
        r"\(gpt2\) is a decoder, and et_linformer has no.*full, local",
    ),
    "both sides": (
        "gpt2",
        "CausalLM",
        {},
        "full",
        {"head": "MaskedLM"},
        r"'MaskedLM'\) must be one of Sequence.*CausalLM",
    ),
    "encoder": ("gpt2", None, {}, "full", {"is_decoder": False}, r"is_decoder \(False\) must be True"),
    "cross": ("gpt2", None, {"add_cross_attention": True}, "full", {}, "add_cross_attention=True"),
    "untied": (
        "gpt2-untied",
        "CausalLM",
        {},
        "full",
        {"tie_word_embeddings": True},
        r"\(True\) must be False",
    ),
    "types": ("distilbert", None, {}, "full", {"type_vocab_size": 2}, r"type_vocab_size \(2\) must be 0"),
}


@pytest.mark.parametrize(("case", "head", "changes", "variant", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_no_variant_computes_is_refused(case, head, changes, variant, options, message):
    with pytest.raises(ValueError, match=message):
        convert(make(case, head, **changes), variant, **options)


@pytest.mark.parametrize("kind", ["mpnet", "deberta", "deberta-v2"])
def test_a_relative_bias_is_refused_with_the_reason(kind, tmp_path):
    (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    with pytest.raises(
        ValueError, match=rf"\({kind!r}\) cannot be converted: its attention scores have a learned term for the"
    ):
        convert(tmp_path, "full")


def test_the_discriminator_of_electra_gives_its_body():
    source = make("electra", "PreTraining")
    conversion = convert(source, "full", head="Model")
    assert all(name.startswith("discriminator_predictions.") for name in conversion.report.left)
    inputs, _ = batch(source, None, "right")
    agree(conversion.model, source.electra, inputs, inputs)


@pytest.mark.parametrize("head", ["SequenceClassification", "MultipleChoice"])
@pytest.mark.parametrize("case", ["distilbert", "electra", "albert", "gpt2"])
def test_a_new_head_begins_as_a_new_one_does(case, head):
    """Not as one of the source's kind: BERT's pooler, tanh and all. GPT-2 has no such head for choices at all."""
    conversion = convert(make(case), "full", head=head)
    assert conversion.model.config.pooler_act == "tanh"
    assert {"classifier.weight", "classifier.bias"} <= set(conversion.report.created)
    assert not torch.equal(conversion.model.model.pooler.dense.weight, torch.eye(32, dtype=torch.float64))


NUMBERED = [f"word{i}" for i in range(50)]
PIECES = [(piece, 0.0) for piece in ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "[CLS]", "[SEP]", "[MASK]")]
PIECES += [(f"▁{word}", -float(i)) for i, word in enumerate(NUMBERED)]
WORDS = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *NUMBERED])}
BYTES = {piece: i for i, piece in enumerate(["<|endoftext|>", *"word0123456789", "Ġ", "wo", "rd", "word"])}
TOKENIZERS = {
    "xlm-roberta": lambda: transformers.XLMRobertaTokenizer(vocab=PIECES),
    "camembert": lambda: transformers.CamembertTokenizer(vocab=PIECES),
    "distilbert": lambda: transformers.DistilBertTokenizer(vocab=WORDS),
    "electra": lambda: transformers.ElectraTokenizer(vocab=WORDS),
    "albert": lambda: transformers.AlbertTokenizer(vocab=PIECES),
    "gpt2": lambda: transformers.GPT2Tokenizer(vocab=BYTES, merges=[("w", "o"), ("r", "d"), ("wo", "rd")]),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_folder_keeps_its_tokenizer(case, tmp_path):
    tokenizer, source = TOKENIZERS[case](), make(case, dtype=torch.float32)
    source.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    conversion = convert(tmp_path / "source", "local", max_position_embeddings=90)
    conversion.save(tmp_path / "local")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "local")
    text = "word7 word3 word11 " * 40
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert len(set(loaded(text)["input_ids"])) > 3
    assert len(loaded(text, truncation=True)["input_ids"]) == 90
    encoded = loaded("word7 word3", return_tensors="pt")
    given = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    agree(AutoModel.from_pretrained(tmp_path / "local").eval(), source, given, given, tolerance=1e-4)
