"""Packing: a (B, T) batch as one stream of N real tokens, without padding and with shared prompts stored once.

The shift by one between a token and the position that predicts it happens only here.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from model.attention import Blocks
from runtime.devices import send

# The matmuls of one token in a layer cost as much as this many query-key pairs (~5 x hidden size at widths 576-1024).
PAIRS_PER_TOKEN = 4096


class Rows(NamedTuple):
    """A batch, as scripts, losses and metrics use it. Masks are bool. True means that the token counts."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) bool, real tokens
    completion_mask: Tensor  # (B, T) bool, tokens that the model sampled or must learn
    stream: "Stream | None" = None  # the packed batch, if the host packed it already

    def select(self, rows) -> "Rows":
        """The rows at `rows` (indices, slice or mask). All columns stay, so that other (B, T) tensors still match."""
        return Rows(*(x[rows] for x in self[:3]))

    def to(self, device) -> "Rows":
        """The rows on `device`, packed. Rows on the host are packed on the host, which avoids a synchronisation."""
        return Rows(*(send(x, device) for x in self[:3]))._replace(stream=pack(*self).to(device))


class Stream(NamedTuple):
    """N real tokens as a sequence of blocks `[prompt | answer 1 | answer 2 ...]`."""

    tokens: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64, from 0 in each row; an answer's positions continue its prompt's
    blocks: Blocks  # which token attends to which
    predicts: Tensor  # (M,) int64, stream index of the token before each target
    targets: Tensor  # (M,) int64, the completion tokens of the batch, row-major
    last: Tensor  # (B,) int64, stream index of each row's last real token

    def to(self, device) -> "Stream":
        return Stream(*(x.to(device) if isinstance(x, Blocks) else send(x, device) for x in self))


def make_rows(examples: list[dict], pad_id: int) -> Rows:
    """Right-padded Rows from [{"input_ids": list[int], "completion_mask": list[bool]}]. Raises ValueError if empty."""
    if not examples:
        raise ValueError("make_rows got no examples; a batch needs at least one row")
    width = max(len(example["input_ids"]) for example in examples)
    input_ids = torch.full((len(examples), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(len(examples), width, dtype=torch.bool)
    completion_mask = torch.zeros(len(examples), width, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids, mask = example["input_ids"], example["completion_mask"]
        if len(ids) != len(mask):
            raise ValueError(f"row {row}: {len(ids)} input_ids but {len(mask)} completion_mask entries")
        input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        attention_mask[row, : len(ids)] = True
        completion_mask[row, : len(mask)] = torch.tensor(mask, dtype=torch.bool)
    return Rows(input_ids, attention_mask, completion_mask)


def pack(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, stream: Stream | None = None) -> Stream:
    """The batch as one stream. Padding may be anywhere. Consecutive rows with equal prompts share one copy of it.

    A row's prompt is all tokens before its first completion token. A given `stream` is returned as it is. Packing runs
    on the host, so rows on a device are copied first. Raises ValueError where the masks are inconsistent.
    """
    if stream is not None:
        return stream
    device = input_ids.device
    ids, real, completion = input_ids.cpu(), attention_mask.cpu(), completion_mask.cpu()
    check_masks(ids, real, completion)
    order = real.cumsum(1) - 1  # (B, T) index of a token within its row
    lengths = real.sum(1)  # (B,)
    first = order.gather(1, completion.int().argmax(1, keepdim=True)).squeeze(1)  # (B,)
    prompts = torch.where(completion.any(1), first, lengths)  # (B,) tokens before the first completion token
    layout = lay_out([row[mask] for row, mask in zip(ids, real, strict=True)], prompts.tolist())

    base, offset = torch.tensor(layout.bases)[:, None], torch.tensor(layout.offsets)[:, None]  # (B, 1)
    index = torch.where(order < prompts[:, None], base + order, offset + order)  # (B, T) stream index of a token
    before = torch.where(order <= prompts[:, None], base, offset) + order - 1  # (B, T) stream index of the one before
    tokens, positions, answers = (torch.empty(layout.size, dtype=torch.int64) for _ in range(3))
    tokens[index[real]] = ids[real]  # each row of a block writes the shared prompt, with the same values
    positions[index[real]] = order[real]
    answer = torch.where(order < prompts[:, None], 0, torch.tensor(layout.answers)[:, None])
    answers[index[real]] = answer[real]
    last = index[:, -1]  # (B,) a padding column repeats the index of the real token before it
    sizes = torch.tensor([cut[-1] - cut[0] for cut in layout.cuts])
    numbers = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    blocks = Blocks(layout.cuts, numbers, answers, positions, lengths.max().item())
    return Stream(tokens, positions, blocks, before[completion], ids[completion], last).to(device)


class Layout(NamedTuple):
    """The places of a batch's rows in the stream."""

    cuts: list[list[int]]  # per block: the start of its prompt, the end of its prompt, the end of each answer
    bases: list[int]  # per row, the start of its prompt
    offsets: list[int]  # per row, the start of its answer minus the length of its prompt
    answers: list[int]  # per row, the number of its answer in the block, from 1
    size: int  # N


def lay_out(rows: list[Tensor], prompts: list[int]) -> Layout:
    """Put each row's answer behind the block's prompt. A row with a different prompt starts a new block."""
    cuts, bases, offsets, start, end = [], [], [], 0, 0
    answers: list[int] = []
    for b, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        same = b > 0 and prompt == prompts[b - 1] and torch.equal(row[:prompt], rows[b - 1][:prompt])
        answer = len(row) - prompt
        # Sharing saves `prompt` tokens, but attention also computes masked pairs between the block's answers.
        if same and prompt * PAIRS_PER_TOKEN >= 2 * (end - start - prompt) * answer:
            answers.append(answers[-1] + 1)
        else:
            start, end = end, end + prompt
            cuts.append([start, end])
            answers.append(1)
        bases.append(start)
        offsets.append(end - prompt)
        end += answer
        cuts[-1].append(end)
    return Layout(cuts, bases, offsets, answers, end)


def check_masks(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> None:
    """Raise ValueError unless the three (B, T) tensors are consistent."""
    shapes = [tuple(x.shape) for x in (input_ids, attention_mask, completion_mask)]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2 or not shapes[0][0]:
        raise ValueError(f"want input_ids, attention_mask, completion_mask of one shape (B, T), got {shapes}")
    if attention_mask.dtype != torch.bool or completion_mask.dtype != torch.bool:
        got = f"{attention_mask.dtype} and {completion_mask.dtype}"
        raise ValueError(f"attention_mask and completion_mask must be bool, got {got}; write `mask.bool()` at the call")
    if not attention_mask.any(1).all():
        row = (~attention_mask.any(1)).nonzero()[0].item()
        raise ValueError(f"row {row} of the batch has no real token; drop empty rows before the batch is made")
    if (completion_mask & ~attention_mask).any():
        row = (completion_mask & ~attention_mask).any(1).nonzero()[0].item()
        raise ValueError(f"row {row}: completion_mask marks padding; it must lie within attention_mask")
    if (completion_mask & (attention_mask.cumsum(1) == 1)).any():
        row = (completion_mask & (attention_mask.cumsum(1) == 1)).any(1).nonzero()[0].item()
        raise ValueError(f"row {row}: its first token is marked as completion, but nothing before it predicts it")
