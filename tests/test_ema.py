import pytest
import torch

from model.ema import WeightAverage


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
