"""What is shown is what is trained on: every token, its mask, what was cut, and where rows meet in a pack."""

import json
import re
from html import unescape

import numpy as np
import pytest
import torch
from text_samples import data_config, said, smollm2, tiny_tokenizer, write_rows

import train_sft
from data import formats
from data.adapters import Layout
from data.chat import encode_chat, encode_completions
from data.checks.token_stats import check_token_stats, describe
from data.checks.view import check_view
from data.preferences import encode_preferences
from data.view import batch_rows, pack_starts, token_texts, tokens_html, trace
from model.packing import make_rows, pack

VIEW = {"kind": "any", "rows": [], "num": 1, "max_length": 40, "max_prompt_length": 12, "on_bad_row": "error"}
TALK = {"messages": said("a latte please", "what size?", "small", "here you are")}
PAIR = {
    "prompt": said("one", "two", "a large coffee with milk and sugar please"),
    "chosen": "sure, here",
    "rejected": "no",
}


@pytest.mark.parametrize("make", [tiny_tokenizer, smollm2])
@pytest.mark.parametrize("max_length, max_prompt_length", [(1000, 500), (30, 9), (21, 21)])
def test_the_tokens_that_are_not_cut_are_the_trainers_row(make, max_length, max_prompt_length):
    tokenizer, limits = make(), {"max_length": max_length, "max_prompt_length": max_prompt_length}
    talk, pair = formats.examples(TALK)[0], formats.preferences(PAIR)[0]
    long = {"max_length": max_length + 20}
    rows = [encode_chat(talk.messages, tokenizer, **long)]
    rows += encode_completions(pair.prompt, [pair.chosen, pair.rejected], tokenizer, **(limits | long))
    sides = trace(talk, tokenizer, **(limits | long)) + trace(pair, tokenizer, **(limits | long))
    for side, row in zip(sides, rows, strict=True):
        kept = [token for token in side.tokens if not token.cut]
        assert [token.id for token in kept] == list(row["input_ids"])
        assert [token.target for token in kept] == list(row["completion_mask"])
        assert len(side.tokens) - len(kept) == row["num_cut"]


def test_the_texts_of_tokens_spell_the_row_and_specials_are_told():
    tokenizer = smollm2()
    (side,) = trace(
        formats.examples({"messages": said("Two  spaces,\n\ttab", "naïve 12 <|im_end|>")})[0],
        tokenizer,
        max_length=999,
        max_prompt_length=999,
    )
    ids = [token.id for token in side.tokens]
    assert "".join(token_texts(ids, tokenizer)) == tokenizer.decode(ids, specials=True)
    assert [t.text for t in side.tokens if t.special and t.target] == ["<|im_end|>"]  # the one that was written is text
    page = tokens_html(side.tokens)
    plain = unescape(re.sub(r'<span class="break">.</span>|<[^>]*>', "", page))
    assert "naïve 12 <|im_end|>" in plain and len(re.findall(r'class="t[" ]', page)) == len(ids)
    emoji = tokenizer.encode("🙂")
    assert len(emoji) > 1 and all(token_texts(emoji, tokenizer)[:-1])  # parts of a character are named, not lost


def test_the_pack_that_is_shown_is_the_pack_that_is_computed(tmp_path):
    tokenizer = tiny_tokenizer()
    path = write_rows(tmp_path / "a.jsonl", PAIR, PAIR | {"prompt": said("tea")}, PAIR | {"chosen": "ok " * 9})
    data = data_config(train=[path])
    items = encode_preferences("data.train", data.train, data, tokenizer).items
    shown = batch_rows(items, tokenizer)
    assert [where for where, _ in shown] == [f"{path}:{n}" for n in (1, 2, 3)]
    assert [side.name for side in shown[0][1]] == ["chosen", "rejected"]
    stream, starts = pack_starts([sides for _, sides in shown])
    packed = pack(*make_rows([row for item in items for row in item.rows], tokenizer.pad_id))
    assert [token.id for token in stream] == packed.tokens.tolist()
    blocks = [start for start, text in starts.items() if text.startswith("block")]
    assert blocks == torch.nonzero(packed.positions == 0).flatten().tolist()
    assert sum(text.startswith("answer") for text in starts.values()) + len(blocks) == 6


