"""Apple's GPU, which is not at hand: what is chosen there, and that nothing on a training's way is what it has not."""

import runpy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_ppo
import train_sft
from model import lora, next_token, sampling
from model.next_token import uniforms
from rollouts import rewards
from runtime import devices, distributed, host, metrics
from runtime.devices import own_device
from tests.runtime.test_scale import inputs, job  # noqa: F401

MPS = torch.device("mps")


@pytest.fixture
def apple(monkeypatch):
    """torch as it answers on a Mac with an Apple GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: major <= 15)
    for module in (devices, lora, next_token, sampling, rewards, metrics, train_sft):
        monkeypatch.setattr(module, "widest", lambda device: torch.float32)


def test_device_and_precision_choose_themselves(apple, monkeypatch):
    fresh = runpy.run_path(devices.__file__)  # conftest.py says that no device has bf16
    assert own_device() == MPS and fresh["own_device"]() == MPS
    assert fresh["widest"](MPS) == torch.float32 and fresh["widest"](torch.device("cuda", 0)) == torch.float64
    assert fresh["choose_precision"]("auto", MPS) == "bf16"
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: major <= 13)
    assert runpy.run_path(devices.__file__)["choose_precision"]("auto", MPS) == "fp32"


def test_ranks_are_refused_and_one_process_is_not(apple, monkeypatch):
    assert distributed.start_ranks("single")[2] == MPS
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="not Apple's GPU; set dist=single"):
        distributed.start_ranks("fsdp")


def test_random_states_are_those_of_the_device(monkeypatch):
    state, kept = torch.arange(16, dtype=torch.uint8), []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.mps, "set_rng_state", kept.append)
    saved = host.random_state(torch.Generator(), MPS)
    host.set_random_state(saved, torch.Generator(), MPS)
    assert torch.equal(kept[0], state)


class NoFloat64(TorchDispatchMode):
    """Fails where a tensor of the device becomes float64. What `.cpu()` returned is the host's."""

    def __init__(self):
        super().__init__()
        self.on_host = []  # held, so that no other tensor gets its id

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        outputs = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        hosts = {id(x) for x in self.on_host}
        if any(x.dtype == torch.float64 for x in outputs):
            cast = "_to_copy" in str(function)
            others = [x for x in tensors if x.dtype != torch.float64 and (cast or x.is_floating_point())]
            assert all(id(x) in hosts for x in others), f"{function} makes float64"
        return out


@pytest.mark.parametrize("name", ["train_sft", "train_ppo"])
def test_a_whole_training_needs_no_float64_on_the_device(inputs, run_script, job, tmp_path, monkeypatch, apple, name):  # noqa: F811
    monkeypatch.setattr(devices, "own_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(distributed, "own_device", lambda: torch.device("cpu"))
    mode, cpu = NoFloat64(), torch.Tensor.cpu

    def to_host(tensor):
        mode.on_host.append(cpu(tensor))
        return mode.on_host[-1]

    monkeypatch.setattr(torch.Tensor, "cpu", to_host)
    module = {"train_sft": train_sft, "train_ppo": train_ppo}[name]
    with mode:
        _, *words = job(name, "run", "num_steps=1", "eval_every=1", "sample_every=1", "save_every=0")
        assert run_script(module, *words) == 0
    assert mode.on_host or name == "train_sft"


def test_numbers_of_24_bits_are_the_first_24_of_53(monkeypatch):
    seeds, steps = torch.arange(1000), torch.arange(1000) * 7
    fine = uniforms(seeds, steps)
    monkeypatch.setattr(next_token, "widest", lambda device: torch.float32)
    coarse = uniforms(seeds, steps)
    assert coarse.dtype == torch.float32 and coarse.max() < 1
    assert torch.equal((fine * 2**24).floor(), coarse.double() * 2**24)
