"""Weights in: a BERT-like checkpoint of transformers becomes a variant of the zoo that can hold its weights.

    conversion = convert("google-bert/bert-base-uncased", "local", max_position_embeddings=4096, window_size=128)
    print(conversion.report)
    conversion.save("bert-local")  # config, code, safetensors, tokenizer, report

What a source is called and how it maps is one entry of `SOURCES`; what a variant has beyond the source is one entry of
`CREATED`; fields that a pair of them shares are one entry of `SHARED_FIELDS`.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from dataclasses import fields as fields_of
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from .folders import fit_tokenizer, load_as_float32
from .models.base_configuration import TEXT_HEADS
from .models.base_kernel_attention import KernelConfig
from .models.base_resizing import stretch_positions
from .models.ops_checks import check_at_least, check_entries, check_shape
from .registry import VARIANTS, Variant

Rules = tuple[tuple[str, str | None], ...]  # pattern of a whole name -> what it is called here; None: left

BODY: Rules = (
    (r"embeddings\.(word|position|token_type)_embeddings\.weight", r"model.embeddings.\1_embeddings.weight"),
    (r"embeddings\.LayerNorm\.(weight|bias)", r"model.embeddings.norm.\1"),
    (r"embeddings\.projection\.(weight|bias)", r"model.embeddings.projection.\1"),
    (r"encoder\.layer\.(\d+)\.attention\.self\.query\.(\w+)", r"model.layers.\1.mixer.q_proj.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.self\.key\.(\w+)", r"model.layers.\1.mixer.k_proj.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.self\.value\.(\w+)", r"model.layers.\1.mixer.v_proj.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.self\.query_global\.(\w+)", r"model.layers.\1.mixer.global_q_proj.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.self\.key_global\.(\w+)", r"model.layers.\1.mixer.global_k_proj.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.self\.value_global\.(\w+)", r"model.layers.\1.mixer.global_v_proj.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)", r"model.layers.\1.mixer.o_proj.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.(\w+)", r"model.layers.\1.mixer_norm.\2"),
    (r"encoder\.layer\.(\d+)\.fourier\.output\.LayerNorm\.(\w+)", r"model.layers.\1.mixer_norm.\2"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(\w+)", r"model.layers.\1.mlp.up_proj.\2"),
    (r"encoder\.layer\.(\d+)\.output\.dense\.(\w+)", r"model.layers.\1.mlp.down_proj.\2"),
    (r"encoder\.layer\.(\d+)\.output\.LayerNorm\.(\w+)", r"model.layers.\1.mlp_norm.\2"),
    (r"pooler\.(?:dense\.)?(weight|bias)", r"model.pooler.dense.\1"),
)
BERT_LM: Rules = (
    (r"cls\.predictions\.transform\.dense\.(\w+)", r"lm_head.dense.\1"),
    (r"cls\.predictions\.transform\.LayerNorm\.(\w+)", r"lm_head.norm.\1"),
    (r"cls\.predictions\.bias", r"lm_head.decoder.bias"),  # the same tensor as decoder.bias
    (r"cls\.predictions\.decoder\.(\w+)", r"lm_head.decoder.\1"),
)
ROBERTA_LM: Rules = (
    (r"lm_head\.dense\.(\w+)", r"lm_head.dense.\1"),
    (r"lm_head\.layer_norm\.(\w+)", r"lm_head.norm.\1"),
    (r"lm_head\.bias", r"lm_head.decoder.bias"),  # the same tensor as decoder.bias
    (r"lm_head\.decoder\.(\w+)", r"lm_head.decoder.\1"),
)
LINEAR: Rules = ((r"classifier\.(weight|bias)", r"classifier.\1"),)
# a head with a dense layer of its own: that one is what is called a pooler here, and the body's pooler goes unread
TWO_LAYERS: Rules = (
    (r"pooler\..*", None),
    (r"classifier\.dense\.(\w+)", r"model.pooler.dense.\1"),
    (r"classifier\.out_proj\.(\w+)", r"classifier.\1"),
)
SPAN: Rules = ((r"qa_outputs\.(\w+)", r"qa_outputs.\1"),)


@dataclass(frozen=True)
class Source:
    """One kind of checkpoint.

    heads: the renaming of each head that has a counterpart here; used if the model keeps that head.
    offset_positions: does the position table begin with `pad_token_id + 1` rows that no token reads?
    lm_act: activation of the language model's head if it is not `hidden_act`.
    classifier_act: activation of the sequence classifier's dense layer.
    """

    heads: Mapping[str, Rules]
    body: Rules = BODY
    offset_positions: bool = False
    lm_act: tuple[str, ...] | None = None
    classifier_act: Literal["tanh", "hidden_act"] = "tanh"


ROBERTA_HEADS = {
    "MaskedLM": ROBERTA_LM,
    "SequenceClassification": TWO_LAYERS,
    "TokenClassification": LINEAR,
    "QuestionAnswering": SPAN,
    "MultipleChoice": LINEAR,
}
BERT_HEADS = {**ROBERTA_HEADS, "MaskedLM": BERT_LM, "SequenceClassification": LINEAR}
BIG_BIRD_HEADS = {**BERT_HEADS, "SequenceClassification": TWO_LAYERS, "QuestionAnswering": ()}
GELU = ("gelu", "gelu_python")  # two names of the same function

SOURCES: dict[str, Source] = {
    "bert": Source(BERT_HEADS),
    "roberta": Source(ROBERTA_HEADS, offset_positions=True, lm_act=GELU),
    "longformer": Source(ROBERTA_HEADS, offset_positions=True, lm_act=GELU),
    "big_bird": Source(BIG_BIRD_HEADS, classifier_act="hidden_act"),
    "fnet": Source(BERT_HEADS),
}


@dataclass(frozen=True)
class Creation:
    """Weights the source may lack.

    pattern: of their names. like: name of the weight they begin as a copy of; None leaves them as initialised.
    how: what the report says.
    """

    pattern: str
    like: str | None
    how: str


POSITIONS = "model.embeddings.position_embeddings.weight"
WORDS = "model.embeddings.word_embeddings.weight"
CREATED = (
    Creation(r"(.*\.mixer)\.global_([qkv]_proj\.\w+)", r"\1.\2", "copied from the local projections"),
    Creation(r".*\.mixer\.[qkv]_proj\.bias", None, "zero: the source has no bias"),
    Creation(r".*\.mixer\.random_blocks", None, "drawn by pattern_seed"),
    Creation(r".*\.mixer\.projection", None, "drawn by feature_seed"),
    Creation(r".*\.mixer\.passes", None, "zero: no forward pass in training yet"),
    Creation(r".*\.mixer\.scale", None, "one: to be learnt"),
    Creation(r".*\.mixer\.centroids", None, "drawn by cluster_seed: training moves them to the data"),
    Creation(r".*\.mixer\.(sums|savings)", None, "zero: no forward pass in training yet"),
    Creation(r"(model|.*\.mixer)\.(shared|projections\.\d)\.weight", None, "initialised: the source keeps all keys"),
    Creation(r".*\.mixer\.convolution", None, "the mean of the tokens: to be learnt"),
    # whatever else a mixer has; without the projections of the source a variant is better trained from scratch
    Creation(r".*\.mixer\.(?![qkvo]_proj\.).*", None, "initialised: the source has no such weights"),
    Creation(r"model\.external_tokens\.weight", None, "initialised: the source has no such tokens"),
    Creation(r"model\.pooler\..*", None, "initialised: the source has none"),
    Creation(r"lm_head\.decoder\.weight", WORDS, "begins as the word embeddings"),
    Creation(r"(lm_head|classifier|qa_outputs)\..*", None, "initialised: the source has no such head"),
)
# weights a variant may do without; any other weight without a place is an error
LEFT = (
    (r".*\.global_[qkv]_proj\..*", "the variant has no projections of its own for global tokens"),
    (r"model\.pooler\..*", "the head reads no pooled vector"),
)
WITHOUT_ATTENTION = ((r".*\.mixer\..*", "the variant has no attention"),)  # left by those, beside the above


def _window_of_longformer(config: PreTrainedConfig) -> dict[str, Any]:
    windows = config.attention_window
    return {"window_size": [w // 2 for w in windows] if isinstance(windows, (list, tuple)) else windows // 2}


# (source, variant) -> fields of the variant that follow from the source's config
SHARED_FIELDS: dict[tuple[str, str], Callable[[PreTrainedConfig], dict[str, Any]]] = {
    ("longformer", "local"): _window_of_longformer,
    ("longformer", "longformer"): lambda config: {"attention_window": config.attention_window},
    ("big_bird", "big_bird"): lambda config: {
        "block_size": config.block_size,
        "num_random_blocks": config.num_random_blocks,
    },
    ("fnet", "fnet"): lambda config: {"embedding_projection": True},
}
# what BigBird reads; as long as none of it is changed, a BigBird can read what transformers' reads
BLOCK_FIELDS = {"block_size", "num_window_blocks", "num_random_blocks", "global_token_type", "head_layout"}
# (source, variant, head) -> where the two differ without being told to
DIFFERENCES = {
    ("longformer", "longformer", "MultipleChoice"): "global tokens: transformers marks all behind the first separator, "
    "this model the first token; give global_attention_mask for more",
}

SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "type_vocab_size",
    "hidden_act",
    "layer_norm_eps",
)
CHOICES = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "initializer_range",
    "chunk_size_feed_forward",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "problem_type",
)
BERT_LAYOUT = {"norm_first": False, "position_embedding_type": "learned", "is_decoder": False}
TRANSFORMERS_FIELDS = {"num_labels", "id2label", "label2id", "problem_type", "chunk_size_feed_forward"}


@dataclass
class Report:
    """What became of every weight. Names are those of the two state dicts.

    copied: name here -> name in the source. created: name here -> how. left: name in the source -> why.
    notes: whatever else differs from the source.
    """

    source: str
    source_type: str
    variant: str
    head: str | None
    copied: dict[str, str] = field(default_factory=dict)
    created: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.source} ({self.source_type}) -> et_{self.variant}, {self.head or 'no head'}"]
        lines.append(f"copied: {len(self.copied)} tensors")
        for title, entries in (("created", self.created), ("left", self.left)):
            lines.append(f"{title}: {len(entries)} tensors" if entries else f"{title}: nothing")
            groups = Counter((re.sub(r"\.\d+\.", ".N.", name), why) for name, why in entries.items())
            lines += [
                f"  {name}{f' ({count} layers)' if count > 1 else ''}: {why}" for (name, why), count in groups.items()
            ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


@dataclass
class Conversion:
    """A converted model in eval mode, what became of the weights, and the source's tokenizer if it has one."""

    model: PreTrainedModel
    report: Report
    tokenizer: Any = None

    def save(self, folder: str | Path) -> None:
        """Write config, code, safetensors, tokenizer and the report (`conversion.json`).

        Weights keep the source's precision on the disk and load as float32, to be trained further.
        """
        self.model.save_pretrained(folder)
        load_as_float32(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        (Path(folder) / "conversion.json").write_text(self.report.to_json(), encoding="utf-8")


def convert(
    source: str | Path | PreTrainedModel,
    variant: str,
    *,
    head: str | None = None,
    max_position_embeddings: int | None = None,
    positions: Literal["tile", "interpolate"] = "tile",
    block_tables: Sequence[Tensor] | None = None,
    **fields: Any,
) -> Conversion:
    """A checkpoint of transformers as a model of `variant`, with the same weights.

    `source` is a Hub name, a folder or a model; its type one of `SOURCES`. `head` is one of the variant's
    (`"MaskedLM"`, …), `"Model"` for the bare body, or None for the source's own. `max_position_embeddings` defaults to
    the source's. A longer table of positions is the source's, tiled (Beltagy et al. 2020, arXiv:2004.05150,
    section 5), or interpolated linearly with its ends kept; a shorter one is cut. `block_tables` are the random blocks
    of `big_bird`, one (heads, blocks, r) tensor per layer, whose row i holds the blocks that block i reads, -1 for
    none. `fields` set the rest of the variant's config.

    The source's dtype is kept. Initialised weights come from torch's default generator.

    Raises ValueError for a source, variant, head or field that does not fit, OSError for a source that cannot be read.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant ({variant!r}) must be one of {', '.join(VARIANTS)}.")
    if positions not in ("tile", "interpolate"):
        raise ValueError(f"positions ({positions!r}) must be 'tile' or 'interpolate'.")
    if max_position_embeddings is not None:
        check_at_least("max_position_embeddings", max_position_embeddings, 1, "it is the longest input in tokens")
    source_config = source.config if isinstance(source, PreTrainedModel) else _read_config(source)
    _check_source(source_config)
    source_head = _head_of(source, source_config)
    target = VARIANTS[variant]
    head = _choose_head(head, source_head, target)
    kept_head = head if head == source_head else None  # another head's weights may have the same names
    report = Report(_name_of(source), source_config.model_type, variant, head)

    model, unloaded = _load(source, source_config, head)
    weights = _rename(model, source_config, kept_head, unloaded, report)
    tokenizer = None if isinstance(source, PreTrainedModel) else _read_tokenizer(source, report)

    table = weights[POSITIONS]
    if SOURCES[source_config.model_type].offset_positions:
        table = table[source_config.pad_token_id + 1 :]
    length = max_position_embeddings or len(table)
    weights[POSITIONS] = stretch_positions(table, length, positions)
    if length != len(table):
        how = "cut" if length < len(table) else {"tile": "tiled", "interpolate": "interpolated"}[positions]
        report.notes.append(f"positions: {len(table)} rows {how} to {length}")

    as_in_eval = block_tables is None and _reads_blocks(source_config, variant, fields)
    if as_in_eval or block_tables is not None:
        fields = {"random_blocks": "stored", **fields}
    config = _make_config(target, source_config, kept_head, length, tokenizer, block_tables, fields)
    if tokenizer is not None:
        fit_tokenizer(tokenizer, config)
    if getattr(source_config, "attention_probs_dropout_prob", 0) and not config.attention_probs_dropout_prob:
        report.notes.append("attention_probs_dropout_prob is 0: the variant has no attention weights to drop from")
    if getattr(source_config, "rescale_embeddings", False):
        _fold_scale(weights, config, head, report)
    if note := DIFFERENCES.get((source_config.model_type, variant, head or "Model")):
        report.notes.append(note)
    converted: Any = target.model_class(head)(config)  # `to` is typed as a plain function
    converted.to(model.dtype)
    if as_in_eval:
        block_tables = _blocks_of_eval_mode(config, report)
    if block_tables is not None:
        weights |= _check_blocks(config, block_tables)
    _fill(converted, weights, head is not None, report)
    return Conversion(converted.eval(), report, tokenizer)


def _read_config(source: str | Path) -> PreTrainedConfig:
    values, _ = PreTrainedConfig.get_config_dict(source, local_files_only=Path(source).is_dir())
    _check_type(values.get("model_type"))
    return AutoConfig.from_pretrained(source, local_files_only=Path(source).is_dir())


def _check_type(model_type: Any) -> None:
    if model_type not in SOURCES:
        raise ValueError(f"the source's model_type ({model_type!r}) must be one of {', '.join(SOURCES)}.")


def _check_source(config: PreTrainedConfig) -> None:
    """Refuse what no variant computes."""
    _check_type(config.model_type)
    for name in ("is_decoder", "add_cross_attention"):
        if getattr(config, name, False):
            raise ValueError(f"the source has {name}=True: only encoders can be converted.")
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    if kind != "absolute":
        raise ValueError(
            f"the source's position_embedding_type ({kind!r}) must be 'absolute': no variant has weights for another."
        )
    if SOURCES[config.model_type].offset_positions and config.pad_token_id is None:
        raise ValueError("the source's pad_token_id (None) must be a number: its positions are counted from there.")


def _stem(config: PreTrainedConfig) -> str:
    return type(config).__name__.removesuffix("Config")


def _head_of(source: str | Path | PreTrainedModel, config: PreTrainedConfig) -> str | None:
    """The source's head under our name, or what its class is called if it has no counterpart; None: the bare body."""
    if isinstance(source, PreTrainedModel):
        known = (c.__name__ for c in type(source).__mro__ if c.__module__.startswith("transformers."))
        class_name = next(known)
    else:
        class_name = (config.architectures or [f"{_stem(config)}Model"])[0]
    suffix = class_name.removeprefix(_stem(config))
    return {"Model": None, "ForPreTraining": "MaskedLM"}.get(suffix, suffix.removeprefix("For"))


def _choose_head(head: str | None, source_head: str | None, variant: Variant) -> str | None:
    wanted = source_head if head is None else None if head == "Model" else head
    known = [name for name in variant.heads if name in TEXT_HEADS]
    if wanted is not None and wanted not in known:
        whose = "the source's" if head is None else "the"
        raise ValueError(
            f"{whose} head ({wanted!r}) must be one of {', '.join(known)} to become {variant.model_type}: "
            "name one of them, or 'Model' for the bare body."
        )
    return wanted


def _name_of(source: str | Path | PreTrainedModel) -> str:
    """What the source may be called in public: no path of this machine."""
    if isinstance(source, PreTrainedModel):
        return type(source).__name__
    return Path(source).resolve().name if Path(source).is_dir() else str(source)


@contextmanager
def _quiet():
    """transformers warns of weights without a place; the report names them."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def _load(
    source: str | Path | PreTrainedModel, config: PreTrainedConfig, head: str | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The source as a model of transformers with the wanted head, and what its files lacked or had too much of.

    The wanted head and not the saved one: `bert-base-uncased` is saved as a masked language model and holds the
    pooler that a classifier begins with.
    """
    if isinstance(source, PreTrainedModel):
        return source, {}
    model_class = getattr(transformers, f"{_stem(config)}For{head}" if head else f"{_stem(config)}Model")
    with _quiet():
        return model_class.from_pretrained(
            source,
            dtype="auto",
            use_safetensors=True,
            local_files_only=Path(source).is_dir(),
            ignore_mismatched_sizes=True,  # reported among the missing ones
            output_loading_info=True,
        )


def _read_tokenizer(source: str | Path, report: Report) -> Any:
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=Path(source).is_dir())
    except (OSError, ValueError, ImportError) as error:
        report.notes.append(f"no tokenizer: {type(error).__name__} while reading the source's")
        return None
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):  # what transformers makes of no files at all
        report.notes.append("no tokenizer: the source has none")
        return None
    # sentence-transformers store the length they cut and pad to in tokenizer.json; it ends with the old positions
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        backend.no_truncation()
        backend.no_padding()
    return tokenizer


