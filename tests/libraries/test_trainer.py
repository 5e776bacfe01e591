"""transformers' Trainer takes the steps of a written-out loop, whatever its options, in every head."""

import os
import subprocess
import sys
from copy import deepcopy
from inspect import signature
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from repository import with_helpers
from torch.nn import functional
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_pt_utils import LabelSmoother
from zoo import SETTINGS, build, inputs, inputs_of

from efficient_transformers import VARIANTS, EtLocalForCausalLM, EtLocalForMaskedLM

IGNORED, RATE, LENGTH = -100, 0.1, 11
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
FAST = ("local",)
# it picks its port as it binds it; the port that `accelerate launch --main_process_port 0` picks can be taken by then
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def marked(slugs, *more):
    """A table of variants, with all but a few marked as slow."""
    return [pytest.param(s, *more, marks=[] if s in FAST else pytest.mark.slow, id="-".join([s, *more])) for s in slugs]


ENCODERS = marked(VARIANTS, "SequenceClassification")
DECODERS = marked([v.slug for v in VARIANTS.values() if v.causal], "CausalLM")
both = pytest.mark.parametrize(("slug", "head"), ENCODERS + DECODERS)
# every head and every kind of labels that it takes
KINDS = [(head, "") for head in ("MaskedLM", "CausalLM", "TokenClassification", "MultipleChoice", "QuestionAnswering")]
KINDS += [(f"{task}Classification", problem) for task in ("Sequence", "Image") for problem in PROBLEMS]


def small(slug: str, head: str, problem: str = ""):
    fields = {"num_labels": 3, "problem_type": problem or None, "dtype": torch.float32, "initializer_range": 0.05}
    if slug == "sinkhorn":
        fields["gumbel_noise"] = False  # two runs would draw it differently
    return build(VARIANTS[slug], SETTINGS[slug][0], head, **fields)


def batch_of(model, size: int) -> dict[str, torch.Tensor]:
    """Random inputs of one length, with their labels; some tokens have none."""
    config, head = model.config, model.task
    x = inputs_of(model, size, LENGTH)
    batch = {model.main_input_name: x}
    if head in ("ForMaskedLM", "ForCausalLM", "ForTokenClassification"):
        labels = x.clone() % (3 if head == "ForTokenClassification" else 99)
        batch["labels"] = labels.masked_fill(torch.rand(x.shape) < 0.4, IGNORED)
    elif head == "ForQuestionAnswering":
        batch |= {f"{end}_positions": torch.randint(LENGTH, (size,)) for end in ("start", "end")}
    elif head == "ForMultipleChoice":
        batch["labels"] = torch.randint(2, (size,))
    elif config.problem_type == "single_label_classification":
        batch["labels"] = torch.randint(3, (size,))
    else:
        labels = torch.randn(size, 3)
        batch["labels"] = labels if config.problem_type == "regression" else (labels > 0).float()
    return batch


def written_out(model, batch, smoothing: float = 0.0) -> tuple[torch.Tensor, int]:
    """The sum of the losses of a batch over its labels, and their number."""
    labels = {name: value for name, value in batch.items() if name == "labels" or "positions" in name}
    output = model(**{name: value for name, value in batch.items() if name not in labels})
    if model.task == "ForQuestionAnswering":
        logits = output.start_logits, output.end_logits
        ends = labels["start_positions"], labels["end_positions"]
        losses = [functional.cross_entropy(x, y, reduction="sum") / 2 for x, y in zip(logits, ends, strict=True)]
        return losses[0] + losses[1], len(ends[0])
    logits, labels = output.logits, labels["labels"]
    if model.config.problem_type == "regression":
        return (logits - labels).square().sum(), labels.numel()
    if model.config.problem_type == "multi_label_classification":
        return -torch.where(labels > 0, logits.sigmoid(), 1 - logits.sigmoid()).log().sum(), labels.numel()
    if model.task == "ForCausalLM":
        logits, labels = logits[:, :-1], labels[:, 1:]
    log = logits.log_softmax(-1)[labels != IGNORED]
    labels = labels[labels != IGNORED]
    right = log.gather(1, labels[:, None]).sum()
    return -(1 - smoothing) * right - smoothing * log.mean(1).sum(), len(labels)


class Rows(torch.utils.data.Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self) -> int:
        return len(next(iter(self.batch.values())))

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {name: column[number] for name, column in self.batch.items()}


