"""Update the pages that are generated from the table of variants: the README's table and the gallery.

    python -m efficient_transformers.pages [README.md] [docs]   # `make pages`

A test fails if the pages are out of date.
"""

import sys
from pathlib import Path

from .plots import gallery, paper_link
from .registry import VARIANTS, Variant

MARKS = ("<!-- begin:variants, by `make pages` -->", "<!-- end:variants -->")
HEADER = """| model type | family | a token attends to | paper | cost | causal |
|---|---|---|---|---|---|"""


def table_row(variant: Variant) -> str:
    causal = "yes" if variant.causal else "no"
    paper = paper_link(variant).replace("arXiv:", "")
    words = variant.attends_to.replace("|", "\\|")
    return f"| `{variant.model_type}` | {variant.family} | {words} | {paper} | {variant.cost} | {causal} |"


def variants_table() -> str:
    """The README's table, in Markdown."""
    return "\n".join([HEADER, *map(table_row, VARIANTS.values())])


def with_table(page: str) -> str:
    """`page` with the current table between its marks. Raises ValueError if the marks are missing."""
    before, begin, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise ValueError(f"the page must contain the marks {MARKS[0]!r} and {MARKS[1]!r}: the table goes between them.")
    return f"{before}{begin}\n{variants_table()}\n{end}{after}"


def main(readme: str = "README.md", docs: str = "docs") -> None:
    page = Path(readme)
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
    gallery(Path(docs))
    print(f"wrote the table in {page}, {Path(docs) / 'gallery.md'} and its pictures")


if __name__ == "__main__":
    main(*sys.argv[1:])
