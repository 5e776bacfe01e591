"""Pipelines over documents that are longer than the model, in the folders that the project writes."""

from pathlib import Path

import pytest
import torch
from repository import ROOT
from transformers import AutoTokenizer, pipeline
from zoo import build

from efficient_transformers import VARIANTS
from efficient_transformers.folders import fit_tokenizer

CARDS = ROOT / "model_cards"
TEXT = "the tariff and the canal of the union " * 600  # over 4,096 tokens


def open_pipeline(task: str, folder: Path):
    return pipeline(task, str(folder), device="cpu")


def test_classification_judges_the_first_tokens_of_a_long_document():
    classify = open_pipeline("text-classification", CARDS / "linear-era")
    ids = classify.tokenizer(TEXT)["input_ids"]
    assert len(ids) > classify.model.config.max_position_embeddings == 4096
    kept = torch.tensor([ids[:4095] + ids[-1:]])  # the separator stays at the end
    with torch.no_grad():
        scores = classify.model(kept).logits.softmax(-1)[0]
    (answer,) = classify(TEXT, truncation=True)
    assert answer["score"] == pytest.approx(scores.max().item(), abs=1e-4)


def test_masked_models_fill_a_long_document():
    fill = open_pipeline("fill-mask", CARDS / "linear-mlm")
    answers = fill(f"the people of the united [MASK] {TEXT}", tokenizer_kwargs={"truncation": True}, top_k=3)
    assert len(answers) == 3


def test_features_of_a_long_document():
    features = open_pipeline("feature-extraction", CARDS / "linear-mlm")
    assert len(features(TEXT, truncation=True)[0]) == 4096


def test_causal_models_continue_the_end_of_a_long_document():
    generate = open_pipeline("text-generation", CARDS / "linear-clm")
    (answer,) = generate(TEXT, max_new_tokens=4, handle_long_generation="hole", do_sample=False)
    assert len(answer["generated_text"]) > 0


def test_tokens_of_a_long_document_are_classified_in_overlapping_pieces(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(CARDS.parent / "data" / "tokenizer")
    model = build(VARIANTS["local"], {"window_size": 3}, "TokenClassification", vocab_size=4096, dtype=torch.float32)
    fit_tokenizer(tokenizer, model.config)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    assert "is_local" not in (tmp_path / "tokenizer_config.json").read_text()
    tag = pipeline("token-classification", str(tmp_path), device="cpu", aggregation_strategy="simple", stride=16)
    text = TEXT[:2000]
    found = tag(text)
    assert max(entity["end"] for entity in found) == len(text.rstrip())
