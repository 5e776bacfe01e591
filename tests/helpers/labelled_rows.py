"""For each task with labelled examples, rows that a tiny model learns, and the settings of a short run."""

from training_runs import TINY, WIDER
from transformers import AutoConfig, AutoModelForQuestionAnswering

# Of 60 rows 42 train: 6 steps an epoch, 24 in all, where each row is one example
TINY_ROWS = {**TINY, "model": WIDER, "learning_rate": 0.02}


WORDS = ["we", "are", "at", "war", "with", "the", "union", "and", "god", "save", "this", "land"]
PLACES = {"union", "land"}


def tagged_row(i):
    words = [WORDS[(5 * i + 7 * j) % len(WORDS)] for j in range(6 + i % 9)]
    return {"words": words, "tags": ["B-PLACE" if word in PLACES else "O" for word in words]}


def question_row(i):
    words = [WORDS[(5 * i + 7 * j) % 6] for j in range(8 + i % 9)]
    words.insert(i % 7, "peace")
    context = " ".join(words)
    answers = {"text": ["peace"], "answer_start": [context.index("peace")]}
    return {"question": "what ?", "context": context, "answers": answers}


def choice_row(i):
    wrong = ["we save this land", "god save the land", "at the union"]
    choices = [*wrong[: i % 4], "we are at war", *wrong[i % 4 :]]
    return {"context": "we the people " * (1 + i % 3), "choices": choices, "label": "ABCD"[i % 4]}


def pair_row(i):
    texts = [" ".join(["war" if (i >> k) % 2 else "peace"] * (2 + i % 5)) for k in (0, 1)]
    return {"text1": texts[0], "text2": texts[1], "label": int(texts[0] == texts[1])}


ROWS = {"case": tagged_row, "facts": question_row, "next": choice_row, "president": pair_row}
OWN = {
    "case": {"task": "tag_tokens", "max_length": 12, "overlap": 4},
    "facts": {"task": "answer", "max_length": 20, "stride": 4, "max_question_length": 6, "max_answer_length": 3},
    "next": {"task": "choose", "max_length": 32, "max_choice_length": 16},
    "president": {
        "task": "match",
        "max_length": 16,
        "head_size": 32,
        "epochs": 12,
        "eval_steps": 24,
        "checkpoint_steps": 24,
    },
}


def task_settings(settings_class, **values):
    return settings_class.from_dict({"data": "era", "model": {"model_type": "bert"}, **values})


def plain_model(model_type="et_full", **fields):
    return AutoModelForQuestionAnswering.from_config(
        AutoConfig.for_model(model_type, vocab_size=4096, hidden_size=8, num_attention_heads=1, num_hidden_layers=1,
                             intermediate_size=8, max_position_embeddings=64, **fields)
    )  # fmt: skip
