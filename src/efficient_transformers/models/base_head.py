"""What all heads share: the bare model they are built on, the pooler of some, the classifier of others.

transformers' `GenericFor…` heads build their model through an Auto class, which fails inside a checkpoint.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from .base_backbone import Backbone
from .base_configuration import EtConfig
from .base_signatures import keywords
from .ops_checks import check_shape

BODY = keywords(Backbone.forward)  # keywords that every head passes on to the bare model


class Head:
    """Mixin of all heads: builds the bare model as `self.model`, then whatever the head adds to it.

    task: suffix of the class name, by which transformers recognizes the task.
    class_names: transformers' table of class names for this task.
    accepts_loss_kwargs: True, because every loss divides by `num_items_in_batch`.
    pools: does the head need the pooled vector?
    reads_images: is the input `pixel_values` instead of text?
    """

    model_class: ClassVar[type[PreTrainedModel]]
    task: ClassVar[str]
    class_names: ClassVar[Any]
    accepts_loss_kwargs: ClassVar[bool] = True
    pools: ClassVar[bool] = False
    reads_images: ClassVar[bool] = False
    config: EtConfig
    model: PreTrainedModel

    def __init_subclass__(cls, **kwargs: Any):
        """Add the class to transformers' table of names.

        Trainer's label smoothing, pipelines and model cards recognize a task by the class name alone. This is done here
        rather than in the registry, because the code inside a checkpoint and derived classes need it as well.
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
                f"{type(self).__name__} takes text and got image_size={config.image_size}: leave image_size out, or "
                "use …ForImageClassification."
            )
        super().__init__(config)  # type: ignore[call-arg]
        self.loss_type = self.task  # transformers infers it from the class name, but derived classes have other names
        self.model = self.model_class(config, add_pooling_layer=self.pools)  # type: ignore[call-arg]
        self.add_head(config)
        self.post_init()  # type: ignore[attr-defined]

    @classmethod
    def own_config(cls, config: EtConfig) -> EtConfig:
        """The config of this head: `config` itself, or a copy with fields that the head sets."""
        return config

    def add_head(self, config: EtConfig) -> None:
        """Create the layers of the head."""
        raise NotImplementedError

    def global_tokens(self, input_ids: Tensor | None, global_mask: Tensor | None) -> Tensor | None:
        """The mask of global tokens, (b, n) or None: the caller's `global_mask`, or one that the head chooses."""
        return global_mask

    def classifier_dropout(self, config: EtConfig) -> nn.Dropout:
        rate = config.classifier_dropout
        return nn.Dropout(config.hidden_dropout_prob if rate is None else rate)


class PoolingHead(Head):
    """Mixin of heads on the pooled vector, whose pooler is trained and saved along with an adapter.

    PEFT selects the modules that it trains in full, besides the adapter, by the end of their names, by default
    `classifier`. The pooler must be one of them, because a classifier made from a language model starts with a new one.
    For PEFT it has a second name, `pooler_classifier`; in the module tree and in checkpoints it is `model.pooler`.
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
        """All modules; with `remove_duplicate=False`, which PEFT passes, also the second name of the pooler."""
        yield from super().named_modules(memo, prefix, remove_duplicate)  # type: ignore[misc]
        if not remove_duplicate:
            # an empty module, so that no parameter is listed twice
            yield f"{prefix}.pooler_classifier".removeprefix("."), nn.Module()


class Classifier(Head):
    """Mixin of heads with dropout and one linear layer onto the labels."""

    def add_head(self, config: EtConfig) -> None:
        if not config.num_labels:
            raise ValueError(f"num_labels ({config.num_labels}) must be at least 1 for {type(self).__name__}.")
        self.num_labels = config.num_labels
        self.dropout = self.classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)


def check_labels(hidden: Tensor, **labels: Tensor | None) -> None:
    """Raise ValueError unless labels per token have the shape (b, n); losses would flatten any other shape."""
    for name, given in labels.items():
        if given is not None:
            check_shape(name, given.shape, tuple(hidden.shape[:2]), "batch, length")
