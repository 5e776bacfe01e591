"""Causal language models: scores, and runs from start to end, interrupted, refused or in two processes."""

import io
import math
from contextlib import redirect_stdout
from functools import partial

import pytest
import torch
from huggingface_hub import ModelCard
from language_runs import TINY_CLM, byte_level, clm_settings
from safetensors.torch import load_file
from training_runs import (
    TEXT,
    assert_same_run,
    composed,
    each_variant_of,
    kill_and_continue,
    launch_two,
    read_metrics,
    reset_accelerate,
    run,
    stop_and_continue,
    write_config,
    write_rows,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForTokenClassification,
)

from efficient_transformers import VARIANTS
from efficient_transformers.cards import loading_code
from efficient_transformers.training.data.packing import IGNORED, RowCollator
from efficient_transformers.training.data.texts import load_texts
from efficient_transformers.training.engine import task
from efficient_transformers.training.engine.building import build_config, make_accelerator
from efficient_transformers.training.engine.scoring import Evaluator
from efficient_transformers.training.runs import evaluate, train
from efficient_transformers.training.settings import InputError
from efficient_transformers.training.tasks import pretrain_clm
from efficient_transformers.training.tasks.pretrain_clm import TASK, CausalScorer, load_open_tokenizer, reads_ahead

TINY = TINY_CLM  # the settings that the fixtures of conftest.py take


SCORES = ("loss", "perplexity", "accuracy", "nats_per_byte", "bits_per_byte")


TOTAL = 28
LAST = f"step-{TOTAL:09d}"


# --- scores


class Uniform(torch.nn.Module):
    """Every token is as likely as any other, but the argmax is the token `best`."""

    def __init__(self, vocabulary, best):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(vocabulary))
        self.logits.data[best] = 1e-6

    def forward(self, input_ids, attention_mask):
        return type("Output", (), {"logits": self.logits.expand(*input_ids.shape, -1)})


def test_scores_on_a_case_done_by_hand():
    """aé$ and é$ (here padded) predict é¹ é² $ and é² $: of five tokens with three bytes two are an end."""
    tokenizer = byte_level()
    tokenizer.pad_token = tokenizer.eos_token
    values = clm_settings(packing="padding")
    data = TASK.make_windows("test", ["aé", "é"], tokenizer, 8, values)
    assert data.counts() == {"predicted_tokens": 5, "predicted_bytes": 3}
    collate = DataCollatorForTokenClassification(tokenizer)
    scores = Evaluator(make_accelerator(values), CausalScorer(data, values), collate, values.eval_batch_size)(
        Uniform(257, tokenizer.eos_token_id)
    )
    nats = math.log(257)
    expected = {"loss": nats, "perplexity": 257, "accuracy": 2 / 5, "nats_per_byte": 5 * nats / 3,
                "bits_per_byte": 5 * math.log2(257) / 3}  # fmt: skip
    assert scores == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("packing", ["padding", "best_fit"])
def test_every_predicted_token_counts_the_same(batch_size, side, packing):
    values = clm_settings(eval_batch_size=batch_size, packing=packing, shortest_window=1)
    tokenizer = load_open_tokenizer(values, [TEXT])
    tokenizer.padding_side = side
    texts = [TEXT * 4, " but", " and nobody", " naïve — 日本", TEXT]
    data = TASK.make_windows("test", texts, tokenizer, 60, values)
    model = pretrain_clm.TASK.build_model(values, build_config(values, tokenizer), tokenizer).eval()
    losses, right = [], []
    windows = data.windows if packing == "padding" else data.windows.windows
    assert (len(data) < len(windows)) == (packing == "best_fit")
    for window in windows:
        ids = torch.tensor(window.ids, dtype=torch.long)[None]
        log_probabilities = model(ids).logits[0, :-1].double().log_softmax(-1)
        losses += (-log_probabilities.gather(1, ids[0, 1:, None])[:, 0]).tolist()
        right += (log_probabilities.argmax(-1) == ids[0, 1:]).tolist()
    assert len(losses) == data.counts()["predicted_tokens"] > 150

    collate = RowCollator(DataCollatorForTokenClassification(tokenizer), side)
    scores = Evaluator(make_accelerator(values), CausalScorer(data, values), collate, values.eval_batch_size)(model)
    loss, nats = sum(losses) / len(losses), sum(losses) / data.counts()["predicted_bytes"]
    expected = (loss, math.exp(loss), sum(right) / len(right), nats, nats / math.log(2))
    assert scores == pytest.approx(dict(zip(SCORES, expected, strict=True)), rel=1e-5)
    # the model's own loss, which training takes, is of the same tokens
    batch = collate([data[i] for i in range(len(data))])
    assert (batch["labels"] != IGNORED).sum() == len(losses)
    assert model(**batch).loss.item() == pytest.approx(loss, rel=1e-5)


