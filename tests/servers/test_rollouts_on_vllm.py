"""Rollouts by the real vLLM: the weights that were sent last sample, and what cannot be right is refused."""

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from omegaconf import OmegaConf

from data.tokenizer import load_tokenizer
from model.build import load_policy
from model.lora import add_lora
from rollouts.handshake import PROBES, check_logprobs, ours_at
from rollouts.server import Server
from tests.published_votes import write_lines
from tests.servers.conftest import ROOT, free_port, vllm_server

LORA = {"rank": 8, "alpha": 16, "targets": ["qkv", "out", "gate_up", "down"], "base": "file"}
LIKE = 0.06  # nats, as engine.max_gap: between bf16 there and float32 here, on average
PROMPTS = ["Coffee is", "The capital of France is", "Once upon a time", "def f(x):"] * 2


@pytest.fixture(scope="module")
def policy(policy_directory):
    return load_policy(str(policy_directory), precision="fp32")


def server_at(url, policy_directory, directory, *, temperature=1.0, weights="disk") -> Server:
    engine = {"kind": "vllm", "url": url, "weights": weights, "max_parallel": 4, "timeout": 300, "max_tries": 40}
    engine, sampling = engine | {"max_gap": LIKE}, {"max_new_tokens": 16, "temperature": temperature}
    return Server(
        OmegaConf.create(engine), OmegaConf.create(sampling), load_tokenizer(policy_directory), window=10**6,
        directory=directory, base=str(policy_directory),
    )  # fmt: skip


def gaps(server, *policies, temperature=1.0) -> list[float]:
    """The mean absolute difference of log-probs, of what the server draws now, from each policy, in nats."""
    prompts = [server.tokenizer.encode(text) for text in PROMPTS]
    turns = server.answer(policies[0], prompts, list(range(len(prompts))))
    theirs = torch.tensor([x for turn in turns for x in turn.logprobs])

    @torch.no_grad()
    def ours(policy):
        rows = [(prompt, [(turn.ids, None)]) for prompt, turn in zip(prompts, turns, strict=True)]
        return torch.cat([ours_at(policy, *row, temperature, server.tokenizer.pad_id) for row in rows])

    return [(ours(policy) - theirs).abs().mean().item() for policy in policies]


def changed(policy):
    """A policy far from it."""
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for weight in other.transformer.layers[len(other.transformer.layers) // 2].parameters():
            weight.zero_()
    return other


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_weights_that_were_sent_last_sample(vllm, policy, tmp_path, temperature):
    server = server_at(vllm.url, vllm.directory, tmp_path / "engine", temperature=temperature)
    other = changed(policy)
    for now, not_now in ((policy, other), (other, policy)):
        with server.ready(now):
            near, far = gaps(server, now, not_now, temperature=temperature)
        print(f"T={temperature}: {near:.4f} nats from the policy that was sent, {far:.4f} from the other")
        assert near < LIKE < 0.2 < far


def test_an_adapter_samples_as_the_policy_that_has_it(vllm, policy, policy_directory, tmp_path):
    server = server_at(vllm.url, vllm.directory, tmp_path / "adapter", weights="lora")
    base = server_at(vllm.url, vllm.directory, tmp_path / "base")
    with base.ready(policy):
        pass
    adapted = add_lora(load_policy(str(policy_directory), precision="fp32", frozen=True), **LORA, seed=0)
    for scale in (0.0, 0.1):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if name.endswith("lora.B"):
                    weight.normal_(0.0, scale or 1e-9, generator=generator)
        with server.ready(adapted):
            near, far = gaps(server, adapted, policy)
        print(f"B of {scale}: {near:.4f} nats from the adapted policy, {far:.4f} from its base")
        assert near < LIKE and (far > 2 * near or not scale)


@pytest.fixture(scope="module")
def raw(policy_directory, tmp_path_factory):
    """A second server, whose log-probs are before the temperature."""
    log = tmp_path_factory.mktemp("raw") / "log"
    server = vllm_server(policy_directory, free_port(), log, "--logprobs-mode", "raw_logprobs")
    with server:
        yield server


def test_other_weights_and_log_probs_before_the_temperature_are_refused(raw, policy, policy_directory, tmp_path):
    server = server_at(raw.url, policy_directory, tmp_path / "engine")
    with server.ready(policy), pytest.raises(ValueError, match="are its weights quantised"):
        check_logprobs(server, changed(policy), server.tokenizer, temperature=1.0, max_gap=LIKE)
    server = server_at(raw.url, policy_directory, tmp_path / "engine", temperature=0.7)
    with pytest.raises(ValueError, match="processed_logprobs") as refused, server.ready(policy):
        pass
    print(refused.value)


def test_a_server_that_is_killed_in_a_rollout_and_comes_back_loses_no_row(raw, policy, policy_directory, tmp_path):
    def answered(log):
        return log.read_text(errors="replace").count('generate HTTP/1.1" 200')

    server = server_at(raw.url, policy_directory, tmp_path / "engine")  # at T = 1 raw log-probs are as good
    other = changed(policy)  # the restarted server begins with the weights of its directory, which are not these
    prompts = [server.tokenizer.encode(text) for text in PROMPTS] * 2
    port, before, log, restarted = int(raw.url.split(":")[2].split("/")[0]), answered(raw.log), tmp_path / "log", []

    def restart():
        while answered(raw.log) < before + PROBES + 6:
            time.sleep(0.05)
        os.killpg(raw.process.pid, signal.SIGKILL)
        raw.process.wait()
        restarted.append(vllm_server(policy_directory, port, log))
        restarted[0].__enter__()

    try:
        with server.ready(other):
            killer = threading.Thread(target=restart)
            killer.start()
            turns = server.answer(other, prompts, list(range(len(prompts))))
            killer.join()
            assert len(turns) == len(prompts) and gaps(server, other)[0] < LIKE
    finally:
        for one in restarted:
            one.__exit__()
    print(f"{answered(raw.log) - before} answers of the first server, {answered(log)} of the second")
    assert PROBES + 6 <= answered(raw.log) - before < PROBES + len(prompts)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ppo_goes_through(vllm, tmp_path, ranks):
    rows = [{"messages": [{"role": "user", "content": f"{text} ..."}]} for text in PROMPTS]
    prompts = write_lines(tmp_path / "prompts.jsonl", rows)
    words = [
        f"policy={vllm.directory}", "reward=[length]", f"data.prompts=[{prompts}]",
        "num_steps=2", "batch_size=4", "minibatch_size=4", "micro_batch_size=2", "ppo_epochs=1", "eval_every=0",
        "sampling.max_new_tokens=8", "sample_every=0", "save_every=0", "kl_exact_every=0", "log.wandb=disabled",
        f"engine.url={vllm.url}", "engine=vllm", f"hydra.run.dir={tmp_path}/run", "engine.ahead=1", "optim.lr=1e-6",
        f"dist={'fsdp' if ranks > 1 else 'single'}", "advantage=rloo", "samples_per_prompt=2",  # no value model: memory
    ]  # fmt: skip
    start = ["launch.py", "--nproc-per-node", "2", "--master-port", str(free_port())] if ranks > 1 else []
    done = subprocess.run([sys.executable, *start, "train_ppo.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    print([(row["policy/sampler_kl"], row["policy/staleness"]) for row in rows])
    assert all(abs(row["policy/sampler_kl"]) < 0.1 for row in rows)
    assert [row["policy/staleness"] for row in rows] == [0, 1]
