"""Settings of short runs on generated tasks."""

from training_runs import write_config

from efficient_transformers.training.tasks import recall
from efficient_transformers.training.tasks.recall import RecallSettings

GENERATED_MODEL = {
    "model_type": "et_full",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.1,
}
GENERATED_SIZES = {
    "train_examples": 40,
    "validation_examples": 8,
    "test_examples": 12,
    "max_steps": 24,
    "batch_size": 4,
    "learning_rate": 0.02,
    "eval_steps": 8,
    "checkpoint_steps": 4,
    "keep_checkpoints_at_end": True,
    "tracker": "none",
}
RECALL = {
    **GENERATED_SIZES,
    "task": "recall",
    "max_length": 12,
    "items": 2,
    "vocabulary": 12,
    "model": {**GENERATED_MODEL, "max_position_embeddings": 16},
}
LRA = {
    **GENERATED_SIZES,
    "task": "lra",
    "min_tokens": 4,
    "max_tokens": 40,
    "max_length": 40,
    "sort_by_length": False,
    "model": {**GENERATED_MODEL, "max_position_embeddings": 64, "classifier_pooling": "cls"},
}


def recall_run(folder, *overrides, **values):
    config = write_config(folder, RECALL, values.pop("data", "mqar"), **values)
    return recall.run(RecallSettings.from_yaml(config, overrides))
