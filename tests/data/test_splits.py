"""What is learned from, and what is held out: values through whole commands."""

import logging
from pathlib import Path

import numpy as np
import pytest
from text_samples import EMBEDDED, data_config, said, tiny_tokenizer, write_rows

import train_sft
from data import formats
from data.preferences import eval_groups, preference_loader
from data.records import BadRows, opening, read_records
from data.sft import eval_examples, sft_loader

RANKS = {"batch_size": 1, "seed": 0, "rank": 0, "world_size": 1}
PIRATE = [{"role": "system", "content": "You are a pirate."}, *said("Hi", "Arr")]
TINY = [
    "model=tiny", "model.num_layers=1", "model.hidden_size=32", "model.intermediate_size=48", "model.num_heads=2",
    "model.num_kv_heads=1", "model.head_dim=16", "num_steps=1", "batch_size=1", "micro_batch_size=1", "eval_every=0",
    "sample_every=0", "save_every=0", "log.wandb=disabled", "model.vocab_size=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save(directory)
    return directory


@pytest.fixture
def trained_on(run_script, tokenizer_dir, tmp_path, monkeypatch):
    """trained_on(rows, *words) -> (text read, text learned) of the rows that `train_sft.py` takes, or its exit code."""
    seen = []
    real = train_sft.make_rows

    def spy(part, pad_id):
        seen.extend(part)
        return real(part, pad_id)

    def run(*rows, words=()):
        path = write_rows(tmp_path / "rows.jsonl", *rows)
        monkeypatch.setattr(train_sft, "make_rows", spy)
        words = [*TINY, f"num_steps={len(rows)}", f"tokenizer={tokenizer_dir}", f"data.train=[{path}]", *words]
        code = run_script(
            train_sft, *words, "data.shuffle=false", f"hydra.run.dir={tmp_path / 'run'}", "overwrite=true"
        )
        decode = tiny_tokenizer().decode
        read = [(decode(r["input_ids"], specials=True), decode(r["input_ids"][r["completion_mask"]])) for r in seen]
        return code or read

    return run


def test_the_system_column_is_the_system_turn_in_every_kind_of_row(trained_on):
    rows = [
        {"system": "You are a pirate.", "messages": said("Hi", "Arr")},
        {"system": "You are a pirate.", "prompt": "Hi", "completion": "Arr"},
        {"messages": PIRATE},
    ]
    read = trained_on(*rows)
    assert len(read) == 3 and len(set(read)) == 1 and "pirate" in read[0][0] and read[0][1] == "Arr"
    pair = {"system": "You are a pirate.", "question": "Hi", "chosen": "Arr", "rejected": "Yo"}
    (record,) = formats.preferences({"prompt": "Hi"} | {k: v for k, v in pair.items() if k != "question"})
    assert record.prompt == PIRATE[:2] == formats.prompts({"system": "You are a pirate.", "prompt": "Hi"})[0].prompt
    with pytest.raises(ValueError, match="another system turn"):
        formats.examples({"system": "Be brief.", "messages": PIRATE})


def test_a_context_and_a_prompt_are_read_one_after_the_other():
    row = {"context": said("a", "b"), "prompt": "now", "chosen": "c", "rejected": "d"}
    assert formats.preferences(row)[0].prompt == formats.prompts(row)[0].prompt == said("a", "b", "now")
    repeated = row | {"context": said("a", "b", "now")}
    assert formats.preferences(repeated)[0].prompt == said("a", "b", "now")
    with pytest.raises(ValueError, match="both texts"):
        formats.preferences(row | {"context": "background"})


def test_a_side_may_go_on_from_the_prompt_or_repeat_it():
    call = [{"role": "assistant", "content": "call x"}, {"role": "tool", "content": "4"}]
    sides = {name: [*call, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    (record,) = formats.preferences({"prompt": PIRATE[:2], **sides})
    assert record.prompt == [*PIRATE[:2], *call] and (record.chosen, record.rejected) == ("chosen", "rejected")
    repeated = {name: [*said("Hi"), {"role": "assistant", "content": name}] for name in sides}
    assert formats.preferences({"prompt": PIRATE[:2], **repeated})[0].prompt == PIRATE[:2]


def test_an_answer_goes_on_with_the_turn_that_its_prompt_began():
    prompt = [*said("Count"), {"role": "assistant", "content": "One, two"}]
    (pair,) = formats.preferences({"prompt": prompt, "chosen": " three", "rejected": " cat"})
    assert (pair.prompt, pair.chosen, pair.rejected) == (said("Count"), "One, two three", "One, two cat")
    assert formats.examples({"prompt": prompt, "completion": " three"})[0].messages == said("Count", "One, two three")


def test_a_conversation_that_goes_on_in_the_completion_is_learned_turn_by_turn(trained_on):
    row = {"prompt": said("q"), "completion": [{"role": "assistant", "content": "a"}, *said("b", "c")]}
    assert trained_on(row)[0][1] == "a c"


def test_columns_of_any_set_are_named_on_the_command_line(trained_on):
    row = {"question": "2+2?", "reply": "Four."}
    ((read, learned),) = trained_on(row, words=["data.columns={prompt: question, answer: reply}"])
    assert learned == "Four." and "2+2?" in read


def test_a_turn_of_weight_0_is_read_and_not_learned(trained_on):
    talk = said("2+2?", "Five.", "Sure?", "Sorry, four.")
    for field in ({"weight": 0}, {"train": False}):
        *_, (read, learned) = trained_on({"messages": [talk[0], talk[1] | field, *talk[2:]]})
        assert learned == "Sorry, four." and "Five." in read


def test_what_was_rated_bad_or_says_nothing_is_no_demonstration(trained_on, capsys):
    good, bad = ({"prompt": "Hi", "completion": "Hello", "label": label} for label in (True, False))
    assert trained_on(good)[0][1] == "Hello"
    for row, problem in (
        (bad, "rows.jsonl:2: rated bad (label=false)"),
        ({"prompt": "Hi", "completion": "Hello", "reward": 0.2}, "rows.jsonl:2: rated bad (reward=0.2)"),
        ({"messages": said("Hi", " ")}, "rows.jsonl:2: messages[1] is an empty assistant turn"),
    ):
        assert trained_on(good, row) == 2 and problem in capsys.readouterr().err
        assert {learned for _, learned in trained_on(good, row, words=["data.on_bad_row=skip"])} == {"Hello"}


def test_parts_of_text_are_joined_and_pictures_refused():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    (example,) = formats.examples({"messages": [*said("Hi"), {"role": "assistant", "content": parts}]})
    assert example.messages[1]["content"] == "Hello"
    with pytest.raises(ValueError, match="part of type 'image_url'"):
        formats.examples({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]})


def parts_of(path, parse) -> list[list]:
    return [read_records(f"{path}@{part}", parse, BadRows("error")) for part in ("train", "eval")]


def test_answers_to_one_prompt_turns_of_one_dialogue_and_branches_of_a_tree_fall_on_one_side(tmp_path):
    answers = [{"prompt": f"q{i}", "chosen": f"a{k}", "rejected": "b"} for i in range(95) for k in range(4)]
    dialogue = [{"messages": said(*["hello", "yes"] * k, "x", "y")} for k in range(1, 4)]
    growing = [
        {
            "context": [
                {"role": "agent", "text": "Hi"},
                *({"role": "user", "text": f"d{i} t{t}"} for t in range(k + 1)),
            ],
            "generation": {"role": "agent", "text": "ok"},
            "reward": 1,
        }
        for i in range(95)
        for k in range(3)
    ]
    for rows, parse in ((answers, formats.preferences), (growing, formats.preferences), (dialogue, formats.examples)):
        path = write_rows(tmp_path / "rows.jsonl", *rows)
        train, held_out = parts_of(path, parse)
        assert len(train) + len(held_out) == len(rows)
        assert not {opening(r) for r in train} & {opening(r) for r in held_out}
    assert 0 < len(parts_of(write_rows(tmp_path / "a.jsonl", *answers), formats.preferences)[1]) < 95


@pytest.mark.parametrize(
    "name, parse",
    [
        ("reward_movie_train", formats.preferences),
        ("reward_coffee_train", formats.preferences),
        ("sft_coffee_train", formats.examples),
        ("pref_oasst_train", formats.preferences),
    ],
)
def test_no_held_out_row_of_the_embedded_sets_begins_like_a_training_row(name, parse):
    train, held_out = parts_of(EMBEDDED / f"{name}.jsonl.gz", parse)
    known = {opening(r) for r in train}
    assert not [r.where for r in held_out if opening(r) in known] or {None} >= known & {opening(r) for r in held_out}
    assert 0.04 < len(held_out) / (len(train) + len(held_out)) < 0.17


def test_overlap_of_training_and_evaluation_is_counted(tmp_path, caplog):
    rows = [{"messages": said(f"q{i}", f"a{i}")} for i in range(8)]
    train = write_rows(tmp_path / "train.jsonl", *rows[:6], {"messages": said("q6", "another")})
    held_out = write_rows(tmp_path / "eval.jsonl", *rows[4:])
    data = data_config(train=[train], eval=[held_out])
    with caplog.at_level(logging.WARNING):
        eval_examples(data, tiny_tokenizer(), sft_loader(data, tiny_tokenizer(), **RANKS))
    assert "data.eval: 3 of 4 items begin with a user turn of the training data, and 2 are" in caplog.text
    caplog.clear()
    pairs = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(4)]
    data = data_config(
        train=[write_rows(tmp_path / "p.jsonl", *pairs)], eval=[write_rows(tmp_path / "q.jsonl", *pairs[2:])]
    )
    with caplog.at_level(logging.WARNING):
        eval_groups(data, tiny_tokenizer(), preference_loader(data, tiny_tokenizer(), **RANKS))
    assert "2 of 2 items" in caplog.text and "and 2 are" in caplog.text
    caplog.clear()
    path = str(EMBEDDED / "pref_oasst_train.jsonl.gz")
    data = data_config(train=[f"{path}@train"], eval=[f"{path}@eval"], max_length=2048, max_prompt_length=1024)
    eval_groups(data, tiny_tokenizer(), preference_loader(data, tiny_tokenizer(), **RANKS))
    assert "items begin with" not in caplog.text


def test_proportions_are_shares_of_the_targets_and_a_mixture_says_what_it_is(tmp_path, caplog):
    long, short = ([{"messages": said(f"q{n}{i}", "word " * n)} for i in range(30)] for n in (40, 4))
    files = [write_rows(tmp_path / f"{name}.jsonl", *rows) for name, rows in (("long", long), ("short", short))]
    data = data_config(train=files, proportions=[1, 3])
    with caplog.at_level(logging.INFO):
        loader = sft_loader(data, tiny_tokenizer(), **RANKS)
    targets = {"long": 0, "short": 0}
    for _ in range(loader.epoch_size):
        (row,) = next(loader)
        targets[Path(row["where"]).name.split(".")[0]] += int(np.sum(row["completion_mask"]))
    assert targets["short"] / sum(targets.values()) == pytest.approx(0.75, abs=0.02)
    whole = sum(int(np.sum(row["completion_mask"])) for row in loader.items)
    assert sum(targets.values()) == pytest.approx(whole, rel=0.03)
    assert "short.jsonl: " in caplog.text and "(75.0 %)" in caplog.text and "(25.0 %)" in caplog.text
    with pytest.raises(ValueError, match="give only one of them"):
        sft_loader(data_config(train=files, proportions=[1, 3], weights=[1, 1]), tiny_tokenizer(), **RANKS)
    with pytest.raises(ValueError, match=r"data.proportions gives \S+ 0\.\S+ of its \d+ rows, which is none; raise it"):
        sft_loader(data_config(train=files, proportions=[1, 1e-4]), tiny_tokenizer(), **RANKS)
    with pytest.raises(ValueError, match=r"data.weights gives \S+short.jsonl 0.01 of its 30 rows, which is none"):
        sft_loader(data_config(train=files, weights=[1, 0.01]), tiny_tokenizer(), **RANKS)
    with pytest.raises(ValueError, match="data.proportions has 1 entries for 2 files"):
        sft_loader(data_config(train=files, proportions=[1]), tiny_tokenizer(), **RANKS)


def test_weights_are_of_the_prompts_and_not_of_the_ptx_files(tmp_path, compose):
    from rollouts.pretraining import pretraining_loader

    ptx = [write_rows(tmp_path / f"{n}.jsonl", *({"messages": said(f"{n}{i}", "b")} for i in range(3))) for n in "xyz"]
    cfg = compose("train_ppo", "policy=x", "ptx_coef=1", f"data.ptx=[{','.join(ptx)}]", "data.weights=[5]")

    loader = pretraining_loader(cfg.data, tiny_tokenizer(), window=512, **RANKS)
    assert loader.weights == [1.0, 1.0, 1.0]
