"""The Hub model card of a trained model: description, training, results, and code to load it.

The metadata block is `huggingface_hub`'s own, so that results appear on the Hub as a `model-index`.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import dedent
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel

from .costs import attention_flops
from .folders import read_json
from .models.base_configuration import EtConfig
from .models.modeling_full import EtFullConfig

PICTURE = "pattern.png"  # shown in the card if the folder contains it

PIPELINE_TAGS = {
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModelForImageClassification": "image-classification",
    "AutoModel": "feature-extraction",
}


def loading_code(folder: str, auto_class: str, max_length: int | None = None) -> str:
    """Python code that loads a saved model and runs it on a text or an image."""
    if auto_class not in PIPELINE_TAGS:
        raise ValueError(f"auto_class ({auto_class!r}) must be one of {', '.join(PIPELINE_TAGS)}.")
    if auto_class == "AutoModelForImageClassification":
        return "\n".join(
            [
                "from PIL import Image",
                f"from transformers import AutoImageProcessor, {auto_class}",
                f'processor = AutoImageProcessor.from_pretrained("{folder}", trust_remote_code=True)',
                f'model = {auto_class}.from_pretrained("{folder}", trust_remote_code=True).eval()',
                'inputs = processor(Image.new("RGB", (100, 100)), return_tensors="pt")  # or Image.open(…)',
                "logits = model(**inputs).logits",
                "print(model.config.id2label[logits.argmax(-1).item()])",
            ]
        )
    cut = f", truncation=True, max_length={max_length}" if max_length else ""
    text = '"A long document …"'
    if auto_class == "AutoModelForMaskedLM":
        text = 'f"A long {tokenizer.mask_token} …"'
    elif auto_class == "AutoModelForQuestionAnswering":
        text = '"What is asked?", "A long document …"'
        cut = cut.replace("True", '"only_second"')
    elif auto_class == "AutoModelForMultipleChoice":
        text = '["A long document …"] * 2, ["One choice.", "Another."], padding=True'
    use = {
        "AutoModelForMaskedLM": [
            "logits = model(**inputs).logits",
            "print(tokenizer.decode(logits[inputs.input_ids == tokenizer.mask_token_id].argmax(-1)))",
        ],
        "AutoModelForSequenceClassification": [
            "logits = model(**inputs).logits",
            "print(model.config.id2label[logits.argmax(-1).item()])",
        ],
        "AutoModelForTokenClassification": [
            "logits = model(**inputs).logits",
            "print([model.config.id2label[tag] for tag in logits[0].argmax(-1).tolist()])",
        ],
        "AutoModelForQuestionAnswering": [
            "outputs = model(**inputs)",
            "begin = outputs.start_logits.argmax().item()",
            "end = begin + outputs.end_logits[0, begin:].argmax().item()",
            "print(tokenizer.decode(inputs.input_ids[0, begin : end + 1]))",
        ],
        "AutoModelForMultipleChoice": [
            "inputs = {name: values[None] for name, values in inputs.items()}  # (1, choices, length)",
            "print(model(**inputs).logits.argmax(-1).item())",
        ],
        "AutoModel": ["print(model(**inputs).pooler_output.shape)"],
    }.get(auto_class, ["logits = model(**inputs).logits", "print(logits.shape)"])
    lines = [
        f"from transformers import AutoTokenizer, {auto_class}",
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)',
        f'model = {auto_class}.from_pretrained("{folder}", trust_remote_code=True).eval()',
        f'inputs = tokenizer({text}, return_tensors="pt"{cut})',
        *use,
    ]
    return "\n".join(lines)


def description_of(model: PreTrainedModel, inline: str | None = None) -> str:
    """Paper, formula and cost from the docstring of the model's file, as Markdown; for other models one paragraph.

    Maths is in the delimiters that the Hub renders, `\\\\( … \\\\)` within a line and `$$ … $$`; `inline` replaces the
    former.
    """
    text = inspect.getdoc(inspect.getmodule(type(model))) or ""
    if not isinstance(model.config, EtConfig):
        return text.partition("\n\n")[0]
    formula = re.compile(r"^\.\. math::[ \n](.*?)(?=\n\n\S|\Z)", re.S | re.M)
    text = formula.sub(lambda found: f"$$\n{dedent(' ' * 10 + found[1]).strip()}\n$$", text)
    opening, closing = (inline, inline) if inline else (r"\\(", r"\\)")  # Markdown renders \\ as one backslash
    text = re.sub(r":math:`(.*?)`", lambda found: f"{opening}{found[1]}{closing}", text, flags=re.S)
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def costs_of(config: PreTrainedConfig, max_length: int) -> dict[int, tuple[int, int]]:
    """FLOPs of mixing tokens in all layers by length in tokens, here and with full attention of the same size.

    The lengths are the powers of two from 512, and `max_length`, for one sequence each; see costs.py. Empty for models
    that are not variants.
    """
    if not isinstance(config, EtConfig):
        return {}
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "is_decoder")
    full = EtFullConfig(**{name: getattr(config, name) for name in names})
    powers = (2**power for power in range(9, max_length.bit_length()))
    lengths = sorted({*(length for length in powers if length < max_length), max_length})
    return {length: (attention_flops(config, length), attention_flops(full, length)) for length in lengths}


def model_card(
    *,
    name: str,
    auto_class: str,
    description: str,
    results: Sequence[EvalResult],
    training: Mapping[str, Any],
    command: str,
    limits: Sequence[str],
    max_length: int | None = None,
    license: str | None = None,
    language: str | None = None,
    notes: str = "",
    datasets: Sequence[str] = (),
    base_model: str | None = None,
    tags: Sequence[str] = (),
    costs: Mapping[int, tuple[int, int]] | None = None,
    picture: str | None = None,
    code: Mapping[str, str] | None = None,
) -> ModelCard:
    """Create the card of the model `name`, which is loaded with the Auto class `auto_class`.

    `training` becomes a table, in its order. `results` become the measured results and the `model-index`; `command`
    is the command that measures them. `datasets` and `base_model` are Hub ids. `description`, `limits` and `notes`
    (placed after the results) are Markdown. `costs` is the output of `costs_of`; `picture` is the file with the pattern
    of the model; `code` is the version and commit of this package that produced the results, as returned by
    `exporting.code_version`.
    """
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag=PIPELINE_TAGS.get(auto_class),
        tags=["efficient-attention", *tags],
        license=license,
        language=language,
        datasets=list(datasets) or None,
        base_model=base_model,
        metrics=sorted({result.metric_type for result in results}) or None,
        eval_results=list(results) or None,
    )
    for key, value in (code or {}).items():
        data[f"efficient_transformers_{key}"] = value
    sections = [
        f"# {name}",
        description.strip(),
        *([f"![The tokens that each token attends to]({picture})"] if picture else []),
        "## Use",
        f"```python\n{loading_code(name, auto_class, max_length)}\n```",
        "The code of the model is included on the Hub: only `transformers` and `trust_remote_code=True` are needed.",
        "## Results",
        _table(
            ("data", "split", "metric", "value"),
            [
                (r.dataset_name, r.dataset_split or "", r.metric_name or r.metric_type, _number(r.metric_value))
                for r in results
            ],
        ),
        f"Measured by\n\n```bash\n{command}\n```",
        *([notes.strip()] if notes else []),
        *(["## Cost against length", _cost_table(costs)] if costs else []),
        "## Training",
        _table(("setting", "value"), [(key, _number(value)) for key, value in training.items()]),
        "## Limits",
        "\n".join(f"- {limit}" for limit in limits),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def measured(cards: Path, slug: str) -> dict[str, float]:
    """Results of a variant in the folders of the zoo in `cards`, named as in `list`; empty if there are none.

    `nats/byte` is that of the causal language model, the others are those of the era classifier, on the test splits.
    """
    classifier, language = (
        read_json(path) if path.exists() else {}
        for path in (cards / f"{slug}-{task}" / "metrics.json" for task in ("era", "clm"))
    )
    found = {
        "parameters": classifier.get("model", {}).get("parameters"),
        "era accuracy": classifier.get("test", {}).get("accuracy"),
        "nats/byte": language.get("test", {}).get("nats_per_byte"),
        "tokens/s": classifier.get("training", {}).get("tokens_per_second"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _cost_table(costs: Mapping[int, tuple[int, int]]) -> str:
    rows = [
        (f"{length:,}", f"{flops / 1e9:.3g}", f"{full / 1e9:.3g}", f"{flops / full:.2g}")
        for length, (flops, full) in costs.items()
    ]
    head = ("tokens", "GFLOPs of mixing tokens", "full attention of the same size", "ratio")
    return f"{_table(head, rows)}\n\nCounted for a forward pass over one sequence; without projections and MLPs."


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *[[cell.replace("|", "\\|") for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
