"""Demonstrations: files -> encoded conversations -> batches."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data import formats
from data.chat import encode_chat
from data.loader import Loader, num_tokens
from data.records import BadRows, Record, read_records

log = logging.getLogger(__name__)


@dataclass
class Encoded:
    """Encoded rows of several files, and what was lost on the way."""

    items: list[Any] = field(default_factory=list)
    file_sizes: list[int] = field(default_factory=list)
    num_cut: int = 0
    skipped: list[str] = field(default_factory=list)  # FILE:LINE: what is wrong

    def report(self, name: str) -> str:
        tokens = sum(map(num_tokens, self.items))
        return (
            f"{name}: {len(self.items):,} rows, {tokens:,} tokens, {self.num_cut:,} rows cut at data.max_length, "
            f"{len(self.skipped):,} skipped"
        )


def sft_loader(data, tokenizer, *, batch_size: int, seed: int, rank: int, world_size: int) -> Loader:
    """Endless batches of encoded conversations {"input_ids", "completion_mask"} from `data.train`.

    `data` is the config group: train, weights, max_length, shuffle, on_bad_row.
    """
    encoded = encode_files(data.train, tokenizer, max_length=data.max_length, on_bad_row=data.on_bad_row)
    return make_loader(encoded, data, "data.train", batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)


def eval_examples(data, tokenizer) -> list[dict]:
    """Every conversation of `data.eval`, encoded, in file order; none where there are no files."""
    encoded = encode_files(data.eval or [], tokenizer, max_length=data.max_length, on_bad_row=data.on_bad_row)
    return encoded.items


def encode_files(files: Sequence[str], tokenizer, *, max_length: int, on_bad_row: str) -> Encoded:
    """Reads and encodes demonstrations, all before the first step: what is wrong with a row is known then."""
    turns = []

    def encode(record, encoded: Encoded) -> dict:
        row = encode_chat(record.messages, tokenizer, max_length=max_length)
        turns.append(sum(m["role"] == "assistant" for m in record.messages))
        encoded.num_cut += row.pop("was_cut", False)
        return compact(row)

    encoded = encode_records(files, formats.examples, encode, on_bad_row)
    if turns and max(turns) == 1:
        log.warning("%s: single-turn conversations only; a model trained on them does not learn to go on", list(files))
    return encoded