class Recorder:
    """A collator that keeps the batches in the order in which they are trained on."""

    def __init__(self):
        self.batches = []

    def __call__(self, rows):
        self.batches.append(default_data_collator(rows))
        return self.batches[-1]


def trainer_of(model, rows, folder, collate=default_data_collator, evaluated=None, **changes) -> Trainer:
    arguments = {
        "optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 2,
        "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, **changes,
    }  # fmt: skip
    given = {"train_dataset": rows, "eval_dataset": evaluated, "data_collator": collate}
    return Trainer(model, TrainingArguments(str(folder), **arguments), **given)


def compare_with_a_loop(model, folder, size=8, smoothing=0.0, **changes):
    """Train on `size` rows; the losses and weights must be those of plain stochastic gradient descent."""
    accumulation = changes.get("gradient_accumulation_steps", 1)
    expected, recorder = deepcopy(model).train(), Recorder()
    trainer = trainer_of(
        model, Rows(batch_of(model, size)), folder, recorder, label_smoothing_factor=smoothing, **changes
    )
    trainer.train()
    losses = []
    for step in range(2):
        parts = recorder.batches[step * accumulation : (step + 1) * accumulation]
        sums = [written_out(expected, part, smoothing) for part in parts]
        loss = sum(total for total, _ in sums) / sum(count for _, count in sums)
        expected.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in expected.parameters():
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad
        losses.append(loss.item())
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert logged == pytest.approx(losses, rel=1e-4, abs=2e-4)  # Trainer rounds some
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


# losses --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slug", "head", "problem"),
    [(v.slug, head, problem) for v in VARIANTS.values() for head, problem in KINDS if head in v.heads],
)
def test_losses_divided_by_a_common_count_add_up(slug, head, problem):
    """As Trainer has it: the number of labels of all batches and processes of a step, whole or as a tensor."""
    model = small(slug, head, problem)
    parts = [batch_of(model, size) for size in (2, 3)]
    sums = [written_out(model, part) for part in parts]
    count = sum(number for _, number in sums)
    for part, (total, number) in zip(parts, sums, strict=True):
        torch.testing.assert_close(model(**part).loss, total / number)
        torch.testing.assert_close(model(**part, num_items_in_batch=count).loss, total / count)
        torch.testing.assert_close(model(**part, num_items_in_batch=torch.tensor(count)).loss, total / count)


def test_labels_without_a_value_count_for_nothing():
    model = small("local", "SequenceClassification", "multi_label_classification")
    batch = batch_of(model, 3)
    batch["labels"][1, 2] = batch["labels"][0, 0] = IGNORED
    logits, keep = model(batch["input_ids"]).logits, batch["labels"] != IGNORED
    expected = functional.binary_cross_entropy_with_logits(logits[keep], batch["labels"][keep])
    torch.testing.assert_close(model(**batch).loss, expected)


def test_labels_of_another_shape_are_refused():
    model = small("local", "SequenceClassification", "regression")
    with pytest.raises(ValueError, match=r"labels must have shape \(batch, num_labels\) = \(2, 3\)"):
        model(inputs(2, 9), labels=torch.randn(2))


@pytest.mark.parametrize(("head", "problem"), KINDS)
def test_accumulated_steps_are_those_of_a_loop(head, problem, tmp_path):
    compare_with_a_loop(small("local", head, problem), tmp_path, gradient_accumulation_steps=2)


@both
def test_accumulated_steps_of_a_family(slug, head, tmp_path):
    problem = "single_label_classification" if head == "SequenceClassification" else ""
    compare_with_a_loop(small(slug, head, problem), tmp_path, gradient_accumulation_steps=2)


# names ---------------------------------------------------------------------------------------------------------------


class Renamed(EtLocalForCausalLM):
    """A class of a user, with a name that says nothing."""


class RenamedMasked(EtLocalForMaskedLM):
    """The same for masked language models."""


@pytest.mark.parametrize(("slug", "head"), DECODERS + marked(VARIANTS, "MaskedLM"))
def test_label_smoothing(slug, head, tmp_path):
    """Labels of a causal model are shifted, which Trainer decides by the name of the class."""
    # before transformers 5.15 smoothed losses are means over their own batch, of every model
    counts = "num_items_in_batch" in signature(LabelSmoother.__call__).parameters
    compare_with_a_loop(small(slug, head), tmp_path, smoothing=0.2, gradient_accumulation_steps=1 + counts)


