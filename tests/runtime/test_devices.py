"""precision=auto: bf16 where the device has it, said once; bf16 that is emulated is warned of with figures."""

import logging

import pytest
import torch
from safetensors.torch import load_file

import train_sft
from runtime import devices
from runtime.config import check_choice

CPU = torch.device("cpu")


@pytest.fixture
def native(monkeypatch):
    def native(answer: bool):
        monkeypatch.setattr(devices, "native_bf16", lambda device_type: answer)
        devices._say.cache_clear()
        devices._warn.cache_clear()

    return native


@pytest.mark.parametrize("has, precision", [(True, "bf16"), (False, "fp32")])
def test_auto_is_what_the_device_has_and_is_said_once(native, caplog, has, precision):
    native(has)
    with caplog.at_level(logging.INFO):
        assert [devices.choose_precision("auto", CPU) for _ in range(3)] == [precision] * 3
    (said,) = [r.message for r in caplog.records]
    assert said.startswith(f"precision=auto: {precision}, as this CPU")


def test_emulated_bf16_is_taken_as_asked_with_both_figures(native, caplog):
    native(False)
    assert devices.choose_precision("bf16", CPU) == "bf16" and devices.choose_precision("fp32", CPU) == "fp32"
    (warning,) = [r.message for r in caplog.records]
    assert "emulated" in warning and "GFLOP/s in bf16" in warning and "in fp32" in warning
    native(True)
    caplog.clear()
    assert devices.choose_precision("bf16", CPU) == "bf16" and not caplog.records


@pytest.mark.parametrize(
    "has, native_there",
    [
        ({"avx2": True, "avx512_f": True}, False),
        ({"avx2": True, "avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
    ],
)
def test_a_cpu_is_asked_for_its_instructions(monkeypatch, has, native_there):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert bool(devices.bf16_instructions()) == native_there


@pytest.mark.parametrize("has, precision", [(True, "bf16"), (False, "fp32")])
def test_the_run_records_what_auto_became(run_script, sft_words, tmp_path, native, has, precision):
    """Through the whole command; the weights are those of that precision asked for by name, and float32 on disk."""
    native(has)
    for run, word in (("auto", "precision=auto"), ("named", f"precision={precision}")):
        words = [*sft_words, "num_steps=1", "eval_every=0", "sample_every=0", "save_every=0", word]
        assert run_script(train_sft, f"hydra.run.dir={tmp_path / run}", *words) == 0
    assert f"precision: {precision}\n" in (tmp_path / "auto" / "config.yaml").read_text()
    auto, named = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("auto", "named"))
    assert all(torch.equal(auto[name], tensor) and tensor.dtype == torch.float32 for name, tensor in named.items())


def test_another_precision_is_refused_by_name():
    with pytest.raises(ValueError, match="auto, fp32, bf16"):
        check_choice("precision", "fp8", devices.PRECISIONS)
