"""Fine-tune any checkpoint as a document classifier with transformers' Trainer.

python examples/finetune_with_trainer.py --checkpoint model_cards/local-mlm --data data/sotu --label_column era \
    --output_dir runs/trained --num_train_epochs 3 --learning_rate 1e-3

`--data` is a folder with a train and a test file, or a dataset on the Hub; the other options are TrainingArguments.
Code that a checkpoint brings along runs only with `--trust_remote_code`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import load_dataset
from sklearn.metrics import accuracy_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments

from efficient_transformers.trust import refusing_code  # the package registers the variants with the Auto classes


@dataclass
class Arguments:
    checkpoint: str
    data: str
    text_column: str = "text"
    label_column: str = "label"
    trust_remote_code: bool = False


def main(arguments: list[str] | None = None) -> None:
    kinds: Any = (Arguments, TrainingArguments)
    given, training = HfArgumentParser(kinds, description=__doc__).parse_args_into_dataclasses(arguments)
    data: Any = load_dataset(given.data)
    names = sorted(map(str, data["train"].unique(given.label_column)))
    trust = {"trust_remote_code": given.trust_remote_code}
    with refusing_code(given.checkpoint):
        tokenizer = AutoTokenizer.from_pretrained(given.checkpoint, **trust)
        model = AutoModelForSequenceClassification.from_pretrained(
            given.checkpoint, id2label=dict(enumerate(names)), **trust
        )

    def encode(rows: dict[str, Any]) -> dict[str, Any]:
        labels = [names.index(str(label)) for label in rows[given.label_column]]
        texts, length = rows[given.text_column], model.config.max_position_embeddings
        return {**tokenizer(texts, truncation=True, max_length=length), "labels": labels}

    data = data.map(encode, batched=True, remove_columns=data["train"].column_names)
    trainer = Trainer(
        model,
        training,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,  # pads batches, and is saved with the model
        compute_metrics=lambda found: {"accuracy": accuracy_score(found.label_ids, np.argmax(found.predictions, -1))},
    )
    trainer.train()
    trainer.save_metrics("test", trainer.evaluate(metric_key_prefix="test"))
    trainer.save_model()


if __name__ == "__main__":
    main()
