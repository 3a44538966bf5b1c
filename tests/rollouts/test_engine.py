"""Rollouts by a server: a loopback one samples with our own sampler on the weights that it was told to load."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import train_ppo
from advantages import importance_weights
from data.chat import encode_prompt
from data.tokenizer import load_tokenizer
from model.build import load_policy
from model.sampling import generate
from rollouts.engine import correct_for_sampler
from rollouts.http import ask, in_parallel
from tests.runtime.test_scale import inputs, job  # noqa: F401 - fixtures


class Loopback:
    """What vLLM would be, with our own sampler on the weights that it was told to load.

    `sharpness` scales its log-odds, as another program's would differ; `broken` = how many requests it refuses first;
    `raw` = log-probs before the temperature; `answer` overrides a choice's fields; `lose` = after how many completions
    it is restarted, with the weights that it began with, once; `serves` what /v1/models says; `tokens` of /tokenize.
    """

    def __init__(
        self, start, sharpness=1.0, broken=0, answer=None, raw=False, lose=None, serves=None, tokens=None, noise=0.0,
        dtype="torch.float32",
    ):  # fmt: skip
        self.dtype = dtype
        self.start, self.sharpness, self.broken, self.answer, self.raw = start, sharpness, broken, answer or {}, raw
        self.lose, self.serves, self.tokens, self.noise = lose, serves, tokens, noise
        self.loads, self.calls, self.drawn, self.lock = [], [], [], threading.Lock()
        self.restart()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                length = int(self.headers["Content-Length"] or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                with outer.lock:
                    outer.broken -= 1
                    code, reply = (503, {}) if outer.broken >= 0 else outer.reply(self.path, body)
                self.send_response(code)
                self.end_headers()
                self.wfile.write(reply.encode() if isinstance(reply, str) else json.dumps(reply).encode())

            do_GET = do_POST

            def log_message(self, *words):
                pass

        self.server = ThreadingHTTPServer(("localhost", 0), Handler)
        self.url = f"http://localhost:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def restart(self):
        self.policy, self.tokenizer = load_policy(self.start), load_tokenizer(self.start)
        self.version, self.paused, self.cached = "default", False, False

    def reply(self, path, body):
        self.calls.append(path)
        if path == "/v1/models":
            return 200, {"data": self.serves or [{"id": "served", "root": str(self.start), "max_model_len": 100}]}
        if path.startswith("/server_info"):
            return 200, {"vllm_config": {"model_config": {"dtype": self.dtype, "quantization": None}}}
        if path == "/tokenize":
            if self.tokens is not None:
                return 200, {"tokens": self.tokens}
            asked = {"max_length": 1 << 30}
            ids = encode_prompt(body["messages"], self.tokenizer, **asked) if "messages" in body else None
            return 200, {"tokens": self.tokenizer.encode(body["prompt"]) if ids is None else ids}
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights" and self.paused  # nothing is drawn meanwhile
            self.loaded_from, self.cached = body["kwargs"]["weights_path"], True
            self.policy, self.tokenizer = load_policy(self.loaded_from), load_tokenizer(self.loaded_from)
            self.loads.append(self.policy.lm_head.weight.detach().clone())
            return 200, {"results": [None]}
        if path in ("/pause?mode=abort", "/resume"):
            self.paused = path != "/resume"
            return 200, {}
        if path == "/reset_prefix_cache":
            self.cached = False
            return 200, {"success": True}
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return 200, {}
        assert path == "/inference/v1/generate" and body["model"] == "served" and not self.paused and not self.cached
        return 200, {"choices": [self.complete(body["token_ids"], body["sampling_params"]) | self.answer]}

    def complete(self, prompt, how):
        if self.lose is not None:
            self.lose -= 1
            if self.lose < 0:
                self.lose = None
                self.restart()
        # vLLM takes what a request leaves out from the checkpoint's generation_config.json
        asked = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.2, "temperature": 0.6} | how
        neutral = {"min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "top_k": 0}
        assert {name: asked[name] for name in neutral} == neutral and asked["ignore_eos"]
        temperature = asked["temperature"] / self.sharpness
        made = generate(
            self.policy, [prompt], max_new_tokens=asked["max_tokens"], temperature=temperature, top_k=asked["top_k"],
            top_p=asked["top_p"], slots=1, stop_ids=asked["stop_token_ids"], seeds=[asked["seed"]],
            pad_id=self.tokenizer.pad_id,
        )  # fmt: skip
        with torch.no_grad():
            logprobs = self.policy.logprobs(*made.rows, temperature=1.0 if self.raw else temperature)
        mask = made.rows.completion_mask
        ids = made.rows.input_ids[mask].tolist()
        self.drawn.append((tuple(prompt), asked["seed"], self.version))
        return {
            "token_ids": ids, "finish_reason": made.finish_reasons[0],
            "logprobs": {"content": [{"logprob": x - self.noise} for x in logprobs[mask].tolist()]},
            "weight_versions": [{"version": self.version, "start": 0, "end": len(ids)}],
        }  # fmt: skip


@pytest.fixture
def loopback(inputs):  # noqa: F811
    """loopback(**settings) -> a running server, started with the policy."""
    servers = []

    def start(**settings):
        servers.append(Loopback(inputs / "policy", **settings))
        return servers[-1]

    yield start
    for one in servers:
        one.server.shutdown()
        one.server.server_close()


def words_for(server):
    return ["engine=vllm", f"engine.url={server.url}", "engine.max_tries=5"]


ALONE = ["missing_eos=none", "eval_every=0", "sample_every=0", "kl_exact_every=0", "save_every=0"]  # only the training


@pytest.mark.parametrize(
    "more", [["sampling.temperature=0.7"], ["score_position=after_eos", "samples_per_prompt=2", "advantage=rloo"]]
)
def test_a_server_with_our_sampler_gives_the_local_curve(run_script, job, loopback, tmp_path, read_metrics, more):  # noqa: F811
    server = loopback()
    assert run_script(train_ppo, *job("train_ppo", "local", "num_steps=2", *ALONE, *more)[1:]) == 0
    words = [*ALONE, *more, *words_for(server)]
    assert run_script(train_ppo, *job("train_ppo", "server", "num_steps=2", *words)[1:]) == 0
    local, served = read_metrics(tmp_path / "local"), read_metrics(tmp_path / "server")
    assert len(local) == len(served) == 2
    for one, other in zip(local, served, strict=True):
        for name in one:
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), f"step {one['step']}: {name}"
    assert all(row["policy/sampler_weight"] == pytest.approx(1, abs=1e-5) for row in served)
    assert len(server.loads) == 2 and not torch.equal(*server.loads)  # it follows the policy


def test_another_distribution_is_weighed_and_the_weights_are_cut(run_script, job, loopback, tmp_path, read_metrics):  # noqa: F811
    server = loopback(sharpness=1.5)
    words = [*words_for(server), "engine.max_gap=9", "num_steps=2", "off_policy.max_weight=1.2", *ALONE]
    assert run_script(train_ppo, *job("train_ppo", "run", *words)[1:]) == 0
    for row in read_metrics(tmp_path / "run"):
        assert row["policy/sampler_kl"] > 0.01 and 0.2 < row["policy/sampler_weight"] <= 1.2
        assert row["policy/ratio_first"] == pytest.approx(1, abs=1e-4)  # the old log-probs are the policy's own


def test_the_weights_reach_the_advantages_and_the_directory_is_the_one_asked_for(run_script, job, loopback, tmp_path):  # noqa: F811
    server = loopback(sharpness=1.5)
    words = ["advantage=rloo", "samples_per_prompt=2", "kl_coef=0", "missing_eos=none", "sample_every=1", "num_steps=1"]
    words += ["num_samples=99", "off_policy.max_weight=1.2", f"engine.directory={tmp_path}/shared", "eval_every=0"]
    words += ["engine.max_gap=9"]
    assert run_script(train_ppo, *job("train_ppo", "run", *words_for(server), *words)[1:]) == 0
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


def test_a_server_that_is_down_for_a_moment_is_asked_again(run_script, job, loopback, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    words = [*words_for(loopback(broken=3)), "num_steps=1", "engine.max_tries=4", *ALONE]
    assert run_script(train_ppo, *job("train_ppo", "run", *words)[1:]) == 0


def test_a_server_that_stays_down_is_a_failure_that_can_go_on(run_script, job, loopback, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    words = [*words_for(loopback(broken=9)), "num_steps=1", "engine.max_tries=2", *ALONE]
    assert run_script(train_ppo, *job("train_ppo", "run", *words)[1:]) == 1
    told = capsys.readouterr().err
    assert "failed after 2 tries (HTTP 503" in told


ONE_TOKEN = {
    "token_ids": [7], "finish_reason": "length", "logprobs": {"content": [{"logprob": -1.0}]},
}  # fmt: skip
TWO_MODELS = [{"id": name, "root": name, "max_model_len": 100} for name in "ab"]
SHORT = [{"id": "served", "root": "served", "max_model_len": 20}]


@pytest.mark.parametrize(
    "server, words, told",
    [
        ({"answer": {"token_ids": None}}, [], "0 token_ids"),
        ({"answer": ONE_TOKEN | {"token_ids": [10**6]}}, [], "outside the policy's vocabulary"),
        ({"answer": ONE_TOKEN | {"token_ids": ["7"]}}, [], "whole token_ids"),
        ({"answer": ONE_TOKEN | {"logprobs": {"content": [{"logprob": None}]}}}, [], "finite log-probs"),
        ({"answer": ONE_TOKEN | {"finish_reason": "stop"}}, [], "stop"),
        ({"answer": {"logprobs": None}}, [], "weight_versions"),
        ({"answer": {"weight_versions": None}}, [], "which weights drew"),
        ({}, ["off_policy.max_weight=0"], "max_weight"),
        ({}, ["engine.max_gap=0"], "engine.max_gap"),
        ({}, ["engine.weights=lora"], "lora.rank=0"),
        ({}, ["engine.weights=floppy"], "engine.weights"),
        ({}, ["engine.ahead=2"], "engine.ahead"),
        ({}, ["engine.ahead=1", "dynamic_sampling=2", "samples_per_prompt=2"], "dynamic_sampling"),
        ({"serves": TWO_MODELS}, [], "serves 2 models (a, b)"),
        ({"serves": SHORT}, [], "the window leaves 14"),
        ({"tokens": [5, 6, 7]}, [], "another tokenizer"),
        ({"raw": True}, ["sampling.temperature=0.7"], "--logprobs-mode processed_logprobs"),
        ({"sharpness": 3.0}, [], "are its weights quantised"),
        ({"noise": 0.2}, [], "0.2000 nats from the policy's"),
    ],
    ids=[
        "no ids", "no such id", "ids as text", "log-prob of none", "no stop token", "no logprobs", "no version",
        "weight", "gap", "no adapter", "weights", "two ahead", "ahead of scores", "two models",
        "short window", "tokenizer", "temperature", "another policy", "shifted",
    ],
)  # fmt: skip
def test_a_server_that_cannot_be_used_is_named(run_script, job, loopback, monkeypatch, capsys, server, words, told):  # noqa: F811
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    words = [*words_for(loopback(**server)), "num_steps=1", *ALONE, *words]
    assert run_script(train_ppo, *job("train_ppo", "run", *words)[1:]) == 2
    assert told in capsys.readouterr().err


def test_the_script_says_how_to_start_a_server_without_its_calls(run_script, job, loopback, capsys, monkeypatch):  # noqa: F811
    server = loopback()
    known = server.reply
    for path, code, told in [
        ("/pause?mode=abort", 404, "development mode"),
        ("/inference/v1/generate", 403, "scale-out"),
    ]:
        monkeypatch.setattr(server, "reply", lambda at, body: (code, {}) if at == path else known(at, body))  # noqa: B023
        words = [*words_for(server), "num_steps=1", *ALONE, "overwrite=true"]
        assert run_script(train_ppo, *job("train_ppo", "run", *words)[1:]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["engine.ahead=1", "num_steps=3"]], ids=["now", "ahead"])
def test_rows_of_a_restarted_server_are_drawn_again(run_script, job, loopback, tmp_path, read_metrics, more):  # noqa: F811
    words = ["num_steps=2", *ALONE, *more]
    whole, lost = loopback(), loopback(lose=8 + 8 + 3)  # probes, the first rollout, three rows of the second
    for server, run in ((whole, "whole"), (lost, "lost")):
        assert run_script(train_ppo, *job("train_ppo", run, *words, *words_for(server))[1:]) == 0
    assert_same_figures(read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "lost"))
    assert len(lost.loads) == len(whole.loads) + 1  # the policy once more, and no row under the old weights
    rows = [row[:2] for row in lost.drawn if row[2] != "default"]
    assert sorted(rows) == sorted(row[:2] for row in whole.drawn)  # each row once
    assert [row[2] for row in lost.drawn].count("default") >= 1


def test_rows_of_a_slow_server_are_asked_again_and_used_once(
    run_script, job, loopback, tmp_path, read_metrics, monkeypatch  # noqa: F811
):  # fmt: skip
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    usual, slow, over = loopback(), loopback(), threading.Event()
    known, asked = slow.server.RequestHandlerClass.do_POST, []

    def late(handler):
        if handler.path == "/inference/v1/generate":
            asked.append(handler)
            if len(asked) in (8 + 2, 8 + 8 + 5):  # one row of each rollout, after the probes
                over.wait(60)
                return
        known(handler)

    monkeypatch.setattr(slow.server.RequestHandlerClass, "do_POST", late)
    words = ["num_steps=2", *ALONE]
    try:
        for server, run, more in ((usual, "usual", []), (slow, "slow", ["engine.timeout=3", "engine.max_tries=20"])):
            assert run_script(train_ppo, *job("train_ppo", run, *words, *words_for(server), *more)[1:]) == 0
    finally:
        over.set()
    assert len(asked) >= 8 + 8 + 8 + 2
    assert_same_figures(read_metrics(tmp_path / "usual"), read_metrics(tmp_path / "slow"))


def test_a_server_in_bf16_is_sent_the_weights_that_it_would_round_to(run_script, job, loopback, tmp_path):  # noqa: F811
    files = {}
    for dtype in ("float32", "bfloat16"):
        words = [*words_for(loopback(dtype=f"torch.{dtype}")), "num_steps=1", "engine.max_gap=9", *ALONE]
        assert run_script(train_ppo, *job("train_ppo", dtype, *words)[1:]) == 0
        files[dtype] = load_file(tmp_path / dtype / "engine" / "model.safetensors")
        assert json.loads((tmp_path / dtype / "engine" / "config.json").read_text())["torch_dtype"] == dtype
    for name, weight in files["bfloat16"].items():
        assert weight.dtype == (torch.bfloat16 if weight.ndim == 2 else torch.float32), name
        assert torch.equal(weight, files["float32"][name].to(weight.dtype)), name


def assert_same_figures(one, other):
    for left, right in zip(one, other, strict=True):
        kept = {name: value for name, value in left.items() if not name.startswith("perf/")}
        assert {name: right[name] for name in kept} == kept


def test_a_rollout_ahead_has_the_same_prompts_and_says_its_age(run_script, job, loopback, tmp_path, read_metrics):  # noqa: F811
    now, ahead = loopback(), loopback()
    for server, run, more in ((now, "now", []), (ahead, "ahead", ["engine.ahead=1"])):
        assert run_script(train_ppo, *job("train_ppo", run, *words_for(server), "num_steps=4", *ALONE, *more)[1:]) == 0
    assert [row[:2] for row in sorted(ahead.drawn)] == [row[:2] for row in sorted(now.drawn)]
    left, right = read_metrics(tmp_path / "now"), read_metrics(tmp_path / "ahead")
    assert [row["policy/staleness"] for row in left] == [0, 0, 0, 0]
    assert [row["policy/staleness"] for row in right] == [0, 1, 1, 1]
    assert_same_figures(left[:1], right[:1])
    assert right[1]["policy/ratio_first"] == pytest.approx(1, abs=1e-4)  # counted from the policy before its updates
    drawn_by = {}
    for prompt, seed, version in ahead.drawn[8:]:
        drawn_by.setdefault(version.split("-")[1], []).append((prompt, seed))
    assert [len(rows) for rows in drawn_by.values()] == [16, 8, 8]  # two rollouts are of the policy that begins


def test_a_run_with_a_rollout_ahead_goes_on_bit_for_bit(run_script, job, loopback, tmp_path, read_metrics):  # noqa: F811
    words = [word for word in ALONE if "save_every" not in word] + ["save_every=2", "engine.ahead=1"]
    ones, parts = loopback(), loopback()
    assert run_script(train_ppo, *job("train_ppo", "whole", *words_for(ones), "num_steps=4", *words)[1:]) == 0
    told = job("train_ppo", "parts", *words_for(parts), "num_steps=4", *words)[1:]
    stop_after(2, run_script, told)
    drawn = len(parts.drawn)
    assert run_script(train_ppo, *told, "resume=true") == 0
    assert_same_figures(read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "parts"))
    again = [row[:2] for row in parts.drawn[drawn + 8 :]]  # after the probes of the second start
    assert len(again) == 8 and not set(again) & {row[:2] for row in parts.drawn[:drawn]}  # nothing is drawn twice


def stop_after(steps, run_script, words):  # noqa: F811
    """The run, told to stop after so many steps."""
    from runtime.run import Run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "stopping", property(lambda run: run.step == steps))
        assert run_script(train_ppo, *words) == 75


@pytest.mark.parametrize("reply", [b'{"choices": [{"tok', b""], ids=["half", "none"])
def test_a_half_answer_is_asked_again(reply, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "40")
            self.end_headers()
            self.wfile.write(reply if len(asked) < 3 else b'{"whole":                          true}')

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://localhost:{server.server_port}/x"
    try:
        assert ask(url, {}, timeout=9, max_tries=3, who="engine") == {"whole": True} and len(asked) == 3
        asked.clear()
        with pytest.raises(ConnectionError, match="failed after 2 tries"):
            ask(url, {}, timeout=9, max_tries=2, who="engine")
    finally:
        server.shutdown()
        server.server_close()


def test_after_an_error_no_further_row_begins():
    begun = []

    def call(row):
        begun.append(row)
        if row == 2:
            raise ValueError("two")
        return row * row

    assert in_parallel(call, [(i,) for i in (0, 1, 3)], 2) == [0, 1, 9]
    begun.clear()
    with pytest.raises(ValueError, match="two"):
        in_parallel(call, [(i,) for i in range(9)], 1)
    assert begun == [0, 1, 2]


@pytest.mark.parametrize("own, stale", [(True, 0), (True, 1), (False, 0)])
def test_what_the_policy_of_now_did_not_sample_is_weighed(own, stale):
    """exp(.3) and exp(-.2) on the two tokens of the row; the policy's own samples of now keep their advantages."""
    mask = torch.tensor([[True, True, False]])
    sampled, now = torch.tensor([[-1.3, -0.8, 0.0]]), torch.tensor([[-1.0, -1.0, -9.0]])
    rollout = SimpleNamespace(action_mask=mask, sampler_logprobs=sampled, step=7 - stale)
    advantages = torch.tensor([[1.0, 2.0, 0.0]])

    def corrected(**changes):
        settings = OmegaConf.create(
            {"old_logprobs": "trainer", "correction": "token_truncate", "max_weight": 1.2} | changes
        )
        return correct_for_sampler(advantages, now, rollout, settings, step=7, own_sampler=own)

    found, old, figures = corrected()
    fresh = own and not stale
    expected = advantages if fresh else torch.tensor([[1.2, 2 * math.exp(-0.2), 0.0]])
    torch.testing.assert_close(found, expected)
    assert old is now and ("policy/sampler_weight" in figures) == (not fresh)
    assert figures["policy/staleness"] == stale
    assert figures["policy/sampler_kl"].mean().item() == pytest.approx((-0.3 + 0.2) / 2, abs=1e-6)
    found, old, _ = corrected(old_logprobs="sampler")
    assert found is advantages and old is (now if fresh else sampled)
