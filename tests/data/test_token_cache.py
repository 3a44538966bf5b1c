"""Tokens are computed once, stored completely or not at all, and do not depend on how they were computed."""

import json
import logging
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from text_samples import data_config, said, tiny_tokenizer, write_rows

import data.encoder as encoder
import data.token_cache as token_cache
import train_sft
from data.loader import Loader
from data.preferences import encode_preferences
from data.prompts import encode_prompts
from data.sft import encode_demonstrations, sft_loader
from data.tokenizer import Tokenizer

RANKS = {"rank": 0, "world_size": 1}


def talks(n: int) -> list[dict]:
    return [{"messages": said(f"question {i}", "answer " * (i % 7 + 1), "and?", f"that is {i}")} for i in range(n)]


def pairs(n: int) -> list[dict]:
    return [{"prompt": f"question {i}", "chosen": f"good {i} " * (i % 3 + 1), "rejected": f"bad {i}"} for i in range(n)]


@pytest.fixture
def tokenised(monkeypatch) -> list[str]:
    """Every text that a tokenizer has been given since the test began, in this process."""
    texts = []
    once = Tokenizer.encode_spelled

    def encode_spelled(self, spelled):
        texts.append(spelled.text)
        return once(self, spelled)

    monkeypatch.setattr(Tokenizer, "encode_spelled", encode_spelled)
    return texts


@pytest.fixture
def four_chunks(monkeypatch):
    """Small chunks, two processes: what a large file gets."""
    monkeypatch.setattr(encoder, "CHUNK", 7)
    monkeypatch.setattr(token_cache, "ALONE", 2)
    monkeypatch.setattr(token_cache, "num_processes", lambda: 2)


def plain(item) -> dict:
    """An item without arrays."""
    if hasattr(item, "rows"):
        return vars(item) | {"rows": [plain(row) for row in item.rows]}
    return {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in item.items()}


