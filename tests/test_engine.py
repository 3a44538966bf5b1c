"""Rollouts by a server: a loopback one samples with our own sampler on the weights that it was told to load."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import train_ppo
from advantages import importance_weights
from data.tokenizer import load_tokenizer
from model.build import load_policy
from model.sampling import generate
from tests.test_scale import house, job  # noqa: F401 - fixtures


class Loopback:
    """What vLLM would be: POST /reload {"model_path"}, POST /v1/completions with token ids. `sharpness` scales its
    log-odds, as another program's would differ; `broken` = how many requests it refuses first."""

    def __init__(self, sharpness=1.0, broken=0, answer=None):
        self.sharpness, self.broken, self.answer, self.loads, self.lock = (
            sharpness,
            broken,
            answer,
            [],
            threading.Lock(),
        )
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.broken -= 1
                    code, reply = (503, {}) if outer.broken >= 0 else (200, outer.reply(self.path, body))
                self.send_response(code)
                self.end_headers()
                self.wfile.write(json.dumps(reply).encode())

            def log_message(self, *words):
                pass

        self.server = ThreadingHTTPServer(("localhost", 0), Handler)
        self.url = f"http://localhost:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reply(self, path, body):
        if path == "/reload":
            self.policy, self.tokenizer = load_policy(body["model_path"]), load_tokenizer(body["model_path"])
            self.loaded_from = body["model_path"]
            self.loads.append(self.policy.lm_head.weight.detach().clone())
            return {}
        assert path == "/v1/completions" and body["model"] == "policy"
        # vLLM takes what a request leaves out from the checkpoint's generation_config.json
        asked = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.2, "temperature": 0.6} | body
        assert (asked["min_p"], asked["repetition_penalty"]) == (0, 1)
        temperature = asked["temperature"] / self.sharpness
        made = generate(
            self.policy, [body["prompt"]], max_new_tokens=body["max_tokens"], temperature=temperature,
            top_k=max(0, asked["top_k"]),
            top_p=body["top_p"], slots=1, stop_ids=body["stop_token_ids"], seeds=[body["seed"]],
            pad_id=self.tokenizer.pad_id,
        )  # fmt: skip
        with torch.no_grad():
            logprobs = self.policy.logprobs(*made.rows, temperature=temperature)
        mask = made.rows.completion_mask
        choice = {"token_ids": made.rows.input_ids[mask].tolist(), "finish_reason": made.finish_reasons[0]}
        choice["logprobs"] = {"token_logprobs": logprobs[mask].tolist()}
        return {"choices": [choice | (self.answer or {})]}


@pytest.fixture
def loopback():
    """loopback(**settings) -> a running server."""
    servers = []

    def start(**settings):
        servers.append(Loopback(**settings))
        return servers[-1]

    yield start
    for one in servers:
        one.server.shutdown()
        one.server.server_close()


def words_for(server):
    return ["engine=server", f"engine.url={server.url}/v1", f"engine.reload_url={server.url}/reload"]


ALONE = ["missing_eos=none", "eval_every=0", "sample_every=0", "kl_exact_every=0", "save_every=0"]  # only the training


@pytest.mark.parametrize(
    "more", [["sampling.temperature=0.7"], ["score_position=after_eos", "samples_per_prompt=2", "advantage=rloo"]]
)
def test_a_server_with_our_sampler_gives_the_local_curve(door, job, loopback, tmp_path, read_metrics, more):  # noqa: F811
    server = loopback()
    assert door(train_ppo, *job("train_ppo", "local", "num_steps=2", *ALONE, *more)[1:]) == 0
    words = [*ALONE, *more, *words_for(server)]
    assert door(train_ppo, *job("train_ppo", "server", "num_steps=2", *words)[1:]) == 0
    local, served = read_metrics(tmp_path / "local"), read_metrics(tmp_path / "server")
    assert len(local) == len(served) == 2
    for one, other in zip(local, served, strict=True):
        for name in one:
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), f"step {one['step']}: {name}"
    assert all(row["policy/sampler_weight"] == pytest.approx(1, abs=1e-5) for row in served)
    assert len(server.loads) == 2 and not torch.equal(*server.loads)  # it follows the policy


def test_another_distribution_is_weighed_and_the_weights_are_cut(door, job, loopback, tmp_path, read_metrics):  # noqa: F811
    server = loopback(sharpness=1.5)
    words = [*words_for(server), "num_steps=2", "off_policy.max_weight=1.2", *ALONE]
    assert door(train_ppo, *job("train_ppo", "run", *words)[1:]) == 0
    for row in read_metrics(tmp_path / "run"):
        assert row["policy/sampler_kl"] > 0.01 and 0.2 < row["policy/sampler_weight"] <= 1.2
        assert row["policy/ratio_first"] == pytest.approx(1, abs=1e-4)  # the old log-probs are the policy's own


