"""Muon and AdamW in 8 bits: their formulas, other people's implementations, resume, ranks, and whether they learn."""

import hashlib
import math

import pytest
import torch
from omegaconf import OmegaConf

import train_sft
from model.build import load_policy, new_policy
from model.lora import add_lora
from runtime.adamw8bit import MAPS, dequantize, dynamic_map, quantize
from runtime.distributed import shard_model, start_ranks, stop_ranks, whole
from runtime.muon import COEFFICIENTS, matrices_of_layers, orthogonal, share_out
from runtime.optim import build_optimizer
from tests.runtime.test_scale import ROOT, finish, group_of_one, launch  # noqa: F401
from tests.tiny_models import batch_of, random_ids, tiny_config

WIDE = dict(hidden_size=96, intermediate_size=272, vocab_size=97)  # rows of one block, and of one and a bit


def settings(**changes):
    cfg = dict(lr=0.01, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1, max_grad_norm=1.0, schedule="constant")
    return OmegaConf.create(cfg | dict(warmup_steps=0, min_lr_ratio=0.0, num_steps=10, momentum=0.95) | changes)


def with_gradients(model, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator)
    return model


# ---- Muon


@pytest.mark.parametrize("shape", [(7, 7), (5, 13), (31, 6)])
def test_the_iteration_moves_singular_values_by_its_polynomial_and_nothing_else(shape):
    G = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U, S, V = torch.linalg.svd(G, full_matrices=False)
    s, (a, b, c) = S / G.norm(), COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    assert torch.allclose(orthogonal(G), U @ s.diag() @ V, atol=1e-9)
    assert s.min() > 0.6 and s.max() < 1.25


def test_steps_are_those_of_torchs_muon_on_each_matrix_and_of_adamw_elsewhere():
    """q, k, v and gate, up are matrices of their own. torch iterates in bf16, which moves a step by 1 %."""
    model, other = (new_policy(tiny_config(), seed=0) for _ in range(2))
    optimizer = build_optimizer(model, settings(kind="muon"))
    parts = matrices_of_layers(other)
    assert {tuple(rows) for rows in parts.values()} == {(48, 16, 16), (48,), (80, 80)}
    split = {p: [torch.nn.Parameter(piece.clone()) for piece in p.detach().split(rows)] for p, rows in parts.items()}
    pieces = [piece for found in split.values() for piece in found]
    theirs = torch.optim.Muon(pieces, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    rest = [p for p in other.parameters() if p not in parts]
    decays = [{"params": [p for p in rest if (p.ndim >= 2) == big], "weight_decay": 0.1 * big} for big in (True, False)]
    adamw = torch.optim.AdamW(decays, lr=0.01, betas=(0.9, 0.95), eps=1e-8, fused=True)
    start = [p.detach().clone() for p in model.parameters()]
    for step in range(3):
        with_gradients(model, step)
        with_gradients(other, step)
        for p, found in split.items():
            for piece, grad in zip(found, p.grad.split(parts[p]), strict=True):
                piece.grad = grad
        for one in (optimizer, theirs, adamw):
            one.step()
    for before, mine, p in zip(start, model.parameters(), other.parameters(), strict=True):
        if p in parts:
            moved, expected = mine - before, torch.cat([x.detach() for x in split[p]]) - before
            assert (moved - expected).norm() < 0.02 * expected.norm()
        else:
            assert torch.equal(mine, p)


def test_adapters_have_the_parts_of_their_product():
    model = add_lora(new_policy(tiny_config(), seed=0), rank=3, alpha=6, targets=["qkv", "down"], seed=0)
    assert {tuple(p.shape): tuple(rows) for p, rows in matrices_of_layers(model).items()} == {
        (3, 48): (3,),
        (80, 3): (48, 16, 16),
        (3, 80): (3,),
        (48, 3): (48,),
    }


def test_experts_are_matrices_and_what_is_no_matrix_is_refused():
    parts = matrices_of_layers(new_policy(tiny_config("olmoe"), seed=0))
    assert {rows for rows in parts.values() if len(rows) > 3} == {(80,) * 8, (48,) * 4}
    with pytest.raises(ValueError, match="optim=muon needs matrices, but 0.mlp.gate_up.weight"):
        matrices_of_layers(new_policy(tiny_config("gpt_oss"), seed=0))


# ---- 8 bits


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    values = functional.create_dynamic_map(signed=signed)
    assert torch.allclose(dynamic_map(signed), values, atol=1e-7)
    x = torch.randn(9, 512, generator=torch.Generator().manual_seed(0))
    x = x if signed else x.abs()
    codes, scales = quantize(x, values)
    theirs, state = functional.quantize_blockwise(x, code=values, blocksize=256)
    assert torch.equal(scales.flatten(), state.absmax)
    apart = codes.int() - theirs.int()
    assert apart.abs().max() <= 1 and (apart != 0).float().mean() < 0.005  # where x lies in the middle of two


@pytest.mark.parametrize("columns", [1, 255, 256, 700])
def test_a_moment_comes_back_to_the_nearest_value_of_its_block(columns):
    values = MAPS["exp_avg"]
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(1)) * torch.logspace(-9, 3, 5)[:, None]
    codes, scales = quantize(x, values)
    back = dequantize(codes, scales, values)
    assert codes.shape == x.shape and codes.dtype == torch.uint8
    for start in range(0, columns, 256):
        block, found = x[:, start : start + 256], back[:, start : start + 256]
        largest = block.abs().amax(1, keepdim=True)
        nearest = (block[..., None] / largest[..., None] - values).abs().amin(-1) * largest
        assert ((found - block).abs() <= nearest * 1.001 + 1e-6 * largest).all()
    assert torch.equal(dequantize(*quantize(torch.zeros(2, columns), values), values), torch.zeros(2, columns))


