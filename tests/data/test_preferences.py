"""Comparisons as elements: one prompt, its completions best first, nothing that teaches nothing."""

import itertools

import pytest
from text_samples import EMBEDDED, data_config, mistral, said, smollm2, tiny_tokenizer, write_rows

from data.preferences import (
    encode_preferences,
    eval_groups,
    preference_loader,
    preference_texts,
    regroup_by_prompt,
)
from data.records import Comparison, Ranking

PROMPT = said("a latte please")
PAIR = {"prompt": PROMPT, "chosen": "sure", "rejected": "no"}


def encode(path, tokenizer=None, **changed):
    data = data_config(train=[str(path)], **changed)
    return encode_preferences("data.train", data.train, data, tokenizer or tiny_tokenizer()).items


def answers(group, tokenizer=None):
    return [(tokenizer or tiny_tokenizer()).decode(row["input_ids"][row["completion_mask"]]) for row in group.rows]


def test_a_pair_is_two_rows_chosen_first(tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", PAIR | {"margin": 2}, PAIR | {"tie": True})
    one, two = encode(path)
    assert answers(one) == answers(two) == ["sure", "no"]
    assert (one.ranks, one.margin, one.is_tie) == ([0.0, 1.0], 2.0, False)
    assert (two.ranks, two.margin, two.is_tie) == ([0.0, 0.0], 0.0, True)
    assert (one.source, one.where, one.reward) == ("pairs", f"{path}:1", None)


def test_a_ranking_is_k_rows_best_first(tmp_path):
    row = {"prompt": PROMPT, "completions": ["worst", "best", "good", "fine"], "ranks": [4, 1, 2, 2]}
    (group,) = encode(write_rows(tmp_path / "a.jsonl", row))
    assert answers(group) == ["best", "good", "fine", "worst"] and group.ranks == [1, 2, 2, 4]


def test_a_rated_completion_is_one_row():
    rated = encode(EMBEDDED / "reward_coffee_train.jsonl.gz", max_length=1024, max_prompt_length=900)
    assert len(rated) == 2541 and all(len(group.rows) == 1 for group in rated)
    assert round(sum(group.reward for group in rated) / 2541, 2) == 0.86  # as published with the set
    assert sum(answers(group)[0].startswith("call ") for group in rated) / 2541 == pytest.approx(0.77, abs=0.01)


@pytest.mark.parametrize("make", [tiny_tokenizer, smollm2, lambda: mistral("llama2"), lambda: mistral("zephyr")])
def test_rows_of_an_element_share_the_prompt_and_end_with_one_stop_token(make):
    tokenizer = make()
    for group in encode(EMBEDDED / "pref_hh_helpful_test.jsonl.gz", tokenizer, max_length=4096, max_prompt_length=4096):
        starts = [int(row["completion_mask"].argmax()) for row in group.rows]
        assert len(set(starts)) == 1 and starts[0] > 0
        one, two = (row["input_ids"] for row in group.rows)
        assert (one[: starts[0]] == two[: starts[0]]).all()
        for row in group.rows:
            completion = row["input_ids"][row["completion_mask"]]
            assert (completion == tokenizer.stop_id).sum() == 1 and completion[-1] == tokenizer.stop_id
            assert row["completion_mask"][starts[0] :].all()


def test_cut_pairs_still_share_their_prompt():
    for group in encode(EMBEDDED / "pref_hh_helpful_test.jsonl.gz", max_length=96, max_prompt_length=48):
        starts = [int(row["completion_mask"].argmax()) for row in group.rows]
        assert len(set(starts)) == 1 and max(len(row["input_ids"]) for row in group.rows) <= 96
        assert (group.rows[0]["input_ids"][: starts[0]] == group.rows[1]["input_ids"][: starts[0]]).all()
        assert all(row["completion_mask"].any() for row in group.rows)


def test_sides_that_become_identical_by_the_cut_are_found(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", PAIR, PAIR | {"chosen": "a " * 90 + "b", "rejected": "a " * 90 + "c"})
    with pytest.raises(ValueError, match=r"a.jsonl:2: .*identical within data.max_length"):
        encode(path, max_length=64, max_prompt_length=32)
    assert len(encode(path, max_length=64, max_prompt_length=32, on_bad_row="skip")) == 1


def test_comparisons_and_ratings_do_not_mix(tmp_path):
    rated = {"context": PAIR["prompt"], "generation": {"role": "agent", "text": "hi"}, "reward": 1}
    path = write_rows(tmp_path / "a.jsonl", PAIR, rated)
    with pytest.raises(ValueError, match=r"rated completions \(.*:2\) and comparisons \(.*:1\)"):
        encode(path)


def test_an_empty_rated_completion_is_kept_and_reported(caplog):
    rated = encode(EMBEDDED / "reward_movie_train.jsonl.gz", max_length=512, max_prompt_length=400)
    assert len(rated) == 2908 and "3 rated completions are empty" in caplog.text


def test_pairs_whose_chosen_side_has_the_lower_score_are_counted(tmp_path, caplog):
    """Two of five are exchanged; equal scores, texts and rows without scores are no sign of it."""
    scores = [(2, 5), (5, 2), (3, 3), ("2", "5"), (1.5, 2.5)]
    rows = [{"prompt": "a", "chosen": f"b{i}", "rejected": "c", "score_chosen": good, "score_rejected": bad}
            for i, (good, bad) in enumerate(scores)]  # fmt: skip
    encode(write_rows(tmp_path / "pairs.jsonl", *rows, {"prompt": "a", "chosen": "b", "rejected": "c"}))
    assert "the chosen side of 2 of 6 comparisons has the lower score" in caplog.text
    assert "pairs.jsonl:1" in caplog.text and "pairs.jsonl:5" in caplog.text


def pairs_of(order, ties=()):
    pairs = [Comparison(PROMPT, a, b) for a, b in itertools.combinations(order, 2)]
    return [Comparison(p.prompt, p.chosen, p.rejected, tie={p.chosen, p.rejected} in ties) for p in pairs]


def test_complete_pairs_become_the_ranking_they_came_from():
    (ranking,) = regroup_by_prompt(pairs_of("bdac"))
    assert ranking == Ranking(PROMPT, ["b", "d", "a", "c"], [0, 1, 2, 3])
    (ranking,) = regroup_by_prompt(pairs_of("bdac", ties=[{"d", "a"}]))
    assert ranking.ranks == [0, 1, 1, 3]


def test_pairs_that_spell_no_order_stay_pairs():
    incomplete = pairs_of("abcd")[:-1]
    circle = [Comparison(PROMPT, *sides) for sides in ("ab", "bc", "ca")]
    contradiction = [*pairs_of("abc"), Comparison(PROMPT, "b", "a")]
    equal_to_both = pairs_of("abc", ties=[{"a", "b"}, {"a", "c"}])  # a as good as b and as c, but b over c
    for pairs in (incomplete, circle, contradiction, equal_to_both, pairs_of("ab")):
        assert regroup_by_prompt(pairs) == pairs


def test_margins_do_not_keep_pairs_from_their_ranking():
    margins = [Comparison(PROMPT, p.chosen, p.rejected, 1.5) for p in pairs_of("bdac")]
    assert regroup_by_prompt(margins) == [Ranking(PROMPT, ["b", "d", "a", "c"], [0, 1, 2, 3])]


def test_openassistant_pairs_regroup_into_complete_rankings():
    path = EMBEDDED / "pref_oasst_train.jsonl.gz"
    groups = encode(path, kwise=True, max_length=2048, max_prompt_length=1024)
    sizes = [len(group.rows) for group in groups]
    assert sum(k * (k - 1) // 2 for k in sizes) == 697 == len(encode(path, max_length=2048, max_prompt_length=1024))
    assert max(sizes) == 9 and len({tuple(group.rows[0]["input_ids"]) for group in groups}) == len(groups)


def test_a_loader_deals_elements_to_ranks_and_evaluates_in_file_order(tmp_path):
    rows = [PAIR | {"prompt": said(str(i))} for i in range(6)]
    path = write_rows(tmp_path / "a.jsonl", *rows)
    data = data_config(train=[path], eval=[path], shuffle=False)
    shares = [
        next(preference_loader(data, tiny_tokenizer(), batch_size=4, seed=0, rank=rank, world_size=2))
        for rank in (0, 1)
    ]
    lines = [[group.where.rpartition(":")[2] for group in share] for share in shares]
    assert lines == [["1", "3"], ["2", "4"]]
    assert [group.where for group in eval_groups(data, tiny_tokenizer())] == [f"{path}:{i}" for i in range(1, 7)]
    assert eval_groups(data_config(), tiny_tokenizer()) == []


def test_a_tokenizer_may_learn_from_every_side(tmp_path):
    ranking = {"prompt": "x", "completions": ["y", "z"], "ranks": [1, 2]}
    path = write_rows(tmp_path / "a.jsonl", PAIR, ranking)
    assert list(preference_texts(data_config(train=[path]))) == ["a latte please", "sure", "no", "x", "y", "z"]
