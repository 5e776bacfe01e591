"""Trains a model that picks one of several choices, evaluates it on the test split and saves it ready for the Hub.

accelerate launch training/choose.py --config configs/next/local.yaml [key=value …] [--resume]
python training/choose.py --evaluate runs/next-local [max_length=512]
"""

from transformers import AutoModelForMultipleChoice, DataCollatorForMultipleChoice

from ..engine.command_line import command_line
from ..engine.task import LabelScorer, Source, Task
from .choosing import ChooseSettings, choice_rows, load_choices


class ChoiceScorer(LabelScorer):
    names = ("accuracy",)  # the number of the right choice is no class


class ChooseTask(Task[ChooseSettings]):
    script = "choose.py"
    settings_class = ChooseSettings
    auto_class = AutoModelForMultipleChoice
    task_type = "multiple-choice"
    unit = "examples"
    collate = DataCollatorForMultipleChoice
    scorer = ChoiceScorer
    purpose = "It reads a context with each of several choices and picks one."

    def load(self, settings: ChooseSettings) -> Source:
        return Source.of_texts(settings, load_choices, choice_rows)

    def limits(self, settings: ChooseSettings) -> list[str]:
        made = "It has learnt to tell what comes next in a text from what stands in other texts, by whatever shows it: "
        made += "topic, time and style as well as what is said."
        always = "It always picks one of the choices, also where none is right."
        return [made if settings.examples == "next" else always]


TASK = ChooseTask()
run, evaluate_folder = TASK.run, TASK.evaluate_folder


def main(arguments: list[str] | None = None) -> None:
    command_line(TASK.script, __doc__, TASK.settings_class, run, evaluate_folder, arguments)
