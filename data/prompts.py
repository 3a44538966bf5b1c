"""Rollout prompts, with the columns that reward functions may read."""

from collections.abc import Sequence
from dataclasses import dataclass

from data import formats
from data.chat import encode_prompt
from data.encoded import Encoded, encode_files, make_loader
from data.encoder import Encoder, Encoding
from data.loader import Loader
from data.records import Prompt
from data.tokenizer import Tokenizer

WHOLE = 1 << 30  # a limit in tokens that never cuts a rollout prompt


def prompt_loader(
    data, tokenizer, *, max_length: int, batch_size: int, seed: int, rank: int, world_size: int
) -> Loader:
    """Endless batches of this rank's prompts from `data.prompts`; see `encode_prompts`."""
    encoded = encode_prompts("data.prompts", data.prompts, data, tokenizer, max_length=max_length)
    return make_loader(
        encoded, shuffle=data.shuffle, weights=data.weights, proportions=data.proportions,
        batch_size=batch_size, seed=seed, rank=rank, world_size=world_size,
    )  # fmt: skip


def encode_prompts(name: str, files: Sequence[str], data, tokenizer, *, max_length: int) -> Encoded:
    """Prompts of `files` as {"input_ids", "messages", "columns", ...}; ids end with the assistant's header.

    `columns` are the record's further fields, for reward functions. `where` is its FILE:LINE. A prompt of more than
    `max_length` tokens (the window minus the tokens to sample) is a bad row, because a cut would change its meaning.
    """
    return encode_files(name, files, data, Prompts(tokenizer, max_length))


@dataclass(frozen=True)
class Prompts(Encoder[Prompt]):
    """A prompt is one row without a target. Its note has the inputs of reward functions."""

    tokenizer: Tokenizer
    max_length: int

    def parse(self, row: dict) -> list[Prompt]:
        return formats.prompts(row)

    def encode(self, record: Prompt) -> list[Encoding]:
        ids = encode_prompt(record.prompt, self.tokenizer, max_length=WHOLE, tools=record.tools)
        if len(ids) > self.max_length:
            raise ValueError(
                f"the prompt takes {len(ids)} tokens, but the window leaves {self.max_length} for it; lower "
                "sampling.max_new_tokens, or leave such rows out with data.on_bad_row=skip"
            )
        row = {"input_ids": ids, "completion_mask": [False] * len(ids), "num_cut": 0}
        return [Encoding([row], {"messages": record.prompt, "columns": record.columns})]

    def item(self, rows: list[dict], note: dict, where: str) -> dict:
        (row,) = rows
        return row | {"input_ids": row["input_ids"].tolist()} | note | {"where": where}

    def settings(self) -> dict:
        return {"max_length": self.max_length}
