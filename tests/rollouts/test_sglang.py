"""SGLang's calls, by a stub with the answers of its source (0.5.23): the script through the whole command.

`sglang_0_5_23.json` has the fields of its requests, read from the published wheel. The stub takes no other.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import train_ppo
from data.chat import encode_prompt
from data.tokenizer import load_tokenizer
from model.build import load_policy
from model.sampling import generate
from tests.runtime.test_scale import inputs, job  # noqa: F401 - fixtures

SCHEMA = json.loads((Path(__file__).parent / "sglang_0_5_23.json").read_text())
REQUESTS = {
    "/v1/tokenize": "TokenizeRequest",
    "/update_weights_from_disk": "UpdateWeightFromDiskReqInput",
    "/generate": "GenerateReqInput",
}
KINDS = {bool: {"bool"}, int: {"int", "float"}, float: {"float"}, str: {"str"}, list: {"List", "Set"}, dict: {"Dict"}}


def check_fields(body, request):
    """Every field is one of the request, and has a type that its annotation names."""
    for name, value in body.items():
        assert KINDS[type(value)] & set(SCHEMA[request][name]), f"{request}.{name} = {value!r}"


@pytest.fixture
def sglang(inputs):  # noqa: F811
    """A server with our own sampler; `server.calls` is what it was asked."""
    server = ThreadingHTTPServer(("localhost", 0), Handler)
    server.policy, server.tokenizer = load_policy(inputs / "policy"), load_tokenizer(inputs / "policy")
    server.version, server.calls, server.lock = "default", [], threading.Lock()
    server.url = f"http://localhost:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        length = int(self.headers["Content-Length"] or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        with self.server.lock:
            reply = json.dumps(self.reply(self.server, body)).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(reply)

    do_GET = do_POST

    def log_message(self, *words):
        pass

    def reply(self, server, body):
        server.calls.append((self.path, body))
        if body is not None:
            check_fields(body, REQUESTS[self.path])
        if self.path == "/v1/models":
            return {"data": [{"id": "policy", "root": "policy", "max_model_len": 128}]}
        if self.path == "/v1/tokenize":
            talk = body.get("messages")
            ids = (
                encode_prompt(talk, server.tokenizer, max_length=999)
                if talk
                else server.tokenizer.encode(body["prompt"])
            )
            return {"tokens": ids, "count": len(ids), "max_model_len": 128}
        if self.path == "/update_weights_from_disk":
            server.policy, server.version = load_policy(body["model_path"]), body["weight_version"]
            return {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}
        assert self.path == "/generate" and body["return_logprob"] is True
        how = body["sampling_params"]
        check_fields(how, "SamplingParams")
        made = generate(
            server.policy,
            [body["input_ids"]],
            max_new_tokens=how["max_new_tokens"],
            temperature=how["temperature"],
            top_k=0,
            top_p=how["top_p"],
            slots=1,
            stop_ids=how["stop_token_ids"],
            seeds=[how["sampling_seed"]],
            pad_id=server.tokenizer.pad_id,
        )
        with torch.no_grad():
            logprobs = server.policy.logprobs(*made.rows, temperature=how["temperature"])
        mask = made.rows.completion_mask
        ids = made.rows.input_ids[mask].tolist()
        tokens = [[logprob, i, None] for logprob, i in zip(logprobs[mask].tolist(), ids, strict=True)]
        meta = {"finish_reason": {"type": made.finish_reasons[0]}, "weight_version": server.version}
        return {"text": "", "output_ids": ids, "meta_info": meta | {"output_token_logprobs": tokens}}


def test_the_curve_is_the_local_one(run_script, job, sglang, tmp_path, read_metrics, monkeypatch):  # noqa: F811
    words = ["num_steps=2", "missing_eos=none", "eval_every=0", "sample_every=0", "kl_exact_every=0", "save_every=0"]
    assert run_script(train_ppo, *job("train_ppo", "local", *words)[1:]) == 0
    words += ["engine=sglang", f"engine.url={sglang.url}"]
    assert run_script(train_ppo, *job("train_ppo", "served", *words)[1:]) == 0
    for one, other in zip(read_metrics(tmp_path / "local"), read_metrics(tmp_path / "served"), strict=True):
        for name in one:
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), f"step {one['step']}: {name}"
    loads = [body for path, body in sglang.calls if path == "/update_weights_from_disk"]
    assert len(loads) == 2 and all(body["flush_cache"] and body["abort_all_requests"] for body in loads)
    assert loads[0]["weight_version"] != loads[1]["weight_version"]
