"""Rollouts in readable form: samples with the figures of every token, the viewer, and warnings."""

import logging

from torch import Tensor

from rollouts.trajectory import Trajectory

log = logging.getLogger(__name__)

COLUMNS = ("reward", "kl", "value", "advantage")


def answer_samples(rollout: Trajectory, tokenizer, scores: Tensor, kl: Tensor, *, count: int) -> list[dict]:
    """The first `count` rows as texts, with their scores and (B,) KL in nats."""
    samples = []
    for row in range(min(count, len(scores))):
        ids, mask = rollout.tokens[row], rollout.action_mask[row]
        first = int(mask.int().argmax())
        if rollout.turn[row].max() > 0:  # an episode of several turns is shown with the environment's messages
            completion = tokenizer.decode(ids[rollout.attention_mask[row]][first:].tolist(), specials=True)
        else:
            completion = tokenizer.decode(ids[mask].tolist())
        samples.append(
            {
                "prompt": tokenizer.decode(ids[:first].tolist(), specials=True),
                "completion": completion,
                "score": scores[row].item() if rollout.judged[row] else None,
                "kl": kl[row].item(),
                "finish_reason": "stop" if rollout.finished[row] else "length",
                "columns": rollout.prompts[row]["columns"],  # the record's further fields, for a reward that reads them
            }
        )
    return samples


def credit_samples(
    rollout: Trajectory, tokenizer, scores: Tensor, credit: dict[str, Tensor], *, count: int
) -> list[dict]:
    """`answer_samples` with the tokens and one list per token-level figure.

    Args:
        credit: (B, T) tensors by name, those of COLUMNS; 0 off-mask.
    """
    samples = answer_samples(rollout, tokenizer, scores, credit["kl"].sum(1), count=count)
    for row, texts in enumerate(samples):
        ids, mask = rollout.tokens[row], rollout.action_mask[row]
        texts["tokens"] = [tokenizer.decode([i], specials=True) for i in ids[mask].tolist()]
        texts |= {f"token_{name}": [round(x, 5) for x in credit[name][row][mask].tolist()] for name in COLUMNS}
    return samples


def print_credit(rollout: Trajectory, tokenizer, scores: Tensor, credit: dict[str, Tensor], say) -> None:
    """Print every row of a batch, one token per line: whether it is a target, its reward, KL, value and advantage."""
    for row, score in enumerate(scores.tolist()):
        say(f"row {row}  score {score:.4f}\n{'token':>20} target " + " ".join(f"{name:>9}" for name in COLUMNS))
        for t in rollout.attention_mask[row].nonzero().flatten().tolist():
            text, is_target = repr(tokenizer.decode([rollout.tokens[row, t].item()], specials=True)), "."
            figures = ""
            if rollout.action_mask[row, t]:
                is_target, figures = "x", " ".join(f"{credit[name][row, t].item():9.4f}" for name in COLUMNS)
            say(f"{text:>20} {is_target:>6} {figures}")


def warn_about(rollout: Trajectory, scores: Tensor, step: int, missing_eos: str, missing_eos_value: float) -> None:
    """Warn about signs of a run that cannot learn as intended, at the first step and then every tenth."""
    if step % 10:
        return
    finished, scores = rollout.finished, scores[rollout.judged]
    if not rollout.judged.all():
        log.warning(
            "step %d: %d of %d completions could not be judged and are left out",
            step + 1,
            len(finished) - len(scores),
            len(finished),
        )
    if len(scores) > 1 and scores.max() == scores.min():
        log.warning("step %d: all %d scores are %g, so no completion is preferred", step + 1, len(scores), scores[0])
    if missing_eos == "replace" and not finished.all() and missing_eos_value > scores.mean():
        log.warning(
            "step %d: a completion that does not stop gets missing_eos_value=%g, more than the mean score of %.3g: "
            "the policy would learn not to stop. Set missing_eos=subtract, or a value below the scores",
            step + 1,
            missing_eos_value,
            scores.mean(),
        )
    if not finished.any():
        log.warning(
            "step %d: 0 of %d completions ended with a stop token: raise sampling.max_new_tokens, or train the SFT "
            "model on completions that end (missing_eos sets the score of such a row)",
            step + 1,
            len(finished),
        )
