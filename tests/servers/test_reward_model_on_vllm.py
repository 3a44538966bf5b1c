"""A reward model of ours behind vLLM gives the scores that it gives in the trainer, by both of vLLM's interfaces."""

import pytest
import torch

from data.chat import encode_completion
from data.tokenizer import load_tokenizer
from model.build import export_model, load_policy, load_reward_model
from model.heads import RewardModel
from model.reading import in_batches
from rewards.reward_server import RewardServer
from tests.servers.conftest import GGUF, free_port, program, running
from tests.servers.test_exports_on_vllm import TALKS

ANSWERS = ["Certainly.", "A large latte, coming up: 4.50 €.", "No!", "Two espressos and 1234 cookies, then " * 8]


@pytest.fixture(scope="module")
def served_reward_model(tmp_path_factory):
    """(its directory, its address without /v1): SmolLM2 under a random head with a bias and a normalisation."""
    home = tmp_path_factory.mktemp("reward")
    policy, tokenizer = load_policy(f"package:{GGUF}", precision="fp32"), load_tokenizer(f"package:{GGUF}")
    model = RewardModel(policy.config)
    model.transformer.load_state_dict(policy.transformer.state_dict())
    with torch.no_grad():
        torch.nn.init.normal_(model.head.weight, std=0.05, generator=torch.Generator().manual_seed(0))
        model.head.bias.fill_(0.75), model.gain.fill_(2.0), model.shift.fill_(-0.5)
    export_model(model, home / "model", tokenizer)
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    port = free_port()
    words = [
        program(".venv-vllm/bin/vllm"), "serve", home / "model", "--served-model-name", "rm", "--host", "127.0.0.1",
        "--port", port, "--dtype", "float32", "--max-model-len", 512, "--enforce-eager", "--runner", "pooling",
    ]  # fmt: skip
    with running(words, environment, port, home / "log") as url:
        yield home / "model", url.removesuffix("/v1")


@pytest.mark.parametrize("api", ["classify", "pooling"])
def test_a_served_reward_model_gives_its_own_scores(served_reward_model, api):
    directory, url = served_reward_model
    tokenizer, model = load_tokenizer(directory), load_reward_model(directory, precision="fp32", frozen=True)
    rows = [
        encode_completion(talk, answer, tokenizer, max_length=512, max_prompt_length=256)
        for talk, answer in zip(TALKS, ANSWERS, strict=True)
    ]
    reading = {"pad_id": tokenizer.pad_id, "batch_size": 2, "device": torch.device("cpu")}
    expected = in_batches(model.score, rows, **reading).tolist()
    found = RewardServer(f"{url}/{api}", api=api, model="rm", tokenizer=str(directory))(
        [""] * 4, ANSWERS, messages=TALKS
    )
    assert found == pytest.approx(expected, abs=1e-3) and max(expected) - min(expected) > 0.1
