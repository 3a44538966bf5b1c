"""The doors on a CUDA device: what a CPU computes, and resumed runs that end in the bits of uninterrupted ones."""

import pytest
import torch
from safetensors.torch import load_file

from tests.runtime.test_scale import DOORS, LORA, command, figures, house, run  # noqa: F401

pytestmark = pytest.mark.gpu
WORDS = {"plain": (), "lora": LORA}


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_in_float32_they_learn_as_on_a_cpu(words, house, tmp_path, monkeypatch):  # noqa: F811
    run(1, [command(house, door, tmp_path / "cuda" / door, *words) for door in DOORS], tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run(1, [command(house, door, tmp_path / "cpu" / door, *words) for door in DOORS], tmp_path)
    for door in DOORS:
        for cpu, cuda in zip(*(figures(tmp_path / place / door) for place in ("cpu", "cuda")), strict=True):
            for name in {"objective/loss", "eval/score", "optim/grad_norm"} & cpu.keys():
                assert cuda[name] == pytest.approx(cpu[name], rel=1e-3, abs=1e-4), (door, cpu["step"], name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_is_uninterrupted_bit_for_bit(precision, house, tmp_path):  # noqa: F811
    words = (f"precision={precision}",)
    jobs = [command(house, door, tmp_path / "whole" / door, *words) for door in DOORS]
    jobs += [command(house, door, tmp_path / "parts" / door, *words, "num_steps=5") for door in DOORS]
    jobs += [command(house, door, tmp_path / "parts" / door, *words, "resume=true") for door in DOORS]
    run(1, jobs, tmp_path)
    for door in DOORS:
        whole, parts = (load_file(tmp_path / part / door / "model/model.safetensors") for part in ("whole", "parts"))
        assert all(torch.equal(whole[name], parts[name]) for name in whole), door
