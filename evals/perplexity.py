"""task=perplexity: a policy's loss and perplexity on the assistant turns of held-out conversations."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from data.sft import encode_demonstrations
from data.tokenizer import load_tokenizer
from model.reading import in_batches, read_policy
from runtime.devices import own_device
from runtime.plots import plot_intervals
from runtime.report import print_table


def conversation_losses(policy, examples: Sequence[dict], *, pad_id: int, batch_size: int) -> np.ndarray:
    """(n, 2) float64: nats and tokens of the assistant's turns of each conversation, which may be several rows."""
    settings = {"pad_id": pad_id, "batch_size": batch_size, "device": own_device()}
    nats = in_batches(lambda *rows: -policy.logprobs(*rows).cpu().double().sum(1), examples, **settings)
    rows = np.stack([nats.numpy(), [float(sum(example["completion_mask"])) for example in examples]], axis=1)
    _, owners = np.unique([example["where"] for example in examples], return_inverse=True)
    table = np.zeros((owners.max() + 1, 2))
    np.add.at(table, owners, rows)
    return table


def perplexity(table: np.ndarray) -> dict:
    """Loss per token and its exponential, with a 95 % interval over conversations (ratio estimator)."""
    nats, tokens = table.sum(0)
    loss = nats / tokens
    residual = table[:, 0] - loss * table[:, 1]
    n = len(table)
    error = math.sqrt(n / (n - 1) * (residual**2).sum()) / tokens if n > 1 else math.nan
    bounds = {"loss_lower": loss - 1.96 * error, "loss_upper": loss + 1.96 * error}
    return {"loss": loss, "perplexity": math.exp(loss), **bounds, "tokens": int(tokens), "conversations": n}


def run(cfg: DictConfig, out: Path) -> dict:
    """task=perplexity: result.json with the figures of all files and of each, perplexity.png."""
    task = cfg.task
    tokenizer = load_tokenizer(task.policy, template=task.template, date=task.date)
    files = {file: encode_demonstrations("task.input", [file], task, tokenizer).items for file in task.input}
    policy = read_policy(task.policy, precision=task.precision)
    settings = {"pad_id": tokenizer.pad_id, "batch_size": task.batch_size}
    tables = {file: conversation_losses(policy, examples, **settings) for file, examples in files.items()}
    result = perplexity(np.concatenate(list(tables.values())))
    result["files"] = {file: perplexity(table) for file, table in tables.items()}
    rows = [
        (Path(file).name, *(r[k] for k in ("loss", "loss_lower", "loss_upper", "conversations", "tokens")))
        for file, r in result["files"].items()
    ]
    print_table("nats per assistant token", ("file", "loss", "lower", "upper", "conversations", "tokens"), rows)
    plot_intervals(out / "perplexity.png", "nats per assistant token", [row[:4] for row in rows], null=None)
    return result
