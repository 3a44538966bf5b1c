"""Demonstrations and prompts: what is read, cut, skipped and reported before the first step."""

import logging

import pytest
from text_samples import EMBEDDED, data_config, said, tiny_tokenizer, write_rows

from data.prompts import encode_prompts, prompt_loader
from data.sft import demonstration_texts, encode_demonstrations, eval_examples, sft_loader

RANKS = {"rank": 0, "world_size": 1}
TALK = {"messages": said("a latte", "what size?", "small", "here you are")}


def encode(path, **changed):
    data = data_config(train=[path], **changed)
    return encode_demonstrations("data.train", data.train, data, tiny_tokenizer())


def test_a_batch_is_batch_size_rows_in_file_order(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", *({"messages": said(f"{i}", f"answer {i}")} for i in range(5)))
    data = data_config(train=[path], shuffle=False)
    batch = next(sft_loader(data, tiny_tokenizer(), batch_size=3, seed=0, **RANKS))
    answers = [tiny_tokenizer().decode(row["input_ids"][row["completion_mask"]]) for row in batch]
    assert answers == ["answer 0", "answer 1", "answer 2"]
    assert [row["where"] for row in batch] == [f"{path}:{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize(
    "row, problem",
    [
        ('{"messages": [', "not JSON"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role 'robot'"),
        ({"messages": said("a")}, "without an assistant turn"),
        ({"messages": said("a " * 99, "b")}, "no assistant token fits in max_length=64"),
        ({"messages": []}, "without an assistant turn"),
    ],
)
def test_a_row_without_a_target_is_an_error_or_is_counted(row, problem, tmp_path, caplog):
    path = write_rows(tmp_path / "a.jsonl", TALK, row)
    with pytest.raises(ValueError, match=f"a.jsonl:2: .*{problem}"):
        encode(path, max_length=64)
    encoded = encode(path, max_length=64, on_bad_row="skip")
    assert len(encoded.items) == 1 and len(encoded.skipped) == 1
    assert f"{path}:2: " in caplog.text and "1 rows skipped" in caplog.text


def test_a_file_of_which_nothing_is_left_is_an_error(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", {"messages": said("a")})
    with pytest.raises(ValueError, match="a.jsonl has no usable row"):
        encode(path, on_bad_row="skip")


def test_an_empty_part_of_a_file_says_how_parts_are_made(tmp_path):
    """TALK's first user turn is in the training part, as is that of every answer to a prompt of FILE@train."""
    path = write_rows(tmp_path / "a.jsonl", TALK)
    assert len(encode(f"{path}@train", max_length=64).items) == 1
    with pytest.raises(ValueError, match="a.jsonl@eval has no usable row; @eval takes rows by their first user turn"):
        encode(f"{path}@eval", max_length=64)


def test_files_are_a_list():
    with pytest.raises(ValueError, match=r"write data.train=\[a.jsonl\]"):
        encode_demonstrations("data.train", "a.jsonl", data_config(), tiny_tokenizer())
    with pytest.raises(ValueError, match="data.train is empty"):
        sft_loader(data_config(), tiny_tokenizer(), batch_size=1, seed=0, **RANKS)
    assert eval_examples(data_config(), tiny_tokenizer()) == []


def test_what_was_cut_is_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = write_rows(tmp_path / "a.jsonl", TALK, {"messages": said("a", "b " * 99)})
    whole, cut = encode(path), encode(path, max_length=60)
    lost = sum(len(row["input_ids"]) for row in whole.items) - sum(len(row["input_ids"]) for row in cut.items)
    assert f"cut at data.max_length: 1 rows, {lost} tokens" in caplog.text and lost > 0
    assert all(row["completion_mask"].any() for row in cut.items)


def test_single_turn_sets_are_warned_about(tmp_path, caplog):
    encode(write_rows(tmp_path / "a.jsonl", {"messages": said("a", "b")}, TALK))
    assert "single-turn" not in caplog.text
    encode(write_rows(tmp_path / "b.jsonl", {"messages": said("a", "b")}))
    assert "data.train: single-turn conversations only" in caplog.text


def test_a_stray_turn_marker_is_reported(tmp_path, caplog):
    path = write_rows(tmp_path / "a.jsonl", TALK, {"messages": said("a", "b\n\nHuman", "c", "d")})
    encode(path)
    assert "1 records have" in caplog.text and f"{path}:2" in caplog.text


def test_files_are_mixed_by_weight(tmp_path):
    files = [write_rows(tmp_path / f"{n}.jsonl", *[{"messages": said(n, n)}] * 4) for n in "ab"]
    data = data_config(train=files, weights=[3, 0.5])
    source = sft_loader(data, tiny_tokenizer(), batch_size=14, seed=0, **RANKS)
    assert source.epoch_size == 14
    assert sum("a.jsonl" in row["where"] for row in next(source)) == 12


def test_training_and_evaluation_parts_of_a_file_are_apart():
    path = str(EMBEDDED / "sft_oasst_train.jsonl.gz")
    data = data_config(train=[f"{path}@train"], eval=[f"{path}@eval"], max_length=2048)
    source = sft_loader(data, tiny_tokenizer(), batch_size=1, seed=0, **RANKS)
    held_out = eval_examples(data, tiny_tokenizer())
    places = [{row["where"] for row in rows} for rows in (source.items, held_out)]
    assert not places[0] & places[1] and len(places[0] | places[1]) == 232


def test_a_tokenizer_may_learn_from_every_message(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", TALK, {"prompt": "x", "completion": "y"})
    assert list(demonstration_texts(data_config(train=[path]))) == [
        "a latte",
        "what size?",
        "small",
        "here you are",
        "x",
        "y",
    ]


def test_prompts_end_with_the_assistants_header_and_keep_columns(tmp_path):
    tokenizer = tiny_tokenizer()
    path = write_rows(tmp_path / "p.jsonl", {"prompt": said("2 + 2?"), "answer": 4, "id": "x"})
    data = data_config(prompts=[path])
    (prompt,) = next(prompt_loader(data, tokenizer, max_length=64, batch_size=1, seed=0, **RANKS))
    assert prompt["input_ids"][-1] == tokenizer.special_id("<|assistant|>")
    assert prompt["columns"] == {"answer": 4, "id": "x"} and prompt["messages"] == said("2 + 2?")
    assert isinstance(prompt["input_ids"], list)


def test_a_prompt_longer_than_the_window_is_never_cut(tmp_path):
    path = write_rows(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "a " * 99})
    data = data_config(prompts=[path])
    with pytest.raises(ValueError, match=r"p.jsonl:2: the prompt takes \d+ tokens, but the window leaves 64"):
        encode_prompts("data.prompts", data.prompts, data, tiny_tokenizer(), max_length=64)
    data.on_bad_row = "skip"
    encoded = encode_prompts("data.prompts", data.prompts, data, tiny_tokenizer(), max_length=64)
    assert len(encoded.items) == len(encoded.skipped) == 1