def test_the_loss_falls(finished):
    found = read_metrics(finished[0])
    assert found["before"]["loss"] == pytest.approx(math.log(4096), abs=1)
    assert found["test"]["loss"] < 0.3 * found["before"]["loss"]
    losses = [entry["loss"] for entry in found["history"]]
    assert found["validation"]["loss"] == min(losses) < losses[0]
    assert found["training"]["steps"] == TOTAL


def test_the_metrics_agree_with_each_other(finished, corpus):
    found, texts = read_metrics(finished[0]), load_texts(clm_settings(data=str(corpus)))
    for name in ("test", "validation"):
        scores = found[name]
        assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
        assert scores["bits_per_byte"] == pytest.approx(scores["nats_per_byte"] / math.log(2))
        nats = scores["loss"] * scores["predicted_tokens"]
        assert scores["nats_per_byte"] == pytest.approx(nats / scores["predicted_bytes"])
        # every window has lost its first token
        whole = sum(len(text.encode()) for text in texts[name])
        assert whole - 12 * scores["n"] < scores["predicted_bytes"] < whole


def test_what_is_learnt_is_generated(config, tmp_path):
    run(config, "--epochs=12", "--gradient_accumulation=1", "--learning_rate=0.01", "--model.hidden_dropout_prob=0.0",
        "--eval_steps=1000", "--checkpoint_steps=1000", "--packing=padding")  # fmt: skip
    model, tokenizer = (auto.from_pretrained(tmp_path / "out") for auto in (AutoModelForCausalLM, AutoTokenizer))
    prompt = tokenizer("the people of", return_tensors="pt")
    (ids,) = model.generate(**prompt, max_new_tokens=7, do_sample=False)
    assert tokenizer.decode(ids) == "[CLS]the people of the union are at peace ."
    # a sentence is the last one of its document now and then, and no document ends within one
    ends = model(ids[None]).logits[0].softmax(-1)[:, tokenizer.eos_token_id]
    assert ends[-1] > 0.1
    assert ends[4:-1].max() < 0.01


def test_the_output_folder_is_ready_for_the_hub(finished):
    folder, printed = finished
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "metrics.json"} < names
    assert "modeling_local.py" in names
    assert list((folder / "runs").rglob("events.out.tfevents.*"))
    code = loading_code(str(folder), "AutoModelForCausalLM", 24)
    assert code in printed
    assert "bits_per_byte" in printed
    with redirect_stdout(io.StringIO()) as shape:
        exec(code, {})
    assert "4096" in shape.getvalue()


def test_the_card_of_a_run_is_valid(finished):
    folder, _ = finished
    card, found = ModelCard.load(folder / "README.md"), read_metrics(folder)
    assert card.data.pipeline_tag == "text-generation"
    results = {result.metric_type: (result.task_type, result.metric_value) for result in card.data.eval_results}
    types = ("cross-entropy", *SCORES[1:])
    assert results == {
        name: ("text-generation", found["test"][score]) for name, score in zip(types, SCORES, strict=True)
    }
    for text in ("AutoModelForCausalLM", "| Bits per byte |", f"{found['test']['predicted_bytes']:,} UTF-8 bytes",
                 "validation before training | loss 8."):  # fmt: skip
        assert text in card.text
    assert f"training/train.py --config {folder.parent / 'tiny.yaml'}" in card.text


def test_a_finished_run_is_evaluated(finished, capsys):
    folder, _ = finished
    found = read_metrics(folder)["test"]
    evaluate.main([str(folder)])
    assert '"bits_per_byte": ' in capsys.readouterr().out
    reset_accelerate()
    scores = pretrain_clm.evaluate_folder(folder, [])
    assert scores == pytest.approx({name: found[name] for name in (*SCORES, "n")}, rel=1e-5)
    reset_accelerate()
    assert pretrain_clm.evaluate_folder(folder, ["--max_length=10"])["n"] > found["n"]


def test_a_checkpoint_is_trained_on(finished, config, tmp_path):
    folder, _ = finished
    found = run(config, f"--model.checkpoint={folder}", "--tokenizer=null", "--max_steps=3", "--learning_rate=0.001")
    best = read_metrics(folder)["validation"]
    assert found["before"] == pytest.approx({name: best[name] for name in SCORES}, rel=1e-5)
    ours, theirs = load_file(tmp_path / "out/model.safetensors"), load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert not any(torch.equal(ours[name], theirs[name]) for name in ours if name.endswith("proj.weight"))


# --- stopped and continued


def test_sigterm_saves_and_the_run_ends_as_one_never_stopped(monkeypatch, capsys, finished, config, tmp_path):
    stop_and_continue(monkeypatch, config, 10)  # in the second epoch
    printed = capsys.readouterr().out
    assert f"train.py --config {config} --resume" in printed
    assert f"Resuming after step 10 of {TOTAL}" in printed
    assert_same_run(tmp_path / "out", finished[0], LAST)


