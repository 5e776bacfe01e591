"""The report of a conversion: what became of every weight."""

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field


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
