"""Trainer, pipelines, PEFT, device maps: what people do with a model once they have it."""

import datasets
import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments, pipeline
from words import WORDS, small
from zoo import every_variant

from efficient_transformers import VARIANTS


@pytest.mark.sampled(3)
@every_variant
def test_trainer_fine_tunes(variant, tokenizer, tmp_path):
    """A word decides the class; the Trainer learns it, saves, and the saved model says the same in a pipeline."""
    generator = torch.Generator().manual_seed(0)
    rows, texts = [], []
    for number in range(64):
        words = [WORDS[7 + i] for i in torch.randint(50, (number % 7 + 5,), generator=generator)]
        words.insert(number % 5, ["bad", "good"][number % 2])
        texts.append(" ".join(words))
        rows.append({**tokenizer(texts[-1]), "labels": number % 2})
    data = datasets.Dataset.from_list(rows)
    arguments = TrainingArguments(
        tmp_path, num_train_epochs=25, per_device_train_batch_size=16, learning_rate=3e-3, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no", seed=0,
    )  # fmt: skip
    trainer = Trainer(
        small(variant, "SequenceClassification"), arguments, train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    assert trainer.predict(data).predictions.argmax(1).tolist() == list(data["labels"])
    trainer.save_model()
    classify = pipeline("text-classification", str(tmp_path), device="cpu")
    assert [int(x["label"][-1]) for x in classify(texts)] == list(data["labels"])
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.classifier.weight, trainer.model.classifier.weight)


@every_variant
def test_pipelines_run_on_saved_checkpoints(variant, tokenizer, tmp_path):
    model = small(variant, "MaskedLM")
    model.save_pretrained(tmp_path / "mlm")
    tokenizer.save_pretrained(tmp_path / "mlm")
    answers = pipeline("fill-mask", str(tmp_path / "mlm"), device="cpu")("word1 [MASK] word2", top_k=3)
    assert len(answers) == 3
    assert all(answer["token_str"] in WORDS for answer in answers)

    model = small(variant, "TokenClassification")
    model.save_pretrained(tmp_path / "tags")
    tokenizer.save_pretrained(tmp_path / "tags")
    assert len(pipeline("token-classification", str(tmp_path / "tags"), device="cpu")("word1 good")) == 2


@pytest.mark.parametrize("variant", [v for v in VARIANTS.values() if v.causal], ids=lambda variant: variant.slug)
def test_generation_pipelines_run_on_saved_checkpoints(variant, tokenizer, tmp_path):
    model = small(variant, "CausalLM")
    model.save_pretrained(tmp_path / "clm")
    tokenizer.save_pretrained(tmp_path / "clm")
    generate = pipeline("text-generation", str(tmp_path / "clm"), device="cpu")
    words = {"suppress_tokens": tokenizer.all_special_ids}  # which would not be seen in the text
    texts = generate(["word1 word2", "word3"], max_new_tokens=4, batch_size=2, pad_token_id=0, do_sample=False, **words)
    lengths = [len(text[0]["generated_text"].split()) for text in texts]
    assert lengths[0] > 2
    assert lengths[1] > 1


@every_variant
def test_lora_wraps_and_trains(variant):
    from peft import LoraConfig, get_peft_model

    model = small(variant, "SequenceClassification")
    targets = ["q_proj", "v_proj"] if variant.attention else ["up_proj", "down_proj"]
    wrapped = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=targets, r=4))
    trainable = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in trainable)
    assert all("lora" in name or "classifier" in name or "pooler" in name for name in trainable)
    ids = torch.randint(5, 50, (4, 30))
    loss = wrapped(input_ids=ids, labels=torch.tensor([0, 1, 0, 1])).loss
    loss.backward()
    assert all(p.grad is not None for name, p in wrapped.named_parameters() if p.requires_grad)
    merged = wrapped.merge_and_unload()
    assert merged(ids).logits.shape == (4, 2)


@every_variant
def test_a_device_map_splits_between_blocks(variant, tmp_path):
    model = small(variant, "SequenceClassification")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, device_map="cpu").eval()
    ids = torch.randint(5, 50, (1, 20))
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    whole = [model.model.embeddings, *model.model.layers]
    assert {type(module).__name__ for module in whole} <= set(model._no_split_modules)
