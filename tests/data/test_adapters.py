"""Published formats: each is recognised by its fields, read as what it says, and converted by one command."""

import json
from pathlib import Path

import pytest
from published_rows import BAD, GOOD, ROWS, TALK, USER, battle
from text_samples import data_config, said, tiny_tokenizer, write_rows

import check_data
from data import formats
from data.adapters import COMPARED, FORMATS, Layout
from data.checks.convert import check_convert
from data.preferences import encode_preferences
from data.prompts import encode_prompts
from data.records import BadRows, read_records
from data.sft import encode_demonstrations

LICENSE = {"license": "CC0-1.0", "on_bad_row": "error"}


def convert(rows: list, directory: Path, **settings) -> list[dict]:
    path = directory / "published.json"
    path.write_text(json.dumps(rows, indent=1))
    check_convert([str(path)], directory, layout=Layout(**settings), **LICENSE)
    return [json.loads(line) for line in (directory / "converted.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ROWS)
def test_a_published_row_is_read_as_what_it_says_and_the_trainers_take_it(name, tmp_path):
    rows, expected, recognised, *settings = ROWS[name]
    converted = convert(rows, tmp_path, **(settings[0] if settings else {}))
    assert {key: converted[0][key] for key in expected} == expected
    assert converted[0]["license"] == "CC0-1.0"
    assert converted[0]["provenance"]["format"] == (recognised or "ours")
    assert converted[0]["provenance"]["file"] == f"{tmp_path}/published.json:1"

    data = data_config(train=[str(tmp_path / "converted.jsonl")])
    if "messages" in expected:
        encoded = encode_demonstrations("data.train", data.train, data, tiny_tokenizer())
    elif {"chosen", "completions", "completion"} & set(expected):
        encoded = encode_preferences("data.train", data.train, data, tiny_tokenizer())
    else:
        encoded = encode_prompts("data.prompts", data.train, data, tiny_tokenizer(), max_length=512)
    assert len(encoded.items) == len(converted)


def test_every_format_has_a_row_here_and_there_are_thirty():
    recognised = {row[2] for row in ROWS.values()} | {"pku_saferlhf_safer"}
    assert recognised - {None} == set(FORMATS) and len(ROWS) >= 30


def test_the_page_names_every_format():
    page = (Path(__file__).parents[2] / "docs/data.md").read_text()
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `") and "](http" in line}
    assert set(COMPARED) < set(FORMATS) == set(rows)
    for name, one in FORMATS.items():
        assert f"({one.source})" in rows[name] and rows[name].endswith(f"| {COMPARED.get(name, 'publisher')} |"), name


def test_a_row_that_fits_two_formats_is_not_guessed_at(tmp_path):
    rows = ROWS["pku_saferlhf"][0]
    with pytest.raises(
        ValueError, match=r"published.json:1: the row fits pku_saferlhf_better and pku_saferlhf_safer; choose"
    ):
        convert(rows, tmp_path)
    assert convert(rows, tmp_path, format="pku_saferlhf_safer")[0]["chosen"] == BAD
    both = {"messages": TALK, "conversations": [{"from": "human", "value": "x"}]}
    with pytest.raises(ValueError, match="fits sharegpt and ours"):
        Layout().adapt(both)
    assert Layout("ours").adapt(both) == [both]
    with pytest.raises(ValueError, match="data.format='alpca' is unknown"):
        Layout("alpca")
    with pytest.raises(ValueError, match="format=shp needs history, human_ref_A"):
        Layout("shp").adapt({"prompt": "x"})


def test_columns_are_renamed_for_any_set(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", {"question": "2 + 2?", "reply": "4", "level": 1})
    data = data_config(train=[path], columns={"prompt": "question", "answer": "reply"})
    (record,) = read_records(path, formats.examples, BadRows("error"), Layout.of(data))
    assert record.messages == said("2 + 2?", "4") and record.columns == {"level": 1}
    (prompt,) = encode_prompts("data.prompts", data.train, data, tiny_tokenizer(), max_length=99).items
    assert prompt["messages"] == said("2 + 2?") and prompt["columns"] == {"answer": "4", "level": 1}
    with pytest.raises(ValueError, match="a.jsonl:1: columns names reply2, but the row has question, reply, level"):
        encode_demonstrations("data.train", [path], data_config(columns={"prompt": "reply2"}), tiny_tokenizer())


def test_languages_keep_their_rows_and_a_row_without_one_is_named(tmp_path):
    english, spanish = (
        ROWS["oasst_flat"][0],
        [row | {"lang": "es", "message_tree_id": "s"} for row in ROWS["oasst_flat"][0]],
    )
    spanish = [row | {"message_id": "s" + row["message_id"], "parent_id": row["parent_id"] and "st"} for row in spanish]
    for rows in (english + spanish, [*english[:1], *spanish, *english[1:]]):  # trees may lie apart
        assert len(convert(rows, tmp_path)) == 2
        (found,) = convert(rows, tmp_path, languages=("es",))
        assert found["messages"] == TALK
    with pytest.raises(ValueError, match="needs a field lang or language"):
        convert([{"messages": TALK}], tmp_path, languages=("en",))
    orphan = [row for row in english if row["message_id"] != "t"]
    with pytest.raises(ValueError, match="message t is missing"):
        convert(orphan, tmp_path)


def test_rows_in_other_languages_are_counted_wherever_they_are_left_out(tmp_path, caplog):
    caplog.set_level("INFO")
    flat = [
        *ROWS["oasst_flat"][0],
        *(row | {"message_id": "s" + row["message_id"], "lang": "es"} for row in ROWS["oasst_flat"][0]),
    ]
    flat[3:] = [row | {"parent_id": row["parent_id"] and "st"} for row in flat[3:]]
    talks = [{"messages": TALK, "lang": language} for language in ("en", "es", "es")]
    for rows, left_out in ((talks, 2), (flat, 1)):
        file = write_rows(tmp_path / f"{left_out}.jsonl", *rows)
        data = data_config(train=[file], languages=["en"], cache=str(tmp_path / "cache"))
        for _ in range(2):  # the second time from the cache
            caplog.clear()
            assert len(encode_demonstrations("data.train", data.train, data, tiny_tokenizer()).items) == 1
            assert f"data.train: {left_out} rows in other languages than ['en'] left out" in caplog.text
        result = check_convert([file], tmp_path, layout=Layout.of(data), **LICENSE)
        assert result["verdicts"] == [f"converted.jsonl: 1 rows, 0 skipped, {left_out} in other languages"]
        with pytest.raises(ValueError, match=f"has no usable row; {left_out + 1} are in other languages than"):
            encode_demonstrations("data.train", data.train, data_config(languages=["de"]), tiny_tokenizer())
        with pytest.raises(ValueError, match=f"can be used: 0 skipped, {left_out + 1} in other languages"):
            check_convert([file], tmp_path, layout=Layout(languages=("de",)), **LICENSE)


@pytest.mark.parametrize(
    "row, problem",
    [
        (battle("neither"), "winner must be one of model_a, model_b, tie"),
        (
            battle("tie") | {"conversation_a": TALK * 2, "conversation_b": [USER, TALK[1] | {"content": BAD}, *TALK]},
            "earlier answers differ",
        ),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "is from 'alien'; known: human"),
        (ROWS["shp"][0][0] | {"labels": 2}, "labels must be one of 0, 1, got 2"),
        (ROWS["helpsteer2_preference"][0][0] | {"prompt": "<extra_id_1>Assistant Hi"}, "prompt holds a mark <extra"),
        (ROWS["helpsteer3"][0][0] | {"overall_preference": 4}, "overall_preference must be one of -3"),
        (ROWS["arena_55k"][0][0] | {"winner_tie": 1}, "one of winner_model_a"),
        (ROWS["nectar"][0][0] | {"answers": [{"rank": 1}]}, "answer must be text"),
        (ROWS["label_studio"][0][0] | {"data": {"prompt": "x"}}, "answer1 and answer2, text1 and text2"),
        (ROWS["taskmaster_1"][0][0] | {"utterances": [{"speaker": "bot", "text": "x"}]}, "got speaker 'bot'"),
    ],
)
def test_a_row_that_breaks_its_schema_is_named(row, problem, tmp_path):
    with pytest.raises(ValueError, match=rf"published.json:2: .*{problem}"):
        convert([{"messages": TALK}, row], tmp_path)
    assert not list(tmp_path.glob("converted.jsonl*"))


def test_ties_and_both_bad_stay_apart(tmp_path):
    rows = convert([battle("tie"), battle("both_bad"), battle("model_b"), battle("tie (bothbad)")], tmp_path)
    assert [(row.get("tie"), row.get("both_bad"), row["chosen"]) for row in rows] == [
        (True, None, GOOD),
        (True, True, GOOD),
        (None, None, BAD),
        (True, True, GOOD),
    ]


def test_one_command_converts_and_what_it_wrote_is_trained_on(monkeypatch, tmp_path, capsys):
    from hydra.core.global_hydra import GlobalHydra

    from runtime.run import main

    def run(*words):
        GlobalHydra.instance().clear()
        monkeypatch.setattr(
            "sys.argv", ["check_data.py", *words, f"hydra.run.dir={tmp_path / 'run'}", "overwrite=true"]
        )
        try:
            main(check_data.check_data, "check_data")
        except SystemExit as stopped:
            return stopped.code
        return 0

    path = tmp_path / "shp.csv"
    row = ROWS["shp"][0][0]
    path.write_text(",".join(row) + "\n" + ",".join(f'"{value}"' for value in row.values()) + "\n")
    assert run("check=convert", f"check.input=[{path}]") == 2
    assert "set check.license=NAME; the original set in this schema has the license" in capsys.readouterr().err
    assert run("check=convert", f"check.input=[{path}]", "check.license=reddit") == 0, capsys.readouterr().err
    (found,) = map(json.loads, (tmp_path / "run/converted.jsonl").read_text().splitlines())
    assert (found["chosen"], found["rejected"], found["license"]) == (GOOD, BAD, "reddit")
    assert found["provenance"] == {"file": f"{path}:2", "format": "shp", "schema": FORMATS["shp"].source}


def test_a_sharegpt_turn_of_weight_zero_is_read_and_not_learned(tmp_path):
    def turns(weight: int) -> dict:
        said = [("human", "hi", {}), ("gpt", "no", {"weight": weight}), ("human", "so?", {}), ("gpt", "yes", {})]
        return {"conversations": [{"from": who, "value": text} | more for who, text, more in said]}

    file = write_rows(tmp_path / "talks.jsonl", turns(0), turns(1))
    settings = data_config(cache=str(tmp_path / "cache"))
    encoded = encode_demonstrations("data.train", [file], settings, tiny_tokenizer())
    learned = []
    for row in encoded.items:
        kept = [i for i, taken in zip(row["input_ids"], row["completion_mask"], strict=True) if taken]
        learned.append(tiny_tokenizer().decode(kept))
    assert learned == ["yes", "no yes"]


def test_what_an_annotator_took_back_or_has_not_sent_is_no_vote(tmp_path):
    task = ROWS["label_studio"][0][0]
    (vote,) = task["annotations"]
    (result,) = vote["result"]
    against = vote | {"was_cancelled": True, "result": [result | {"value": {"selected": "left"}}] * 2}
    record = ROWS["argilla_1"][0][0]
    (sent,) = record["preference"]
    draft = sent | {"status": "draft", "value": {"rank": [1, 2], "value": ["response1", "response2"]}}
    for row in (task | {"annotations": [against, vote, against]}, record | {"preference": [draft, sent, draft]}):
        (pair,) = convert([row], tmp_path)
        best = pair["chosen"] if "chosen" in pair else pair["completions"][0]
        assert best in (GOOD, [{"role": "assistant", "content": GOOD}])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_hold_is_not_converted(value, tmp_path):
    with pytest.raises(ValueError, match="published.json:1: a value is NaN or infinite"):
        convert([{"prompt": "a", "completion": "b", "score": value}], tmp_path)
