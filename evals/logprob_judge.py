"""A language model as a judge, by the probabilities of the two verdicts. Nothing is sampled.

As in AlpacaEval 2 (Dubois et al. 2024, arXiv:2404.04475), the preference for the second answer is
P("M") / (P("m") + P("M")). No verdict is unreadable. Both orders are asked.
"""

import sys
from collections.abc import Sequence

import torch
from omegaconf import DictConfig

from data.chat import encode_completions
from data.chat_template import TextMarkerSaid
from data.records import Verdict
from data.tokenizer import load_tokenizer
from evals.judge_items import Item, check_fits, choose_template, item_messages
from evals.prompts import check_identifiers, load_templates
from evals.top_logprobs import share_verdict
from model.reading import in_batches, read_policy
from runtime.devices import own_device

IDENTIFIERS = ["m", "M"]  # of the answer that is shown first, and of the second one


class LogprobJudge:
    """A policy as a judge, with a template whose verdict is one of two identifiers.

    Args:
        settings: conf/judge/logprobs.yaml.
    Raises:
        ValueError: the template's verdict is not one of two identifiers.
    """

    def __init__(self, settings: DictConfig):
        self.settings, self.name = settings, f"logprobs:{settings.path}"
        self.templates = load_templates(settings.template, "pairwise")
        check_identifiers(self.templates, settings.template, "logprobs")
        self.tokenizer = load_tokenizer(settings.path)
        self.policy = read_policy(settings.path, precision=settings.precision)
        self.window = min(settings.max_length, self.policy.config.max_length)

    def compare(self, items: Sequence[Item]) -> list[Verdict]:
        """A verdict for every pair in its order. `preference` is the probability that b is better.

        Raises:
            ValueError: prompts are longer than the window. The message has their number.
        """
        lengths = [len(self.encode(item)[0]["input_ids"]) for item in items]
        check_fits([item.name for item in items], lengths, self.window, "judge.max_length up to the model's window")
        verdicts = []
        for start in range(0, len(items), self.settings.batch_size):
            batch = items[start : start + self.settings.batch_size]
            verdicts += [self.verdict(item, share) for item, share in zip(batch, self.shares(batch), strict=True)]
        return verdicts

    def shares(self, items: Sequence[Item]) -> list[float]:
        """Per item, P(second identifier) / P(either) in the order shown. An identifier includes the stop token."""
        rows = [row for item in items for row in self.encode(item)]
        settings = {"pad_id": self.tokenizer.pad_id, "batch_size": len(rows), "device": own_device(), "together": 2}
        logprobs = in_batches(lambda *batch: self.policy.logprobs(*batch).sum(1), rows, **settings)
        first, second = logprobs.view(-1, 2).unbind(1)
        return torch.sigmoid(second - first).tolist()

    def encode(self, item: Item) -> list[dict]:
        """Two uncut rows: the judge's prompt with each of the identifiers as its answer."""
        messages = item_messages(item, choose_template(item, self.templates))
        try:
            return encode_completions(
                messages, IDENTIFIERS, self.tokenizer, max_length=sys.maxsize, max_prompt_length=sys.maxsize
            )
        except TextMarkerSaid as error:
            raise ValueError(f"{item.name}: {error}") from None

    def verdict(self, item: Item, share: float) -> Verdict:
        """The verdict from that share."""
        return share_verdict(item, self.name, share, f"P(M) {share:.4f}")
