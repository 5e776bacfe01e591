"""The heads, written once. A variant derives each of them; `model_class` of its pretrained base is what they build on.

transformers' `GenericFor…` heads build their body through an Auto class, which fails inside a checkpoint.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    ImageClassifierOutput,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.models.auto import modeling_auto as auto

from .base_backbone import Backbone
from .base_configuration import EtConfig
from .base_generation import OwnCacheGeneration
from .base_signatures import CACHE_FIELD, accepts, keywords
from .ops_checks import check_shape
from .ops_losses import IGNORED, cross_entropy, pooled_loss

BODY = keywords(Backbone.forward)


class Head:
    """Mixin: a body under the name `model`, and what all heads do with it."""

    model_class: ClassVar[type[PreTrainedModel]]
    task: ClassVar[str]  # the part of the class name that transformers takes its decisions by
    class_names: ClassVar[Any]  # transformers' table of the classes for this task
    accepts_loss_kwargs: ClassVar[bool] = True  # every loss divides by `num_items_in_batch`
    pools: ClassVar[bool] = False  # does the head read the pooled vector?
    reads_images: ClassVar[bool] = False
    config: EtConfig
    model: PreTrainedModel

    def __init_subclass__(cls, **kwargs: Any):
        """Enter the class into transformers' table of names.

        Trainer shifts smoothed labels, and pipelines and model cards recognise a task, by the name of the class alone.
        Here and not in the registry, since a checkpoint's own code and classes derived from these need it as well.
        """
        super().__init_subclass__(**kwargs)
        if issubclass(cls, PreTrainedModel):
            cls.class_names[cls.__name__] = cls.__name__

    def __init__(self, config: EtConfig):
        config = self.own_config(config)
        if self.reads_images:
            config.check_image_size()
        elif config.image_size is not None:
            raise ValueError(
                f"{type(self).__name__} reads text and got image_size={config.image_size}: leave image_size out, or "
                "use …ForImageClassification."
            )
        super().__init__(config)  # type: ignore[call-arg]
        self.loss_type = self.task  # transformers cuts it out of the class name, which derived classes need not have
        self.model = self.model_class(config, add_pooling_layer=self.pools)  # type: ignore[call-arg]
        self.add_head(config)
        self.post_init()  # type: ignore[attr-defined]

    @classmethod
    def own_config(cls, config: EtConfig) -> EtConfig:
        """The config this head works with: the one given, or a copy in which the head has settled something."""
        return config

    def add_head(self, config: EtConfig) -> None:
        raise NotImplementedError

    def mark(self, input_ids: Tensor | None, marked: Tensor | None) -> Tensor | None:
        """The global_attention_mask: what the caller gave, or this head's own choice, (b, n) or None."""
        return marked

    def classifier_dropout(self, config: EtConfig) -> nn.Dropout:
        rate = config.classifier_dropout
        return nn.Dropout(config.hidden_dropout_prob if rate is None else rate)


def check_labels(hidden: Tensor, **labels: Tensor | None) -> None:
    """Raise ValueError unless labels per token have the shape (b, n): losses flatten them, whatever their axes are."""
    for name, given in labels.items():
        if given is not None:
            check_shape(name, given.shape, tuple(hidden.shape[:2]), "batch, length")


class MaskedLMHead(nn.Module):
    """BERT's: dense, activation, norm, then the (tied) word embeddings and a bias."""

    def __init__(self, config: EtConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.embedding_width)
        self.activation = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(config.embedding_width, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.embedding_width, config.vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.norm(self.activation(self.dense(hidden))))


