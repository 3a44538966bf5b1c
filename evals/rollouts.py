"""Rollouts to look at: held-out answers, samples with the credit of every token, the viewer, and warnings."""

import logging
from collections.abc import Callable

import torch
from omegaconf import DictConfig
from torch import Tensor

from data.rollout import in_parts, row_seeds, sample
from model.heads import Policy
from model.packing import Rows
from runtime.distributed import gathered
from runtime.run import Run

log = logging.getLogger(__name__)

COLUMNS = ("reward", "kl", "value", "advantage")


def answer_samples(rows: Rows, tokenizer, finished: Tensor, scores: Tensor, kl: Tensor, *, count: int) -> list[dict]:
    """The first `count` rows as texts, with their scores and (B,) KL in nats."""
    samples = []
    for row in range(min(count, len(scores))):
        ids, mask = rows.input_ids[row], rows.completion_mask[row]
        samples.append(
            {
                "prompt": tokenizer.decode(ids[rows.attention_mask[row] & ~mask].tolist(), specials=True),
                "completion": tokenizer.decode(ids[mask].tolist()),
                "score": scores[row].item(),
                "kl": kl[row].item(),
                "finish_reason": "stop" if finished[row] else "length",
            }
        )
    return samples


def credit_samples(
    rollout: Rows, tokenizer, finished: Tensor, scores: Tensor, credit: dict[str, Tensor], *, count: int
) -> list[dict]:
    """`answer_samples`, and beside them the tokens and one list per token-level figure.

    Args:
        credit: (B, T) tensors by name, those of COLUMNS; 0 off-mask.
    """
    samples = answer_samples(rollout, tokenizer, finished, scores, credit["kl"].sum(1), count=count)
    for row, texts in enumerate(samples):
        ids, mask = rollout.input_ids[row], rollout.completion_mask[row]
        texts["tokens"] = [tokenizer.decode([i], specials=True) for i in ids[mask].tolist()]
        texts |= {f"token_{name}": [round(x, 5) for x in credit[name][row][mask].tolist()] for name in COLUMNS}
    return samples


def print_credit(rollout: Rows, tokenizer, scores: Tensor, credit: dict[str, Tensor], say) -> None:
    """Every row of a batch decoded, a token a line: is it a target, and its reward, KL, value and advantage."""
    for row, score in enumerate(scores.tolist()):
        say(f"row {row}  score {score:.4f}\n{'token':>20} target " + " ".join(f"{name:>9}" for name in COLUMNS))
        for t in rollout.attention_mask[row].nonzero().flatten().tolist():
            text, is_target = repr(tokenizer.decode([rollout.input_ids[row, t].item()], specials=True)), "."
            figures = ""
            if rollout.completion_mask[row, t]:
                is_target, figures = "x", " ".join(f"{credit[name][row, t].item():9.4f}" for name in COLUMNS)
            say(f"{text:>20} {is_target:>6} {figures}")


@torch.no_grad()
def evaluate_policy(
    cfg: DictConfig, run: Run, policy: Policy, ref_policy: Policy, tokenizer,
    score: Callable[..., Tensor], held_out: list[dict], *, step: int,
) -> None:  # fmt: skip
    """Held-out prompts answered with the same seeds each time: score, exact KL, length, and the first few as texts."""
    if not held_out or not run.due(cfg.eval_every, step):
        return
    mine = held_out[run.rank :: run.world_size]
    reward_model = getattr(score, "reward_model", None)
    with run.off_the_clock(), gathered(*filter(None, (policy, ref_policy, reward_model))):
        if mine:  # with more ranks than held-out prompts, some have none
            seeds = row_seeds(cfg.seed, 0, list(range(run.rank, len(held_out), run.world_size)))
            rows, finished = sample(policy, mine, tokenizer, cfg.sampling, seeds=seeds)
            scores, size = score(rows, mine), cfg.micro_batch_size
            settings = {"temperature": cfg.sampling.temperature}
            kl = in_parts(lambda *part: policy.exact_kl(ref_policy, *part, **settings), rows, size).sum(1)
            figures = {"score": scores, "kl": kl, "length": rows.completion_mask.sum(1), "truncated": ~finished}
            run.metrics.add({f"eval/{name}": value for name, value in figures.items()})
            run.log_samples(answer_samples(rows, tokenizer, finished, scores, kl, count=cfg.num_samples), step)
    if step == 0:
        run.log_metrics(step=0)


def warn_about(scores: Tensor, finished: Tensor, cfg: DictConfig, run: Run) -> None:
    """Signs of a run that cannot learn what it should; said at the first step and every tenth while they last."""
    if run.step % 10:
        return
    if len(scores) > 1 and scores.max() == scores.min():
        log.warning("step %d: all %d scores are %g: there is nothing to prefer", run.step + 1, len(scores), scores[0])
    if cfg.missing_eos == "replace" and not finished.all() and cfg.missing_eos_value > scores.mean():
        log.warning(
            "step %d: a completion that does not stop is paid missing_eos_value=%g, more than the mean score of %.3g: "
            "the policy is taught not to stop. Set missing_eos=subtract, or a value below the scores",
            run.step + 1, cfg.missing_eos_value, scores.mean(),
        )  # fmt: skip
    if not finished.any():
        log.warning(
            "step %d: 0 of %d completions ended with a stop token: raise sampling.max_new_tokens, or train the SFT "
            "model on completions that end (missing_eos decides what such a row is paid)", run.step + 1, len(finished),
        )  # fmt: skip
