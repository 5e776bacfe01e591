"""Small models of transformers, to be given other attention."""

from transformers import AutoConfig, AutoModel

SIZES = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None, "initializer_range": 0.1,
}  # fmt: skip


def model_of(kind: str, head=AutoModel, **settings):
    if kind == "llama":
        settings.pop("sliding_window", None)
    config = AutoConfig.for_model(kind, **{**SIZES, **settings})
    return head.from_config(config, attn_implementation="sdpa").eval()
