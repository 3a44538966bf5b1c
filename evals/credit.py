"""The mask and credit viewer: a rollout token by token, with what each token was paid and blamed for."""

from torch import Tensor

from model.packing import Rows

COLUMNS = ("reward", "kl", "value", "advantage")


def credit_samples(
    rollout: Rows, tokenizer, finished: Tensor, scores: Tensor, credit: dict[str, Tensor], *, count: int
) -> list[dict]:
    """The first `count` rows as samples: prompt, completion, score, KL, and one list per token-level figure.

    Args:
        credit: (B, T) tensors by name, those of COLUMNS.
    """
    samples = []
    for row in range(min(count, len(scores))):
        ids, mask = rollout.input_ids[row], rollout.completion_mask[row]
        prompt = ids[rollout.attention_mask[row] & ~mask]
        figures = {f"token_{name}": _rounded(credit[name][row][mask]) for name in COLUMNS}
        samples.append(
            {
                "prompt": tokenizer.decode(prompt.tolist(), specials=True),
                "completion": tokenizer.decode(ids[mask].tolist()),
                "score": scores[row].item(),
                "kl": credit["kl"][row][mask].sum().item(),
                "finish_reason": "stop" if finished[row] else "length",
                "tokens": [tokenizer.decode([i], specials=True) for i in ids[mask].tolist()],
            }
            | figures
        )
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


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]
