"""Demonstrations: files -> encoded conversations -> batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data import formats
from data.chat import encode_rows
from data.encoded import Encoded, encode_files, make_loader, training_texts, warn_of_overlap
from data.encoder import Encoder, Encoding
from data.loader import Loader
from data.records import Example
from data.tokenizer import Tokenizer
from runtime.config import check_whole


def sft_loader(data, tokenizer, *, batch_size: int, seed: int, rank: int, world_size: int) -> Loader:
    """Endless batches of this rank's conversations {"input_ids", "completion_mask"} from `data.train`.

    `data` is the config group of conf/data/sft.yaml.
    """
    encoded = encode_demonstrations("data.train", data.train, data, tokenizer)
    return make_loader(
        encoded, shuffle=data.shuffle, weights=data.weights, proportions=data.proportions,
        batch_size=batch_size, seed=seed, rank=rank, world_size=world_size,
    )  # fmt: skip


def eval_examples(data, tokenizer, train: Loader | None = None) -> Sequence[dict]:
    """Every conversation of `data.eval`, encoded, in file order. Empty if it names no file. Warns about overlap."""
    if not data.eval:
        return []
    encoded = encode_demonstrations("data.eval", data.eval, data, tokenizer)
    if train is not None:
        warn_of_overlap(train, encoded)
    return encoded.items


def encode_demonstrations(name: str, files: Sequence[str], data, tokenizer) -> Encoded:
    """Demonstrations of `files`, the value of the config key `name`. A conversation may be several items."""
    check_whole(1, data__max_length=data.max_length)
    return encode_files(name, files, data, Demonstrations(tokenizer, data.max_length))


@dataclass(frozen=True)
class Demonstrations(Encoder[Example]):
    """An item is one row: a conversation, or one of its answers with its context. It is cut at `max_length` tokens."""

    tokenizer: Tokenizer
    max_length: int

    def parse(self, row: dict) -> list[Example]:
        return formats.examples(row)

    def encode(self, record: Example) -> list[Encoding]:
        rows = encode_rows(record.messages, self.tokenizer, max_length=self.max_length, tools=record.tools)
        return [Encoding([row]) for row in rows]

    def item(self, rows: list[dict], note: dict, where: str) -> dict:
        return rows[0] | {"where": where}

    def settings(self) -> dict:
        return {"max_length": self.max_length}


def demonstration_texts(data) -> Iterator[str]:
    """Every message of `data.train`, to train a tokenizer on."""
    return training_texts(data, formats.examples)
