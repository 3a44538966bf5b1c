"""Rollouts by an inference server (vLLM, SGLang) that is given every new policy.

Before a rollout the policy is exported and the server loads it under a new version; then every prompt
goes there as token ids, and token ids come back with the log-probs that the server drew them with, and the version of
the weights. An answer of other weights is not used: the policy is loaded again and the row drawn again, with the same
seed; rows that came back well are kept. Two programs never compute quite the same log-probs: `correct_for_sampler`
weighs each token by how much likelier it is here than there.
"""

import math
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from omegaconf import DictConfig

from model.build import export_model
from model.heads import Policy
from model.lora import export_adapter
from rollouts.handshake import check_logprobs, check_tokens
from rollouts.http import Refused, in_parallel
from rollouts.sglang import SGLang
from rollouts.trajectory import Turn
from rollouts.vllm import VLLM
from runtime.config import check_choice, check_positive, check_whole
from runtime.distributed import from_main, gathered

ENGINES: dict[str, type[VLLM] | type[SGLang]] = {"vllm": VLLM, "sglang": SGLang}
MOST_LOADS = 4  # of one policy, before a server that keeps losing it ends the run


class Server:
    """The engine that conf/engine/vllm.yaml or sglang.yaml describes.

    Args:
        engine, sampling: groups of the config. window: number of tokens that the run's models can read.
        directory: where each policy is exported; the server must see the path. base: the checkpoint that an adapter
            belongs to.
    Raises:
        ValueError: a setting is out of range, or the server writes text with other tokens. ConnectionError.
    """

    def __init__(self, engine: DictConfig, sampling: DictConfig, tokenizer, *, window: int, directory: Path, base: str):
        check_whole(1, engine__max_parallel=engine.max_parallel, engine__max_tries=engine.max_tries)
        check_positive(engine__timeout=engine.timeout, engine__max_gap=engine.max_gap)
        kind = ENGINES[engine.kind]
        check_choice("engine.weights", engine.weights, kind.weights)
        self.engine, self.sampling, self.tokenizer = engine, sampling, tokenizer
        self.directory, self.base = directory.resolve(), base
        self.api = kind(engine, sampling, tokenizer)
        self.window = min(window, self.api.window)
        check_tokens(self.api, tokenizer)
        self.run_id, self.loads, self.checked = from_main(secrets.token_hex(4)), 0, False
        self.is_main = not dist.is_initialized() or dist.get_rank() == 0

    @property
    def version(self) -> str:
        """What the weights are called that are loaded now: no other run's are called so."""
        return f"{self.run_id}-{self.loads}"

    @contextmanager
    def ready(self, policy: Policy) -> Iterator[None]:
        """The server answers as the policy is now. All ranks enter; rank 0 writes and asks."""
        self.loads += 1
        if self.engine.weights == "lora":
            export_adapter(policy, self.directory, self.base, durable=False)
        else:
            export_model(policy, self.directory, self.tokenizer, durable=False, matrices=self.api.matrices)
        if self.is_main:
            self.api.load(self.directory, self.version)
        if dist.is_initialized():
            dist.barrier()
        if not self.checked:
            with gathered(policy):
                temperature, max_gap = self.sampling.temperature, self.engine.max_gap
                check_logprobs(self, policy, self.tokenizer, temperature=temperature, max_gap=max_gap)
            self.checked = True
        yield

    def answer(self, policy: Policy, prompts: list[list[int]], seeds: list[int]) -> list[Turn]:
        """One turn for each prompt, given as token ids, with the server's log-probs.

        Raises:
            ValueError: the server refuses, or answers something else than token ids and log-probs.
            ConnectionError: it stays down, or keeps losing the policy.
        """
        turns: list[Turn | None] = [None] * len(prompts)
        for loads in range(MOST_LOADS):
            missing = [i for i, turn in enumerate(turns) if turn is None]
            if not missing:
                return turns
            if loads:  # it was restarted, or somebody gave it other weights
                self.api.load(self.directory, self.version)
            rows = [(prompts[i], seeds[i], policy.config.vocab_size) for i in missing]
            for i, turn in zip(missing, in_parallel(self.complete, rows, self.engine.max_parallel), strict=True):
                turns[i] = turn
        raise ConnectionError(
            f"engine: {self.api.url} lost the weights {self.version} {MOST_LOADS} times in one rollout: is another run "
            "using it, or does it restart?"
        )

    def complete(self, prompt: list[int], seed: int, vocab_size: int) -> Turn | None:
        """One turn; None where the weights that drew it are not those that were loaded last, or it was given up."""
        try:
            reply = self.api.complete(prompt, seed)
        except Refused as error:
            if error.code == 404:  # the adapter of a server that was restarted
                return None
            raise
        if reply.reason == "abort" or reply.versions - {self.version}:
            return None
        ids, logprobs, url, stop_ids = reply.ids, reply.logprobs, self.api.url, self.tokenizer.stop_ids
        if not all(isinstance(number, float | int) and math.isfinite(number) for number in logprobs) or not all(
            isinstance(i, int) for i in ids
        ):
            raise ValueError(f"{url}: wanted whole token_ids and finite log-probs, got {ids[:8]} with {logprobs[:8]}")
        stopped = bool(ids) and ids[-1] in stop_ids
        if len(ids) != len(logprobs) or not ids or stopped != (reply.reason == "stop"):
            raise ValueError(
                f"{url}: {len(ids)} token_ids, {len(logprobs)} log-probs, finish_reason={reply.reason}, last id "
                f"{ids[-1:]}; wanted as many of both, and a stop token of {list(stop_ids)} at the end exactly where "
                "finish_reason is stop"
            )
        if not reply.versions:
            raise ValueError(f"{url} does not say which weights drew an answer (weight_versions)")
        if outside := [i for i in ids if not 0 <= i < vocab_size]:
            known = f"the policy's vocabulary of {vocab_size}"
            raise ValueError(f"{url} drew token {outside[0]}, which is outside {known}: another model?")
        return Turn(ids, logprobs, stopped)
