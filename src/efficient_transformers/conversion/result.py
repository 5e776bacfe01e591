"""The result of a conversion, and the folder that it is saved as."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..folders import load_as_float32
from .card import Origin, conversion_card
from .report import Report
from .sentences import SentenceModules


@dataclass
class Conversion:
    """A converted model in eval mode, the report, and the source's tokenizer if it has one.

    modules: those of a SentenceTransformer, None for other sources. origin: facts for the card.
    """

    model: PreTrainedModel
    report: Report
    tokenizer: Any = None
    modules: SentenceModules | None = None
    origin: Origin = field(default_factory=Origin)

    def save(self, folder: str | Path) -> None:
        """Write config, code, safetensors, tokenizer, card and the report (`conversion.json`).

        Weights keep the source's precision on the disk and load as float32, to be trained further. With `modules`,
        `SentenceTransformer(folder, trust_remote_code=True)` opens the folder.
        """
        self.model.save_pretrained(folder)
        load_as_float32(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        if self.modules is not None:
            self.modules.write(folder)
        facts = self.model, self.report, self.origin, self.modules is not None
        card = conversion_card(Path(folder).resolve().name, *facts)
        (Path(folder) / "README.md").write_text(str(card), encoding="utf-8")
        (Path(folder) / "conversion.json").write_text(self.report.to_json(), encoding="utf-8")
