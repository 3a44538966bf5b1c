"""Laws 1 and 2: results do not depend on how rows are batched, padded, packed or shared."""

import pytest
import torch

from model.build import new_policy, new_reward_model
from model.heads import ValueModel
from model.packing import Rows, pack
from tests.tiny_models import FAMILY, batch_of, random_ids, tiny_config

SHARED = random_ids(
    11, seed=0
)  # one prompt under three completions, then rows of their own, one with no prompt but bos
ROWS = [(SHARED, random_ids(7, 1)), (SHARED, random_ids(1, 2)), (SHARED, random_ids(12, 3))]
ROWS += [(random_ids(4, 4), random_ids(9, 5)), (random_ids(1, 6), random_ids(17, 7))]


def models(family: str) -> dict:
    """Each head's outputs as a function of a batch: (B, T) or (B,)."""
    config = tiny_config(family)
    policy, reward_model = (new(config, seed=0, precision="fp32").double() for new in (new_policy, new_reward_model))
    value_model = ValueModel(config).double()
    with torch.no_grad():  # weights far from their small start, so that attention is not flat
        for model in (policy, reward_model, value_model):
            for number, weight in enumerate(model.parameters()):
                weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(number))
    heads = {"logprobs": policy.logprobs, "scores": reward_model.score, "values": value_model}
    heads["entropy"] = lambda *rows: policy.logprobs_and_entropy(*rows, temperature=0.7)[1]
    owners = {"logprobs": policy, "entropy": policy, "scores": reward_model, "values": value_model}
    return {name: (heads[name], owners[name]) for name in heads}


def measure(head, owner, batches: list[Rows]) -> tuple[list, dict]:
    """Outputs at real completion tokens (or per row) in row order, and the gradient of a fixed mix of them."""
    owner.zero_grad()
    outputs = []
    for rows in batches:
        out = head(*rows)
        outputs.append(out[rows.completion_mask] if out.ndim == 2 else out)
        if out.ndim == 2:
            assert (out[~rows.completion_mask] == 0).all()
    flat = torch.cat(outputs)
    (flat.double() * torch.linspace(-1, 1, len(flat), dtype=torch.float64)).sum().backward()
    return flat.detach(), {name: weight.grad.clone() for name, weight in owner.named_parameters()}


def assert_same(got, expected, tolerance=2e-6):
    torch.testing.assert_close(got[0], expected[0], rtol=tolerance, atol=tolerance)
    for name, grad in expected[1].items():
        scale = grad.abs().max().item() + 1e-3
        assert (got[1][name] - grad).abs().max().item() <= 10 * tolerance * scale, name


@pytest.mark.parametrize("family", FAMILY)
def test_padding_packing_sharing_and_micro_batches_change_nothing(family):
    """One row alone without padding is the definition; every other layout of the same rows must give the same."""
    for head, owner in models(family).values():
        alone = measure(head, owner, [batch_of([row], "right", extra=0) for row in ROWS])
        for padding in ("left", "right", "both"):
            assert_same(measure(head, owner, [batch_of(ROWS, padding)]), alone)
        assert_same(measure(head, owner, [batch_of(ROWS[:2], "left"), batch_of(ROWS[2:], "right")]), alone)


def test_a_shared_prompt_lies_in_the_stream_once():
    stream = pack(*batch_of(ROWS, "left"))
    assert stream.blocks.spans == [(0, 31), (31, 44), (44, 62)]  # 11 + 7 + 1 + 12, 4 + 9, 1 + 17
    assert len(stream.tokens) == 62


def test_rows_with_equal_prompts_apart_from_each_other_agree_with_the_shared_layout():
    """Sharing looks at neighbours only: other rows in between mean two copies, and the same numbers."""
    head, owner = models("llama")["logprobs"]
    together = measure(head, owner, [batch_of([ROWS[0], ROWS[1], ROWS[3]], "right")])
    apart_rows = batch_of([ROWS[0], ROWS[3], ROWS[1]], "right")
    assert len(pack(*apart_rows).tokens) == len(pack(*batch_of([ROWS[0], ROWS[1], ROWS[3]], "right")).tokens) + 11
    out = head(*apart_rows)
    apart = torch.cat([out[b][apart_rows.completion_mask[b]] for b in (0, 2, 1)])
    torch.testing.assert_close(apart, together[0], rtol=2e-6, atol=2e-6)


def test_exact_kl_to_itself_is_zero_and_to_another_is_the_sum_over_the_vocabulary():
    policy, other = (new_policy(tiny_config(), seed=seed) for seed in (0, 1))
    with torch.no_grad():
        policy.lm_head.weight.mul_(20)
    rows = batch_of(ROWS, "left")
    assert policy.exact_kl(policy, *rows).abs().max() < 1e-6
    stream = pack(*rows)
    logits = [p(stream.tokens, stream.positions, stream.blocks, stream.predicts) / 0.7 for p in (policy, other)]
    log_p, log_q = (x.log_softmax(-1) for x in logits)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    kl = policy.exact_kl(other, *rows, temperature=0.7)
    torch.testing.assert_close(kl[rows.completion_mask], expected, rtol=1e-4, atol=1e-5)