def _rename(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    kept_head: str | None,
    unloaded: Mapping[str, Any],
    report: Report,
) -> dict[str, Tensor]:
    """The source's weights under our names, in the form they have below a head (`model.…`)."""
    source = SOURCES[config.model_type]
    rules = (*(source.heads[kept_head] if kept_head else ()), *source.body)
    missing = {*unloaded.get("missing_keys", ()), *(entry[0] for entry in unloaded.get("mismatched_keys", ()))}
    state, weights = model.state_dict(), {}
    absent = {state[name].data_ptr() for name in missing if name in state}  # tied weights have two names
    for name, tensor in state.items():
        short = name.removeprefix(model.base_model_prefix + ".")
        in_body = short.startswith(("embeddings.", "encoder."))
        if name in missing and in_body:
            raise ValueError(
                f"the source has no {name!r} of the right size: its files must hold every weight of the body."
            )
        if tensor.data_ptr() in absent:
            continue
        new = _look_up(short, rules)
        if new is not None:
            weights[new] = tensor
            report.copied[new] = name
        elif in_body:
            raise ValueError(f"the source's weight {name!r} has no counterpart: no variant has such a part.")
        elif tensor.data_ptr() not in {weight.data_ptr() for weight in weights.values()}:
            report.left[name] = "no counterpart in the model"
    report.left |= dict.fromkeys(sorted(unloaded.get("unexpected_keys", ())), f"no part of {type(model).__name__}")
    return weights