class ForMaskedLM(Head):
    """Predicts masked tokens from both sides. Labels (b, n), -100 where nothing is to be predicted.

    Logits (b, n, vocab_size); in training with `sparse_prediction` those of labelled tokens, (labels, vocab_size).
    """

    task = "ForMaskedLM"
    class_names = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    _tied_weights_keys = {"lm_head.decoder.weight": "model.embeddings.word_embeddings.weight"}

    def add_head(self, config: EtConfig) -> None:
        if config.is_decoder:
            raise ValueError(
                f"{type(self).__name__} reads both sides and got is_decoder=True: set is_decoder=False, or use "
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
            *inputs, global_attention_mask=self.mark(input_ids, global_attention_mask), return_dict=True, **kwargs
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

    The variant's class names GenerationMixin itself, behind its pretrained base: transformers looks for it there.
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
        """`logits_to_keep` n > 0 computes the last n logits, a tensor those at its positions, 0 all of them.

        `labels` (b, n) are shifted here; `shift_labels` (b, n), which collators for parallel sequences make, are not.
        """
        shift_labels = kwargs.pop("shift_labels", None)  # unlisted: Trainer asks its batches for every listed "label"
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


class PoolingHead(Head):
    """A head whose body pools, and whose pooler is trained and saved with an adapter.

    What PEFT trains as a whole beside an adapter it finds by the end of a module's name, by default `classifier`. The
    pooler is new in a classifier that is made from a language model, so it has to be among them: under the name
    `pooler_classifier`, for PEFT alone. In the tree of modules and in checkpoints it is the body's `pooler`.
    """

    pools = True

    @property
    def pooler_classifier(self) -> nn.Module:
        return self.model.pooler  # type: ignore[return-value]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "pooler_classifier":
            self.model.pooler = value
        else:
            super().__setattr__(name, value)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """All modules; with `remove_duplicate=False`, as PEFT asks, the second name of the pooler as well."""
        yield from super().named_modules(memo, prefix, remove_duplicate)  # type: ignore[misc]
        if not remove_duplicate:
            # an empty module in its place: no parameter is to be listed twice
            yield f"{prefix}.pooler_classifier".removeprefix("."), nn.Module()


class Classifier(Head):
    """A head of dropout and one linear layer onto the labels."""

    def add_head(self, config: EtConfig) -> None:
        if not config.num_labels:
            raise ValueError(f"num_labels ({config.num_labels}) must be at least 1 for {type(self).__name__}.")
        self.num_labels = config.num_labels
        self.dropout = self.classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)


class ForSequenceClassification(PoolingHead, Classifier):
    """Judges a whole sequence: classes, several labels at once or numbers, by `config.problem_type`."""

    task = "ForSequenceClassification"
    class_names = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    _loss_function = staticmethod(pooled_loss)

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
    ) -> SequenceClassifierOutput:
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        outputs = self.model(
            *inputs, global_attention_mask=self.mark(input_ids, global_attention_mask), return_dict=True, **kwargs
        )
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, num_items_in_batch)  # type: ignore[attr-defined]
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ForTokenClassification(Classifier):
    """Labels every token. Labels (b, n), -100 where there is none."""

    task = "ForTokenClassification"
    class_names = auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES

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
    ) -> TokenClassifierOutput:
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        outputs = self.model(
            *inputs, global_attention_mask=self.mark(input_ids, global_attention_mask), return_dict=True, **kwargs
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            check_labels(outputs.last_hidden_state, labels=labels)
            counted = {"num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits, labels, self.config, **counted)  # type: ignore[attr-defined]
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ForQuestionAnswering(Head):
    """Finds the answer as a span of tokens. `start_positions` and `end_positions` (b,)."""

    task = "ForQuestionAnswering"
    class_names = auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES

    def add_head(self, config: EtConfig) -> None:
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    @accepts(BODY)
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        if (start_positions is None) != (end_positions is None):
            raise ValueError("give both start_positions and end_positions, or neither: a loss needs the whole span.")
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        outputs = self.model(
            *inputs, global_attention_mask=self.mark(input_ids, global_attention_mask), return_dict=True, **kwargs
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            spans = start_logits, end_logits, start_positions, end_positions
            loss = self.loss_function(*spans, num_items_in_batch=num_items_in_batch)  # type: ignore[attr-defined]
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits.contiguous(),
            end_logits=end_logits.contiguous(),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ForMultipleChoice(PoolingHead):
    """Picks one of several sequences. All inputs have a choices axis: (b, c, n); labels (b,)."""

    task = "ForMultipleChoice"
    class_names = auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

    def add_head(self, config: EtConfig) -> None:
        self.dropout = self.classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, 1)

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
    ) -> MultipleChoiceModelOutput:
        first = inputs_embeds if input_ids is None else input_ids
        if first is None or first.dim() < 3:
            raise ValueError("multiple choice takes inputs of shape (batch, choices, length): add the axis of choices.")
        marked = self.mark(input_ids, global_attention_mask)
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, marked
        *inputs, marked = (None if x is None else x.flatten(0, 1) for x in inputs)
        outputs = self.model(*inputs, global_attention_mask=marked, return_dict=True, **kwargs)
        logits = self.classifier(self.dropout(outputs.pooler_output)).view(first.shape[:2])
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ForImageClassification(PoolingHead, Classifier):
    """Judges an image, a sequence of patches: classes, several labels at once or numbers, by `config.problem_type`."""

    task = "ForImageClassification"
    class_names = auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    _loss_function = staticmethod(pooled_loss)
    reads_images = True
    main_input_name = "pixel_values"

    @accepts(BODY)
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """`pixel_values` (b, channels, height, width), of the size that the config states; `labels` (b,) or (b, l)."""
        outputs = self.model(pixel_values=pixel_values, return_dict=True, **kwargs)
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, num_items_in_batch)  # type: ignore[attr-defined]
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
