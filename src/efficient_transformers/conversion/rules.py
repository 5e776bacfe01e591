"""What the variants make of a source: new weights, weights that find no place, and fields of configs.

What a variant has beyond the source is one entry of `CREATED`; fields that a pair of them shares are one entry of
`SHARED_FIELDS`.
"""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from .layouts import Creation

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
TRANSFORMERS_FIELDS = {"num_labels", "id2label", "label2id", "problem_type", "chunk_size_feed_forward"}
