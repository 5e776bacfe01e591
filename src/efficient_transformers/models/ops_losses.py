"""Losses of whole sequences: means over all labels between two optimizer steps.

Trainer counts the labels of all batches and processes that share a step and passes their number as
`num_items_in_batch`; a loss that is a mean over its own batch alone would be that many batches times too large.
"""

from typing import Any

from torch import Tensor, nn

IGNORED = -100  # a label of nothing, as in transformers


def cross_entropy(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Mean over the labels (b,) of logits (b, l) that are not -100, or their sum divided by the given count."""
    labels = labels.to(logits.device)
    if num_items_in_batch is None:
        return nn.functional.cross_entropy(logits, labels)
    return nn.functional.cross_entropy(logits, labels, reduction="sum") / on_device(num_items_in_batch, logits)


def choose_problem_type(labels: Tensor, config: Any) -> str:
    """`config.problem_type`, settled by the labels where it is None: a pipeline takes the saved one from there."""
    if config.problem_type is None:
        if config.num_labels == 1:
            config.problem_type = "regression"
        elif labels.is_floating_point():
            config.problem_type = "multi_label_classification"
        else:
            config.problem_type = "single_label_classification"
    return config.problem_type


def pooled_loss(
    labels: Tensor, pooled_logits: Tensor, config: Any, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """The loss of logits (b, l) by `config.problem_type`, a scalar.

    `single_label_classification`: labels (b,), cross-entropy. `multi_label_classification`: labels (b, l) of 0 and 1,
    binary cross-entropy. `regression`: labels (b, l), squared error. With l = 1, labels may also be (b,). Labels of
    -100 are ignored, except by a regression, where that is a number like any other.

    transformers' own function drops `num_items_in_batch` for the last two.
    """
    labels = labels.to(pooled_logits.device)
    problem = choose_problem_type(labels, config)
    if pooled_logits.dtype.itemsize < 4:
        pooled_logits = pooled_logits.float()
    if problem == "single_label_classification":
        return cross_entropy(pooled_logits, labels.view(-1), num_items_in_batch)
    if config.num_labels == 1:
        labels = labels.view(-1, 1)
    if labels.shape != pooled_logits.shape:
        raise ValueError(
            f"labels must have shape (batch, num_labels) = {tuple(pooled_logits.shape)} for problem_type {problem!r}, "
            f"got {tuple(labels.shape)}: pass labels of that shape, or set another problem_type."
        )
    labels = labels.to(pooled_logits.dtype)
    if problem == "regression":
        losses = nn.functional.mse_loss(pooled_logits, labels, reduction="none")
        return losses.mean() if num_items_in_batch is None else losses.sum() / on_device(num_items_in_batch, losses)
    if problem != "multi_label_classification":
        raise ValueError(f"problem_type ({problem!r}) is not one that a loss exists for.")
    counted = labels != IGNORED
    losses = nn.functional.binary_cross_entropy_with_logits(pooled_logits, labels, reduction="none")
    total = losses.where(counted, 0).sum()
    return total / (counted.sum() if num_items_in_batch is None else on_device(num_items_in_batch, losses))


def on_device(count: Tensor | int, like: Tensor) -> Tensor | int:
    """Trainer's count where the loss is: a model may be spread over devices."""
    return count.to(like.device) if isinstance(count, Tensor) else count
