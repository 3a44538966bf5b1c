"""A reward model as a judge: the answer with the higher score wins. It reads one answer at a time."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig

from data.chat import encode_completion
from data.tokenizer import load_tokenizer
from evals.judge_items import check_fits
from model.build import open_weights
from model.reading import in_batches, read_reward_model
from runtime.devices import own_device


class RewardJudge:
    """Scores of a reward model that train_rm.py wrote.

    Args:
        settings: conf/judge/reward_model.yaml.
    Raises:
        ValueError: the path holds no reward model.
    """

    def __init__(self, settings: DictConfig):
        if open_weights(settings.path).kind != "reward":
            raise ValueError(f"judge.path={settings.path} holds no reward head; give the model/ folder of train_rm.py")
        self.settings, self.name = settings, f"reward_model:{Path(settings.path).absolute().parent.name}"
        self.tokenizer = load_tokenizer(settings.path)
        self.model = read_reward_model(settings.path, precision=settings.precision)

    def scores(self, conversations: Sequence[list[dict[str, str]]]) -> list[float]:
        """The score of each conversation, which ends with the assistant turn to be scored.

        Raises:
            ValueError: conversations are longer than the window. The message has their number; nothing is cut.
        """
        encode = partial(encode_completion, max_length=sys.maxsize, max_prompt_length=sys.maxsize)
        rows = [encode(messages[:-1], messages[-1]["content"], self.tokenizer) for messages in conversations]
        window = min(self.settings.max_length, self.model.config.max_length)
        lengths, names = [len(row["input_ids"]) for row in rows], [f"conversation {i}" for i in range(len(rows))]
        check_fits(names, lengths, window, "judge.max_length up to the model's window")
        settings = {"pad_id": self.tokenizer.pad_id, "batch_size": self.settings.batch_size, "device": own_device()}
        return in_batches(self.model.score, rows, **settings).tolist()

    def compare(self, items: Sequence, pair_verdict: Callable) -> list:
        """A verdict for every pair; `preference` is the Bradley-Terry probability that b is better."""
        first, second = (self.scores([conversation(item, side) for item in items]) for side in (0, 1))
        verdicts = []
        for item, a, b in zip(items, first, second, strict=True):
            winner = "tie" if abs(a - b) <= self.settings.tie_margin else "a" if a > b else "b"
            verdict = pair_verdict(item, self.name, f"scores {a:.4f} {b:.4f}", (winner, 1.0), None)
            preference = float(torch.sigmoid(torch.tensor(b - a)))
            verdicts.append(dataclasses.replace(verdict, preference=preference))
        return verdicts

    def grade(self, items: Sequence) -> list[float]:
        """The score of every single answer."""
        return self.scores([conversation(item, 0) for item in items])


def conversation(item, side: int) -> list[dict[str, str]]:
    """The item's turns with the answers of one model between them."""
    messages = []
    for question, answer in zip(item.asked, item.answers[side], strict=True):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages
