"""The layout of each kind of source: names of its weights, fields of its config, and features that no variant has.

A new kind is one entry of `SOURCES`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

Rules = tuple[tuple[str, str | None], ...]  # pattern of a whole name -> what it is called here; None: left


def layer_rules(prefix: str, parts: Mapping[str, str]) -> Rules:
    """Rules for the parts of all layers, `<prefix>.<number>.<part>`; `parts` maps their names in the source to ours."""
    return tuple(
        (rf"{re.escape(prefix)}\.(\d+)\.{re.escape(theirs)}\.(weight|bias)", rf"model.layers.\1.{ours}.\2")
        for theirs, ours in parts.items()
    )


def renamed(theirs: str, ours: str) -> tuple[str, str]:
    """Rule for the weight and the bias of one layer."""
    return rf"{re.escape(theirs)}\.(weight|bias)", rf"{ours}.\1"


EMBEDDINGS: Rules = (
    (r"embeddings\.(word|position|token_type)_embeddings\.weight", r"model.embeddings.\1_embeddings.weight"),
    renamed("embeddings.LayerNorm", "model.embeddings.norm"),
)
POOLER: Rules = ((r"pooler\.(?:dense\.)?(weight|bias)", r"model.pooler.dense.\1"),)
MLP = {"intermediate.dense": "mlp.up_proj", "output.dense": "mlp.down_proj", "output.LayerNorm": "mlp_norm"}
BODY: Rules = (
    *EMBEDDINGS,
    renamed("embeddings.projection", "model.embeddings.projection"),
    *layer_rules(
        "encoder.layer",
        {
            "attention.self.query": "mixer.q_proj",
            "attention.self.key": "mixer.k_proj",
            "attention.self.value": "mixer.v_proj",
            "attention.self.query_global": "mixer.global_q_proj",
            "attention.self.key_global": "mixer.global_k_proj",
            "attention.self.value_global": "mixer.global_v_proj",
            "attention.output.dense": "mixer.o_proj",
            "attention.output.LayerNorm": "mixer_norm",
            "fourier.output.LayerNorm": "mixer_norm",
            **MLP,
        },
    ),
    *POOLER,
)
DISTILBERT_BODY: Rules = (
    *EMBEDDINGS,
    *layer_rules(
        "transformer.layer",
        {
            "attention.q_lin": "mixer.q_proj",
            "attention.k_lin": "mixer.k_proj",
            "attention.v_lin": "mixer.v_proj",
            "attention.out_lin": "mixer.o_proj",
            "sa_layer_norm": "mixer_norm",
            "ffn.lin1": "mlp.up_proj",
            "ffn.lin2": "mlp.down_proj",
            "output_layer_norm": "mlp_norm",
        },
    ),
)
ELECTRA_BODY: Rules = (renamed("embeddings_project", "model.embeddings.projection"), *BODY)
ALBERT_BODY: Rules = (
    *EMBEDDINGS,
    renamed("encoder.embedding_hidden_mapping_in", "model.embeddings.projection"),
    *layer_rules(
        "encoder.layer",
        {
            "attention.query": "mixer.q_proj",
            "attention.key": "mixer.k_proj",
            "attention.value": "mixer.v_proj",
            "attention.dense": "mixer.o_proj",
            "attention.LayerNorm": "mixer_norm",
            "ffn": "mlp.up_proj",
            "ffn_output": "mlp.down_proj",
            "full_layer_layer_norm": "mlp_norm",
        },
    ),
    *POOLER,
)
GPT2_BODY: Rules = (
    (r"wte\.weight", "model.embeddings.word_embeddings.weight"),
    (r"wpe\.weight", "model.embeddings.position_embeddings.weight"),
    *layer_rules(
        "h",
        {
            "ln_1": "mixer_norm",
            "attn.query": "mixer.q_proj",
            "attn.key": "mixer.k_proj",
            "attn.value": "mixer.v_proj",
            "attn.c_proj": "mixer.o_proj",
            "ln_2": "mlp_norm",
            "mlp.c_fc": "mlp.up_proj",
            "mlp.c_proj": "mlp.down_proj",
        },
    ),
    renamed("ln_f", "model.norm"),
)


def lm_rules(dense: str, norm: str, decoder: str, bias: str | None = None) -> Rules:
    """Rules for BERT's language model head; `bias` is a second name of the decoder's bias."""
    rules = renamed(dense, "lm_head.dense"), renamed(norm, "lm_head.norm"), renamed(decoder, "lm_head.decoder")
    return rules if bias is None else (*rules, (re.escape(bias), "lm_head.decoder.bias"))


BERT_LM = lm_rules(
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.predictions.decoder",
    "cls.predictions.bias",
)
ROBERTA_LM = lm_rules("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias")
DISTILBERT_LM = lm_rules("vocab_transform", "vocab_layer_norm", "vocab_projector")
ELECTRA_LM = lm_rules("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head")
ALBERT_LM = lm_rules("predictions.dense", "predictions.LayerNorm", "predictions.decoder", "predictions.bias")
LINEAR: Rules = (renamed("classifier", "classifier"),)
# heads with a dense layer of their own: it becomes the pooler here, and the pooler of the body is unused
TWO_LAYERS: Rules = (
    (r"pooler\..*", None),
    renamed("classifier.dense", "model.pooler.dense"),
    renamed("classifier.out_proj", "classifier"),
)
PRE_CLASSIFIER: Rules = (renamed("pre_classifier", "model.pooler.dense"), *LINEAR)
SUMMARY: Rules = (renamed("sequence_summary.summary", "model.pooler.dense"), *LINEAR)
SPAN: Rules = (renamed("qa_outputs", "qa_outputs"),)
ROBERTA_HEADS = {
    "MaskedLM": ROBERTA_LM,
    "SequenceClassification": TWO_LAYERS,
    "TokenClassification": LINEAR,
    "QuestionAnswering": SPAN,
    "MultipleChoice": LINEAR,
}
BERT_HEADS = {**ROBERTA_HEADS, "MaskedLM": BERT_LM, "SequenceClassification": LINEAR}
BIG_BIRD_HEADS = {**BERT_HEADS, "SequenceClassification": TWO_LAYERS, "QuestionAnswering": ()}
DISTILBERT_HEADS = {
    **BERT_HEADS,
    "MaskedLM": DISTILBERT_LM,
    "SequenceClassification": PRE_CLASSIFIER,
    "MultipleChoice": PRE_CLASSIFIER,
}
ELECTRA_HEADS = {**ROBERTA_HEADS, "MaskedLM": ELECTRA_LM, "MultipleChoice": SUMMARY}
GPT2_HEADS = {
    "CausalLM": ((r"lm_head\.weight", "lm_head.weight"),),
    "SequenceClassification": ((r"score\.weight", "classifier.weight"),),
    "TokenClassification": LINEAR,
    "QuestionAnswering": SPAN,
}


@dataclass(frozen=True)
class Creation:
    """Weights that the source may lack.

    pattern: of their names. how: what the report says.
    like: name of the weight that they are copied from, or a function of the initialised tensor; None keeps the
        initialised values.
    """

    pattern: str
    like: str | Callable[[Tensor], Tensor] | None
    how: str


# GPT-2's classifier multiplies the last token's state by one matrix: it has no pooler and no bias
GPT2_CLASSIFIER = (
    Creation(r"model\.pooler\.dense\.weight", lambda x: torch.eye(len(x)), "identity: the source has no pooler"),
    Creation(r"model\.pooler\.dense\.bias", None, "zero: the source has no pooler"),
    Creation(r"classifier\.bias", None, "zero: the source has no bias"),
)

BERT_LAYOUT = {
    "norm_first": False,
    "position_embedding_type": "learned",
    "is_decoder": False,
    "embedding_size": None,
}
GPT2_LAYOUT = {**BERT_LAYOUT, "norm_first": True, "is_decoder": True, "type_vocab_size": 0}


def as_it_is(name: str, tensor: Tensor, config: PreTrainedConfig) -> Iterable[tuple[str, Tensor]]:
    return [(name, tensor)]


def unrolled(name: str, tensor: Tensor, config: PreTrainedConfig) -> Iterable[tuple[str, Tensor]]:
    """A weight of one of ALBERT's shared layers, once for each layer that uses it."""
    found = re.fullmatch(r"encoder\.albert_layer_groups\.(\d+)\.albert_layers\.(\d+)\.(.*)", name)
    if found is None:
        return [(name, tensor)]
    group, inner, rest = int(found[1]), int(found[2]), found[3]
    layers, groups, per_group = config.num_hidden_layers, config.num_hidden_groups, config.inner_group_num
    repeats = [number for number in range(layers) if int(number / (layers / groups)) == group]  # as AlbertTransformer
    return [(f"encoder.layer.{number * per_group + inner}.{rest}", tensor) for number in repeats]


