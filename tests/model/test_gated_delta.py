"""Gated DeltaNets: chunks, forks and borders against the recurrence as it is defined, one token at a time."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import train_dpo
import train_ppo
import train_rm
import train_sft
from data.tokenizer import load_tokenizer
from model.build import export_model, new_policy
from model.chunks import Chunks
from model.gated_delta import ShortConvolution, gated_delta, gated_delta_step
from model.packing import pack
from model.sampling import generate
from tests.runtime.test_scale import inputs, job  # noqa: F401 - fixtures
from tests.tiny_models import random_ids, shaken, tiny_config

CUTS = [[0, 130, 194, 200, 301], [301, 310], [310, 311, 311, 400]]  # blocks: a prompt's ends, and its answers' ends
HK, HV, DK, DV = 2, 6, 5, 7


def rows_of(cuts):
    """Stream indices of every row: a prompt with each of its answers."""
    for begin, end, *answers in cuts:
        starts = [end, *answers[:-1]] if answers else [end]
        for start, stop in zip(starts, answers or [end], strict=True):
            yield torch.tensor([*range(begin, end), *range(start, stop)])


def random_inputs(size):
    """q, k, v, g, beta of a stream, float64, with gradients."""
    generator = torch.Generator().manual_seed(0)
    q, k = (F.normalize(torch.randn(size, HK, DK, generator=generator).double(), dim=-1) for _ in range(2))
    v, g = torch.randn(size, HV, DV, generator=generator).double(), torch.randn(size, HV, generator=generator).double()
    beta = torch.rand(size, HV, generator=generator).double()
    return [x.detach().requires_grad_() for x in (q, k, v, -0.1 * g.exp(), beta)]


def stepped(row):
    """The definition over one row, token by token, and the last state."""
    state, outs = torch.zeros(1, HV, DK, DV, dtype=torch.float64), []
    for token in zip(*row, strict=True):
        out, state = gated_delta_step(state, *(x[None] for x in token))
        outs.append(out)
    return torch.cat(outs), state[0]


def test_chunks_and_forked_states_are_the_recurrence_of_every_row_alone():
    sample, chunks = random_inputs(400), Chunks(CUTS, torch.device("cpu"))
    out, states = gated_delta(*sample, chunks)
    weights, expected = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out), 0
    counted = torch.zeros(400, dtype=torch.bool)
    for row in rows_of(CUTS):
        alone, _ = stepped([x[row] for x in sample])
        torch.testing.assert_close(out[row], alone, rtol=1e-10, atol=1e-10)
        fresh = ~counted[row]  # a shared prompt's outputs count once
        expected = expected + (alone * weights[row])[fresh].sum()
        counted[row] = True
    grads = torch.autograd.grad((out * weights).sum(), sample, retain_graph=True)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, sample), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for (level, place), (begin, end, *_) in zip(chunks.ends, CUTS, strict=True):
        _, state = stepped([x[begin:end] for x in sample])
        torch.testing.assert_close(states[level][place].flatten(0, 1), state, rtol=1e-10, atol=1e-10)


def test_the_convolution_reads_the_tokens_before_in_the_row_and_no_others():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 1, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    before = Chunks(CUTS, torch.device("cpu")).before
    out = ShortConvolution.apply(x, weight, before)
    for row in rows_of(CUTS):
        alone = F.conv1d(F.pad(x[row].T, (3, 0)), weight, groups=3).T
        torch.testing.assert_close(out[row], alone, rtol=1e-12, atol=1e-12)
    cuts = [[0, 3, 5, 6], [6, 7]]
    before = Chunks(cuts, torch.device("cpu")).before
    small = x[:7].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: ShortConvolution.apply(x, w, before), (small, weight))


@pytest.mark.parametrize("slots", [1, 3])
def test_states_move_with_their_rows_while_decoding(slots):
    """Rows that stop at different tokens, prompts shorter than the convolution, a slot that another row takes over."""
    policy = shaken(new_policy(tiny_config("qwen3_5_text", max_length=160), seed=0))
    prompts = [random_ids(n, n) for n in (1, 2, 9, 9, 70, 3)]
    how = dict(temperature=0.0, top_k=0, top_p=1.0, stop_ids=[], pad_id=0)
    limits = [3, 11, 7, 5, 9, 13]
    together = generate(policy, prompts, seeds=[0] * 6, max_new_tokens=limits, slots=slots, **how).rows
    for prompt, limit, ids, mask in zip(prompts, limits, together.input_ids, together.completion_mask, strict=True):
        text = list(prompt)
        for _ in range(limit):
            batch = torch.tensor([text])
            real = torch.ones_like(batch, dtype=torch.bool)
            stream = pack(batch, real, torch.zeros_like(real))
            with torch.no_grad():
                text.append(policy(stream.tokens, stream.positions, stream.blocks)[-1].argmax().item())
        assert ids[mask].tolist() == text[len(prompt) :]


@pytest.fixture
def hybrid(inputs, tmp_path):  # noqa: F811
    """The directory of a tiny policy with gated DeltaNets and a real tokenizer."""
    config = tiny_config("qwen3_5_text", vocab_size=400, max_length=1024, num_layers=3)
    export_model(shaken(new_policy(config, seed=0)), tmp_path / "hybrid", load_tokenizer(inputs / "policy"))
    return tmp_path / "hybrid"


SLOW = (pytest.param(module, marks=pytest.mark.slow) for module in (train_sft, train_rm, train_ppo))


@pytest.mark.parametrize("module", [train_dpo, *SLOW])
def test_every_training_script_learns_with_gated_delta_nets(module, run_script, job, hybrid, tmp_path):  # noqa: F811
    """Also with its layers computed again, which changes nothing."""
    ends = {}
    for again in ("false", "true"):
        words = [f"policy={hybrid}", "num_steps=2", "save_every=0", f"activation_checkpointing={again}"]
        assert run_script(module, *job(module.__name__, again, *words)[1:]) == 0
        ends[again] = load_file(tmp_path / again / "model" / "model.safetensors")
    start = load_file(hybrid / "model.safetensors")
    for name, weight in ends["false"].items():
        assert torch.equal(weight, ends["true"][name]), name
        if "linear_attn" in name:
            assert (weight - start[name]).abs().max() > 0, name
