"""reward={name: reward_server, url: ...}: a reward model on a server."""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from data.chat import encode_completion
from data.tokenizer import load_tokenizer
from data.view import WHOLE
from rollouts.http import ask
from runtime.config import check_choice, check_positive, check_whole


class RewardServer:
    """The server's score of each completion.

    Args:
        url: address of the endpoint itself, such as http://HOST:PORT/classify.
        api: classify or pooling (vLLM's, one request per completion; the server renders its own chat template, and
            returns the score before any sigmoid), or plain: {"prompts": [MESSAGES, ...], "completions": [TEXT, ...]}
            for the whole rollout, with the reply {"rewards": [NUMBER, ...]}.
        tokenizer: the directory of a reward model of ours. Conversations are then encoded as in training and sent as
            ids. If vLLM renders them, it also reads the template's text after the stop token, and the score differs.
        model: the model's name on the server. timeout: seconds per request. max_parallel: requests at the same time.
    """

    def __init__(
        self,
        url: str,
        api: str = "classify",
        model: str | None = None,
        tokenizer: str | None = None,
        timeout: float = 60.0,
        max_tries: int = 6,
        max_parallel: int = 16,
    ):
        check_choice("reward_server.api", api, ("classify", "pooling", "plain"))
        check_positive(reward_server__timeout=timeout)
        check_whole(1, reward_server__max_tries=max_tries, reward_server__max_parallel=max_parallel)
        if tokenizer is not None and api == "plain":
            raise ValueError("reward_server.tokenizer creates ids for vLLM, but api=plain sends texts; leave it out")
        self.tokenizer = None if tokenizer is None else load_tokenizer(tokenizer)
        self.url, self.api, self.model, self.max_parallel = url, api, model, max_parallel
        self.ask = partial(ask, url, timeout=timeout, max_tries=max_tries, who="reward_server")

    def __call__(self, prompts: list[str], completions: list[str], messages: list) -> list[float]:
        if self.api == "plain":
            rewards = self.read(self.ask({"prompts": messages, "completions": completions}))
            if len(rewards) != len(completions):
                raise ValueError(f"{self.url} gave {len(rewards)} rewards for {len(completions)} completions")
            return rewards
        with ThreadPoolExecutor(self.max_parallel) as pool:
            return list(pool.map(self.score, messages, completions))

    def score(self, prompt: list[dict], completion: str) -> float:
        """One completion's score by vLLM."""
        if self.tokenizer is None:
            talk: dict = {"messages": [*prompt, {"role": "assistant", "content": completion}]}
        else:  # not cut: the server refuses texts longer than its window
            row = encode_completion(prompt, completion, self.tokenizer, max_length=WHOLE, max_prompt_length=WHOLE)
            talk = {"input": [int(token) for token in row["input_ids"]]}
        body = talk | {"use_activation": False} | ({"model": self.model} if self.model else {})
        (reward,) = self.read(self.ask(body))
        return reward

    def read(self, answer: dict) -> list[float]:
        """The numbers in a reply. Raises ValueError if it has another form."""
        try:
            if self.api == "plain":
                rewards = answer["rewards"]
            else:
                (data,) = answer["data"]
                rewards = data["probs"] if self.api == "classify" else data["data"]
                if self.api == "pooling" and isinstance(rewards[0], list):  # one score per token; the last one counts
                    rewards = rewards[-1]
            if self.api != "plain" and len(rewards) != 1:
                raise ValueError(
                    f"{self.url} returned {len(rewards)} numbers for a completion, so it is not a reward model"
                )
            fits = all(isinstance(reward, int | float) and math.isfinite(reward) for reward in rewards)
        except (KeyError, IndexError, TypeError):
            fits = False
        if not fits:
            raise ValueError(f"{self.url} answered {str(answer)[:200]}, which is not a reply of api={self.api}")
        return [float(reward) for reward in rewards]
