"""What vLLM is asked: token ids in and out, each answer with the version of the weights that drew it.

Met: vLLM 0.32.0 on a CPU (docs/engines.md). It must run in its development mode, which has the calls for weights:

    VLLM_SERVER_DEV_MODE=1 vllm serve POLICY_DIR --enable-scale-out --logprobs-mode processed_logprobs
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig

from rollouts.http import Refused, ask

ADMIN_TRIES = 3  # of a call for weights: what fails thrice is not the network


class Said(NamedTuple):
    """One answer of a server."""

    ids: list[int]
    logprobs: list[float]
    reason: str  # stop, length, abort, ...
    versions: set[str]  # of the weights that drew its tokens


class VLLM:
    """One server.

    Args:
        engine: conf/engine/vllm.yaml. sampling: conf/sampling. tokenizer: whose stop ids end a completion.
    Raises:
        ValueError: it serves no model, or several. ConnectionError: it stays down.
    """

    weights = ("disk", "lora")
    start = "VLLM_SERVER_DEV_MODE=1 vllm serve POLICY_DIR --enable-scale-out --logprobs-mode processed_logprobs"
    raw_logprobs = "start it with --logprobs-mode processed_logprobs"

    def __init__(self, engine: DictConfig, sampling: DictConfig, tokenizer):
        self.engine, self.url = engine, engine.url.rstrip("/").removesuffix("/v1")
        self.limits = {"timeout": engine.timeout, "max_tries": engine.max_tries, "who": "engine"}
        self.model, self.window = self.served()
        self.matrices = torch.float32 if engine.weights == "lora" else self.dtype()
        self.adapter: str | None = None  # the name of the adapter that answers, with weights=lora
        self.sampling = {  # all of it: what is left out, generation_config.json may decide
            "max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, "top_p": 1.0, "top_k": 0,
            "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logprobs": 0,
            "stop_token_ids": list(tokenizer.stop_ids), "ignore_eos": True, "detokenize": False,
        }  # fmt: skip

    def served(self) -> tuple[str, int]:
        """The name of the model and its window in tokens."""
        found = [row for row in self.ask("/v1/models").get("data", []) if not row.get("parent")]  # a parent: an adapter
        if len({row.get("root") for row in found}) != 1:
            names = ", ".join(str(row.get("id")) for row in found) or "none"
            raise ValueError(f"engine: {self.url} serves {len(found)} models ({names}); start it with one")
        return found[0]["id"], int(found[0]["max_model_len"])

    def dtype(self) -> torch.dtype:
        """What the matrices of an export are written in: bfloat16 where the server would round them to it."""
        info = self.change("/server_info?config_format=json", None)
        try:
            model = info["vllm_config"]["model_config"]
            bf16 = model["dtype"] == "torch.bfloat16" and model["quantization"] is None
        except (LookupError, TypeError):  # another version's reply; float32 is right for every server
            bf16 = False
        return torch.bfloat16 if bf16 else torch.float32

    def tokenize(self, **what: Any) -> list[int] | None:
        """Ids of prompt=TEXT or messages=[...]; None where the server cannot write a conversation."""
        try:
            return self.ask("/tokenize", {"model": self.model, "add_special_tokens": False} | what)["tokens"]
        except Refused as error:
            if "messages" in what and error.code == 400:  # it has no template, and needs none
                return None
            raise

    def load(self, directory: Path, version: str) -> None:
        """The server's weights become those of the directory, by the name `version`; nothing of the old ones is left.

        What a dead trainer may still be waiting for is given up. Weights that are loaded already may be loaded again.
        """
        if self.engine.weights == "lora":
            self.load_adapter(directory, version)
            return
        self.change("/pause?mode=abort", {})
        path = {"weights_path": str(directory)}
        self.change("/collective_rpc", {"method": "reload_weights", "kwargs": path})
        if not self.change("/reset_prefix_cache", {}).get("success"):
            raise ValueError(f"engine: {self.url} keeps its prefix cache, whose keys are of older weights")
        self.change("/update_weight_version", {"new_version": version})
        self.change("/resume", {})

    def load_adapter(self, directory: Path, version: str) -> None:
        """The adapter of the directory, under a name of its own, so that no cached prefix of another one serves it."""
        named = {"lora_name": version, "lora_path": str(directory), "load_inplace": True}
        self.change("/v1/load_lora_adapter", named, read=bytes.decode)  # a sentence, not JSON
        if self.adapter not in (None, version):
            self.change("/v1/unload_lora_adapter", {"lora_name": self.adapter}, read=bytes.decode)
        self.adapter = version

    def complete(self, prompt: list[int], seed: int) -> Said:
        """One answer to a prompt of token ids. Raises Refused, and ValueError where the answer has another form."""
        url, model = f"{self.url}/inference/v1/generate", self.adapter or self.model
        body = {"model": model, "token_ids": prompt, "sampling_params": self.sampling | {"seed": seed}}
        try:
            answer = ask(url, body, **self.limits)
        except Refused as error:
            if error.code == 403:
                raise ValueError(f"{error}; start it as {self.start}") from None
            raise
        try:
            choice = answer["choices"][0]
            logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
            versions = {span["version"] for span in choice["weight_versions"] or []}
            ids, reason = choice["token_ids"] or [], choice["finish_reason"]
        except (KeyError, IndexError, TypeError):
            raise ValueError(
                f"engine: {url} answered without token_ids, logprobs.content and weight_versions "
                f"({str(answer)[:200]}); vLLM has them since 0.32"
            ) from None
        return Said(ids, logprobs, reason, {self.adapter} if self.adapter else versions)

    def change(self, path: str, body: dict | None, **more) -> Any:
        """A call of the development mode: GET without a body."""
        try:
            return self.ask(path, body, max_tries=ADMIN_TRIES, **more)
        except Refused as error:
            if error.code == 404 and "lora" in path:
                raise ValueError(
                    f"{error}; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"
                ) from None
            if error.code == 404:
                raise ValueError(f"{error}; it is not in its development mode: {self.start}") from None
            raise

    def ask(self, path: str, body: dict | None = None, **more) -> Any:
        return ask(self.url + path, body, **self.limits | more)
