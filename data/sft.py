"""Demonstrations: files -> encoded conversations -> batches."""

from collections.abc import Iterator, Sequence

from data import formats
from data.adapters import Layout
from data.chat import encode_rows
from data.encoded import Encoded, compact, encode_files, make_loader, training_texts, warn_of_overlap
from data.loader import Loader


def sft_loader(data, tokenizer, *, batch_size: int, seed: int, rank: int, world_size: int) -> Loader:
    """Endless batches of this rank's conversations {"input_ids", "completion_mask"} from `data.train`.

    `data` is the config group of conf/data/sft.yaml.
    """
    encoded = encode_demonstrations("data.train", data.train, data, tokenizer)
    mixture = {"weights": data.weights, "proportions": data.proportions, "shuffle": data.shuffle}
    return make_loader(encoded, **mixture, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)


def eval_examples(data, tokenizer, train: Loader | None = None) -> list[dict]:
    """Every conversation of `data.eval`, encoded, in file order; none where it names no file. Warns of overlap."""
    if not data.eval:
        return []
    encoded = encode_demonstrations("data.eval", data.eval, data, tokenizer)
    if train is not None:
        warn_of_overlap(train, encoded)
    return encoded.items


def encode_demonstrations(name: str, files: Sequence[str], data, tokenizer) -> Encoded:
    """Demonstrations of `files`, the value of the config key `name`; a conversation may be several rows."""

    def encode(record) -> list[dict]:
        rows = encode_rows(record.messages, tokenizer, max_length=data.max_length, tools=record.tools)
        return [compact(row) | {"where": record.where} for row in rows]

    return encode_files(name, files, formats.examples, encode, on_bad_row=data.on_bad_row, layout=Layout.of(data))


def demonstration_texts(data) -> Iterator[str]:
    """Every message of `data.train`, to train a tokenizer on."""
    return training_texts(data, formats.examples)