def transposed(name: str, tensor: Tensor, config: PreTrainedConfig) -> Iterable[tuple[str, Tensor]]:
    """GPT-2's Conv1D (in, out) as a linear layer (out, in), split into queries (scaled), keys and values."""
    found = re.fullmatch(r"h\.(\d+)\.(?:attn|mlp)\.(c_attn|c_proj|c_fc)\.(?:weight|bias)", name)
    if found is None:
        return [(name, tensor)]
    tensor = tensor.t() if tensor.dim() == 2 else tensor
    if found[2] != "c_attn":
        return [(name, tensor)]
    query, key, value = tensor.chunk(3)
    return [
        (name.replace("c_attn", "query"), query * gpt2_scale(config, int(found[1]))),
        (name.replace("c_attn", "key"), key),
        (name.replace("c_attn", "value"), value),
    ]


def gpt2_scale(config: PreTrainedConfig, layer: int) -> float:
    """Scale of the scores of `layer`, relative to 1/√d."""
    scale = 1.0 if config.scale_attn_weights else (config.hidden_size // config.num_attention_heads) ** 0.5
    return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale


def no_fields(config: PreTrainedConfig) -> dict[str, Any]:
    return {}


def distilbert_fields(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "intermediate_size": config.hidden_dim,
        "hidden_act": config.activation,
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "classifier_dropout": config.seq_classif_dropout,
    }


def electra_fields(config: PreTrainedConfig) -> dict[str, Any]:
    return {"embedding_size": None if config.embedding_size == config.hidden_size else config.embedding_size}


def albert_fields(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "embedding_size": config.embedding_size,  # ALBERT projects even from hidden_size to hidden_size
        "num_hidden_layers": config.num_hidden_layers * config.inner_group_num,
        "classifier_dropout": config.classifier_dropout_prob,
    }


def gpt2_fields(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "intermediate_size": config.n_inner or 4 * config.hidden_size,
        "hidden_act": config.activation_function,
        "layer_norm_eps": config.layer_norm_epsilon,
        "hidden_dropout_prob": config.resid_pdrop,
        "attention_probs_dropout_prob": config.attn_pdrop,
    }


def no_notes(config: PreTrainedConfig, head: str | None) -> list[str]:
    return []


def albert_notes(config: PreTrainedConfig, head: str | None) -> list[str]:
    return [
        f"layers: the source shares {config.num_hidden_groups * config.inner_group_num} among "
        f"{config.num_hidden_layers * config.inner_group_num}; here each has a copy, trained on its own"
    ]


def electra_notes(config: PreTrainedConfig, head: str | None) -> list[str]:
    summary = config.summary_type, config.summary_use_proj
    if head == "MultipleChoice" and summary != ("first", True):
        raise ValueError(
            f"the source's summary_type and summary_use_proj {summary} must be ('first', True): a choice is judged by "
            "a dense layer on its first token. Convert without that head (head='Model')."
        )
    return []


def gpt2_notes(config: PreTrainedConfig, head: str | None) -> list[str]:
    notes = []
    if {gpt2_scale(config, layer) for layer in range(config.num_hidden_layers)} != {1.0}:
        notes.append(
            "the scale of the attention scores, relative to 1/√d, is folded into the queries: scale_attn_weights is "
            f"{config.scale_attn_weights}, scale_attn_by_inverse_layer_idx is {config.scale_attn_by_inverse_layer_idx}"
        )
    if config.embd_pdrop != config.resid_pdrop:
        notes.append(f"embd_pdrop ({config.embd_pdrop}) becomes hidden_dropout_prob ({config.resid_pdrop})")
    return notes


@dataclass(frozen=True)
class Source:
    """One kind of checkpoint.

    heads: rules for each head that has a counterpart here, applied if the model keeps that head.
    body: rules for the body. parts: prefixes of the names of its weights, except the pooler's.
    unpack: splits or copies a weight of the source into the weights that `body` has rules for.
    suffixes: suffix of a class name -> head, where it is not `For<head>`.
    layout: fields that all checkpoints of this kind share. fields: fields with another name in the source's config.
    offset_positions: does the position table begin with `pad_token_id + 1` rows that no token reads?
    lm_act: activation of the language model's head if it is not `hidden_act`.
    pooler_act: activation of a head's dense layer if it is not tanh; the name of a field of the source's config, or of
        an activation.
    created: weights of a kept head that only the model here has.
    notes: notes for the report, from the config and the kept head. Raises ValueError for features that no variant has.
    """

    heads: Mapping[str, Rules]
    body: Rules = BODY
    parts: tuple[str, ...] = ("embeddings.", "encoder.")
    unpack: Callable[[str, Tensor, PreTrainedConfig], Iterable[tuple[str, Tensor]]] = as_it_is
    suffixes: Mapping[str, str] = field(default_factory=lambda: {"ForPreTraining": "MaskedLM"})
    layout: Mapping[str, Any] = field(default_factory=lambda: BERT_LAYOUT)
    fields: Callable[[PreTrainedConfig], dict[str, Any]] = no_fields
    offset_positions: bool = False
    lm_act: tuple[str, ...] | None = None
    pooler_act: Mapping[str, str] = field(default_factory=dict)
    created: Mapping[str, tuple[Creation, ...]] = field(default_factory=dict)
    notes: Callable[[PreTrainedConfig, str | None], list[str]] = no_notes

    @property
    def is_decoder(self) -> bool:
        return self.layout["is_decoder"]


GELU = ("gelu", "gelu_python")  # two names of the same function
ROBERTA = Source(ROBERTA_HEADS, offset_positions=True, lm_act=GELU)

SOURCES: dict[str, Source] = {
    "bert": Source(BERT_HEADS),
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "longformer": ROBERTA,
    "big_bird": Source(BIG_BIRD_HEADS, pooler_act={"SequenceClassification": "hidden_act"}),
    "fnet": Source(BERT_HEADS),
    "distilbert": Source(
        DISTILBERT_HEADS,
        DISTILBERT_BODY,
        ("embeddings.", "transformer."),
        fields=distilbert_fields,
        pooler_act={"SequenceClassification": "relu", "MultipleChoice": "relu"},
    ),
    "electra": Source(
        ELECTRA_HEADS,
        ELECTRA_BODY,
        ("embeddings.", "embeddings_project.", "encoder."),
        suffixes={},  # `ForPreTraining` is the discriminator
        fields=electra_fields,
        lm_act=GELU,
        pooler_act={"SequenceClassification": "gelu", "MultipleChoice": "summary_activation"},
        notes=electra_notes,
    ),
    "albert": Source(
        {**BERT_HEADS, "MaskedLM": ALBERT_LM},
        ALBERT_BODY,
        unpack=unrolled,
        fields=albert_fields,
        notes=albert_notes,
    ),
    "gpt2": Source(
        GPT2_HEADS,
        GPT2_BODY,
        ("wte.", "wpe.", "h.", "ln_f."),
        unpack=transposed,
        suffixes={"LMHeadModel": "CausalLM"},
        layout=GPT2_LAYOUT,
        fields=gpt2_fields,
        pooler_act={"SequenceClassification": "linear"},
        created={"SequenceClassification": GPT2_CLASSIFIER},
        notes=gpt2_notes,
    ),
}
DISTANCE = "its attention scores have a learned term for the distance between query and key, which no engine computes"
UNSUPPORTED = {"mpnet": DISTANCE, "deberta": DISTANCE, "deberta-v2": DISTANCE}  # related kinds, and why not