def _look_up(name: str, rules: Rules) -> str | None:
    for pattern, replacement in rules:
        match = re.fullmatch(pattern, name)
        if match:
            return None if replacement is None else match.expand(replacement)
    return None


def _make_config(
    variant: Variant,
    source_config: PreTrainedConfig,
    kept_head: str | None,
    length: int,
    tokenizer: Any,
    block_tables: Sequence[Tensor] | None,
    fields: dict[str, Any],
) -> Any:
    """The variant's config: the source's sizes and choices, what the pair shares, then the caller's fields."""
    source = SOURCES[source_config.model_type]
    theirs = {entry.name for entry in fields_of(PreTrainedConfig)}
    own = {entry.name for entry in fields_of(variant.config_class)} - theirs
    if block_tables is not None and "random_blocks" not in own:
        raise ValueError(f"block_tables are the stored random blocks of 'big_bird': {variant.model_type} has none.")
    for name in fields:
        if name not in own | TRANSFORMERS_FIELDS:
            close = get_close_matches(name, own, n=1)
            raise ValueError(
                f"{variant.model_type} has no field {name!r}"
                + (f"; did you mean {close[0]!r}?" if close else f": it has {', '.join(sorted(own))}.")
            )
    fixed = {name: getattr(source_config, name) for name in SIZES if hasattr(source_config, name)} | BERT_LAYOUT
    if source.classifier_act == "hidden_act" and kept_head == "SequenceClassification":
        fixed["pooler_act"] = source_config.hidden_act
    elif "pooler_act" in own:
        fixed["pooler_act"] = "tanh"
    if kept_head == "MaskedLM":
        if source.lm_act and source_config.hidden_act not in source.lm_act:
            raise ValueError(
                f"the source's hidden_act ({source_config.hidden_act!r}) must be 'gelu', which its language model's "
                "head always uses: convert without that head (head='Model')."
            )
        if not source_config.tie_word_embeddings:
            fixed["tie_word_embeddings"] = False
    for name, value in fixed.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{name} ({fields[name]!r}) must be {value!r}, as the source's weights are: leave it out.")

    values = {name: getattr(source_config, name) for name in CHOICES if hasattr(source_config, name)}
    if not fields.keys() & {"num_labels", "id2label", "label2id"}:
        values |= {"id2label": source_config.id2label, "label2id": source_config.label2id}
    if "sep_token_id" in own:
        values["sep_token_id"] = getattr(source_config, "sep_token_id", None) or getattr(
            tokenizer, "sep_token_id", None
        )
    if issubclass(variant.config_class, KernelConfig) or not variant.attention:
        values.pop("attention_probs_dropout_prob", None)  # there is no matrix to drop from
    values |= {"classifier_pooling": "cls", "max_position_embeddings": length}
    values |= SHARED_FIELDS.get((source_config.model_type, variant.slug), lambda _: {})(source_config)
    if block_tables is not None:
        if fields["random_blocks"] != "stored":
            raise ValueError(f"random_blocks ({fields['random_blocks']!r}) must be 'stored' to take block_tables.")
        values["num_random_blocks"] = block_tables[0].shape[-1]
    try:
        return variant.config_class(**{**values, **fixed, **fields})
    except StrictDataclassError as error:  # says which validator failed; the cause says why
        raise ValueError(str(error.__cause__ or error)) from error