def test_a_step_is_adamws_up_to_the_codes():
    """The first step exactly, as moments start at 0; later ones as far as 8 bits go; vectors stay whole."""
    models = [new_policy(tiny_config(**WIDE), seed=0) for _ in range(2)]
    optimizers = [build_optimizer(m, settings(kind=k)) for m, k in zip(models, ("adamw", "adamw8bit"), strict=True)]
    start = [p.detach().clone() for p in models[0].parameters()]
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            with_gradients(model, step)
            optimizer.step()
        pairs = list(zip(start, *(m.parameters() for m in models), strict=True))
        for before, a, b in pairs:
            exact = step == 0 or a.ndim < 2
            error = (a - b).norm() / (a - before).norm()
            assert error < (1e-5 if exact else 0.03), (step, tuple(a.shape), error)
    state = optimizers[1].state[models[1].lm_head.weight]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8
    bytes_of = [
        sum(x.nbytes for s in o.state.values() for x in s.values() if isinstance(x, torch.Tensor) and x.ndim)
        for o in optimizers
    ]
    assert bytes_of[1] < 0.28 * bytes_of[0]


def test_a_small_gradient_beside_a_large_one_is_no_large_step():
    """The second moment of the small one, kept as it is, would be 0, and its step a first moment over eps."""
    weight = torch.nn.Linear(256, 16, bias=False)
    before = weight.weight.detach().clone()
    optimizer = build_optimizer(weight, settings(kind="adamw8bit", weight_decay=0.0))
    for _ in range(3):
        weight.weight.grad = torch.full((16, 256), 3e-4)
        weight.weight.grad[:, 0] = 1.0
        optimizer.step()
    assert (weight.weight - before).abs().max() < 3 * 0.01 * 1.05


# ---- both


@pytest.mark.parametrize("kind", ["muon", "adamw8bit"])
def test_a_split_weight_takes_the_steps_of_a_whole_one(kind, group_of_one):  # noqa: F811
    one = new_policy(tiny_config(**WIDE), seed=0)
    optimizer = build_optimizer(one, settings(kind=kind))
    _, _, device = start_ranks("fsdp")
    try:
        two = shard_model(new_policy(tiny_config(**WIDE), seed=0), device, shard_size=None, cpu_offload=False)
        sharded = build_optimizer(two, settings(kind=kind))
        rows = batch_of([(random_ids(5, 1), random_ids(9, 2))], "right")
        for _ in range(3):
            for model, stepped in ((one, optimizer), (two, sharded)):
                model.logprobs(*rows).sum().neg().backward()
                stepped.step()
                stepped.zero_grad()
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            assert torch.equal(a, whole(b))
    finally:
        stop_ranks()


