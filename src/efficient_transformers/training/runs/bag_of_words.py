"""Bag-of-words baseline: train and test a linear SVM on TF-IDF features of the windows of a classifier's config.

    python training/bag_of_words.py --config configs/era.yaml [--max_length 512 …]

Its inputs are those of the model: with `--max_length 512`, the first 512 tokens of each window.
"""

import argparse
import json
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from ..data.texts import SPLITS
from ..engine.building import load_tokenizer
from ..engine.metrics import compute_metrics, load_metrics
from ..settings import InputError
from ..tasks.classify import ClassifySettings, labelled_documents
from .errors import add_debug, input_errors


def scores_of(settings: ClassifySettings) -> dict[str, dict[str, float]]:
    """Accuracy, macro F1 and number of examples of each split."""
    tokenizer = load_tokenizer(settings)
    source = labelled_documents(settings, tokenizer)
    length = settings.max_length or settings.window_length
    if length is None:
        raise InputError("A bag of words has no maximum length: set max_length or window_length.")
    texts, labels = {}, {}
    for name in SPLITS:
        examples = source.encode(name, length, None)  # type: ignore[arg-type]  # no model is needed to cut windows
        windows = tokenizer.batch_decode(examples.column("input_ids"), skip_special_tokens=True)
        texts[name], labels[name] = windows, examples.column("labels")
        if not settings.window_length:  # scores of the model are also per document
            whole: dict[int, list[str]] = {}
            for document, window in zip(examples.documents, windows, strict=True):
                whole.setdefault(document, []).append(window)
            of_document = dict(zip(examples.documents, labels[name], strict=True))
            texts[name], labels[name] = [" ".join(own) for own in whole.values()], list(of_document.values())
    bag = make_pipeline(TfidfVectorizer(sublinear_tf=True), LinearSVC()).fit(texts["train"], labels["train"])
    metrics = load_metrics()
    return {
        name: {**compute_metrics(metrics, bag.predict(texts[name]).tolist(), labels[name]), "n": len(labels[name])}
        for name in SPLITS
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--variant", default="full", help="for settings that depend on the variant")
    add_debug(parser)
    given, options = parser.parse_known_args(arguments)
    with input_errors(debug=given.debug):
        print(json.dumps(scores_of(ClassifySettings.from_yaml(given.config, options, given.variant))))
