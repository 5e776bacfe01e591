"""The result of a conversion: the model, and a report of what became of every weight."""

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..folders import load_as_float32


@dataclass
class Report:
    """What became of every weight. Names are those of the two state dicts.

    copied: name here -> name in the source. created: name here -> how. left: name in the source -> why.
    notes: whatever else differs from the source.
    """

    source: str
    source_type: str
    variant: str
    head: str | None
    copied: dict[str, str] = field(default_factory=dict)
    created: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.source} ({self.source_type}) -> et_{self.variant}, {self.head or 'no head'}"]
        lines.append(f"copied: {len(self.copied)} tensors")
        for title, entries in (("created", self.created), ("left", self.left)):
            lines.append(f"{title}: {len(entries)} tensors" if entries else f"{title}: nothing")
            groups = Counter((re.sub(r"\.\d+\.", ".N.", name), why) for name, why in entries.items())
            lines += [
                f"  {name}{f' ({count} layers)' if count > 1 else ''}: {why}" for (name, why), count in groups.items()
            ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


@dataclass
class Conversion:
    """A converted model in eval mode, what became of the weights, and the source's tokenizer if it has one."""

    model: PreTrainedModel
    report: Report
    tokenizer: Any = None

    def save(self, folder: str | Path) -> None:
        """Write config, code, safetensors, tokenizer and the report (`conversion.json`).

        Weights keep the source's precision on the disk and load as float32, to be trained further.
        """
        self.model.save_pretrained(folder)
        load_as_float32(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        (Path(folder) / "conversion.json").write_text(self.report.to_json(), encoding="utf-8")
