"""The model card of a conversion: the origin of the weights, the report, and code that loads the model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..cards import PIPELINE_TAGS, description_of, loading_code
from ..folders import load_card
from .report import Report
from .sentences import find_file

SENTENCE_CODE = """from sentence_transformers import SentenceTransformer
model = SentenceTransformer("{name}", trust_remote_code=True)
vectors = model.encode(["A long document …", "Another one …"])
print(model.similarity(vectors, vectors))"""


@dataclass
class Origin:
    """Facts about the source for the card. base_model: its id on the Hub. license, language: those of its own card."""

    base_model: str | None = None
    license: str | None = None
    language: str | list[str] | None = None


def read_origin(source: str | Path, base_model: str | None, report: Report) -> Origin:
    """Read licence and language from the source's own card, if it has one."""
    origin = Origin(base_model or (None if Path(source).is_dir() else str(source)))
    path = find_file(source, "README.md")
    if path is not None:
        try:
            data = load_card(path).data
        except ValueError as error:
            report.notes.append(f"card: the source's licence and language are unknown ({error})")
            return origin
        origin.license, origin.language = data.get("license"), data.get("language")
    return origin


def conversion_card(name: str, model: Any, report: Report, origin: Origin, is_sentence_transformer: bool) -> ModelCard:
    """The card of the folder `name`."""
    auto_class = f"AutoModelFor{report.head}" if report.head else "AutoModel"
    data = ModelCardData(
        model_name=name,
        library_name="sentence-transformers" if is_sentence_transformer else "transformers",
        pipeline_tag="sentence-similarity" if is_sentence_transformer else PIPELINE_TAGS[auto_class],
        tags=["efficient-attention"],
        base_model=origin.base_model,
        license=origin.license,
        language=origin.language,
    )
    link = f"[{origin.base_model}](https://huggingface.co/{origin.base_model})" if origin.base_model else report.source
    code = SENTENCE_CODE.format(name=name) if is_sentence_transformer else loading_code(name, auto_class)
    sections = [
        f"# {name}",
        f"The weights of {link} in `{model.config.model_type}`, converted without training. Longest input: "
        f"{model.config.max_position_embeddings:,} tokens.",
        "## Use",
        f"```python\n{code}\n```",
        "The folder contains the model's code: `trust_remote_code=True` is needed, this package is not.",
        "## Attention",
        description_of(model),
        "## Conversion",
        f"```text\n{report}\n```",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
