"""Elements -> the tensors of one forward of a preference loss."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from data.preferences import Element
from model.packing import Rows, make_rows
from model.ref_cache import row_key
from runtime.devices import send

Reference = Callable[[list[dict], Rows], Tensor]  # encoded rows, and the same as tensors -> (b,) nats


class Batch(NamedTuple):
    """Elements of a forward: b rows, those of an element one after the other, best first."""

    rows: Rows
    elements: Tensor  # (b,) which element
    ranks: Tensor  # (b,) lower is better
    good: Tensor  # (b,) bool: as good as the best of its element, or rated good
    good_rows: Tensor  # (g,) which rows are
    margins: Tensor  # (e,) how much better the better side is, as far as the data tell
    ref_logprobs: Tensor  # (b,) nats
    mismatched: Rows | None  # KTO: each row's prompt with another prompt's completion
    mismatched_ref_logprobs: Tensor | None
    where: list[str]  # FILE:LINE of each row
    num_tokens: int  # real ones of all rows
    num_targets: int  # completion tokens of the good rows


def collate(elements: list[Element], reference: Reference, partners: dict[bytes, dict], pad_id: int, device) -> Batch:
    """The elements as tensors, with what the reference thinks of their rows. `partners`: see `mismatched`, or empty."""
    examples = [row for element in elements for row in element.rows]
    counts = torch.tensor([len(element.rows) for element in elements])
    good = [e.is_good if e.reward is not None else r == e.ranks[0] for e in elements for r in e.ranks]
    rows = make_rows(examples, pad_id).to(device)
    others = [partners[row_key(row)] for row in examples] if partners else []
    mismatched = make_rows(others, pad_id).to(device) if partners else None
    return Batch(
        rows=rows,
        elements=send(torch.repeat_interleave(counts), device),
        ranks=send(torch.tensor([rank for element in elements for rank in element.ranks]), device),
        good=send(torch.tensor(good), device),
        good_rows=send(torch.tensor(good).nonzero().flatten(), device),
        margins=send(torch.tensor([element.margin for element in elements]), device),
        ref_logprobs=reference(examples, rows),
        mismatched=mismatched,
        mismatched_ref_logprobs=reference(others, mismatched) if partners else None,
        where=[element.where for element in elements for _ in element.rows],
        num_tokens=sum(len(row["input_ids"]) for row in examples),
        num_targets=sum(
            int(sum(row["completion_mask"])) for row, is_good in zip(examples, good, strict=True) if is_good
        ),
    )


def mismatched(elements: list[Element], *, max_length: int) -> dict[bytes, dict]:
    """KTO's reference point: each row's prompt with a completion of another prompt, as Ethayarajh et al. 2024 take it
    from the same data: every completion is taken once, so good and bad ones come as often as the data have them.

    Rows are sorted by prompt in a ring, and a row takes the completion that lies as many places ahead as the largest
    prompt has rows; where that prompt has more than half of all, its rows go round the others. Paired once for the
    whole set, by row_key: no batch matters, and the reference's part can be cached. Cut at `max_length` like every row.
    Raises ValueError where there is only one prompt.
    """
    groups: dict[tuple[int, ...], list[dict]] = {}
    for row in (row for element in elements for row in element.rows):
        groups.setdefault(tuple(prompt_ids(row)), []).append(row)
    if len(groups) == 1:
        raise ValueError("loss=kto sets prompts beside other prompts' completions, but all rows have the same prompt")
    ring, largest = [row for group in groups.values() for row in group], max(map(len, groups.values()), default=0)
    partners, end = {}, 0
    for prompt, group in groups.items():
        end += len(group)  # of the group in the ring: the others begin here
        for place, row in enumerate(group):
            other = ring[(end + (place + largest - len(group)) % (len(ring) - len(group))) % len(ring)]
            completion = other["input_ids"][len(prompt_ids(other)) :].tolist()[: max_length - len(prompt)]
            mask = [False] * len(prompt) + [True] * len(completion)
            partners[row_key(row)] = {"input_ids": [*prompt, *completion], "completion_mask": mask}
    return partners


def prompt_ids(row: dict) -> list[int]:
    """The row's ids before its completion."""
    return row["input_ids"][: int(row["completion_mask"].argmax())].tolist()


def all_rows(elements: Iterable[Element], partners: dict[bytes, dict]) -> Iterator[dict]:
    """Every row whose reference log-prob training on these elements will ask for."""
    for row in (row for element in elements for row in element.rows):
        yield row
        if partners:
            yield partners[row_key(row)]