@pytest.mark.slow
def test_two_ranks_make_half_of_the_matrices_each_and_step_as_one_does():
    output = finish(launch(2, ROOT / "tests" / "muon_on_ranks.py"))
    one, other = ([int(n) for n in line.split()[1:]] for line in output.splitlines() if line.startswith("made"))
    matrices = [rows for parts in matrices_of_layers(new_policy(tiny_config(), seed=0)).values() for rows in parts]
    assert one[0] + other[0] == 3 * len(matrices)  # of each of three steps, each matrix once
    assert max(one[1], other[1]) < 1.3 * min(one[1], other[1])


@pytest.mark.parametrize("kind, rank", [("muon", 0), ("muon", 4), ("adamw8bit", 0), ("adamw8bit", 4)])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(run_script, sft_words, tmp_path, monkeypatch, kind, rank):
    quiet = ["eval_every=0", "sample_every=0", f"optim={kind}", "optim.lr=1e-3"]
    start = ["model.hidden_size=64", "model.intermediate_size=96", "model.head_dim=32"]
    if rank:
        assert run_script(train_sft, *sft_words, *quiet, *start, "num_steps=1", f"hydra.run.dir={tmp_path}/base") == 0
        sft_words = [word for word in sft_words if not word.startswith("model")]
        start = [f"policy={tmp_path}/base/model", f"lora.rank={rank}"]
    monkeypatch.setattr("runtime.adamw8bit.LEAST", 64)  # adapters of so small a model would stay whole
    for name, steps in (("whole", 3), ("parts", 2), ("parts", 3)):
        words = [*sft_words, *quiet, *start, f"num_steps={steps}", "optim.schedule=constant", "resume=true"]
        assert run_script(train_sft, *words, "resume_anyway=true", f"hydra.run.dir={tmp_path}/{name}") == 0
    hashes = [
        hashlib.sha256((tmp_path / n / "model/model.safetensors").read_bytes()).digest() for n in ("whole", "parts")
    ]
    assert hashes[0] == hashes[1]
    assert len(load_policy(tmp_path / "parts/model").transformer.layers) == 1


def test_matrices_are_shared_out_evenly():
    layer = [
        [(4096, 4096), (1024, 4096), (1024, 4096)],
        [(4096, 4096)],
        [(14336, 4096), (14336, 4096)],
        [(4096, 14336)],
    ]
    for ranks in (1, 2, 8):
        makers, work = share_out(layer * ranks * 2, ranks), [0] * ranks
        for weight, own in zip(layer * ranks * 2, makers, strict=True):
            for (rows, columns), maker in zip(weight, own, strict=True):
                work[maker] += rows * columns * min(rows, columns)
        assert max(work) < 1.25 * min(work), (ranks, work)


def test_it_learns_as_adamw_does():
    """Three seeds of 25 steps on four rows: the loss that AdamW reaches at the same rate, or a lower one."""
    ends = {}
    for kind in ("adamw", "muon", "adamw8bit"):
        for seed in range(3):
            policy = new_policy(tiny_config(), seed=seed)
            optimizer = build_optimizer(policy, settings(kind=kind, lr=3e-3, weight_decay=0.0))
            rows = batch_of(
                [(random_ids(4, 9 * seed + i), random_ids(6, 99 + 9 * seed + i)) for i in range(4)], "right"
            )
            for _ in range(25):
                loss = -policy.logprobs(*rows).sum() / rows.completion_mask.sum()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            ends.setdefault(kind, []).append(loss.item())
    assert max(ends["adamw"]) < math.log(97) / 2, "nothing was learned"
    assert all(sum(losses) < 1.1 * sum(ends["adamw"]) for losses in ends.values()), ends


def test_muon_without_its_momentum_is_refused():
    with pytest.raises(ValueError, match="optim=muon"):
        build_optimizer(new_policy(tiny_config(), seed=0), settings(kind="muon", momentum=None))
