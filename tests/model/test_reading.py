"""Models that are only read: one way to load them, and rows in any batches give the same figures in their order."""

import re
from pathlib import Path

import pytest
import torch

from model.build import new_reward_model
from model.reading import in_batches
from tests.tiny_models import random_ids, shaken, tiny_config

ROOT = Path(__file__).parents[2]


def test_every_evaluator_and_method_loads_its_model_in_the_one_way():
    """Else it would stay on the CPU of a machine with a GPU, and in float32."""
    places = ("evals", "data", "generation", "arena")
    files = [path for place in places for path in (ROOT / place).rglob("*.py")] + [ROOT / "arena.py"]
    own = {
        str(path.relative_to(ROOT))
        for path in files
        if re.search(r"\bload_(policy|reward_model|value_model)\b", path.read_text(encoding="utf-8"))
    }
    assert not own


def rows_of(sizes):
    ids = [(random_ids(3 + i % 4, i), random_ids(size, 50 + i)) for i, size in enumerate(sizes)]
    return [{"input_ids": p + c, "completion_mask": [False] * len(p) + [True] * len(c)} for p, c in ids]


@pytest.mark.parametrize("batch_size, together", [(1, 1), (3, 1), (64, 1), (1, 2), (4, 2)])
def test_rows_come_back_in_their_order_whatever_the_batches(batch_size, together):
    model = shaken(new_reward_model(tiny_config(), seed=0, precision="fp32")).requires_grad_(False)
    rows = rows_of([5, 1, 9, 2, 7, 7, 3, 4])
    alone = [in_batches(model.score, [row], pad_id=0, batch_size=1, device=torch.device("cpu")) for row in rows]
    settings = {"pad_id": 0, "batch_size": batch_size, "device": torch.device("cpu"), "together": together}
    assert torch.allclose(in_batches(model.score, rows, **settings), torch.cat(alone), atol=1e-5)


def test_rows_that_belong_together_share_a_forward_and_the_longest_come_first():
    seen = []

    def spy(input_ids, attention_mask, completion_mask, stream):
        seen.append(attention_mask.sum(1).tolist())
        return attention_mask.sum(1)

    rows = [{"input_ids": [1] * n, "completion_mask": [False] + [True] * (n - 1)} for n in (2, 3, 8, 9, 5, 6)]
    told = in_batches(spy, rows, pad_id=0, batch_size=2, device=torch.device("cpu"), together=2)
    assert told.tolist() == [2, 3, 8, 9, 5, 6]
    assert seen == [[8, 9], [5, 6], [2, 3]]
