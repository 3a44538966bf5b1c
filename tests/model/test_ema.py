import pytest
import torch

from model.build import load_policy
from model.ema import WeightAverage
from tests.test_train_ppo import inputs, ppo  # noqa: F401 - fixtures


def test_what_is_evaluated_is_what_is_exported(ppo, inputs, tmp_path, read_metrics):  # noqa: F811
    """Through the whole command: an average that has hardly left the start has no KL to it, the weights have."""
    words = [f"data.eval=[{inputs}/rows.jsonl]", "eval_every=1", "num_prompts=8", "optim.lr=1e-2", "num_steps=3"]
    for run, decay in (("average", "0.9999999"), ("last", "null")):
        assert ppo(*words, f"ema_decay={decay}", run=run) == 0
    average, last = (read_metrics(tmp_path / run)[-1] for run in ("average", "last"))
    assert average["eval/kl"] < 1e-4 < 0.01 < last["eval/kl"]
    assert average["objective/kl"] == last["objective/kl"] > 0.01  # the rollouts are the weights' own, and go on so
    first, exported = (load_policy(path) for path in (inputs / "policy", tmp_path / "average" / "model"))
    for before, after in zip(first.parameters(), exported.parameters(), strict=True):
        assert torch.allclose(before, after, atol=1e-5)


def test_average_follows_its_recurrence_and_comes_back_from_its_state():
    model = torch.nn.Linear(3, 2)
    average, expected = WeightAverage(model, 0.9), model.weight.detach().clone()
    for _ in range(5):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        average.update(model)
        expected = 0.9 * expected + 0.1 * model.weight.detach()
    torch.testing.assert_close(average.average["weight"], expected)
    other = WeightAverage(torch.nn.Linear(3, 2), 0.9)
    other.load_state_dict(average.state_dict())
    assert torch.equal(other.average["weight"], average.average["weight"])


def test_the_model_carries_the_average_only_inside_the_block():
    model = torch.nn.Linear(3, 2)
    average, own = WeightAverage(model, 0.5), model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    average.update(model)
    with average.swapped_in(model):
        torch.testing.assert_close(model.weight.detach(), own + 0.5)
    torch.testing.assert_close(model.weight.detach(), own + 1.0)
    torch.testing.assert_close(average.average["weight"], own + 0.5)


def test_no_decay_keeps_no_copy_and_leaves_the_weights():
    model = torch.nn.Linear(3, 2)
    average = WeightAverage(model, None)
    average.update(model)
    own = model.weight.detach().clone()
    with average.swapped_in(model):
        assert torch.equal(model.weight, own)
    assert average.state_dict() == {}


def test_a_decay_of_one_is_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        WeightAverage(torch.nn.Linear(1, 1), 1.0)
