"""How the checkpoints of transformers map onto the variants: names of weights, new weights, and fields of configs.

What a source is called and how it maps is one entry of `SOURCES`; what a variant has beyond the source is one entry of
`CREATED`; fields that a pair of them shares are one entry of `SHARED_FIELDS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedConfig

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
