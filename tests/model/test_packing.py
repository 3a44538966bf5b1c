import pytest
import torch

from model.heads import Policy
from model.packing import Rows, make_rows, pack
from tests.tiny_models import batch_of, random_ids, tiny_config


def test_make_rows_pads_on_the_right_and_masks_decide():
    rows = make_rows(
        [
            {"input_ids": [5, 6, 7], "completion_mask": [False, True, True]},
            {"input_ids": [8, 9], "completion_mask": [False, True]},
        ],
        pad_id=7,
    )
    assert rows.input_ids.tolist() == [[5, 6, 7], [8, 9, 7]]
    assert rows.attention_mask.tolist() == [[True, True, True], [True, True, False]]  # the pad id inside a row is real
    assert rows.completion_mask.tolist() == [[False, True, True], [False, True, False]]
    assert [x.tolist() for x in rows.select([1])[:3]] == [[x[1].tolist()] for x in rows[:3]]


def test_the_stream_holds_each_row_in_order_and_its_targets_row_major():
    rows = [(random_ids(3, 0), random_ids(4, 1)), (random_ids(5, 2), random_ids(1, 3))]
    stream = pack(*batch_of(rows, "left"))
    assert stream.tokens.tolist() == rows[0][0] + rows[0][1] + rows[1][0] + rows[1][1]
    assert stream.positions.tolist() == [*range(7), *range(6)]
    assert stream.targets.tolist() == rows[0][1] + rows[1][1]
    assert stream.predicts.tolist() == [2, 3, 4, 5, 11]
    assert stream.last.tolist() == [6, 12]


def test_answers_go_on_from_their_prompt_and_are_predicted_by_its_last_token():
    prompt = random_ids(4, 0)
    rows = [(prompt, random_ids(2, 1)), (prompt, random_ids(3, 2))]
    stream = pack(*batch_of(rows, "right"))
    assert stream.tokens.tolist() == prompt + rows[0][1] + rows[1][1]
    assert stream.positions.tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6]
    assert stream.predicts.tolist() == [3, 4, 3, 6, 7]
    assert stream.last.tolist() == [5, 8]
    index = torch.arange(9)
    sees = stream.blocks.allowed(index[:, None], index[None, :], None)
    assert sees[6].tolist() == [True] * 4 + [False, False, True, False, False]  # the prompt and itself, no other answer


def test_completions_of_several_turns_are_predicted_from_the_token_before():
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
    completion = torch.tensor([[False, True, False, False, True, True]])
    stream = pack(ids, torch.ones_like(completion), completion)
    assert (stream.predicts.tolist(), stream.targets.tolist()) == ([0, 3, 4], [4, 7, 8])


def test_a_one_token_prompt_under_long_answers_is_not_shared():
    """One token saved would cost a square of answers that do not see each other."""
    rows = [([1], random_ids(60, 1)), ([1], random_ids(60, 2))]
    assert len(pack(*batch_of(rows, "right")).blocks.spans) == 2
    assert len(pack(*batch_of([([1] * 40, row[1]) for row in rows], "right")).blocks.spans) == 1


def test_rows_without_any_completion_pack_whole():
    rows = batch_of([(random_ids(4, 0), []), (random_ids(6, 1), [])], "left")
    stream = pack(*rows)
    assert len(stream.targets) == 0 and stream.last.tolist() == [3, 9]


def bad(name: str) -> Rows:
    rows = Rows(
        *(x.clone() for x in batch_of([(random_ids(3, 0), random_ids(2, 1)), (random_ids(4, 2), [5])], "right")[:3])
    )
    if name == "empty row":
        rows.attention_mask[1] = rows.completion_mask[1] = False
    if name == "marks padding":
        rows.completion_mask[0, -1] = True
    if name == "first token":
        rows.completion_mask[1, 0] = True
    if name == "bool":
        return rows._replace(completion_mask=rows.completion_mask.long())
    if name == "shape":
        return rows._replace(completion_mask=rows.completion_mask[:, 1:])
    return rows


@pytest.mark.parametrize(
    "name, message",
    [
        ("empty row", "row 1 of the batch has no real token"),
        ("marks padding", "row 0: completion_mask marks padding"),
        ("first token", "row 1: its first token is marked as completion"),
        ("bool", "must be bool"),
        ("shape", r"of one shape \(B, T\)"),
    ],
)
def test_masks_that_contradict_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        pack(*bad(name))


def test_make_rows_refuses_a_mask_of_another_length():
    with pytest.raises(ValueError, match="row 0: 3 input_ids but 2 completion_mask"):
        make_rows([{"input_ids": [1, 2, 3], "completion_mask": [False, True]}], pad_id=0)


def test_the_longest_row_is_what_the_window_is_held_against():
    """Two answers on one prompt: a block of 9 tokens, rows of 6 and 8."""
    rows = batch_of([([1, 2, 3, 4, 5], [6]), ([1, 2, 3, 4, 5], [7, 8, 9])], "right")
    assert pack(*rows).blocks.longest == 8
    with pytest.raises(ValueError, match="a row of 8 tokens exceeds the model's window of 7"):
        Policy(tiny_config(max_length=7)).logprobs(*rows)
    Policy(tiny_config(max_length=8)).logprobs(*rows)


def test_a_prompt_that_is_the_beginning_of_another_is_not_shared_with_it():
    """Else the second answer would see the first prompt's last token."""
    rows = [([1, 2, 3], [4, 9]), ([1, 2], [5, 6])]
    assert len(pack(*batch_of(rows, "right")).blocks.spans) == 2
    assert len(pack(*batch_of([rows[0], ([1, 2, 3], [5, 6])], "right")).blocks.spans) == 1
