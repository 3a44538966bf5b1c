"""The trajectory: the tokens of a policy on a batch of prompts, and their rewards. All RL code works on this object."""

from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.packing import Rows
from runtime.devices import send


@dataclass
class Trajectory:
    """B episodes of at most T tokens. Column t is about token t. Masks are bool, True = this token counts.

    An episode is a prompt and an answer, or a dialogue of several turns with messages of an environment between them.
    The environment's tokens are attended to. They are neither actions nor states with a value.

    tokens            (B, T) int64
    attention_mask    (B, T) real tokens
    action_mask       (B, T) tokens that the policy sampled, including stop tokens
    value_mask        (B, T) states that have a value: those of the actions; one more with score_position=after_eos
    done              (B, T) the last state of an episode: its return does not include anything later
    turn              (B, T) int64, number of the policy's turn to which an action belongs, from 0; -1 elsewhere
    finished          (B,) the last turn ended with a stop token
    judged            (B,) every reward source could judge the episode; other episodes are not trained on
    sampler_logprobs  (B, T) float32 nats, log-probability of each action in the sampler; 0 elsewhere, None if unknown
    rewards           {name: (B, T) float32} rewards of each source on each token, before weights
    step              number of steps that the sampling policy had completed
    prompts           B encoded prompts with `messages`, `columns` and `where`, the record's FILE:LINE
    """

    tokens: Tensor
    attention_mask: Tensor
    action_mask: Tensor
    value_mask: Tensor
    done: Tensor
    turn: Tensor
    finished: Tensor
    judged: Tensor
    sampler_logprobs: Tensor | None
    _: KW_ONLY
    prompts: list[dict]
    step: int = 0
    rewards: dict[str, Tensor] = field(default_factory=dict)
    # the parts that `parts` has already packed
    packed: dict[int, list["Part"]] = field(default_factory=dict, repr=False)
    # copies of `rows` and `states` from which parts are packed
    on_host: tuple[Rows, ...] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def where(self) -> list[str]:
        """FILE:LINE of every episode's prompt."""
        return [prompt["where"] for prompt in self.prompts]

    @property
    def rows(self) -> Rows:
        """The episodes with the actions as targets: the input of policies and reward models."""
        return Rows(self.tokens, self.attention_mask, self.action_mask)

    @property
    def states(self) -> Rows:
        """The episodes with the states that have a value as targets: the input of a value model."""
        return Rows(self.tokens, self.attention_mask | self.value_mask, self.value_mask)

    def parts(self, size: int) -> list["Part"]:
        """The episodes in parts of `size`, packed once for all networks that read them."""
        if size not in self.packed:
            self.packed[size] = [self.part(some) for some in torch.arange(len(self)).split(size)]
        return self.packed[size]

    def part(self, rows: Tensor) -> "Part":
        """The episodes at `rows` (indices on the host), packed on the host."""
        device = self.tokens.device
        if self.on_host is None:
            self.on_host = tuple(Rows(*(x.cpu() for x in some[:3])) for some in (self.rows, self.states))
        actions, states = (some.select(rows) for some in self.on_host)
        same, index = torch.equal(actions.completion_mask, states.completion_mask), send(rows, device)
        actions = actions.to(device)
        return Part(index, actions, actions if same else states.to(device))

    def select(self, rows: Tensor) -> "Trajectory":
        """The episodes at `rows` (indices)."""
        tensors = {name: x[rows] for name, x in vars(self).items() if isinstance(x, Tensor)}
        prompts = [self.prompts[row] for row in rows.tolist()]
        rewards = {name: x[rows] for name, x in self.rewards.items()}
        known = {"sampler_logprobs": None} | tensors
        return Trajectory(**known, prompts=prompts, step=self.step, rewards=rewards)

    def state_dict(self) -> dict[str, Any]:
        """The trajectory of this rank as JSON. (Checkpoints store as tensors only what all ranks share.)"""
        kept = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)} | self.rewards
        rows = {name: {"dtype": str(x.dtype).removeprefix("torch."), "rows": x.tolist()} for name, x in kept.items()}
        prompts = [{k: v.tolist() if hasattr(v, "tolist") else v for k, v in row.items()} for row in self.prompts]
        return {"tensors": rows, "rewards": list(self.rewards), "prompts": prompts, "step": self.step}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> "Trajectory":
        """The trajectory of a `state_dict`."""
        tensors = {
            name: torch.tensor(kept["rows"], dtype=getattr(torch, kept["dtype"]), device=device)
            for name, kept in state["tensors"].items()
        }
        rewards = {name: tensors.pop(name) for name in state["rewards"]}
        known = {"sampler_logprobs": None} | tensors
        return cls(**known, prompts=state["prompts"], step=state["step"], rewards=rewards)

    def leave_out(self, rows: Tensor) -> None:
        """Exclude the episodes where `rows` (B,) is True from training: they keep tokens and lose their actions."""
        keep, self.packed, self.on_host = ~rows[:, None], {}, None
        self.action_mask, self.value_mask, self.done = (
            m & keep for m in (self.action_mask, self.value_mask, self.done)
        )


