"""What stands on the transformer: a policy over tokens, a score per sequence, a value per state."""

import torch
from torch import Tensor, nn

from kernels.logprob import linear_kl, linear_logprob
from model.config import ModelConfig
from model.linear import Linear
from model.packing import Stream, pack
from model.transformer import Transformer


class Policy(nn.Module):
    """A distribution over the next token."""

    kind = "policy"
    forward_methods = ("logprobs", "logprobs_and_entropy", "exact_kl", "states")  # entry points beside forward (FSDP2)

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.adapted = True  # with LoRA's part, where there is one (model/lora.py)
        self.transformer = Transformer(config, compute_dtype)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Make lm_head and embedding one parameter where the config says so; leaving the meta device parts them."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.transformer.embed.weight

    def forward(self, tokens: Tensor, positions: Tensor, blocks, picks: Tensor | None = None, cache=None) -> Tensor:
        """(M, V) float32 logits at the stream indices `picks` (all N if None): for sampling, not for losses."""
        logits = self.lm_head(self.transformer(tokens, positions, blocks, cache, self.adapted, picks)).float()
        config = self.config
        if config.logit_softcap is not None:
            logits = config.logit_softcap * torch.tanh(logits / config.logit_softcap)
        return logits if config.logit_divisor == 1 else logits / config.logit_divisor

    def states(self, stream: Stream) -> Tensor:
        """(M, D) hidden states of the positions that predict a completion token."""
        return self._states(stream)

    def _states(self, stream: Stream) -> Tensor:  # FSDP2 splits weights again after a forward method inside another
        return self.transformer(
            stream.tokens, stream.positions, stream.blocks, adapted=self.adapted, picks=stream.predicts
        )

    def logprobs(
        self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, stream: Stream | None = None,
        *, temperature: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """(B, T) float32: column t is log pi(token t | tokens before t), 0 where completion_mask is False.

        The transformer sees N real tokens and no padding; only the M positions that predict a completion token reach
        the vocabulary product, and the kernel never stores the (M, V) logits. `stream` is the rows packed, where that
        is done (`Rows.stream`).
        """
        stream = pack(input_ids, attention_mask, completion_mask, stream)
        how = self.logit_settings(temperature)
        picked = linear_logprob(self._states(stream), self.lm_head.weight, stream.targets, **how)
        return spread(picked, completion_mask)

    def logprobs_and_entropy(
        self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, stream: Stream | None = None,
        *, temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`logprobs`, and beside it (B, T) float32 entropy in nats of the distribution that token t was drawn from."""
        stream = pack(input_ids, attention_mask, completion_mask, stream)
        picked, entropy = linear_logprob(
            self._states(stream), self.lm_head.weight, stream.targets, **self.logit_settings(temperature), entropy=True
        )
        return spread(picked, completion_mask), spread(entropy, completion_mask)

    def exact_kl(
        self, ref_policy: "Policy", input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
        stream: Stream | None = None, *, temperature: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """(B, T) float32 nats: KL(self || ref_policy) over the whole vocabulary at each completion position.

        Raises ValueError where the reference is of a family that makes its logits otherwise.
        """
        theirs, ours = ((c.logit_divisor, c.logit_softcap) for c in (ref_policy.config, self.config))
        if theirs != ours:
            raise ValueError(f"the reference scales and caps its logits by {theirs}, the policy by {ours}: no exact KL")
        stream = pack(input_ids, attention_mask, completion_mask, stream)
        ref = (ref_policy.states(stream), ref_policy.lm_head.weight)
        kl = linear_kl(self._states(stream), self.lm_head.weight, *ref, **self.logit_settings(temperature))
        return spread(kl, completion_mask)

    def logit_settings(self, temperature: float) -> dict:
        """How the log-prob's kernel makes logits out of hidden states."""
        return {"temperature": temperature * self.config.logit_divisor, "softcap": self.config.logit_softcap}


class RewardModel(nn.Module):
    """One number per sequence, read at its last real token: (head(hidden)) * gain + shift.

    gain and shift are not learned: they hold the normalisation (Ziegler et al. 2019, section 2.1: mean 0, variance 1 on
    the reference policy's samples) so that kl_coef always has the same meaning, and are saved with the model.
    """

    kind = "reward"
    forward_methods = ("score",)

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, compute_dtype)
        self.head = nn.Linear(config.hidden_size, 1)
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))

    def score(
        self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, stream: Stream | None = None
    ) -> Tensor:
        """(B,) float32 scores. The last token is found by the mask, so pad and eos may share an id."""
        stream = pack(input_ids, attention_mask, completion_mask, stream)
        hidden = self.transformer(stream.tokens, stream.positions, stream.blocks, picks=stream.last)  # (B, D)
        return scalar(self.head, hidden) * self.gain + self.shift

    forward = score


class ValueModel(nn.Module):
    """The expected return from the state before each completion token."""

    kind = "value"
    forward_methods = ()

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, compute_dtype)
        self.head = nn.Linear(config.hidden_size, 1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, stream: Stream | None = None
    ) -> Tensor:
        """(B, T) float32: column t is V of the state before token t is emitted, 0 where completion_mask is False."""
        stream = pack(input_ids, attention_mask, completion_mask, stream)
        hidden = self.transformer(stream.tokens, stream.positions, stream.blocks, picks=stream.predicts)  # (M, D)
        return spread(scalar(self.head, hidden), completion_mask)


def scalar(head: nn.Linear, hidden: Tensor) -> Tensor:
    """(n,) outputs of a width-1 head, in at least float32 whatever the transformer ran in.

    A call of the module, as FSDP2 gathers a head by its own forward.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return head(hidden.to(dtype)).squeeze(-1)


def spread(picked: Tensor, completion_mask: Tensor) -> Tensor:
    """(B, T) with the (M,) values at the completion tokens, row-major, and 0 elsewhere."""
    return torch.zeros(completion_mask.shape, dtype=picked.dtype, device=picked.device).masked_scatter(
        completion_mask, picked
    )