def test_the_first_the_longest_the_most_cut_and_given_rows_are_shown(tmp_path, capsys):
    rows = [{"messages": said(f"q{i}", "word " * n)} for i, n in enumerate((3, 5, 30, 60, 4))]
    path = write_rows(tmp_path / "a.jsonl", *rows)
    result = check_view([path], tmp_path, tokenizer=tiny_tokenizer(), layout=Layout(), **VIEW | {"rows": [5]})
    assert result["shown"] == [f"given: {path}:5", f"first: {path}:1", f"longest: {path}:4"]
    page = (tmp_path / "report.html").read_text()
    assert 'class="t target cut"' in page and "As one pack" in page and "block at 0" in page
    told = capsys.readouterr().out
    assert f"{path}:4  conversation: 40 tokens" in told and "cut" in told
    (tmp_path / "b").mkdir()
    pair = write_rows(tmp_path / "pair.jsonl", PAIR)
    check_view([pair], tmp_path / "b", tokenizer=tiny_tokenizer(), layout=Layout(), **VIEW)
    page = (tmp_path / "b/report.html").read_text()
    assert page.count('class="side"') == 2 and "chosen: " in page and "rejected: " in page


def test_a_run_shows_its_first_batch_and_trains_the_same(run_script, sft_words, read_metrics, tmp_path, monkeypatch):

    words = [*sft_words, "num_steps=2", "sample_every=0", "eval_every=0"]
    taken = []
    real = train_sft.micro_batches
    monkeypatch.setattr(train_sft, "micro_batches", lambda batch, size: taken.append(batch) or real(batch, size))
    assert run_script(train_sft, *words, f"hydra.run.dir={tmp_path / 'a'}") == 0
    first = next(batch for batch in taken if len(batch) == 8)
    assert run_script(train_sft, *words, "view=true", f"hydra.run.dir={tmp_path / 'b'}") == 0
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b")
    page = (tmp_path / "b/first_batch.html").read_text()
    assert re.findall(r"<h2>(/\S+?:\d+)</h2>", page) == [row["where"] for row in first]
    targets = page.partition("As one pack")[0].count('class="t target')
    assert targets - 1 == sum(int(np.sum(row["completion_mask"])) for row in first)  # one is the legend's
    assert not (tmp_path / "a/first_batch.html").exists()


def test_token_stats_count_what_each_length_cuts(tmp_path):
    facts = describe(np.array([[500, 12], [1, 1], [1000, 1000], [10, 9000]]))
    assert facts["cut"] == {"512": 0.5, "1024": 0.5, "2048": 0.25, "4096": 0.25, "8192": 0.25}
    assert facts["tokens"] == 11524 and facts["targets"] == 10013 and facts["whole"]["max"] == 9010
    path = write_rows(
        tmp_path / "a.jsonl", TALK | {"lang": "en"}, {"messages": said("¿Dónde está la estación de tren?", "Allí.")}
    )
    result = check_token_stats(
        [path], tmp_path, tokenizer=tiny_tokenizer(), layout=Layout(), max_rows=5, on_bad_row="error"
    )
    found = result["files"][path]
    assert found["user_turns"] == {1: 1, 2: 1} and found["languages"] == {"en": 1, "es": 1}
    row = encode_chat(TALK["messages"], tiny_tokenizer(), max_length=999)
    assert found["targets"] > sum(row["completion_mask"]) and json.loads((tmp_path / "result.json").read_text())
    assert (tmp_path / "lengths_0.png").stat().st_size > 0


def test_a_file_of_other_languages_is_an_error_and_no_traceback(tmp_path):
    file, layout = write_rows(tmp_path / "a.jsonl", TALK | {"lang": "en"}), Layout(languages=("de",))
    with pytest.raises(ValueError, match="no row of .* can be shown: 0 skipped, 1 in other languages"):
        check_view([file], tmp_path, tokenizer=tiny_tokenizer(), layout=layout, **VIEW)
    with pytest.raises(ValueError, match="a.jsonl has no usable row: 0 skipped, 1 in other languages"):
        check_token_stats([file], tmp_path, tokenizer=tiny_tokenizer(), layout=layout, max_rows=9, on_bad_row="error")
    result = check_view([file], tmp_path, tokenizer=tiny_tokenizer(), layout=Layout(), **VIEW)
    assert result["verdicts"] == [f"1 of 1 rows, 0 skipped; token by token: {tmp_path}/report.html"]
