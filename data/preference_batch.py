"""Elements -> the tensors of one forward of a preference loss."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from data.preferences import Element
from model.packing import Rows, make_rows
from model.ref_cache import row_key

Reference = Callable[[list[dict], Rows], Tensor]  # encoded rows, and the same as tensors -> (b,) nats


class Batch(NamedTuple):
    """Elements of a forward: b rows, those of an element one after the other, best first."""

    rows: Rows
    elements: Tensor  # (b,) which element
    ranks: Tensor  # (b,) lower is better
    good: Tensor  # (b,) bool: as good as the best of its element, or rated good
    margins: Tensor  # (e,) how much better the better side is, as far as the data tell
    ref_logprobs: Tensor  # (b,) nats
    mismatched: Rows | None  # KTO: each row's prompt with another prompt's completion
    mismatched_ref_logprobs: Tensor | None
    where: list[str]  # FILE:LINE of each row


def collate(elements: list[Element], reference: Reference, partners: dict[bytes, dict], pad_id: int, device) -> Batch:
    """The elements as tensors, with what the reference thinks of their rows. `partners`: see `mismatched`, or empty."""
    examples = [row for element in elements for row in element.rows]
    counts = torch.tensor([len(element.rows) for element in elements])
    good = [(e.reward >= 0.5) if e.reward is not None else r == e.ranks[0] for e in elements for r in e.ranks]
    rows = make_rows(examples, pad_id).to(device)
    others = [partners[row_key(row)] for row in examples] if partners else []
    mismatched = make_rows(others, pad_id).to(device) if partners else None
    return Batch(
        rows=rows,
        elements=torch.repeat_interleave(counts).to(device),
        ranks=torch.tensor([rank for element in elements for rank in element.ranks], device=device),
        good=torch.tensor(good, device=device),
        margins=torch.tensor([element.margin for element in elements], device=device),
        ref_logprobs=reference(examples, rows),
        mismatched=mismatched,
        mismatched_ref_logprobs=reference(others, mismatched) if partners else None,
        where=[element.where for element in elements for _ in element.rows],
    )


def mismatched(elements: list[Element], *, max_length: int) -> dict[bytes, dict]:
    """KTO's reference point: each row's prompt with the completion of the nearest row before it of another prompt.

    Paired once for the whole set, by row_key, so that it depends on no batch and the reference's part can be cached.
    Cut at `max_length` like every row.
    Raises ValueError where there is only one prompt.
    """
    rows = [row for element in elements for row in element.rows]
    starts = [int(row["completion_mask"].argmax()) for row in rows]
    prompts = [row["input_ids"][:start].tolist() for row, start in zip(rows, starts, strict=True)]
    if rows and all(prompt == prompts[0] for prompt in prompts):
        raise ValueError("loss=kto sets prompts beside other prompts' completions, but all rows have the same prompt")
    partners = {}
    for i, row in enumerate(rows):
        other = next(j for j in range(i - 1, i - len(rows), -1) if prompts[j] != prompts[i])  # from -1 on: the end
        completion = rows[other]["input_ids"][starts[other] :].tolist()[: max_length - len(prompts[i])]
        mask = [False] * len(prompts[i]) + [True] * len(completion)
        partners[row_key(row)] = {"input_ids": prompts[i] + completion, "completion_mask": mask}
    return partners


def all_rows(elements: list[Element], partners: dict[bytes, dict]) -> list[dict]:
    """Every row whose reference log-prob training will ask for."""
    return [row for element in elements for row in element.rows] + list(partners.values())
