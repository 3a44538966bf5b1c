"""The scripts on a CUDA device: what a CPU computes, and resumed runs that end in the bits of uninterrupted ones."""

import pytest
import torch
from safetensors.torch import load_file

from tests.runtime.test_scale import LORA, SCRIPTS, command, figures, inputs, run  # noqa: F401

pytestmark = pytest.mark.gpu
WORDS = {"plain": (), "lora": LORA}


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_in_float32_they_learn_as_on_a_cpu(words, inputs, tmp_path, monkeypatch):  # noqa: F811
    run(1, [command(inputs, script, tmp_path / "cuda" / script, *words) for script in SCRIPTS], tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run(1, [command(inputs, script, tmp_path / "cpu" / script, *words) for script in SCRIPTS], tmp_path)
    for script in SCRIPTS:
        for cpu, cuda in zip(*(figures(tmp_path / place / script) for place in ("cpu", "cuda")), strict=True):
            for name in {"objective/loss", "eval/score", "optim/grad_norm"} & cpu.keys():
                assert cuda[name] == pytest.approx(cpu[name], rel=1e-3, abs=1e-4), (script, cpu["step"], name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_is_uninterrupted_bit_for_bit(precision, inputs, tmp_path):  # noqa: F811
    words = (f"precision={precision}",)
    jobs = [command(inputs, script, tmp_path / "whole" / script, *words) for script in SCRIPTS]
    jobs += [command(inputs, script, tmp_path / "parts" / script, *words, "num_steps=5") for script in SCRIPTS]
    jobs += [command(inputs, script, tmp_path / "parts" / script, *words, "resume=true") for script in SCRIPTS]
    run(1, jobs, tmp_path)
    for script in SCRIPTS:
        whole, parts = (load_file(tmp_path / part / script / "model/model.safetensors") for part in ("whole", "parts"))
        assert all(torch.equal(whole[name], parts[name]) for name in whole), script
