"""Rollout prompts: what the policy is asked, and the columns that a reward function may want."""

from collections.abc import Sequence

from data import formats
from data.adapters import Layout
from data.chat import encode_prompt
from data.encoded import Encoded, encode_files, make_loader
from data.loader import Loader

WHOLE = 1 << 30  # tokens: a rollout prompt is never cut


def prompt_loader(
    data, tokenizer, *, max_length: int, batch_size: int, seed: int, rank: int, world_size: int
) -> Loader:
    """Endless batches of this rank's prompts from `data.prompts`; see `encode_prompts`."""
    encoded = encode_prompts("data.prompts", data.prompts, data, tokenizer, max_length=max_length)
    mixture = {"weights": data.weights, "proportions": data.proportions, "shuffle": data.shuffle}
    return make_loader(encoded, **mixture, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)


def encode_prompts(name: str, files: Sequence[str], data, tokenizer, *, max_length: int) -> Encoded:
    """Prompts of `files` as {"input_ids", "messages", "columns", ...}; ids end with the assistant's header.

    `columns` are the record's further fields, for reward functions; `where` is its FILE:LINE. A prompt of more than
    `max_length` tokens (the window less the tokens to sample) is a bad row: cut, it would ask something else.
    """

    def encode(record) -> list[dict]:
        ids = encode_prompt(record.prompt, tokenizer, max_length=WHOLE, tools=record.tools)
        if len(ids) > max_length:
            raise ValueError(
                f"the prompt takes {len(ids)} tokens, but the window leaves {max_length} for it; lower "
                "sampling.max_new_tokens, or leave such rows out with data.on_bad_row=skip"
            )
        mask = [False] * len(ids)
        row = {"input_ids": ids, "completion_mask": mask, "num_cut": 0}
        return [row | {"messages": record.prompt, "columns": record.columns, "where": record.where}]

    return encode_files(name, files, formats.prompts, encode, on_bad_row=data.on_bad_row, layout=Layout.of(data))
