"""Trains a model that tells whether two documents match, evaluates it on the test split and saves it.

accelerate launch training/match.py --config configs/president/local.yaml [key=value …] [--resume]
python training/match.py --evaluate runs/president-local [max_length=512]

Each document is encoded by itself, so that vectors of many can be kept: the head of LRA's retrieval task. In the output
folder the encoder is an ordinary checkpoint; `matching.DocumentMatcher.from_pretrained` opens it with its head.
"""

from transformers import AutoModel, DataCollatorForMultipleChoice, PreTrainedConfig

from ..engine.command_line import command_line
from ..engine.task import Source, Task
from .choose import ChoiceScorer
from .matching import DocumentMatcher, MatchSettings, build_matcher, load_pairs, pair_rows


class MatchTask(Task[MatchSettings]):
    script = "match.py"
    settings_class = MatchSettings
    auto_class = AutoModel
    task_type = "text-classification"
    unit = "pairs"
    collate = DataCollatorForMultipleChoice  # pads what has a second axis, here of two documents
    scorer = ChoiceScorer
    purpose = "It encodes two documents apart and tells whether they match."

    def load(self, settings: MatchSettings) -> Source:
        return Source.of_texts(settings, load_pairs, pair_rows)

    def build_model(self, settings: MatchSettings, config: PreTrainedConfig) -> DocumentMatcher:
        return build_matcher(settings, config, self.auto_class)

    def limits(self, settings: MatchSettings) -> list[str]:
        made = f"Its pairs have the same {settings.group_column!r} or not, in excerpts of texts that training has not "
        made += "seen, but of groups most of which it has. Time and topic tell many groups apart."
        return [
            "The head is in matching_head.safetensors and opens with the training scripts (training/matching.py); "
            "AutoModel opens the encoder alone.",
            *([made] if settings.examples == "same" else []),
        ]


TASK = MatchTask()
run, evaluate_folder = TASK.run, TASK.evaluate_folder


def main(arguments: list[str] | None = None) -> None:
    command_line(TASK.script, __doc__, TASK.settings_class, run, evaluate_folder, arguments)
