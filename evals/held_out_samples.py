"""Samples of a policy on held-out prompts, with their KL to the reference and their reward-model scores."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from omegaconf import DictConfig
from torch import Tensor

from data.chat import cut_prompt
from data.preferences import PreferenceGroup
from data.tokenizer import Tokenizer
from evals.watched import Watched
from model.heads import Policy, RewardModel
from model.packing import Rows, make_rows
from model.sampling import generate
from runtime.distributed import gathered
from runtime.run import Run


@dataclass(frozen=True)
class HeldOutPrompt:
    """A prompt that is answered at each call."""

    ids: list[int]  # they end with the assistant's header
    seed: int
    item: dict | None = None  # of data.prompts, with the columns that rewards read; None for a prompt of comparisons
    reference: dict | None = None  # row of the data's completion, for a prompt of comparisons


@dataclass
class HeldOutSamples:
    """Samples completions of the same prompts with the same seeds at each call, so that only the policy changes.

    It adds to the metrics of the step:
        objective/kl          nats per sequence: KL(policy || reference) over the vocabulary, summed along each sample
        objective/score       the reward model's score of the samples
        eval/win_rate         share of samples that score higher than the data's completion, where a tie counts half
        eval/win_rate_before  the same against the reference's sample
        eval/watch/NAME       mean of the reward NAME in `watch` over the samples
    """

    run: Run
    tokenizer: Tokenizer
    prompts: list[HeldOutPrompt]  # of this rank
    load_reference: Callable[[Policy], Policy]  # the reference of a policy
    reward_model: RewardModel | None
    watched: Watched
    sampling: DictConfig
    micro_batch_size: int
    num_samples: int  # that are logged as texts
    scores_before: Tensor | None = None  # of the reference's samples

    @torch.no_grad()
    def __call__(self, policy: Policy, step: int) -> None:
        ref_policy = self.load_reference(policy)
        with gathered(*filter(None, (policy, ref_policy, self.reward_model))):
            if self.prompts:  # with more ranks than prompts, some ranks have none
                self.measure(policy, ref_policy, step)

    def measure(self, policy: Policy, ref_policy: Policy, step: int) -> None:
        """Sample completions of this rank's prompts, add their metrics, and log the first ones."""
        samples = self.sample_completions(policy)
        kl = torch.cat([policy.exact_kl(ref_policy, *part).sum(1) for part in self.parts(samples.rows)])  # (B,)
        metrics = {"objective/kl": kl, "objective/length": samples.rows.completion_mask.sum(1)}
        scores = None
        if self.reward_model is not None:
            scores = self.score(samples.rows)
            if self.scores_before is None:
                self.scores_before = self.score(self.sample_completions(ref_policy).rows)
            metrics |= {"objective/score": scores, "eval/win_rate_before": wins(scores, self.scores_before)}
            if references := [prompt.reference for prompt in self.prompts if prompt.reference is not None]:
                of_data = self.score(make_rows(references, self.tokenizer.pad_id).to(self.run.device))
                metrics |= {"eval/win_rate": wins(scores, of_data)}
        texts = [
            self.tokenizer.decode(ids[mask].tolist())
            for ids, mask in zip(samples.rows.input_ids, samples.rows.completion_mask, strict=True)
        ]
        items = [prompt.item for prompt in self.prompts if prompt.item is not None]
        self.run.metrics.add(metrics | self.watched.figures(items, texts))
        self.run.log_samples(self.sample_rows(samples, texts, kl, scores), step)

    def sample_completions(self, policy: Policy):
        """One completion of every prompt."""
        return generate(
            policy,
            [prompt.ids for prompt in self.prompts],
            **self.sampling,
            stop_ids=self.tokenizer.stop_ids,
            seeds=[prompt.seed for prompt in self.prompts],
            pad_id=self.tokenizer.pad_id,
        )

    def score(self, rows: Rows) -> Tensor:
        """(B,) scores of the reward model."""
        return torch.cat([self.reward_model.score(*part) for part in self.parts(rows)])

    def parts(self, rows: Rows) -> list[Rows]:
        """The batch in parts of one forward each."""
        indices = torch.arange(len(rows.input_ids), device=rows.input_ids.device)
        return [rows.select(part) for part in indices.split(2 * self.micro_batch_size)]

    def sample_rows(self, samples, texts: list[str], kl: Tensor, scores: Tensor | None) -> list[dict]:
        """Rows of samples.jsonl: the first samples as texts, with the completion in the data."""
        rows = []
        for i, prompt in enumerate(self.prompts[: self.num_samples]):
            sample = {
                "prompt": self.tokenizer.decode(prompt.ids, specials=True),
                "completion": texts[i],
                "finish_reason": samples.finish_reasons[i],
                "kl": round(kl[i].item(), 3),
            }
            if prompt.item is not None:
                sample["columns"] = prompt.item["columns"]  # the record's further fields, for a reward that reads them
            if prompt.reference is not None:
                ids = prompt.reference["input_ids"][prompt.reference["completion_mask"]]
                sample["reference"] = self.tokenizer.decode(ids)
            if scores is not None:
                sample["score"] = round(scores[i].item(), 3)
            rows.append(sample)
        return rows


def prompts_of_items(items: Sequence[dict], *, seed: int) -> list[HeldOutPrompt]:
    """The prompts of `data.prompts`, encoded (data/prompts.py)."""
    return [HeldOutPrompt(list(item["input_ids"]), seed + number, item=item) for number, item in enumerate(items)]


def prompts_of_groups(
    groups: Iterable[PreferenceGroup], tokenizer: Tokenizer, *, num_prompts: int, max_length: int, seed: int
) -> list[HeldOutPrompt]:
    """The first prompts of comparisons, cut at `max_length` tokens, with their completions in the data."""
    asked = enumerate(islice(each_prompt(groups), num_prompts))
    return [
        HeldOutPrompt(cut_prompt(list(ids), tokenizer, max_length=max_length), seed + number, reference=row)
        for number, (ids, row) in asked
    ]


def each_prompt(groups: Iterable[PreferenceGroup]) -> Iterator[tuple[tuple[int, ...], dict]]:
    """Yield each prompt once, in file order, with its first completion that is not rated bad."""
    seen = set()
    for group in groups:
        prompt = prompt_of(group)
        if prompt not in seen and (group.reward is None or group.is_good):
            seen.add(prompt)
            yield prompt, group.rows[0]


def prompt_of(group: PreferenceGroup) -> tuple[int, ...]:
    """The ids of the prompt, including the assistant's header."""
    row = group.rows[0]
    return tuple(row["input_ids"][: int(row["completion_mask"].argmax())].tolist())


def wins(scores: Tensor, others: Tensor) -> Tensor:
    """(B,) 1 where the score is higher, 0.5 where equal, 0 where lower."""
    return (scores > others).float() + 0.5 * (scores == others).float()
