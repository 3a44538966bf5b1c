"""What a training exports, served by vLLM: it writes a conversation as we do, and answers with the same tokens."""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest

from data.chat import encode_prompt
from data.tokenizer import load_tokenizer
from model.build import load_policy
from model.sampling import generate
from tests.servers.conftest import GGUF, ROOT, free_port, program, running

SMALL = [
    "model.hidden_size=128", "model.intermediate_size=256", "model.num_layers=6", "model.num_heads=4",
    "model.num_kv_heads=2", "model.head_dim=32", "model.max_length=512", f"tokenizer=package:{GGUF}", "num_steps=30",
    "optim.lr=3e-3", "batch_size=8", "micro_batch_size=8",
]  # fmt: skip
TRAININGS = {
    "smollm2": [f"policy=package:{GGUF}", "num_steps=2", "batch_size=2", "micro_batch_size=2"],
    "gemma3": ["model=gemma3_270m", *SMALL, "model.sliding_window=32"],
    "qwen3": ["model=qwen3_0_6b", *SMALL],
}
TALKS = [
    [{"role": "user", "content": "I would like a large latte, please."}],
    [{"role": "system", "content": "You sell coffee."}, {"role": "user", "content": "naïve café 🙂 — ½?"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "What can I get you?"},
        {"role": "user", "content": "  Two espressos\n\nand 1234 cookies. "},
    ],
    [{"role": "user", "content": "A tea " * 60}],
]
NEW_TOKENS = 24


class Exported(NamedTuple):
    directory: Path
    url: str


@pytest.fixture(scope="module", params=TRAININGS)
def exported(request, tmp_path_factory):
    home = tmp_path_factory.mktemp(request.param)
    words = ["data.train=[data/embedded/sft_coffee_train.jsonl.gz]", "precision=fp32", "log.wandb=disabled"]
    words += ["eval_every=0", "sample_every=0", "save_every=0", f"hydra.run.dir={home / 'run'}"]
    subprocess.run([sys.executable, "train_sft.py", *words, *TRAININGS[request.param]], cwd=ROOT, check=True)
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    port, directory = free_port(), home / "run" / "model"
    serve = [
        program(".venv-vllm/bin/vllm"), "serve", directory, "--served-model-name", "policy", "--host", "127.0.0.1",
        "--port", port, "--dtype", "float32", "--max-model-len", 512, "--enforce-eager",
    ]  # fmt: skip
    with running(serve, environment, port, home / "log") as url:
        yield Exported(directory, url)


def ask(url: str, **body) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.loads(reply.read())


def test_vllm_writes_a_conversation_as_we_do_and_answers_with_the_same_tokens(exported):
    tokenizer = load_tokenizer(exported.directory)
    policy = load_policy(str(exported.directory), precision="fp32", frozen=True)
    for talk in TALKS:
        prompt = encode_prompt(talk, tokenizer, max_length=512)
        theirs = ask(exported.url.replace("/v1", "/tokenize"), model="policy", messages=talk)["tokens"]
        assert prompt == theirs
        how = {"model": "policy", "messages": talk, "max_tokens": NEW_TOKENS, "temperature": 0}
        (choice,) = ask(f"{exported.url}/chat/completions", **how, return_token_ids=True)["choices"]
        greedy = {"max_new_tokens": NEW_TOKENS, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "slots": 1, "seeds": [0]}
        made = generate(policy, [prompt], **greedy, stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id)
        ours = made.rows.input_ids[0][made.rows.completion_mask[0]].tolist()
        assert choice["token_ids"] == ours
        assert choice["finish_reason"] == made.finish_reasons[0]
        assert choice["message"]["content"].strip() == tokenizer.decode(ours).strip()
        print(len(prompt), choice["finish_reason"], repr(tokenizer.decode(ours)))
