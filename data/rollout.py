"""Rollouts: a policy answers a batch of prompts, and whoever reads the answers reads them a few rows at a time."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.heads import Policy
from model.packing import Rows
from model.sampling import generate
from runtime.seeds import seed_of


def sample(policy: Policy, batch: list[dict], tokenizer, sampling: dict, *, seeds: list[int]) -> tuple[Rows, Tensor]:
    """One completion per prompt of `batch`, and (B,) bool: which of them ended with a stop token.

    Args:
        batch: encoded prompts (`data/prompts.py`). sampling: the config group. seeds: what each row draws from.
    """
    answers = generate(
        policy,
        [list(map(int, prompt["input_ids"])) for prompt in batch],
        **sampling,
        stop_ids=tokenizer.stop_ids,
        seeds=seeds,
        pad_id=tokenizer.pad_id,
    )
    stopped = [reason == "stop" for reason in answers.finish_reasons]
    return answers.rows, torch.tensor(stopped, device=answers.rows.input_ids.device)


def row_seeds(seed: int, step: int, numbers: list[int]) -> list[int]:
    """What each row of a rollout draws from, by its number among the rows of all ranks."""
    return [seed_of(seed, "rollout", step, number) for number in numbers]


def value_states(rows: Rows, finished: Tensor, *, score_position: str, max_new_tokens: int) -> tuple[Rows, Rows]:
    """The rollout twice: its completion mask marks the actions, then the states that have a value.

    score_position=eos: the same. after_eos: the state after EOS has a value too, and receives the score, where the
    completion left room for a further token (Huang et al. 2024, arXiv:2403.17031, and TRL).
    """
    if score_position == "eos":
        return rows, rows
    rows = Rows(*(nn.functional.pad(x, (0, 1)) for x in rows))
    room = finished & (rows.completion_mask.sum(1) < max_new_tokens)
    columns = torch.arange(rows.input_ids.shape[1], device=room.device)
    after = (columns == rows.attention_mask.sum(1, keepdim=True)) & room[:, None]  # (B, T)
    return rows, Rows(rows.input_ids, rows.attention_mask | after, rows.completion_mask | after)


def in_parts(function: Callable, rows: Rows, size: int, **settings) -> Tensor | tuple[Tensor, ...]:
    """function(*rows, **settings), computed `size` rows at a time: one tensor, or a tuple where it returns several."""
    parts = torch.arange(len(rows.input_ids), device=rows.input_ids.device).split(size)
    outputs = [function(*rows.select(part), **settings) for part in parts]
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs)
    return tuple(torch.cat(column) for column in zip(*outputs, strict=True))
