"""A second model as the user. It has a goal that the policy does not see, writes between the policy's turns, and rates
the policy at the end.

    python train_ppo.py data.prompts=[FILES] ... \\
        'env={name:rollouts/simulated_user.py:SimulatedUser,client:{kind:openai,model:M,base_url:URL}}'

A record has a `prompt`, the user's first message, and may have a `goal`. Without one, the first message states the
goal. The user ends the talk with <done>. Then, or at the policy's last turn, it gives a rating from 1 to 5, which
becomes a reward from 0 to 1. A cut turn of the policy ends the talk, without a reward unless the user also ends it
there.
"""

from pathlib import Path

from generation.build_client import client_of
from generation.clients import Client
from generation.preferences import read_rating

DONE = "<done>"


class SimulatedUser:
    """One episode. All episodes of a run share the client.

    Args:
        client: the model of the user (conf/client/). max_turns: the policy's largest number of turns (the setting).
        max_tokens: limit of a user message. directory: for the client's answers.
    """

    clients: dict[str, Client] = {}

    def __init__(self, directory: Path, client: dict, max_turns: int = 4, max_tokens: int = 128):
        key = repr((client, directory))
        if key not in self.clients:
            self.clients[key] = client_of(client, directory)
        self.client, self.max_turns, self.max_tokens = self.clients[key], max_turns, max_tokens

    def reset(self, record: dict) -> list[dict]:
        """The messages of the record."""
        self.goal, self.turns = record.get("goal") or "what your first message asks for", 0
        return record["messages"]

    def step(self, messages: list[dict]) -> tuple[list[dict], float, bool]:
        """The user's next message, or the rating at the end."""
        self.turns += 1
        text = self.ask(messages, f"Write your next message, or {DONE} alone if you have what you want.")
        if DONE in text or not text or self.turns == self.max_turns:
            return [], self.rate(messages), True
        return [{"role": "user", "content": text}], 0.0, False

    def rate(self, messages: list[dict]) -> float:
        """The rating, scaled to [0, 1].

        Raises ValueError if the client gives no rating, because it would count as 0.
        """
        asked = "The talk is over. How well did the assistant serve your goal? 5: fully, 1: not at all. "
        asked += "Reply `Rating: [[N]]`."
        (answer,) = self.client.ask([self.conversation(messages, asked)], temperature=0.0, max_tokens=64, seed=0)
        rating = None if answer.missing else read_rating(answer)
        if rating is None:
            raise ValueError(f"the simulated user gave no rating from 1 to 5: {(answer.text or answer.error)[:200]!r}")
        return (rating - 1) / 4

    def ask(self, messages: list[dict], asked: str) -> str:
        """The user's next text. Raises ValueError if the client does not answer."""
        talk = self.conversation(messages, asked)
        (answer,) = self.client.ask([talk], temperature=0.0, max_tokens=self.max_tokens, seed=0)
        if answer.missing:
            raise ValueError(f"the simulated user does not answer: {answer.error[:200]}")
        return answer.text.strip()

    def conversation(self, messages: list[dict], asked: str) -> list[dict]:
        """The dialogue so far as one text, so that the order of roles does not matter to the server's template."""
        talk = "\n\n".join(f"{'you' if m['role'] == 'user' else m['role']}: {m['content']}" for m in messages)
        text = (
            f"You play the user of an assistant. Your goal: {self.goal}.\n\n--- so far ---\n{talk}\n\n--- end ---\n\n"
        )
        text += asked
        return [{"role": "user", "content": text}]
