import pytest
import torch

from model.next_token import next_token, uniforms


def test_uniforms_are_uniform_and_independent_of_the_batch():
    seeds, steps = torch.arange(40_001) % 211, torch.arange(40_001) // 211
    u = uniforms(seeds, steps)
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u.float(), bins=50, min=0, max=1)
    chi_square = ((counts - 40_001 / 50) ** 2 / (40_001 / 50)).sum()
    assert chi_square < 85.4  # 49 degrees of freedom, p = 0.001
    assert len(u.unique()) == len(u)
    pair = uniforms(seeds[[17, 9]], steps[[17, 9]])
    assert torch.equal(pair, u[[17, 9]])


@pytest.mark.parametrize("V", [1, 7, 255, 257, 1000])
def test_tokens_follow_the_softmax_at_the_temperature(V):
    torch.manual_seed(V)
    logits, n = torch.randn(1, V) * 2, 60_000
    u = (torch.arange(n) + 0.5) / n  # a grid: the empirical distribution is exact up to 1/n
    tokens = next_token(logits.expand(n, -1), u.double(), temperature=0.7, top_k=0, top_p=1.0)
    frequency = torch.bincount(tokens, minlength=V) / n
    assert (frequency - (logits[0] / 0.7).softmax(-1)).abs().max() < 2 / n + 1e-6


@pytest.mark.parametrize("top_k, top_p", [(5, 1.0), (0, 0.6), (7, 0.8), (3, 1e-9), (10_000, 0.999)])
def test_top_k_and_top_p_keep_what_a_sort_keeps(top_k, top_p):
    torch.manual_seed(1)
    logits, n = torch.randn(1, 301) * 3, 20_000
    order = logits[0].sort(descending=True)
    kept = torch.ones(301, dtype=torch.bool)
    if top_k:
        kept[top_k:] = False
    p = order.values.masked_fill(~kept, -torch.inf).double().softmax(-1)
    kept &= (p.cumsum(-1) - p) < top_p
    expected = torch.zeros(301, dtype=torch.float64)
    expected[order.indices] = p.where(kept, 0.0) / p[kept].sum()
    u = (torch.arange(n).double() + 0.5) / n
    tokens = next_token(logits.expand(n, -1), u, temperature=1.0, top_k=top_k, top_p=top_p)
    assert (torch.bincount(tokens, minlength=301) / n - expected).abs().max() < 2 / n + 1e-6


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    tokens = next_token(torch.zeros(1, 4), torch.tensor([0.9]).double(), temperature=1.0, top_k=0, top_p=0.5)
    assert tokens.tolist() == [1]  # two of four equal tokens reach one half


def test_a_token_without_probability_is_never_taken():
    logits = torch.full((3, 600), -torch.inf)
    logits[0, 599], logits[1, 0], logits[2, 300] = 5.0, -3.0, 0.0
    for u in (0.0, 0.5, 1 - 2.0**-53):
        for top_k, top_p in ((0, 1.0), (4, 0.9)):
            tokens = next_token(logits, torch.full((3,), u).double(), temperature=1.0, top_k=top_k, top_p=top_p)
            assert tokens.tolist() == [599, 0, 300]


def test_temperature_zero_is_argmax():
    logits = torch.tensor([[0.0, 3.0, 3.0], [1.0, -1.0, 0.5]])
    assert next_token(logits, torch.tensor([0.9, 0.9]).double(), temperature=0, top_k=0, top_p=1.0).tolist() == [1, 0]
