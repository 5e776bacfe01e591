"""The heads that classify sequences, tokens, answer spans, choices and images."""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import (
    ImageClassifierOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.models.auto import modeling_auto as auto

from .base_configuration import EtConfig
from .base_head import BODY, Classifier, Head, PoolingHead, check_labels
from .base_signatures import accepts
from .ops_losses import cross_entropy, pooled_loss


class ForSequenceClassification(PoolingHead, Classifier):
    """Classifies a sequence: one class, several labels or numbers, by `config.problem_type`."""

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
            *inputs,
            global_attention_mask=self.global_tokens(input_ids, global_attention_mask),
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, num_items_in_batch)  # type: ignore[attr-defined]
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ForTokenClassification(Classifier):
    """Classifies every token. Labels (b, n), -100 at tokens without a label."""

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
            *inputs,
            global_attention_mask=self.global_tokens(input_ids, global_attention_mask),
            return_dict=True,
            **kwargs,
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
    """Predicts the answer as a span of tokens. `start_positions` and `end_positions` (b,)."""

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
            raise ValueError("pass both start_positions and end_positions, or neither: the loss needs the whole span.")
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        outputs = self.model(
            *inputs,
            global_attention_mask=self.global_tokens(input_ids, global_attention_mask),
            return_dict=True,
            **kwargs,
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
    """Chooses one of several sequences. All inputs have an axis of choices, (b, c, n); labels (b,)."""

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
        global_mask = self.global_tokens(input_ids, global_attention_mask)
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, global_mask
        *inputs, global_mask = (None if x is None else x.flatten(0, 1) for x in inputs)
        outputs = self.model(*inputs, global_attention_mask=global_mask, return_dict=True, **kwargs)
        logits = self.classifier(self.dropout(outputs.pooler_output)).view(first.shape[:2])
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ForImageClassification(PoolingHead, Classifier):
    """Classifies an image, a sequence of patches: one class, several labels or numbers, by `config.problem_type`."""

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
        """`pixel_values` (b, channels, height, width), of the size in the config; `labels` (b,) or (b, l)."""
        outputs = self.model(pixel_values=pixel_values, return_dict=True, **kwargs)
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, num_items_in_batch)  # type: ignore[attr-defined]
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