def test_the_weights_reach_the_advantages_and_the_directory_is_the_one_asked_for(door, job, loopback, tmp_path):  # noqa: F811
    server = loopback(sharpness=1.5)
    words = ["advantage=rloo", "samples_per_prompt=2", "kl_coef=0", "missing_eos=none", "sample_every=1", "num_steps=1"]
    words += ["num_samples=99", "off_policy.max_weight=1.2", f"engine.directory={tmp_path}/shared", "eval_every=0"]
    assert door(train_ppo, *job("train_ppo", "run", *words_for(server), *words)[1:]) == 0
    assert server.loaded_from == str(tmp_path / "shared") and not (tmp_path / "run" / "engine").exists()
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    weights = []
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        base = one["score"] - other["score"]
        weights += [a / base for a in one["token_advantage"]] + [-a / base for a in other["token_advantage"]]
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(weights) / len(weights) == pytest.approx(row["policy/sampler_weight"], rel=1e-3)
    assert max(weights) == pytest.approx(1.2, rel=1e-2) and min(weights) < 0.9


def test_weighted_samples_of_another_distribution_have_the_policys_mean():
    p, q = torch.tensor([0.5, 0.3, 0.15, 0.05]).double(), torch.tensor([0.25, 0.25, 0.25, 0.25]).double()
    values = torch.tensor([1.0, -2.0, 3.0, 0.5]).double()
    rows = {"action_mask": torch.ones(1, 4, dtype=torch.bool), "correction": "token_truncate"}
    weights = importance_weights(p.log()[None], q.log()[None], **rows, max_weight=10.0)[0]
    assert (q * weights * values).sum() == pytest.approx((p * values).sum().item(), abs=1e-12)
    cut = importance_weights(p.log()[None], q.log()[None], **rows, max_weight=1.5)[0]
    assert torch.allclose(cut, (p / q).clamp(max=1.5))


def test_weights_of_sequences_are_products_and_a_mask_drops_what_is_above_the_bound():
    logprobs = torch.tensor([[1.0, 2.0, 5.0], [0.3, 0.6, 9.0]]).log()
    sampled = torch.tensor([[0.5, 0.5, 5.0], [0.6, 0.6, 1.0]]).log()
    mask = torch.tensor([[True, True, True], [True, True, False]])

    def weights(correction):
        return importance_weights(logprobs, sampled, mask, correction=correction, max_weight=3.0)

    assert torch.allclose(weights("token_truncate"), torch.tensor([[2.0, 3.0, 1.0], [0.5, 1.0, 0.0]]))
    assert torch.allclose(weights("token_mask"), torch.tensor([[2.0, 0.0, 1.0], [0.5, 1.0, 0.0]]))
    assert torch.allclose(weights("sequence_truncate"), torch.tensor([[3.0] * 3, [0.5, 0.5, 0.0]]))
    assert torch.allclose(weights("sequence_mask"), torch.tensor([[0.0] * 3, [0.5, 0.5, 0.0]]))


def test_a_server_that_is_down_for_a_moment_is_asked_again(door, job, loopback, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    words = [*words_for(loopback(broken=3)), "num_steps=1", "engine.max_tries=4", *ALONE]
    assert door(train_ppo, *job("train_ppo", "run", *words)[1:]) == 0


def test_a_server_that_stays_down_is_a_failure_that_can_go_on(door, job, loopback, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    words = [*words_for(loopback(broken=9)), "num_steps=1", "engine.max_tries=2", *ALONE]
    assert door(train_ppo, *job("train_ppo", "run", *words)[1:]) == 1
    told = capsys.readouterr().err
    assert "failed after 2 tries (HTTP 503" in told and "resume=true goes on" in told


ONE_TOKEN = {"token_ids": [7], "finish_reason": "length", "logprobs": {"token_logprobs": [-1.0]}}


@pytest.mark.parametrize(
    "server, words, told",
    [
        ({"answer": {"token_ids": None}}, [], "0 token_ids"),
        ({"answer": ONE_TOKEN | {"token_ids": [10**6]}}, [], "outside the policy's vocabulary"),
        ({"answer": ONE_TOKEN | {"token_ids": ["7"]}}, [], "whole token_ids"),
        ({"answer": ONE_TOKEN | {"logprobs": {"token_logprobs": [None]}}}, [], "finite log-probs"),
        ({"answer": {"finish_reason": "stop", "token_ids": [7], "logprobs": {"token_logprobs": [-1.0]}}}, [], "stop"),
        ({"answer": {"logprobs": None}}, [], "return_token_ids"),
        ({}, ["off_policy.max_weight=0"], "max_weight"),
    ],
    ids=["no ids", "no such id", "ids as text", "log-prob of none", "no stop token", "no logprobs", "setting"],
)
def test_a_server_that_cannot_be_used_is_named(door, job, loopback, monkeypatch, capsys, server, words, told):  # noqa: F811
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    words = [*words_for(loopback(**server)), "num_steps=1", *ALONE, *words]
    assert door(train_ppo, *job("train_ppo", "run", *words)[1:]) == 2
    assert told in capsys.readouterr().err
