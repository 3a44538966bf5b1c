"""Sampling by an OpenAI-compatible server (vLLM, SGLang) that is sent every new policy.

Before each rollout the policy is exported and the server told to load it; then every prompt goes to its /completions
as token ids, and token ids come back with the log-probs that the server drew them with. Two programs never compute
quite the same log-probs: `correct_for_sampler` weighs each token by how much likelier it is here than there.
"""

import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from model.build import export_model
from model.heads import Policy
from rollouts.trajectory import Turn

SERVER_DOWN = (408, 429, 500, 502, 503, 504)


class Server:
    """The engine that conf/engine/server.yaml describes.

    Args:
        cfg: the group. sampling: the other one. directory: where the policy is exported; the server must see the path.
    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(self, cfg: DictConfig, sampling: DictConfig, tokenizer, directory: Path):
        if cfg.max_parallel < 1 or cfg.max_tries < 1 or cfg.timeout <= 0:
            raise ValueError("need engine.max_parallel, max_tries >= 1 and engine.timeout > 0")
        self.cfg, self.tokenizer, self.directory = cfg, tokenizer, directory.resolve()
        self.url, self.reload_url = cfg.url.rstrip("/") + "/completions", cfg.reload_url  # both must be given
        self.settings = {
            "model": cfg.model, "max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature,
            "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,  # else generation_config.json's
            "logprobs": 0, "return_token_ids": True, "stop_token_ids": list(tokenizer.stop_ids),
        }  # fmt: skip

    @contextmanager
    def ready(self, policy: Policy) -> Iterator[None]:
        """Export the policy and have the server load it. All ranks call it; rank 0 writes and asks."""
        export_model(policy, self.directory, self.tokenizer, durable=False)
        if not dist.is_initialized() or dist.get_rank() == 0:
            body = json.dumps(OmegaConf.to_container(self.cfg.reload_body))
            self._post(self.reload_url, json.loads(body.replace("{path}", str(self.directory))))
        if dist.is_initialized():
            dist.barrier()
        yield

    def answer(self, policy: Policy, prompts: list[list[int]], seeds: list[int]) -> list[Turn]:
        """One turn for each prompt, given as token ids, with the server's log-probs.

        Raises:
            ValueError: the server refuses, or answers something else than token ids and log-probs.
            ConnectionError: it stays down.
        """
        with ThreadPoolExecutor(self.cfg.max_parallel) as pool:
            turns = list(pool.map(self._complete, prompts, seeds))
        if outside := {i for turn in turns for i in turn.ids if not 0 <= i < policy.config.vocab_size}:
            known = f"the policy's vocabulary of {policy.config.vocab_size}"
            raise ValueError(f"{self.url} drew token {min(outside)}, which is outside {known}: another model?")
        return turns

    def _complete(self, prompt: list[int], seed: int) -> Turn:
        url = self.url
        answer = self._post(url, self.settings | {"prompt": prompt, "seed": seed})
        try:
            choice = answer["choices"][0]
            ids, reason = choice["token_ids"] or [], choice["finish_reason"]
            logprobs = choice["logprobs"]["token_logprobs"]
        except (KeyError, IndexError, TypeError):
            raise ValueError(
                f"{url} answered without token_ids and logprobs.token_logprobs ({str(answer)[:200]}); the engine must "
                "know return_token_ids, as vLLM does since 0.10.2"
            ) from None
        stopped = bool(ids) and ids[-1] in self.settings["stop_token_ids"]
        if len(ids) != len(logprobs) or not ids or stopped != (reason == "stop"):
            raise ValueError(
                f"{url}: {len(ids)} token_ids, {len(logprobs)} log-probs, finish_reason={reason}, last id "
                f"{ids[-1:]}; wanted as many of both, and a stop token of {self.settings['stop_token_ids']} at the end "
                "exactly where finish_reason is stop"
            )
        numbers = all(isinstance(number, float | int) and math.isfinite(number) for number in logprobs)
        if not numbers or not all(isinstance(i, int) for i in ids):
            raise ValueError(f"{url}: wanted whole token_ids and finite log-probs, got {ids[:8]} with {logprobs[:8]}")
        return Turn(ids, logprobs, stopped)

    def _post(self, url: str, body: dict) -> Any:
        return post(url, body, timeout=self.cfg.timeout, max_tries=self.cfg.max_tries, who="engine")


def post(url: str, body: dict, *, timeout: float, max_tries: int, who: str) -> Any:
    """The JSON that a server answers to JSON; asked again while it is down or busy.

    Raises:
        ValueError: it refuses. ConnectionError: it stays down. Both begin with `who`.
    """
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for attempt in range(1, max_tries + 1):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return json.loads(response.read() or b"{}")
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"
            if error.code not in SERVER_DOWN:
                raise ValueError(f"{who}: {url} refuses ({problem})") from None
        except (OSError, ValueError) as error:  # refused, timed out, cut; or no JSON
            problem = f"{type(error).__name__}: {error}"
        if attempt < max_tries:
            time.sleep(min(30.0, 2.0 ** (attempt - 1)))
    raise ConnectionError(f"{who}: {url} failed after {max_tries} tries ({problem})")
