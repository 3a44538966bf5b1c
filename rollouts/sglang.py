"""What SGLang is asked: as rollouts/vllm.py, by its native calls.

Written from the source of SGLang 0.5.23 (srt/entrypoints/http_server.py, srt/managers/io_struct.py and
tokenizer_manager.py, srt/sampling/sampling_params.py); no SGLang was met.

    sglang serve --model-path POLICY_DIR --enable-deterministic-inference
"""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from rollouts.http import Refused, ask
from rollouts.vllm import ADMIN_TRIES, Said


class SGLang:
    """One server.

    Args:
        engine: conf/engine/sglang.yaml. sampling: conf/sampling. tokenizer: whose stop ids end a completion.
    Raises:
        ValueError: it serves no model. ConnectionError: it stays down.
    """

    weights = ("disk",)
    matrices = torch.float32  # of an export
    raw_logprobs = "start it without SGLANG_RETURN_ORIGINAL_LOGPROB"

    def __init__(self, engine: DictConfig, sampling: DictConfig, tokenizer):
        self.url = engine.url.rstrip("/").removesuffix("/v1")
        self.limits = {"timeout": engine.timeout, "max_tries": engine.max_tries, "who": "engine"}
        self.model, self.window = self.served()
        self.sampling = {  # all of it: what is left out, generation_config.json may decide
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(tokenizer.stop_ids),
            "ignore_eos": True,
            "skip_special_tokens": False,
        }

    def served(self) -> tuple[str, int]:
        """The name of the model and its window in tokens."""
        found = [row for row in self.ask("/v1/models").get("data", []) if not row.get("parent")]
        if len(found) != 1:
            raise ValueError(f"engine: {self.url} serves {len(found)} models; start it with one")
        return found[0]["id"], int(found[0]["max_model_len"])

    def tokenize(self, **what: Any) -> list[int] | None:
        """Ids of prompt=TEXT or messages=[...]; None where the server cannot write a conversation."""
        try:
            return self.ask("/v1/tokenize", {"model": self.model, "add_special_tokens": False} | what)["tokens"]
        except Refused as error:
            if "messages" in what and error.code == 400:
                return None
            raise

    def load(self, directory: Path, version: str) -> None:
        """The server's weights become those of the directory, by the name `version`; its prefix cache is emptied.

        What a dead trainer may still be waiting for is given up.
        """
        body = {"model_path": str(directory), "weight_version": version, "flush_cache": True}
        reply = self.ask("/update_weights_from_disk", body | {"abort_all_requests": True}, max_tries=ADMIN_TRIES)
        if not reply.get("success"):
            raise ValueError(f"engine: {self.url} did not load {directory}: {str(reply)[:200]}")

    def complete(self, prompt: list[int], seed: int) -> Said:
        """One answer to a prompt of token ids. Raises Refused, and ValueError where the answer has another form."""
        how = self.sampling | {"sampling_seed": seed}
        answer = self.ask("/generate", {"input_ids": prompt, "sampling_params": how, "return_logprob": True})
        try:
            meta = answer["meta_info"]
            logprobs, ids = ([row[i] for row in meta["output_token_logprobs"]] for i in (0, 1))
            reason = meta["finish_reason"]["type"]
            versions = {span["version"] for span in meta.get("weight_versions") or []} or {meta["weight_version"]}
        except (KeyError, IndexError, TypeError):
            raise ValueError(
                f"engine: {self.url}/generate answered without output_token_logprobs, finish_reason and weight_version "
                f"({str(answer)[:200]}); SGLang 0.5.23 has them"
            ) from None
        return Said(ids, logprobs, reason, versions)

    def ask(self, path: str, body: dict | None = None, **more) -> Any:
        return ask(self.url + path, body, **self.limits | more)