KINDS = {
    "demonstrations": (talks, lambda data: encode_demonstrations("data.train", data.train, data, tiny_tokenizer())),
    "pairs": (pairs, lambda data: encode_preferences("data.train", data.train, data, tiny_tokenizer())),
    "prompts": (pairs, lambda data: encode_prompts("data.train", data.train, data, tiny_tokenizer(), max_length=99)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_tokenised_once_and_read_back_as_they_were(kind, tmp_path, tokenised):
    rows, encode = KINDS[kind]
    data = data_config(train=[write_rows(tmp_path / "a.jsonl", *rows(9))], cache=str(tmp_path / "cache"))
    first = [plain(item) for item in encode(data).items]
    assert len(first) == 9 and tokenised
    tokenised.clear()
    again = encode(data)  # a restart, another rank, another job of a sweep: whatever comes after
    assert [plain(item) for item in again.items] == first == [plain(again.items[i]) for i in range(9)]
    assert tokenised == []
    (tmp_path / "moved").mkdir()
    moved = Path(data.train[0]).rename(tmp_path / "moved/b.jsonl")  # the same content under another name
    data.train = [str(moved)]
    assert [plain(item)["where"] for item in encode(data).items] == [f"{moved}:{i}" for i in range(1, 10)]
    assert tokenised == []


@pytest.mark.parametrize("kind", KINDS)
def test_several_processes_make_what_one_makes(kind, tmp_path, four_chunks, monkeypatch):
    rows, encode = KINDS[kind]
    bad = [{"messages": []}, "{", {"prompt": "x " * 300, "chosen": "a", "rejected": "a"}]
    lines = [*rows(20), bad[0], *rows(9), bad[1], *rows(17), bad[2]]
    data = data_config(train=[write_rows(tmp_path / "a.jsonl", *lines)], on_bad_row="skip", cache=str(tmp_path / "two"))
    several = encode(data)
    monkeypatch.setattr(token_cache, "ALONE", 99)
    data.cache = str(tmp_path / "one")
    alone = encode(data)
    assert [plain(item) for item in several.items] == [plain(item) for item in alone.items] and len(alone.items) == 46
    monkeypatch.setattr(encoder, "CHUNK", 999)
    data.cache = str(tmp_path / "one_chunk")
    assert [plain(item) for item in encode(data).items] == [plain(item) for item in alone.items]
    assert several.items.digest == alone.items.digest
    assert several.skipped == alone.skipped
    assert [re.sub(r": .*", "", problem) for problem in alone.skipped] == [f"{data.train[0]}:{n}" for n in (21, 31, 49)]


def test_the_first_bad_row_is_named_whichever_process_meets_it(tmp_path, four_chunks):
    lines = [*talks(30), {"messages": said("a")}, *talks(20), "{", *talks(9)]
    data = data_config(train=[write_rows(tmp_path / "a.jsonl", *lines)], cache=str(tmp_path / "cache"))
    for _ in range(2):  # nothing of it is kept
        with pytest.raises(ValueError, match=r"^\S+a.jsonl:31: a conversation without an assistant turn"):
            KINDS["demonstrations"][1](data)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_rankings_are_made_of_pairs_that_lie_in_several_chunks(tmp_path, four_chunks):
    sides = [(f"{a} {i}", f"{b} {i}") for a, b in ("xy", "xz", "yz") for i in range(9)]
    rows = [{"prompt": a.split()[1], "chosen": a, "rejected": b} for a, b in sides]
    data = data_config(train=[write_rows(tmp_path / "a.jsonl", *rows)], kwise=True, cache=str(tmp_path / "cache"))
    assert [len(element.rows) for element in KINDS["pairs"][1](data).items] == [3] * 9


CHANGES = {
    "content": lambda data: write_rows(Path(data.train[0]), *talks(8)),
    "part": lambda data: data.train.append(data.train.pop() + "@train"),
    "max_length": lambda data: setattr(data, "max_length", 20),
    "on_bad_row": lambda data: setattr(data, "on_bad_row", "skip"),
    "format": lambda data: setattr(data, "format", "ours"),
    "columns": lambda data: setattr(data, "columns", {"id": "messages", "messages": "messages"}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_decides_the_tokens_decides_which_are_read(change, tmp_path, tokenised):
    data = data_config(train=[write_rows(tmp_path / "a.jsonl", *talks(9))], cache=str(tmp_path / "cache"))
    encode = KINDS["demonstrations"][1]
    encode(data)
    change(data)
    tokenised.clear()
    encode(data)
    assert tokenised


def test_another_template_another_day_and_other_code_make_other_tokens(tmp_path, tokenised, monkeypatch):
    data = data_config(train=[write_rows(tmp_path / "a.jsonl", *talks(3))], cache=str(tmp_path / "cache"))
    vocabulary = tiny_tokenizer().vocabulary
    for template in ("plain", "zephyr"):
        encode_demonstrations("data.train", data.train, data, Tokenizer(vocabulary, f"replace:{template}"))
        assert len(tokenised) == 3
        tokenised.clear()
    monkeypatch.setattr(token_cache, "code_digest", lambda: "other")
    encode_demonstrations("data.train", data.train, data, Tokenizer(vocabulary, "replace:plain"))
    assert len(tokenised) == 3


@pytest.mark.parametrize(
    "name", ["tokens.bin", "targets.bin", "rows.bin", "items.bin", "notes.bin", "store.json", "SHA256SUMS"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_cache_is_noticed_and_made_again(name, damage, tmp_path, caplog):
    data = data_config(train=[write_rows(tmp_path / "a.jsonl", *pairs(9))], cache=str(tmp_path / "cache"))
    encode = KINDS["pairs"][1]
    first = [plain(item) for item in encode(data).items]
    (home,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    content = bytearray((home / name).read_bytes())
    (home / name).unlink()
    if damage != "gone":
        content[len(content) // 2] ^= 1
        (home / name).write_bytes(content if damage == "flip" else content[: len(content) // 2])
    assert [plain(item) for item in encode(data).items] == first
    assert "are damaged and are computed again" in caplog.text
    caplog.clear()
    assert [plain(item) for item in encode(data).items] == first
    assert "damaged" not in caplog.text


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", *talks(9))
    data = data_config(train=[path], cache=str(tmp_path / "cache"))
    made = token_cache._write_rows
    monkeypatch.setattr(token_cache, "_write_rows", lambda *a: made(*a) and write_rows(Path(path), *talks(10)) and 1)
    with pytest.raises(ValueError, match="a.jsonl changed while it was read"):
        KINDS["demonstrations"][1](data)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "cache").write_text("")
    data = data_config(train=[write_rows(tmp_path / "a.jsonl", *talks(2))], cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="cannot write the tokens of .*a.jsonl to .*cache: .*data.cache=DIR"):
        KINDS["demonstrations"][1](data)


def start(data, pause: float, log: Path) -> multiprocessing.Process:
    """A process that encodes, with a rest before each row; it writes "row" lines and log messages to `log`."""

    def work():
        once = Tokenizer.encode_spelled
        out = log.open("w", buffering=1)
        logging.getLogger().handlers[:] = [logging.StreamHandler(out)]
        logging.getLogger().setLevel(logging.INFO)

        def encode_spelled(self, spelled):
            out.write("row\n")
            time.sleep(pause)
            return once(self, spelled)

        Tokenizer.encode_spelled = encode_spelled
        out.write(f"{len(KINDS['demonstrations'][1](data).items)} items\n")

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def wait_for(words: str, log: Path) -> None:
    ends = time.monotonic() + 60
    while not log.exists() or words not in log.read_text():
        assert time.monotonic() < ends, f"never said: {words}"
        time.sleep(0.02)


def test_one_process_makes_the_tokens_and_the_others_wait_with_a_word(tmp_path):
    """Also where the one that makes them is killed halfway: one of those that wait goes on in its place."""
    tiny_tokenizer()  # the processes have it from this one
    data = data_config(train=[write_rows(tmp_path / "a.jsonl", *talks(6))], cache=str(tmp_path / "cache"))
    killed = start(data, 60, tmp_path / "killed")
    wait_for("row\n", tmp_path / "killed")
    others = [start(data, 0.01, tmp_path / f"other{i}") for i in range(2)]
    for i in range(2):
        wait_for("another process is computing the tokens; waiting for it", tmp_path / f"other{i}")
    killed.kill()
    for process in (killed, *others):
        process.join(60)
    told = [(tmp_path / f"other{i}").read_text().splitlines() for i in range(2)]
    assert [lines[-1] for lines in told] == ["6 items", "6 items"]
    assert sorted(lines.count("row") for lines in told) == [0, 6]
    assert not list((tmp_path / "cache").glob("*.making"))


def test_processes_end_with_the_one_that_forked_them(tmp_path, four_chunks):
    """Killed by SIGKILL, it leaves nobody behind."""
    tiny_tokenizer()
    data = data_config(train=[write_rows(tmp_path / "a.jsonl", *talks(60))], cache=str(tmp_path / "cache"))
    parent = start(data, 0.5, tmp_path / "log")
    wait_for("row\n", tmp_path / "log")
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert len(children) >= 2
    parent.kill()
    parent.join()
    ends = time.monotonic() + 20
    while alive := [child for child in children if _runs(child)]:
        assert time.monotonic() < ends, f"{alive} still run"
        time.sleep(0.1)


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_process_is_an_error_not_a_wait(tmp_path, four_chunks, monkeypatch):
    parent, once = os.getpid(), Tokenizer.encode_spelled

    def encode(self, spelled):
        if os.getpid() != parent and "question 29" in spelled.text:
            os.kill(os.getpid(), signal.SIGKILL)
        return once(self, spelled)

    monkeypatch.setattr(Tokenizer, "encode_spelled", encode)
    data = data_config(train=[write_rows(tmp_path / "a.jsonl", *talks(40))], cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="one of 2 processes that encode tokens was killed"):
        KINDS["demonstrations"][1](data)


def test_a_loader_over_kept_tokens_goes_on_where_it_stopped(tmp_path):
    data = data_config(train=[write_rows(tmp_path / "a.jsonl", *talks(11))], cache=str(tmp_path / "cache"))

    def loader() -> Loader:
        return sft_loader(data, tiny_tokenizer(), batch_size=4, seed=0, **RANKS)

    first, second = loader(), loader()
    taken = [[plain(item) for item in next(first)] for _ in range(9)]
    for _ in range(4):
        next(second)
    third = loader()
    third.load_state_dict(json.loads(json.dumps(second.state_dict())))
    assert [[plain(item) for item in next(third)] for _ in range(5)] == taken[4:]


def test_progress_is_told_now_and_then(tmp_path, four_chunks, monkeypatch, caplog):
    monkeypatch.setattr("runtime.display.RowProgress.EVERY", 0.0)
    caplog.set_level(logging.INFO)
    data = data_config(train=[write_rows(tmp_path / "a.jsonl", *talks(40))], cache=str(tmp_path / "cache"))
    KINDS["demonstrations"][1](data)
    assert re.search(r"data.train: computing tokens: 35 of 40 rows, [\d,]+ tokens/s, \d+ s left", caplog.text)
    assert re.search(r"data.train: computed [\d,]+ tokens of \S+a.jsonl in \d+\.\d s with 2 processes", caplog.text)


def test_no_process_is_left_over(tmp_path, four_chunks):
    data = data_config(train=[write_rows(tmp_path / "a.jsonl", *talks(40))], cache=str(tmp_path / "cache"))
    KINDS["demonstrations"][1](data)
    assert not multiprocessing.active_children()


def test_the_jobs_of_a_sweep_and_a_restart_tokenise_nothing_again(run_script, sft_words, tmp_path, tokenised):
    """Through the whole command: 40 conversations to learn and 8 held out, each once."""
    words = [
        *sft_words,
        "num_steps=1",
        "eval_every=1",
        "sample_every=0",
        "save_every=0",
        f"data.cache={tmp_path}/cache",
    ]
    assert run_script(train_sft, "-m", *words, "seed=0,1", f"hydra.sweep.dir={tmp_path}/sweep") == 0
    assert len(tokenised) == 48
    assert run_script(train_sft, *words, f"hydra.run.dir={tmp_path}/again") == 0
    assert len(tokenised) == 48
    first, again = ((tmp_path / d / "metrics.jsonl").read_text().splitlines() for d in ("sweep/0", "again"))
    assert [json.loads(row)["eval/loss"] for row in first] == [json.loads(row)["eval/loss"] for row in again]
