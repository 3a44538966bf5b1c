"""PPO-ptx: language modelling on further text, so that the policy does not forget it during PPO."""

import torch

from data.encoded import check_window, make_loader
from data.loader import Loader, micro_batches
from data.sft import encode_demonstrations
from losses import sft_loss
from model.heads import Policy
from model.packing import make_rows


class PretrainingMix:
    """coef * the SFT loss joins every optimizer step: Ouyang et al. 2022 (arXiv:2203.02155), Eq. 2.

    Args:
        run: the run of this rank. loader: from `pretraining_loader`, with one batch for each optimizer step; None adds
            nothing. coef: `ptx_coef`.
    """

    def __init__(self, run, loader: Loader | None, *, coef: float, micro_batch_size: int, pad_id: int):
        self.run, self.loader, self.coef = run, loader, coef
        self.micro_batch_size, self.pad_id = micro_batch_size, pad_id

    def add_gradients(self, policy: Policy) -> None:
        """Add the gradients of one batch to the existing ones."""
        if self.loader is None:
            return
        parts = micro_batches(next(self.loader), self.micro_batch_size)
        targets = torch.tensor(float(sum(row["completion_mask"].sum() for part in parts for row in part)))
        num_tokens = self.run.mean(targets)
        for part in parts:
            rows = make_rows(part, self.pad_id).to(self.run.device)
            loss, metrics = sft_loss(policy.logprobs(*rows), rows.completion_mask, num_tokens=num_tokens)
            (self.coef * loss).backward()
            self.run.metrics.add({"objective/ptx_loss": metrics["objective/loss"]})

    def state_dict(self) -> dict:
        return {} if self.loader is None else self.loader.state_dict()

    def load_state_dict(self, state: dict) -> None:
        if self.loader is not None:
            self.loader.load_state_dict(state)


def pretraining_loader(
    data, tokenizer, *, window: int, batch_size: int, seed: int, rank: int, world_size: int
) -> Loader:
    """Endless batches of this rank's conversations of `data.ptx`. `data` is the config group of conf/data/prompts.yaml.

    Raises:
        ValueError: a row is longer than `window` tokens.
    """
    encoded = encode_demonstrations("data.ptx", data.ptx, data, tokenizer)
    check_window(window, encoded.items)
    return make_loader(
        encoded, shuffle=data.shuffle, weights=None, proportions=None,  # those of the config belong to data.prompts
        batch_size=batch_size, seed=seed, rank=rank, world_size=world_size,
    )  # fmt: skip
