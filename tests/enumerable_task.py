"""A task small enough to solve on paper: completions of 1 to 3 tokens over 6 symbols, a random reward and reference.

Symbol 0 ends a completion; reward and reference are fixed. With all 156 completions at hand, the KL-regularised optimum
pi*(y) ~ pi_ref(y) exp(r(y) / kl_coef) is a softmax.
"""

import torch
from torch import Tensor

VOCABULARY, LENGTH = 6, 3
STOP = 0


def mask_of(completions: Tensor) -> Tensor:
    """(B, 3) bool: the tokens up to the first STOP, and it."""
    stopped = (completions == STOP).int().cumsum(1) - (completions == STOP).int()
    return stopped == 0


def code_of(completions: Tensor) -> Tensor:
    """(B,) a number for every row of tokens."""
    return (completions * torch.tensor([VOCABULARY**2, VOCABULARY, 1])).sum(1)


def cut(completions: Tensor) -> Tensor:
    """The rows with STOP in every place after the first one."""
    return torch.where(mask_of(completions), completions, STOP)


COMPLETIONS = cut(torch.cartesian_prod(*[torch.arange(VOCABULARY)] * LENGTH)).unique(dim=0)  # (156, 3)
PLACE = torch.zeros(VOCABULARY**LENGTH, dtype=torch.long)  # which of the 156 a code is
PLACE[code_of(COMPLETIONS)] = torch.arange(len(COMPLETIONS))
OFFSETS = torch.tensor([0, 1, 1 + VOCABULARY])  # the first state of each length; 43 states in all
NUM_STATES = 1 + VOCABULARY + VOCABULARY**2


def states(completions: Tensor) -> Tensor:
    """(B, 3) the state before each token: an index of the prefix."""
    first, second = completions[:, 0], completions[:, 1]
    prefix = torch.stack([torch.zeros_like(first), first, VOCABULARY * first + second], dim=1)
    return prefix + OFFSETS


class TabularPolicy(torch.nn.Module):
    """One row of logits a state: can represent every distribution over completions."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = torch.nn.Parameter(logits.clone())  # (43, 6)

    def logprobs(self, completions: Tensor) -> Tensor:
        """(B, 3) nats, 0 after the end."""
        logprobs = self.logits.log_softmax(1)[states(completions)].gather(2, completions[..., None]).squeeze(2)
        return torch.where(mask_of(completions), logprobs, 0.0)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        completions = torch.zeros(count, LENGTH, dtype=torch.long)
        for t in range(LENGTH):
            probabilities = self.logits.softmax(1)[states(completions)[:, t]]
            completions[:, t] = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        return cut(completions)


def make_task(seed: int) -> tuple[Tensor, Tensor]:
    """Reference logits (43, 6) and rewards (156,) ~ N(0, 1), in the order of COMPLETIONS."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(NUM_STATES, VOCABULARY, generator=generator), torch.randn(len(COMPLETIONS), generator=generator)


def reward_of(completions: Tensor, rewards: Tensor) -> Tensor:
    """(B,) rewards of sampled completions."""
    return rewards[PLACE[code_of(completions)]]


def optimum(reference: TabularPolicy, rewards: Tensor, kl_coef: float) -> Tensor:
    """(156,) log pi*, the closed form."""
    return (reference.logprobs(COMPLETIONS).sum(1).double() + rewards.double() / kl_coef).log_softmax(0).detach()


def ipo_optimum(reference: TabularPolicy, rewards: Tensor, beta: float) -> Tensor:
    """(156,) log pi* of IPO, Azar et al. 2023 (arXiv:2310.12036), Eq. 7 with Psi the identity.

    The reward is the chance to win against an answer drawn like those that were compared, here any of the 156.
    """
    wins = torch.sigmoid(rewards.double()[:, None] - rewards.double()).mean(1)
    return (reference.logprobs(COMPLETIONS).sum(1).double() + wins / beta).log_softmax(0).detach()


def kl_to(policy: TabularPolicy, target: Tensor) -> float:
    """KL(pi || target) in nats over all completions."""
    with torch.no_grad():
        logprobs = policy.logprobs(COMPLETIONS).sum(1).double()
        return (logprobs.exp() * (logprobs - target)).sum().item()