@pytest.mark.parametrize("renamed", [Renamed, RenamedMasked])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_derived_class_trains_as_the_one_it_is_derived_from(renamed, smoothing, tmp_path):
    """Its loss, too, would be chosen by its name."""
    compare_with_a_loop(renamed(small("local", renamed.task.removeprefix("For")).config), tmp_path, smoothing=smoothing)


def test_label_smoothing_with_an_adapter(tmp_path):
    """An adapter is zero at first, and the first loss that of the model alone."""
    model, recorder = small("local", "CausalLM"), Recorder()
    alone = deepcopy(model)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
    options = {"label_smoothing_factor": 0.2, "max_steps": 1}
    trainer = trainer_of(wrapped, Rows(batch_of(model, 4)), tmp_path, recorder, **options)
    trainer.train()
    with torch.no_grad():
        total, count = written_out(alone, recorder.batches[0], 0.2)
    assert trainer.state.log_history[0]["loss"] == pytest.approx((total / count).item(), abs=2e-4)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_head_is_in_the_tables_of_names(variant):
    for head in variant.heads:
        head_class = variant.model_class(head)
        assert head_class.__name__ in head_class.class_names.values()
        assert head_class.task == f"For{head}"
    if variant.causal:
        assert variant.model_class("CausalLM").__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        assert variant.model_class("CausalLM")._supports_default_dynamic_cache()


# options -------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "options",
    [{"train_sampling_strategy": "group_by_length"}, {"gradient_checkpointing": True}],
    ids=lambda options: next(iter(options)),
)
def test_options_change_no_step(slug, head, options, tmp_path):
    problem = "single_label_classification" if head == "SequenceClassification" else ""
    compare_with_a_loop(small(slug, head, problem), tmp_path, **options)


@both
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(slug, head, tmp_path):
    problem = "single_label_classification" if head == "SequenceClassification" else ""
    first = small(slug, head, problem)
    rows = Rows(batch_of(first, 8))
    second, third = deepcopy(first), deepcopy(first)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer_of(first, rows, tmp_path / "whole", **options).train()
    trainer_of(second, rows, tmp_path / "parts", **options).train()
    trainer_of(third, rows, tmp_path / "parts", **options).train(str(tmp_path / "parts" / "checkpoint-2"))
    for a, b in zip(first.state_dict().values(), third.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


@both
def test_the_best_model_is_loaded_at_the_end(slug, head, tmp_path):
    problem = "single_label_classification" if head == "SequenceClassification" else ""
    model = small(slug, head, problem)
    batch = batch_of(model, 4)
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"learning_rate": 30.0, "load_best_model_at_end": True}  # the loss rises
    trainer = trainer_of(model, Rows(batch), tmp_path, evaluated=Rows(batch_of(model, 4)), **options)
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert trainer.state.best_metric == min(losses)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("slug", "head"), [("local", "SequenceClassification"), ("linear", "CausalLM")])
def test_a_compiled_model_takes_the_same_steps(slug, head, tmp_path):
    problem = "single_label_classification" if head == "SequenceClassification" else ""
    compare_with_a_loop(small(slug, head, problem), tmp_path, torch_compile=True)


@pytest.mark.slow
@pytest.mark.parametrize(("head", "problem"), KINDS)
def test_two_processes_take_the_steps_of_one(head, problem, tmp_path):
    """Two batches of two in each process against one of four, by this file as a script."""
    folders = []
    for processes in (1, 2):
        folders.append(tmp_path / str(processes))
        command = [sys.executable]
        if processes > 1:
            command += LAUNCHER
        command += [__file__, head, problem, str(4 // processes), str(folders[-1])]
        environment = {**with_helpers(), "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(folder / "weights.pt") for folder in folders)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


def main(head: str, problem: str, size: str, folder: str) -> None:
    torch.manual_seed(0)
    model = small("local", head, problem)
    options = {"per_device_train_batch_size": int(size), "train_sampling_strategy": "sequential", "max_steps": 2}
    trainer = trainer_of(model, Rows(batch_of(model, 8)), folder, **options)
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save(model.state_dict(), Path(folder) / "weights.pt")
    # Trainer leaves the process group open. Its destructor waits for a thread that waits for the interpreter's lock, or
    # aborts if the interpreter is gone: exit without destructors
    trainer.accelerator.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
