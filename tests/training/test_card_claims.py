"""A card says only what is true of its run: nothing of a config's own data where options name others."""

import pytest
from huggingface_hub import ModelCard
from training_runs import MODEL, TINY_LANGUAGE, composed, read_metrics, write_config, write_sentences

from efficient_transformers import cli
from efficient_transformers.publishing import to_fill_in
from efficient_transformers.training.data.texts import source_of
from efficient_transformers.training.engine.card import make_card
from efficient_transformers.training.runs import train
from efficient_transformers.training.settings import DATA
from efficient_transformers.training.tasks.classify import ClassifySettings

CLAIMS = ("license", "language", "card_notes")


def claims(*options, variant="local"):
    settings = composed("era", variant, *options)[1]
    return {name for name in CLAIMS if getattr(settings, name)}


def test_a_config_speaks_of_its_own_run():
    assert claims() == claims("--seed=3", "--out=elsewhere", "--log_steps=5") == set(CLAIMS)


@pytest.mark.parametrize("name", DATA)
def test_other_data_have_a_licence_and_a_language_of_their_own(name):
    value = '["b.jsonl"]' if name == "more_data" else "b.jsonl"
    assert claims(f"--{name}={value}") == set()
    assert claims(f"--{name}={value}", "--license=mit", "--language=de") == {"license", "language"}


def test_other_models_have_no_notes_and_other_checkpoints_no_licence():
    assert claims("--learning_rate=1e-5") == {"license", "language"}
    assert claims("--model.hidden_size=64") == {"license", "language"}
    assert claims("--model.checkpoint=bert-base-uncased") == {"language"}


def test_a_folder_of_ones_own_is_no_data_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "reviews").mkdir(parents=True)
    assert source_of("mine/reviews") == source_of("./gone") == source_of("/gone/reviews") == "local"
    assert source_of("stanfordnlp/imdb") == "hub"
    assert source_of("era") == "bundled"
    assert source_of("listops") == "generated"


@pytest.mark.parametrize(("source", "declared"), [("local", None), ("hub", ["mine/reviews"])])
def test_the_card_of_a_folder_that_is_gone_knows_where_it_was(source, declared):
    metrics = {
        "model": {"model_type": "et_local", "max_length": 8, "parameters": 1},
        "training": dict.fromkeys(("windows", "steps", "tokens", "seconds", "tokens_per_second", "processes"), 1)
        | {"hardware": "none", "precision": "no", "data_source": source},
        "test": {"n": 1},
        "validation": {"step": 1},
        "versions": {},
    }
    settings = ClassifySettings.from_dict({"data": "mine/reviews", "tokenizer": "data/tokenizer", "model": MODEL})
    card = make_card(
        settings,
        metrics,
        "command",
        task_type="text-classification",
        auto_class="AutoModelForSequenceClassification",
        description="A model.",
        shown={"accuracy": 0.5},
        unit="documents",
        limits=["None."],
    )
    assert card.data.datasets == declared
    (result,) = card.data.eval_results
    assert result.dataset_type == ("local" if source == "local" else "mine/reviews")
    assert "long-documents" not in card.data.tags


def test_a_run_on_ones_own_documents_claims_nothing_and_says_what_to_fill_in(tmp_path, capsys):
    config = write_config(
        tmp_path,
        TINY_LANGUAGE | {"task": "pretrain_mlm", "eval_first": False},
        "era",
        max_steps=1,
        gradient_accumulation=1,
        eval_steps=1,
        license="apache-2.0",
        language="en",
        card_notes="Of the bundled corpus: 0.85.",
    )
    train.main(["--config", str(config), "--data", str(write_sentences(tmp_path))])
    assert "To fill in at the top of" in (printed := capsys.readouterr().out)
    assert "license: …" in printed
    folder = tmp_path / "out"
    card = ModelCard.load(folder / "README.md")
    assert card.data.license is None
    assert card.data.language is None
    assert card.data.datasets is None
    assert "0.85" not in str(card)
    assert "apache" not in str(card)
    assert read_metrics(folder)["training"]["data_source"] == "local"
    assert len(to_fill_in(folder)) == 3
    cli.main(["push", str(folder), "someone/model", "--dry-run"])
    assert "to fill in" in capsys.readouterr().out
