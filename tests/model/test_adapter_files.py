"""Damaged directories of peft: what does not fit its base or its own config is refused before a weight is read."""

import json

import pytest
from safetensors.torch import load_file, save_file

from model.build import load_policy
from tests.family_checkpoints import checkpoint
from tests.model.test_checkpoints import adapter_of, rewritten

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def reweighted(directory, change):
    weights = load_file(directory / "adapter_model.safetensors")
    save_file(change(weights), directory / "adapter_model.safetensors", {"format": "pt"})


def cut(part, rows):
    return lambda w: {k: v[:rows].contiguous() if k == f"{Q_PROJ}.lora_{part}.weight" else v for k, v in w.items()}


BROKEN = {
    "another rank in the config": (
        lambda d: rewritten(d, r=5),
        r"\(4, 80\) and .* r=5 .* needs \(5, 80\) and \(48, 5\)",
    ),
    "one A of another rank": (lambda d: reweighted(d, cut("A", 2)), r"q_proj has .* \(2, 48\) .* needs \(4, 48\)"),
    "a B of another width": (lambda d: reweighted(d, cut("B", 9)), r"q_proj has .* \(9, 4\), .* needs .* \(48, 4\)"),
    "no B": (
        lambda d: reweighted(d, lambda w: {k: v for k, v in w.items() if k != f"{Q_PROJ}.lora_B.weight"}),
        "lacks",
    ),
    "another module": (
        lambda d: reweighted(d, lambda w: {k.replace("q_proj", "z_proj"): v for k, v in w.items()}),
        "z_proj.weight, which its base .* does not have; .* merge_and_unload",
    ),
    "no base": (lambda d: rewritten(d, base_model_name_or_path=None), "needs base_model_name_or_path"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_adapter_that_does_not_fit_is_refused(name, tmp_path, monkeypatch):
    checkpoint("llama", tmp_path / "base")
    adapter_of(tmp_path / "adapter", tmp_path / "base")
    change, message = BROKEN[name]
    change(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path / "base")  # a base that is not named is not the working directory
    with pytest.raises(ValueError, match=message) as refusal:
        load_policy(tmp_path / "adapter")
    assert str(tmp_path / "adapter") in str(refusal.value)


def test_a_stack_of_experts_of_another_rank_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    model = checkpoint("olmoe", tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_parameters=["mlp.experts.down_proj"], target_modules=[])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    rewritten(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    load_policy(tmp_path / "adapter")
    raw = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    rewritten(tmp_path / "adapter", r=raw["r"] + 1)
    with pytest.raises(ValueError, match=r"r=3 .* needs \(18, 80\) and \(48, 18\)"):
        load_policy(tmp_path / "adapter")