def _fold_scale(weights: dict[str, Tensor], config: Any, head: str | None, report: Report) -> None:
    """BigBird's `rescale_embeddings` multiplies word embeddings by √e; here they are stored multiplied."""
    if head == "MaskedLM" and config.tie_word_embeddings:
        raise ValueError(
            "the source's rescale_embeddings (True) cannot be folded into word embeddings that are tied to the "
            "language model's head: untie them (tie_word_embeddings=False)."
        )
    weights[WORDS] = weights[WORDS] * config.hidden_size**0.5
    report.notes.append("word embeddings are multiplied by √hidden_size: the source rescales them in its forward")


def _reads_blocks(config: PreTrainedConfig, variant: str, fields: Mapping[str, Any]) -> bool:
    """Can the model be made to read what the source reads in eval mode, and is it not told to read anything else?"""
    sparse = config.model_type == variant == "big_bird" and config.attention_type == "block_sparse"
    return sparse and not fields.keys() & BLOCK_FIELDS and fields.get("random_blocks", "stored") == "stored"


def _blocks_of_eval_mode(config: Any, report: Report) -> list[Tensor]:
    """What transformers reads as random blocks when it does not train: block 0, `num_random_blocks` times over."""
    blocks = -(-config.max_position_embeddings // config.block_size)
    table = torch.zeros(config.num_attention_heads, blocks, config.num_random_blocks, dtype=torch.long)
    full = (5 + 2 * config.num_random_blocks) * config.block_size
    report.notes.append(
        f"random blocks: {config.num_random_blocks} times block 0, which is what transformers reads in eval mode, so "
        "that outputs agree; random_blocks=drawn reads random ones"
    )
    report.notes.append(
        f"short inputs: up to {full} tokens transformers reads everything, this model its blocks at any length"
    )
    return [table] * config.num_hidden_layers


def _check_blocks(config: Any, tables: Sequence[Tensor]) -> dict[str, Tensor]:
    """Tables of random blocks, by the name of their buffers."""
    blocks = -(-(config.max_position_embeddings + config.num_external_tokens) // config.block_size)
    shape = (config.num_attention_heads, blocks, config.num_random_blocks)
    layers = config.num_hidden_layers
    check_entries("block_tables", tables, "num_hidden_layers", layers, "give one table for each layer")
    for layer, table in enumerate(tables):
        check_shape(f"block_tables[{layer}]", table.shape, shape, "heads, blocks, random blocks")
        wrong = table[(table < -1) | (table >= blocks)]
        if wrong.numel():
            raise ValueError(
                f"block_tables[{layer}] holds {wrong[0].item()}: blocks are numbered 0 to {blocks - 1}, -1 is none."
            )
    return {f"model.layers.{layer}.mixer.random_blocks": table.long() for layer, table in enumerate(tables)}


def _fill(model: PreTrainedModel, weights: dict[str, Tensor], has_head: bool, report: Report) -> None:
    """Give every weight of `model` its value; nothing is left over or left out without a word in the report."""
    state = {name if has_head else f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    variant = model.config.model_type
    places = LEFT if model.config.attends else (*WITHOUT_ATTENTION, *LEFT)
    for name in [name for name in weights if name not in state]:
        why = next((why for pattern, why in places if re.fullmatch(pattern, name)), None)
        if why is None:
            raise ValueError(f"{variant} cannot hold the source's {report.copied[name]!r}: choose another variant.")
        report.left[report.copied.pop(name)] = why
        del weights[name]
    values = {}
    for name, tensor in state.items():
        if name in weights:
            if weights[name].shape != tensor.shape:
                raise ValueError(
                    f"the source's {report.copied.get(name, name)!r} has shape {tuple(weights[name].shape)} and "
                    f"{variant} needs {tuple(tensor.shape)}: leave out the fields that change sizes (num_labels, …)."
                )
            values[name] = weights[name]
            continue
        creation = next((entry for entry in CREATED if re.fullmatch(entry.pattern, name)), None)
        if creation is None:
            raise ValueError(f"{variant} needs {name!r}, which the source does not have: choose another variant.")
        values[name] = tensor if creation.like is None else weights[re.sub(creation.pattern, creation.like, name)]
        report.created[name] = creation.how
    model.load_state_dict({name if has_head else name.removeprefix("model."): x for name, x in values.items()})
    if not has_head:
        report.copied = {name.removeprefix("model."): old for name, old in report.copied.items()}
        report.created = {name.removeprefix("model."): why for name, why in report.created.items()}
