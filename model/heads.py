"""The models: a transformer with a head for next tokens (policy), for scores (reward model) or for values."""

import torch
from torch import Tensor, nn

from kernels.logprob import linear_kl, linear_logprob
from model.config import ModelConfig
from model.linear import Linear
from model.packing import Stream, pack
from model.transformer import Transformer


class Policy(nn.Module):
    """A transformer with an output matrix: the distribution of the next token."""

    kind = "policy"
    forward_methods = ("logprobs", "logprobs_and_entropy", "exact_kl", "hidden_states")  # registered with FSDP2

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.adapted = True  # whether LoRA adapters are used, where there are any (model/lora.py)
        self.transformer = Transformer(config, compute_dtype)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Make lm_head and embedding one parameter where the config ties them. Leaving the meta device unties them."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.transformer.embed.weight

    def forward(self, tokens: Tensor, positions: Tensor, blocks, picks: Tensor | None = None, cache=None) -> Tensor:
        """(M, V) float32 logits at the stream indices `picks` (all N if None). For sampling only, not for losses."""
        logits = self.lm_head(self.transformer(tokens, positions, blocks, cache, self.adapted, picks)).float()
        config = self.config
        if config.logit_softcap is not None:
            logits = config.logit_softcap * torch.tanh(logits / config.logit_softcap)
        return logits if config.logit_divisor == 1 else logits / config.logit_divisor

    def hidden_states(self, stream: Stream) -> Tensor:
        """(M, D) hidden states of the positions that predict a completion token."""
        return self._hidden_states(stream)

    def _hidden_states(self, stream: Stream) -> Tensor:
        # Forward methods call this one, because FSDP2 would reshard the weights after a nested forward method.
        return self.transformer(
            stream.tokens, stream.positions, stream.blocks, adapted=self.adapted, picks=stream.predicts
        )

    def logprobs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        completion_mask: Tensor,
        stream: Stream | None = None,
        *,
        temperature: float = 1.0,
    ) -> Tensor:
        """(B, T) float32: column t is log pi(token t | tokens before t), 0 where completion_mask is False.

        The transformer sees the N real tokens without padding. The output matrix is applied only at the M positions
        that predict a completion token, and the kernel never stores the (M, V) logits. `stream` is the packed batch,
        if it was packed before (`Rows.stream`).
        """
        stream = pack(input_ids, attention_mask, completion_mask, stream)
        settings = self.logit_settings(temperature)
        logprobs = linear_logprob(self._hidden_states(stream), self.lm_head.weight, stream.targets, **settings)
        return scatter_to_rows(logprobs, completion_mask)

    def logprobs_and_entropy(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        completion_mask: Tensor,
        stream: Stream | None = None,
        *,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """`logprobs`, and (B, T) float32 entropy in nats of the distribution of token t given the tokens before it."""
        stream = pack(input_ids, attention_mask, completion_mask, stream)
        settings = self.logit_settings(temperature)
        logprobs, entropy = linear_logprob(
            self._hidden_states(stream), self.lm_head.weight, stream.targets, **settings, entropy=True
        )
        return scatter_to_rows(logprobs, completion_mask), scatter_to_rows(entropy, completion_mask)

    def exact_kl(
        self,
        ref_policy: "Policy",
        input_ids: Tensor,
        attention_mask: Tensor,
        completion_mask: Tensor,
        stream: Stream | None = None,
        *,
        temperature: float = 1.0,
    ) -> Tensor:
        """(B, T) float32 nats: KL(self || ref_policy) over the whole vocabulary at each completion position.

        Raises ValueError where the two families compute logits from hidden states in different ways.
        """
        theirs, ours = ((c.logit_divisor, c.logit_softcap) for c in (ref_policy.config, self.config))
        if theirs != ours:
            raise ValueError(f"the reference scales and caps its logits by {theirs}, the policy by {ours}: no exact KL")
        stream = pack(input_ids, attention_mask, completion_mask, stream)
        ref = (ref_policy.hidden_states(stream), ref_policy.lm_head.weight)
        kl = linear_kl(self._hidden_states(stream), self.lm_head.weight, *ref, **self.logit_settings(temperature))
        return scatter_to_rows(kl, completion_mask)

    def logit_settings(self, temperature: float) -> dict:
        """The settings with which `linear_logprob` computes logits from hidden states."""
        return {"temperature": temperature * self.config.logit_divisor, "softcap": self.config.logit_softcap}


class RewardModel(nn.Module):
    """A score per sequence: head(hidden state of the last real token) * gain + shift.

    gain and shift are not learned. They normalise the scores to mean 0 and variance 1 on samples of the reference
    policy (Ziegler et al. 2019, section 2.1), so that kl_coef means the same for every reward model. They are saved
    with the model.
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
        """(B,) float32 scores. The mask gives the last token, so padding and EOS may have the same id."""
        stream = pack(input_ids, attention_mask, completion_mask, stream)
        hidden = self.transformer(stream.tokens, stream.positions, stream.blocks, picks=stream.last)  # (B, D)
        return scalar(self.head, hidden) * self.gain + self.shift

    forward = score


class ValueModel(nn.Module):
    """A value per state: the expected return before each completion token."""

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
        """(B, T) float32: column t is the value of the state before token t, 0 where completion_mask is False."""
        stream = pack(input_ids, attention_mask, completion_mask, stream)
        hidden = self.transformer(stream.tokens, stream.positions, stream.blocks, picks=stream.predicts)  # (M, D)
        return scatter_to_rows(scalar(self.head, hidden), completion_mask)


def scalar(head: nn.Linear, hidden: Tensor) -> Tensor:
    """(n,) outputs of a head with one output, in float32 or wider, whatever dtype the transformer computes in.

    It calls the module, because FSDP2 gathers the head's weights in its forward.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return head(hidden.to(dtype)).squeeze(-1)


def scatter_to_rows(picked: Tensor, completion_mask: Tensor) -> Tensor:
    """(B, T) with the M values of `picked` at the completion tokens, in row-major order, and 0 elsewhere."""
    return torch.zeros(completion_mask.shape, dtype=picked.dtype, device=picked.device).masked_scatter(
        completion_mask, picked
    )
