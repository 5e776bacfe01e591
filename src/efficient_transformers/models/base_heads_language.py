"""The language-modeling heads: masked and causal."""

from copy import deepcopy
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput
from transformers.models.auto import modeling_auto as auto

from .base_configuration import EtConfig
from .base_generation import OwnCacheGeneration
from .base_head import BODY, Head, check_labels
from .base_signatures import CACHE_FIELD, accepts
from .ops_losses import IGNORED


class MaskedLMHead(nn.Module):
    """BERT's prediction head: dense, activation, norm, then the (tied) word embeddings and a bias."""

    def __init__(self, config: EtConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.embedding_width)
        self.activation = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(config.embedding_width, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.embedding_width, config.vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.norm(self.activation(self.dense(hidden))))


class ForMaskedLM(Head):
    """Predicts masked tokens from both sides. Labels (b, n), -100 at tokens without a label.

    Logits (b, n, vocab_size); in training with `sparse_prediction` only those of labelled tokens, (labels, vocab_size).
    """

    task = "ForMaskedLM"
    class_names = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    _tied_weights_keys = {"lm_head.decoder.weight": "model.embeddings.word_embeddings.weight"}

    def add_head(self, config: EtConfig) -> None:
        if config.is_decoder:
            raise ValueError(
                f"{type(self).__name__} attends to both sides and got is_decoder=True: set is_decoder=False, or use "
                f"{type(self).__name__.replace('MaskedLM', 'CausalLM')}."
            )
        self.lm_head = MaskedLMHead(config)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head.decoder = new_embeddings

    @accepts(BODY)
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        outputs = self.model(
            *inputs,
            global_attention_mask=self.global_tokens(input_ids, global_attention_mask),
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        check_labels(hidden, labels=labels)
        if self.config.sparse_prediction and self.training and labels is not None:  # type: ignore[attr-defined]
            predicted = labels != IGNORED
            hidden, labels = hidden[predicted], labels[predicted]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            sizes = {"vocab_size": self.config.vocab_size, "num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits, labels, **sizes)  # type: ignore[attr-defined]
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ForCausalLM(OwnCacheGeneration, Head):
    """Predicts the next token, with a cache. Sets `is_decoder` in its own copy of the config.

    The variant's class lists GenerationMixin itself, after its pretrained base, where transformers looks for it.
    """

    task = "ForCausalLM"
    class_names = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.word_embeddings.weight"}

    @classmethod
    def own_config(cls, config: EtConfig) -> EtConfig:
        config = super().own_config(config)
        if config.is_decoder:
            return config
        config = deepcopy(config)
        config.is_decoder = True
        return config

    def add_head(self, config: EtConfig) -> None:
        factorized = config.embedding_size is not None
        width = config.embedding_width
        self.project_out = nn.Linear(config.hidden_size, width, bias=False) if factorized else nn.Identity()
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    @accepts(BODY, {"shift_labels"})
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute the last `logits_to_keep` logits, all if it is 0, or those at its positions if it is a tensor.

        `labels` (b, n) are shifted here; `shift_labels` (b, n), from collators for sequence parallelism, already are.
        """
        shift_labels = kwargs.pop(
            "shift_labels", None
        )  # not a named argument: Trainer expects every argument named "label" in its batches
        outputs = self.model(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(self.project_out(outputs.last_hidden_state[:, kept]))
        loss = None
        check_labels(outputs.last_hidden_state, labels=labels, shift_labels=shift_labels)
        if labels is not None or shift_labels is not None:
            sizes = {"vocab_size": self.config.vocab_size, "num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits, labels, shift_labels=shift_labels, **sizes)  # type: ignore[attr-defined]
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_FIELD: getattr(outputs, CACHE_FIELD)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
