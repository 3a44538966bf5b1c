"""Samples of a policy on held-out prompts, with their KL to the reference and their reward-model scores."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from omegaconf import DictConfig
from torch import Tensor

from data.chat import cut_prompt
from data.preferences import PreferenceGroup
from data.prompts import encode_prompts
from data.tokenizer import check_same_tokenizer
from evals.watched import Watched
from model.build import load_policy, load_reward_model
from model.heads import Policy
from model.lora import AdaptersOff
from model.packing import Rows, make_rows
from model.sampling import generate
from runtime.distributed import gathered
from runtime.run import Run


class HeldOutSamples:
    """Samples completions of the same prompts with the same seeds at each call, so that only the policy changes.

    It adds to the metrics of the step:
        objective/kl          nats per sequence: KL(policy || reference) over the vocabulary, summed along each sample
        objective/score       the reward model's score of the samples
        eval/win_rate         share of samples that score higher than the data's completion, where a tie counts half
        eval/win_rate_before  the same against the reference's sample
        eval/watch/NAME       mean of the reward NAME in `watch` over the samples
    """

    def __init__(self, cfg: DictConfig, run: Run, tokenizer, groups: Sequence[PreferenceGroup], window: int):
        self.cfg, self.run, self.tokenizer = cfg, run, tokenizer
        room = window - cfg.sampling.max_new_tokens
        if cfg.sample_every and room < 1:
            raise ValueError(
                f"sampling.max_new_tokens={cfg.sampling.max_new_tokens} leaves no tokens for a prompt in the window of "
                f"{window}; lower it, or set sample_every=0"
            )
        has_answers = bool(cfg.data.prompts and cfg.sample_every)
        self.watched = Watched(cfg.watch, run, seconds=cfg.reward_timeout, has_answers=has_answers)
        items: Sequence[dict] = []
        if cfg.data.prompts is None:
            asked: list[tuple[Sequence[int], dict | None]] = list(islice(each_prompt(groups), cfg.num_prompts))
        else:
            items = encode_prompts("data.prompts", cfg.data.prompts, cfg.data, tokenizer, max_length=room).items
            items = items[: cfg.num_prompts]
            asked = [(list(row["input_ids"]), None) for row in items]
        asked, self.items = asked[run.rank :: run.world_size], items[run.rank :: run.world_size]
        self.prompts = [cut_prompt(list(prompt), tokenizer, max_length=room) for prompt, _ in asked]
        self.references = [row for _, row in asked if row is not None]  # completions in the data that are not rated bad
        self.seeds = [cfg.seed + run.rank + i * run.world_size for i in range(len(asked))]
        self.reward_model = None
        if cfg.reward_model is not None:
            check_same_tokenizer(cfg.reward_model, tokenizer)
            reward_model = load_reward_model(cfg.reward_model, precision=cfg.precision, frozen=True)
            self.reward_model = run.shard(reward_model)
        self.scores_before: Tensor | None = None

    @torch.no_grad()
    def __call__(self, policy: Policy, step: int) -> None:
        cfg = self.cfg
        if cfg.lora.rank and cfg.ref_policy is None:
            ref_policy = AdaptersOff(policy)
        else:
            path = cfg.ref_policy or cfg.policy
            ref_policy = self.run.shard(load_policy(path, precision=cfg.precision, frozen=True))
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
            if self.references:
                of_data = self.score(make_rows(self.references, self.tokenizer.pad_id).to(self.run.device))
                metrics |= {"eval/win_rate": wins(scores, of_data)}
        texts = [
            self.tokenizer.decode(ids[mask].tolist())
            for ids, mask in zip(samples.rows.input_ids, samples.rows.completion_mask, strict=True)
        ]
        self.run.metrics.add(metrics | self.watched.figures(self.items, texts))
        self.run.log_samples(self.sample_rows(samples, texts, kl, scores), step)

    def sample_completions(self, policy: Policy):
        """One completion of every prompt."""
        return generate(
            policy,
            self.prompts,
            **self.cfg.sampling,
            stop_ids=self.tokenizer.stop_ids,
            seeds=self.seeds,
            pad_id=self.tokenizer.pad_id,
        )

    def score(self, rows: Rows) -> Tensor:
        """(B,) scores of the reward model."""
        return torch.cat([self.reward_model.score(*part) for part in self.parts(rows)])

    def parts(self, rows: Rows) -> list[Rows]:
        """The batch in parts of one forward each."""
        indices = torch.arange(len(rows.input_ids), device=rows.input_ids.device)
        return [rows.select(part) for part in indices.split(2 * self.cfg.micro_batch_size)]

    def sample_rows(self, samples, texts: list[str], kl: Tensor, scores: Tensor | None) -> list[dict]:
        """Rows of samples.jsonl: the first samples as texts, with the completion in the data."""
        rows = []
        for i in range(min(self.cfg.num_samples, len(self.prompts))):
            sample = {
                "prompt": self.tokenizer.decode(self.prompts[i], specials=True),
                "completion": texts[i],
                "finish_reason": samples.finish_reasons[i],
                "kl": round(kl[i].item(), 3),
            }
            if self.items:
                sample["columns"] = self.items[i][
                    "columns"
                ]  # the record's further fields, for a reward that reads them
            if self.references:
                reference = self.references[i]
                sample["reference"] = self.tokenizer.decode(reference["input_ids"][reference["completion_mask"]])
            if scores is not None:
                sample["score"] = round(scores[i].item(), 3)
            rows.append(sample)
        return rows


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
