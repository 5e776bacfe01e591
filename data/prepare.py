"""Build the bundled corpus and its tokenizer: `python data/prepare.py sotu.jsonl.gz`.

SOURCE has one JSON object per line with `year`, `name`, `party` and `text`. Writes
`sotu/{train,validation,test}.parquet` and `tokenizer/` next to this file. The output is reproducible byte for byte.
"""

import argparse
import gzip
import json
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.model_selection import train_test_split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
FIRST_YEAR = 1790
LAST_YEARS = (1829, 1869, 1912, 1945, 1980, 2021)  # last years of eras of similar size (32 to 43 addresses)
SPLIT_SEED = 0
HELD_OUT = 0.15  # share of the validation split, and of the test split
VOCAB_SIZE = 4096
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

Address = dict[str, str | int]


def era_of(year: int) -> str:
    """Name of the era of `year`, e.g. `1790–1829`; names sort chronologically."""
    first = FIRST_YEAR
    for last in LAST_YEARS:
        if first <= year <= last:
            return f"{first}\N{EN DASH}{last}"
        first = last + 1
    raise ValueError(f"year ({year}) must lie between {FIRST_YEAR} and {LAST_YEARS[-1]}: add an era to LAST_YEARS.")


def read_source(path: Path) -> list[Address]:
    """The addresses in chronological order, each with its era."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        addresses: list[Address] = [json.loads(line) for line in lines]
    addresses.sort(key=lambda address: (address["year"], address["name"]))
    return [{**address, "era": era_of(int(address["year"]))} for address in addresses]


def split_addresses(addresses: list[Address]) -> dict[str, list[Address]]:
    """Split the addresses of every era about 70 / 15 / 15 %; no address is divided between splits."""
    eras = [address["era"] for address in addresses]
    train, rest = train_test_split(addresses, test_size=2 * HELD_OUT, stratify=eras, random_state=SPLIT_SEED)
    rest_eras = [address["era"] for address in rest]
    validation, test = train_test_split(rest, test_size=0.5, stratify=rest_eras, random_state=SPLIT_SEED)
    splits = {"train": train, "validation": validation, "test": test}
    return {name: sorted(rows, key=lambda address: (address["year"], address["name"])) for name, rows in splits.items()}


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: no text is out of vocabulary, and decoding restores the text byte for byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", cls), ("[SEP]", sep)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        bos_token="[CLS]",  # causal models begin and end a document with the same two tokens
        eos_token="[SEP]",
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def write_split(rows: list[Address], path: Path) -> None:
    text_columns = [(name, pa.string()) for name in ("name", "party", "text", "era")]
    schema = pa.schema([("year", pa.int32()), *text_columns])
    pq.write_table(pa.Table.from_pylist(rows, schema), path, compression="zstd", compression_level=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the addresses, .jsonl.gz")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: beside this file)")
    arguments = parser.parse_args()

    splits = split_addresses(read_source(arguments.source))
    (arguments.out / "sotu").mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        path = arguments.out / "sotu" / f"{name}.parquet"
        write_split(rows, path)
        print(f"{name}: {len(rows)} addresses, {path.stat().st_size:,} bytes")

    # the tokenizer is trained on the training split only, so that held-out addresses do not leak into it
    tokenizer = train_tokenizer(str(row["text"]) for row in splits["train"])
    tokenizer.save_pretrained(arguments.out / "tokenizer")
    print(f"tokenizer: {len(tokenizer):,} tokens")


if __name__ == "__main__":
    main()
