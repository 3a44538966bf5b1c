"""PPO-ptx: language modelling on further text, so that the policy does not forget it during PPO."""

import torch
from omegaconf import DictConfig

from data.encoded import check_window, make_loader
from data.loader import micro_batches
from data.sft import encode_demonstrations
from losses import sft_loss
from model.config import ModelConfig
from model.heads import Policy
from model.packing import make_rows


class PretrainingMix:
    """ptx_coef * the SFT loss on `data.ptx` joins every optimizer step: Ouyang et al. 2022 (arXiv:2203.02155), Eq. 2.

    ptx_coef=0 reads nothing and adds nothing.
    """

    def __init__(self, cfg: DictConfig, run, tokenizer, config: ModelConfig):
        self.cfg, self.run, self.pad_id, self.loader = cfg, run, tokenizer.pad_id, None
        if cfg.ptx_coef:
            encoded = encode_demonstrations("data.ptx", cfg.data.ptx, cfg.data, tokenizer)
            check_window(config.max_length, encoded.items)
            ranks = {"rank": run.rank, "world_size": run.world_size}
            order = {"batch_size": cfg.minibatch_size, "seed": cfg.seed, "shuffle": cfg.data.shuffle, **ranks}
            # weights and proportions belong to data.prompts
            self.loader = make_loader(encoded, weights=None, proportions=None, **order)

    def add_gradients(self, policy: Policy) -> None:
        """Add the gradients of one batch of minibatch_size rows to the existing ones."""
        if self.loader is None:
            return
        parts = micro_batches(next(self.loader), self.cfg.micro_batch_size)
        targets = torch.tensor(float(sum(row["completion_mask"].sum() for part in parts for row in part)))
        num_tokens = self.run.mean(targets)
        for part in parts:
            rows = make_rows(part, self.pad_id).to(self.run.device)
            loss, metrics = sft_loss(policy.logprobs(*rows), rows.completion_mask, num_tokens=num_tokens)
            (self.cfg.ptx_coef * loss).backward()
            self.run.metrics.add({"objective/ptx_loss": metrics["objective/loss"]})

    def state_dict(self) -> dict:
        return {} if self.loader is None else self.loader.state_dict()

    def load_state_dict(self, state: dict) -> None:
        if self.loader is not None:
            self.loader.load_state_dict(state)
