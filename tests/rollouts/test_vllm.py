"""What is read of vLLM's own replies, against a small server. Rollouts by one: test_engine.py."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from rollouts.vllm import VLLM


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        models = {"data": [{"id": "served", "root": "policy", "max_model_len": 100}]}
        reply = json.dumps(self.server.info if self.path.startswith("/server_info") else models).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *words):
        pass


@pytest.fixture
def url():
    """serve(info) -> the address of a server whose /server_info says that."""
    server = ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def serve(info):
        server.info = info
        return f"http://localhost:{server.server_port}"

    yield serve
    server.shutdown()
    server.server_close()


def of_0_32(**model):
    """/server_info?config_format=json of vLLM 0.32.0, as far as it is read."""
    return {"vllm_config": {"model_config": {"dtype": "torch.bfloat16", "quantization": None} | model}}


WITHOUT_QUANTIZATION = {"vllm_config": {"model_config": {"dtype": "torch.bfloat16"}}}
REPLIES = [
    (of_0_32(), torch.bfloat16),
    (of_0_32(dtype="torch.float32"), torch.float32),
    (of_0_32(dtype="torch.float16"), torch.float32),
    (of_0_32(quantization="fp8"), torch.float32),
    # of other versions: text in place of the configuration, other keys, another nesting, nothing
    ({"vllm_config": "model='policy', dtype=torch.bfloat16, quantization=None"}, torch.float32),
    (WITHOUT_QUANTIZATION, torch.float32),
    ({"vllm_config": {"model_config": None}}, torch.float32),
    ({"vllm_config": [{"model_config": {}}]}, torch.float32),
    ({}, torch.float32),
    ([], torch.float32),
    (None, torch.float32),
]


@pytest.mark.parametrize("info, expected", REPLIES)
def test_only_a_server_that_says_it_computes_in_bf16_is_sent_bf16(url, info, expected):
    cfg = OmegaConf.create({"url": url(info), "weights": "disk", "timeout": 30, "max_tries": 1})
    sampling = OmegaConf.create({"max_new_tokens": 8, "temperature": 1.0})
    assert VLLM(cfg, sampling, SimpleNamespace(stop_ids=(0,))).matrices == expected
