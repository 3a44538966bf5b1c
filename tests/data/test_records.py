"""Records in and out: every kind is recognised, every fault is named by file and line."""

import gzip
import json

import pytest
from text_samples import EMBEDDED, said, write_rows

from data import formats
from data.records import BadRows, Comparison, Ranking, Rated, read_jsonl, read_records, split_of, write_jsonl

GOOD = {"messages": said("a", "b"), "license": "MIT"}
PROMPT = said("a")


def read(path, parse=formats.examples, on_bad_row="error"):
    bad_rows = BadRows(on_bad_row)
    return read_records(path, parse, bad_rows), bad_rows.skipped


def preference(**row):
    return formats.preferences(row)[0]


@pytest.mark.parametrize(
    "line, problem",
    [
        ('{"messages": [', "not JSON"),
        ('["a"]', "expected a JSON object, got list"),
        ({"text": "a"}, "it needs messages, or prompt and completion; got text"),
        ({"messages": "hello"}, "messages must be a list"),
        ({"messages": ["hello"]}, r"messages\[0\] must be an object"),
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            r"messages\[0\] has role 'bot'; known roles: system, dev",
        ),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "known roles"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\] \(user\) needs a text"),
        ({"prompt": "a", "completion": 3}, "completion"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(line, problem, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", GOOD, line, GOOD)
    with pytest.raises(ValueError, match=rf"rows.jsonl:2: .*{problem}"):
        read(path)
    records, skipped = read(path, on_bad_row="skip")
    assert [record.where for record in records] == [f"{path}:1", f"{path}:3"]
    assert len(skipped) == 1 and skipped[0].startswith(f"{path}:2: ")


def test_a_file_that_is_missing_empty_or_damaged_is_named(tmp_path):
    with pytest.raises(ValueError, match="no data file '/no/such.jsonl'"):
        read("/no/such.jsonl")
    with pytest.raises(ValueError, match="empty.jsonl is empty"):
        read(write_rows(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match="blank.jsonl is empty"):
        read(write_rows(tmp_path / "blank.jsonl", "", "  "))
    whole = gzip.compress(b"".join(json.dumps(GOOD).encode() + b"\n" for _ in range(999)))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut.jsonl.gz:\d+: the file is damaged"):
        read(tmp_path / "cut.jsonl.gz")
    (tmp_path / "no.jsonl.gz").write_bytes(b"plain text")
    with pytest.raises(ValueError, match=r"no.jsonl.gz:1: the file is damaged"):
        read(tmp_path / "no.jsonl.gz")
    (tmp_path / "latin.jsonl").write_bytes('{"é"'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.jsonl:1: the file is not UTF-8"):
        read(tmp_path / "latin.jsonl")
    (tmp_path / "no.parquet").write_bytes(b"plain text")
    with pytest.raises(ValueError, match="no.parquet is not a readable Parquet file"):
        read(tmp_path / "no.parquet")


def test_on_bad_row_is_one_of_two():
    with pytest.raises(ValueError, match="'error' or 'skip', got 'ignore'"):
        BadRows("ignore")


def test_jsonl_gzip_and_parquet_hold_the_same(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [GOOD, {"messages": said("é", "🙂"), "license": "x"}]
    for name in ("a.jsonl", "a.jsonl.gz"):
        write_jsonl(tmp_path / name, rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    read_back = [read(tmp_path / name)[0] for name in ("a.jsonl", "a.jsonl.gz", "a.parquet")]
    for records in read_back:
        assert [r.messages for r in records] == [r["messages"] for r in rows]
        assert [r.columns for r in records] == [{"license": "MIT"}, {"license": "x"}]
    assert read_jsonl(tmp_path / "a.jsonl.gz") == rows and sorted(p.name for p in tmp_path.iterdir())[0] == "a.jsonl"
    first = (tmp_path / "a.jsonl.gz").read_bytes()
    write_jsonl(tmp_path / "a.jsonl.gz", rows)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == first  # the same rows make the same bytes


def test_aliases_of_roles_are_read():
    roles = ("system", "human", "gpt", "api", "agent", "tool")
    messages = [{"role": role, "content": "x"} for role in roles]
    read_as = [m["role"] for m in formats.examples({"messages": messages})[0].messages]
    assert read_as == ["system", "user", "assistant", "tool", "assistant", "tool"]


def test_prompt_and_completion_make_a_demonstration():
    for prompt in ("a", PROMPT):
        assert formats.examples({"prompt": prompt, "completion": "b"})[0].messages == said("a", "b")
    answer = {"role": "assistant", "content": "b"}
    assert formats.examples({"prompt": "a", "completion": [answer]})[0].messages == said("a", "b")


def test_the_four_kinds_of_comparison_are_recognised():
    pair = preference(prompt=PROMPT, chosen="b", rejected="c", margin=1.5, id="7")
    assert pair == Comparison(PROMPT, "b", "c", 1.5, columns={"id": "7"})
    assert preference(prompt="a", chosen="b", rejected="c", tie=True).tie
    ranking = preference(prompt=PROMPT, completions=["b", "c", "d"], ranks=[2, 1, 2])
    assert ranking == Ranking(PROMPT, ["b", "c", "d"], [2.0, 1.0, 2.0])
    context = [{"role": "user", "text": "a"}]
    assert preference(context=context, generation={"role": "agent", "text": "b"}, reward=1.0) == Rated(PROMPT, "b", 1.0)
    sides = {"chosen": {"role": "agent", "text": "b"}, "rejected": {"role": "agent", "api": {"go": {"n": 1}}}}
    assert preference(context=context, **sides) == Comparison(PROMPT, "b", 'call go {"n": 1}')
    with pytest.raises(ValueError, match="prompt/chosen/rejected, prompt/completions/ranks.*got text"):
        formats.preferences({"text": "a"})


def test_a_taskmaster_context_becomes_turns_of_assistant_and_tool():
    context = [
        {"role": "agent", "text": "Welcome"},
        {"role": "user", "text": "a mocha"},
        {"role": "agent", "api": {"get_menu": {"query": "mocha"}}},
        {"role": "api", "response": {"get_menu": {"items": ["Café Mocha"]}}},
    ]
    record = preference(context=context, generation={"role": "agent", "text": "ok"}, reward=0)
    assert [(m["role"], m["content"]) for m in record.prompt] == [
        ("assistant", "Welcome"),
        ("user", "a mocha"),
        ("assistant", 'call get_menu {"query": "mocha"}'),
        ("tool", '{"get_menu": {"items": ["Café Mocha"]}}'),
    ]
    with pytest.raises(ValueError, match="text, api or response; got role"):
        preference(context=[{"role": "user"}], generation={"role": "agent", "text": "ok"}, reward=0)


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"prompt": PROMPT, "chosen": "b", "rejected": "b"}, "identical"),
        ({"prompt": PROMPT, "chosen": " ", "rejected": "b"}, "chosen is empty"),
        ({"prompt": PROMPT, "chosen": "b", "rejected": ""}, "rejected is empty"),
        ({"prompt": PROMPT, "chosen": said("a", "b"), "rejected": said("z", "c")}, "rejected does not answer the row"),
        ({"prompt": "z", "chosen": said("a", "b"), "rejected": said("a", "c")}, "does not answer the row's prompt"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: z\n\nAssistant: c"}, "different prompts"),
        ({"chosen": "b", "rejected": "c"}, "not of the form"),
        ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"}, "end with an assistant turn"),
        ({"prompt": PROMPT, "completions": ["b"], "ranks": [1]}, "two completions or more"),
        ({"prompt": PROMPT, "completions": ["b", "c"], "ranks": [1]}, "2 completions but 1 ranks"),
        ({"prompt": PROMPT, "completions": ["b", "b"], "ranks": [1, 2]}, "identical"),
        ({"prompt": PROMPT, "completions": ["b", ""], "ranks": [1, 2]}, r"completions\[1\] is empty"),
        ({"prompt": PROMPT, "completions": ["b", "c"], "ranks": [1, "x"]}, "ranks must be a number"),
        ({"context": [], "generation": {"role": "agent", "text": "b"}, "reward": "good"}, "reward must be a number"),
        ({"context": [], "generation": {"role": "agent", "text": "b"}, "reward": 5}, r"\[0, 1\]"),
        ({"prompt": PROMPT, "chosen": "b", "rejected": "c", "margin": "big"}, "margin must be a number"),
        ({"prompt": PROMPT, "chosen": "b", "rejected": "c", "tie": "no"}, "tie must be true or false"),
    ],
)
def test_comparisons_that_teach_nothing_are_found(row, problem, tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", {"prompt": PROMPT, "chosen": "b", "rejected": "c"}, row)
    with pytest.raises(ValueError, match=rf"pairs.jsonl:2: .*{problem}"):
        read(path, formats.preferences)
    records, skipped = read(path, formats.preferences, "skip")
    assert len(records) == len(skipped) == 1


def test_anthropics_raw_text_is_read():
    start = "\n\nHuman: Hi: there\n\nAssistant: Yes?\n\nHuman: Tell me\n\nplease."
    record = preference(chosen=f"{start}\n\nAssistant: Sure.\n", rejected=f"{start}\n\nAssistant: No.")
    assert record == Comparison(said("Hi: there", "Yes?", "Tell me\n\nplease."), "Sure.", "No.")
    # a stray "Human" without a colon opens no turn; a whole marker does, and then the sides' prompts differ
    stray = preference(chosen=f"{start}\n\nAssistant: Sure.\n\nHuman", rejected=f"{start}\n\nAssistant: No.")
    assert stray.chosen == "Sure.\n\nHuman"
    with pytest.raises(ValueError, match="end with an assistant turn"):
        preference(chosen=f"{start}\n\nAssistant: Sure.\n\nHuman: more", rejected=f"{start}\n\nAssistant: No.")


def test_ultrafeedback_and_ultrachat_rows_are_read_for_what_is_asked_of_them():
    feedback = {
        "prompt": "a",
        "prompt_id": "1",
        "chosen": said("a", "b"),
        "rejected": said("a", "c"),
        "messages": said("a", "b"),
        "score_chosen": 8.0,
        "score_rejected": 3.0,
    }
    record = preference(**feedback)
    assert record == Comparison(
        PROMPT, "b", "c", columns={"prompt_id": "1", "score_chosen": 8.0, "score_rejected": 3.0}
    )
    assert formats.examples(feedback)[0].messages == said("a", "b")
    chat = {"prompt": "a", "prompt_id": "1", "messages": said("a", "b", "c", "d")}
    assert formats.examples(chat)[0].messages == said("a", "b", "c", "d")
    assert formats.prompts(chat)[0].prompt == PROMPT
    system = [{"role": "system", "content": "s"}, *said("a", "b")]
    other = [{"role": "system", "content": "s"}, *said("a", "c")]
    assert preference(prompt="a", chosen=system, rejected=other).prompt == system[:-1]


def test_openassistant_trees_give_the_best_path_and_every_ranking():
    def node(role, text, *replies, **more):
        return {"message_id": text, "role": role, "text": text, "replies": list(replies), **more}

    again = node("prompter", "q2", node("assistant", "r2", rank=0), node("assistant", "r3", rank=1))
    best, worse = node("assistant", "best", again, rank=0), node("assistant", "worse", rank=2)
    gone, spam = node("assistant", "gone", rank=1, deleted=True), node("assistant", "spam", rank=3, review_result=False)
    tree = {"message_tree_id": "t", "prompt": node("prompter", "q1", worse, gone, best, spam)}
    assert [e.messages for e in formats.examples(tree)] == [said("q1", "best", "q2", "r2")]
    rankings = formats.preferences(tree)
    assert [(r.prompt, r.completions, r.ranks) for r in rankings] == [
        (said("q1"), ["best", "worse"], [0.0, 2.0]),
        (said("q1", "best", "q2"), ["r2", "r3"], [0.0, 1.0]),
    ]
    assert formats.prompts(tree)[0].prompt == said("q1")


def test_prompts_keep_their_columns_and_leave_the_last_answer_out():
    record = formats.prompts({"prompt": "2 + 2?", "answer": 4})[0]
    assert (record.prompt, record.columns) == (said("2 + 2?"), {"answer": 4})
    assert formats.prompts({"messages": said("a", "b", "c", "d")})[0].prompt == said("a", "b", "c")
    assert formats.prompts({"messages": said("a")})[0].prompt == PROMPT
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    assert formats.prompts({"chosen": text + "d", "rejected": text + "e"})[0].prompt == said("a", "b", "c")
    for row in ({"prompt": ""}, {"prompt": []}, {"messages": [{"role": "system", "content": "s"}]}):
        with pytest.raises(ValueError, match="has no text"):
            formats.prompts(row)


def test_one_row_in_ten_is_for_evaluation_and_no_context_is_in_both(tmp_path):
    path = EMBEDDED / "reward_coffee_train.jsonl.gz"
    train, held_out = (read(f"{path}@{part}", formats.preferences)[0] for part in ("train", "eval"))
    assert len(train) + len(held_out) == 2541 and 0.07 < len(held_out) / 2541 < 0.13
    assert not {str(r.prompt) for r in train} & {str(r.prompt) for r in held_out}
    asked = [formats.prompts({"prompt": f"Question {i}?"})[0] for i in range(60)]
    chosen = [i for i, prompt in enumerate(asked) if split_of(prompt, {}) == "eval"]
    assert chosen == [16, 20, 24, 35, 40, 53]  # another rule would put rows that models were trained on among these
    odd = write_rows(tmp_path / "name@2024.jsonl", GOOD)
    assert len(read(odd)[0]) == 1  # an @ that names no part belongs to the name


@pytest.mark.parametrize(
    "name, rows", [("sft_coffee_train", 3500), ("sft_oasst_train", 232), ("sft_rasbt_train", 1100)]
)
def test_embedded_demonstrations_are_whole(name, rows):
    records, _ = read(EMBEDDED / f"{name}.jsonl.gz")
    assert len(records) == rows and all(record.columns["license"] for record in records)


@pytest.mark.parametrize(
    "name, rows", [("pref_coffee_train", 623), ("pref_hh_helpful_test", 256), ("pref_oasst_train", 697)]
)
def test_embedded_pairs_are_whole(name, rows):
    records, _ = read(EMBEDDED / f"{name}.jsonl.gz", formats.preferences)
    assert len(records) == rows and all(isinstance(record, Comparison) for record in records)
