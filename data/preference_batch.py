"""From preference groups to the tensors of one forward of a preference loss."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from data.preferences import PreferenceGroup
from model.packing import Rows, make_rows
from model.ref_cache import row_key
from runtime.devices import send

RefLogprobs = Callable[[list[dict], Rows], Tensor]  # (encoded rows, the same as tensors) -> (b,) nats


class Batch(NamedTuple):
    """The preference groups of one forward: b rows. The rows of a group are consecutive, best first."""

    rows: Rows
    group_ids: Tensor  # (b,) the number of the row's group
    ranks: Tensor  # (b,) lower is better
    is_chosen: Tensor  # tied with the best of its group, or rated good
    chosen_rows: Tensor  # (g,) indices of the chosen rows
    margins: Tensor  # the margin of the better side; 0 if the data have no margin
    ref_logprobs: Tensor  # (b,) nats
    mismatched: Rows | None  # KTO: each row's prompt with another prompt's completion
    mismatched_ref_logprobs: Tensor | None
    where: list[str]  # FILE:LINE of each row
    num_tokens: int  # real tokens of all rows
    num_targets: int  # completion tokens of the chosen rows


def collate(
    groups: list[PreferenceGroup], reference: RefLogprobs, kl_rows: dict[bytes, dict], pad_id: int, device
) -> Batch:
    """The groups as tensors, with the reference's log-probs of their rows. kl_rows: from `mismatched`, or empty."""
    examples = [row for group in groups for row in group.rows]
    counts = torch.tensor([len(group.rows) for group in groups])
    is_chosen = [e.is_good if e.reward is not None else r == e.ranks[0] for e in groups for r in e.ranks]
    rows = make_rows(examples, pad_id).to(device)
    others = [kl_rows[row_key(row)] for row in examples] if kl_rows else []
    mismatched = make_rows(others, pad_id).to(device) if kl_rows else None
    return Batch(
        rows=rows,
        group_ids=send(torch.repeat_interleave(counts), device),
        ranks=send(torch.tensor([rank for group in groups for rank in group.ranks]), device),
        is_chosen=send(torch.tensor(is_chosen), device),
        chosen_rows=send(torch.tensor(is_chosen).nonzero().flatten(), device),
        margins=send(torch.tensor([group.margin for group in groups]), device),
        ref_logprobs=reference(examples, rows),
        mismatched=mismatched,
        mismatched_ref_logprobs=reference(others, mismatched) if kl_rows else None,
        where=[group.where for group in groups for _ in group.rows],
        num_tokens=sum(len(row["input_ids"]) for row in examples),
        num_targets=sum(
            int(sum(row["completion_mask"])) for row, is_good in zip(examples, is_chosen, strict=True) if is_good
        ),
    )


def mismatched(groups: Sequence[PreferenceGroup], *, max_length: int) -> dict[bytes, dict]:
    """row_key -> a mismatched row for KTO's reference point: the row's prompt with a completion of another prompt.

    As in Ethayarajh et al. 2024 the completions come from the same data. Each one is used once, so the shares of good
    and bad ones are those of the data.

    The rows are arranged in a ring, sorted by prompt. A row gets the completion that is n places ahead, where n is the
    number of rows of the largest prompt. If that prompt has more than half of all rows, its rows go round the others.
    The pairs are made once for the whole set, so they do not depend on batches and the reference's log-probs can be
    cached. Rows are cut at `max_length`. Raises ValueError where there is only one prompt.
    """
    by_prompt: dict[tuple[int, ...], list[dict]] = {}
    for row in (row for group in groups for row in group.rows):
        by_prompt.setdefault(tuple(prompt_ids(row)), []).append(row)
    if len(by_prompt) == 1:
        raise ValueError(
            "loss=kto pairs prompts with other prompts' completions, but all rows have the same prompt; add rows "
            "with other prompts"
        )
    ring = [row for prompt_rows in by_prompt.values() for row in prompt_rows]
    largest = max(map(len, by_prompt.values()), default=0)
    kl_rows, end = {}, 0
    for prompt, prompt_rows in by_prompt.items():
        end += len(prompt_rows)  # end of this prompt in the ring
        for place, row in enumerate(prompt_rows):
            other = ring[(end + (place + largest - len(prompt_rows)) % (len(ring) - len(prompt_rows))) % len(ring)]
            completion = other["input_ids"][len(prompt_ids(other)) :].tolist()[: max_length - len(prompt)]
            mask = [False] * len(prompt) + [True] * len(completion)
            kl_rows[row_key(row)] = {"input_ids": [*prompt, *completion], "completion_mask": mask}
    return kl_rows


def prompt_ids(row: dict) -> list[int]:
    """The row's ids before its completion."""
    return row["input_ids"][: int(row["completion_mask"].argmax())].tolist()


def all_rows(groups: Iterable[PreferenceGroup], kl_rows: dict[bytes, dict]) -> Iterator[dict]:
    """Yield every row whose reference log-prob is needed for training on these groups."""
    for row in (row for group in groups for row in group.rows):
        yield row
        if kl_rows:
            yield kl_rows[row_key(row)]