class Part(NamedTuple):
    """Some episodes, packed (`model/packing.py`)."""

    index: Tensor  # (b,) indices in the trajectory
    rows: Rows
    states: Rows


class Turn(NamedTuple):
    """One turn of the policy: its token ids, their log-probs in the sampler (None: unknown), and whether it stopped."""

    ids: list[int]
    logprobs: list[float] | None
    stopped: bool


@dataclass
class Episode:
    """One row of a rollout in progress."""

    prompt: dict  # encoded, with the messages and columns of its record
    ids: list[int]  # all tokens so far
    turns: list[int]  # for each token: the policy's turn, or -1 if the policy did not sample it
    logprobs: list[float] | None  # for each token: its log-probability in the sampler
    messages: list[dict] = field(default_factory=list)  # the dialogue as texts
    rewards: list[float] = field(default_factory=list)  # the environment's reward of each turn
    num_turns: int = 0
    finished: bool = False  # the last turn ended with a stop token
    over: bool = False
    number: int = 0  # number of the episode in its rollout

    def add(self, turn: Turn) -> None:
        """Append a turn of the policy."""
        self.ids = self.ids + turn.ids
        self.turns = self.turns + [self.num_turns] * len(turn.ids)
        known = self.logprobs is not None and turn.logprobs is not None
        self.logprobs = self.logprobs + turn.logprobs if known else None
        self.num_turns, self.finished = self.num_turns + 1, turn.stopped


def make_trajectory(
    episodes: list[Episode],
    prompts: list[dict],
    *,
    pad_id: int,
    device: torch.device,
    score_position: str,
    max_new_tokens: int,
) -> Trajectory:
    """The trajectory of finished episodes. Log-probs of the sampler are unknown if one episode has none.

    Args:
        prompts: of the episodes, without what an environment wrote before the first turn.
        score_position: eos, or after_eos: the state after the last token also has a value and receives the score, if
            the completion has space for a further token (Huang et al. 2024, arXiv:2403.17031, and TRL).
        max_new_tokens: the limit of a turn.
    """
    tokens = padded([episode.ids for episode in episodes], pad_id, torch.int64)
    turn = padded([episode.turns for episode in episodes], -1, torch.int64)
    attention_mask = padded([[True] * len(episode.ids) for episode in episodes], False, torch.bool)
    logprobs = [episode.logprobs for episode in episodes if episode.logprobs is not None]
    sampler_logprobs = padded(logprobs, 0.0, torch.float32) if len(logprobs) == len(episodes) else None
    stopped, action_mask = torch.tensor([episode.finished for episode in episodes]), turn >= 0
    value_mask = action_mask
    if score_position == "after_eos":
        beside = (tokens, attention_mask, action_mask, sampler_logprobs)
        tokens, attention_mask, action_mask, sampler_logprobs = (x if x is None else one_more(x) for x in beside)
        turn = nn.functional.pad(turn, (0, 1), value=-1)
        last_turn = (turn == turn.amax(1, keepdim=True)) & action_mask
        room = stopped & (last_turn.sum(1) < max_new_tokens)
        columns = torch.arange(tokens.shape[1])
        value_mask = action_mask | (columns == attention_mask.sum(1, keepdim=True)) & room[:, None]
    columns = torch.arange(tokens.shape[1]).expand(tokens.shape)
    done = columns == columns.masked_fill(~value_mask, -1).amax(1, keepdim=True)
    judged = torch.ones_like(stopped)
    tensors = (tokens, attention_mask, action_mask, value_mask, done, turn, stopped, judged, sampler_logprobs)
    return Trajectory(*(x if x is None else send(x, device) for x in tensors), prompts=prompts)


def from_rows(rows: Rows, finished: list[bool], prompts: list[dict]) -> Trajectory:
    """The trajectory of completions from another sampler, one turn each, with the score at the end."""
    mask, device = rows.completion_mask, rows.input_ids.device
    columns = torch.arange(mask.shape[1], device=device).expand(mask.shape)
    done = columns == columns.masked_fill(~mask, -1).amax(1, keepdim=True)
    stopped = torch.tensor(finished, device=device)
    turn = torch.where(mask, 0, -1)
    tensors = (rows.input_ids, rows.attention_mask, mask, mask, done, turn, stopped, torch.ones_like(stopped), None)
    return Trajectory(*tensors, prompts=prompts)


def padded(rows: list[list], fill, dtype: torch.dtype) -> Tensor:
    """(B, T): the rows, padded on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype)


def one_more(x: Tensor) -> Tensor:
    """(B, T + 1): x with a column of zeros on the right."""
    return nn.functional.pad(x, (0, 1))