@pytest.mark.parametrize(("step", "saved"), [(11, 9), (TOTAL, TOTAL)], ids=["midway", "at last"])
def test_a_killed_run_ends_as_one_never_stopped(monkeypatch, finished, config, tmp_path, step, saved):
    left = kill_and_continue(monkeypatch, partial(run, config), tmp_path / "out", step, TOTAL)
    assert left == f"step-{saved:09d}"
    assert_same_run(tmp_path / "out", finished[0], LAST)


# --- errors before any work


BAD_RUNS = {
    "packing": (["--packing=tight"], r"packing \('tight'\) must be one of documents, padding"),
    "metric": (["--best_metric=bits_per_byte"], r"best_metric \('bits_per_byte'\) must be loss"),
    "share": (["--mlm_probability=0.3"], "There is no setting 'mlm_probability'"),
    "length": (["--max_length=1"], r"max_length \(1\) must be at least 3"),
    "positions": (["--max_length=65"], r"max_length \(65\) must not exceed .* max_position_embeddings \(64\)"),
    "column": (["--text_column=body"], "no column 'body'; there are: text. Set text_column"),
}
BERT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
BAD_MODELS = {
    "no head": ({"model_type": "et_big_bird"}, r"A et_big_bird model has no head .* \(et_full, et_local, .*_mlm"),
    "told to": ({"model_type": "et_big_bird", "is_decoder": True}, "BigBird cannot be causal: .* use et_mixed"),
    "encoder": (BERT, "A bert model attends to the tokens that it should predict: set --model.is_decoder true"),
}


@pytest.mark.parametrize(("overrides", "message"), BAD_RUNS.values(), ids=BAD_RUNS)
def test_bad_runs_are_refused_before_training(monkeypatch, config, tmp_path, overrides, message):
    monkeypatch.setattr(task, "train", lambda *arguments: pytest.fail("training began"))
    with pytest.raises(InputError, match=message):
        run(config, *overrides)
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(("model", "message"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_models_that_are_not_causal_are_refused(corpus, tmp_path, model, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}") as error:
        train.main(["--config", str(write_config(tmp_path, TINY_CLM, corpus, model=model))])
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("*"))


def test_a_split_without_text_is_refused(config, tmp_path):
    empty = write_rows(tmp_path / "empty.jsonl", [{"text": "[MASK]"}])
    with pytest.raises(InputError, match="The test data contains no text that could be predicted"):
        run(config, f"--test_data={empty}")


def test_an_encoder_is_refused_unless_it_is_to_become_a_decoder(config, tmp_path):
    fields = {**TINY_CLM["model"], "vocab_size": 4096}
    encoder = AutoModelForMaskedLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    encoder.save_pretrained(tmp_path / "encoder")
    given = (f"--model.checkpoint={tmp_path / 'encoder'}", "--max_steps=1", "--eval_first=false")
    with pytest.raises(InputError, match=r"The checkpoint .* is a bidirectional encoder.*set --model.is_decoder true"):
        run(config, *given)
    run(config, *given, "--model.is_decoder=true")
    assert not reads_ahead(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}


@pytest.mark.parametrize("model", [GPT2, {**BERT, "is_decoder": True}], ids=["gpt2", "bert"])
def test_models_of_transformers_are_trained(corpus, tmp_path, model):
    found = run(write_config(tmp_path, TINY_CLM, corpus, model=model), "--max_steps=2", "--eval_first=false")
    assert found["training"]["steps"] == 2


# --- the configs, and several processes


@each_variant_of("clm", "pg19")
def test_every_config_builds_a_tiny_model(task, variant):
    tiny = ("--model.hidden_size=32", "--model.num_hidden_layers=1", "--model.intermediate_size=32")
    _, values = composed(task, variant, *tiny)
    tokenizer = load_open_tokenizer(values, [TEXT])
    model = pretrain_clm.TASK.build_model(values, build_config(values, tokenizer), tokenizer)
    data = TASK.make_windows("train", [TEXT * 30], tokenizer, 300, values)
    batch = DataCollatorForTokenClassification(tokenizer)([data[0], data[1]])
    assert model(**batch).loss.item() == pytest.approx(math.log(len(tokenizer)), abs=2)
    assert {key: getattr(model.config, key) for key in values.model} == values.model
    assert VARIANTS[values.model["model_type"].removeprefix("et_")].causal


@pytest.mark.slow
def test_several_processes_give_the_scores_of_one(config, tmp_path):
    launch_two("--config", str(config), "--eval_batch_size=5")
    found = read_metrics(tmp_path / "out")
    assert found["training"]["processes"] == 2
    scores = pretrain_clm.evaluate_folder(tmp_path / "out", [])
    assert {name: scores[name] for name in SCORES} == pytest.approx(
        {name: found["test"][name] for name in SCORES}, rel=1e-5
    )
