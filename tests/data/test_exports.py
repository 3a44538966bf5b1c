"""Exports of annotation tools and OpenAssistant's trees: what people submitted and kept is read, and all of it."""

import json

import pytest
from published_rows import ANNOTATION, ASK, BAD, GOOD, OASST, ROWS, USER, flat
from text_samples import said

from data import formats
from data.adapters import Layout
from data.checks.agreement import check_agreement
from data.checks.convert import check_convert
from data.checks.votes import VoteLayout, parse_vote
from data.records import BadRows, parse_rows

WRITTEN = "Oolong."


def read(rows: list, parse=formats.any_record, **settings) -> list:
    places = ((f"export.json:{i}", row) for i, row in enumerate(rows, 1))
    return list(parse_rows(places, parse, BadRows("error"), Layout(**settings), None))


def learned(record) -> tuple:
    if hasattr(record, "messages"):
        return tuple(message["content"] for message in record.messages)
    return (record.chosen, record.rejected) if hasattr(record, "chosen") else (record.completions, record.ranks)


# ---- several people


def argilla(*values, fields=None, **more) -> dict:
    answers = [{"value": value, "user_id": f"u{i}"} for i, value in enumerate(values)]
    row = ROWS["argilla_2"][0][0] | {"responses": {"preference": answers}} | more
    return row | {"fields": fields or row["fields"]}


def argilla_1(*given: tuple) -> dict:
    answers = [{"user_id": f"u{i}", "status": status, "value": value} for i, (status, value) in enumerate(given)]
    return ROWS["argilla_1"][0][0] | {"preference": answers}


def flat_argilla(values, status, **more) -> dict:
    users = [f"u{i}" for i in range(len(values or []))]
    asked = {"preference.responses": values, "preference.responses.users": users, "preference.responses.status": status}
    return ROWS["argilla_flat"][0][0] | asked | more


def label_studio(*sides: str, **more) -> dict:
    task = ROWS["label_studio"][0][0]
    result = task["annotations"][0]["result"][0]
    chosen = [ANNOTATION | {"id": i, "result": [result | {"value": {"selected": s}}]} for i, s in enumerate(sides)]
    return task | {"annotations": chosen} | more


def written(*texts, tag: str = "answer", **annotation) -> dict:
    task = ROWS["label_studio_text"][0][0]
    result = task["annotations"][0]["result"][0]
    given = [
        ANNOTATION | annotation | {"result": [result | {"from_name": tag, "value": {"text": text}}]} for text in texts
    ]
    return task | {"annotations": given}


ONLY, EMPTY = {"prompt": ASK}, ANNOTATION | {"result": None}
FIRST, SECOND = ["response1", "response2"], ["response2", "response1"]
ABC, THREE = ["a", "b", "c"], {"prompt": ASK, "a": "x", "b": "y", "c": "z"}
LISTED = [{"rank": 2, "value": "response1"}, {"rank": 1, "value": "response2"}]
SUBMITTED = ["submitted"]
RANKED_2, EQUAL = {"rank": [2, 1], "value": FIRST}, {"rank": [1, 1], "value": FIRST}


@pytest.mark.parametrize(
    "row, expected",
    [
        # a vote: the majority of those that were submitted
        (argilla("response2", "response1", "response2"), [(GOOD, BAD)]),
        (flat_argilla(["response1", "response2"], ["draft", "submitted"]), [(GOOD, BAD)]),
        (flat_argilla(["response1", "response1", "response2"], ["draft", "discarded", "submitted"]), [(GOOD, BAD)]),
        (label_studio("right", "left", "right"), [(GOOD, BAD)]),
        # a ranking: the mean of the ranks; equal ranks are a tie
        (argilla(ABC, ["b", "a", "c"], ABC, fields=THREE), [(["x", "y", "z"], [1 / 3, 2 / 3, 2])]),
        (argilla_1(("submitted", {"rank": [1, 1], "value": SECOND})), [([GOOD, BAD], [0, 0])]),
        (argilla_1(("submitted", LISTED)), [([GOOD, BAD], [0, 1])]),
        (argilla_1(("discarded", {"rank": [1, 2], "value": FIRST}), ("submitted", RANKED_2)), [([GOOD, BAD], [0, 1])]),
        # written answers: each is a demonstration, equal ones once
        (argilla(GOOD, WRITTEN, GOOD, fields=ONLY), [(ASK, GOOD), (ASK, WRITTEN)]),
        (written([GOOD], [WRITTEN], [GOOD]), [(ASK, GOOD), (ASK, WRITTEN)]),
        (written("Sencha."), [(ASK, GOOD)]),
        (written() | {"annotations": [EMPTY, *written([GOOD])["annotations"]]}, [(ASK, GOOD)]),
    ],
)  # fmt: skip
def test_of_several_people_all_who_submitted_count(row, expected):
    assert [learned(record) for record in read([row])] == expected


@pytest.mark.parametrize(
    "row, problem",
    [
        (argilla("response2", "response1"), "disagree: 1 for response1 and 1 for response2.*on_bad_row=skip"),
        (flat_argilla(["response2", "response1"], SUBMITTED * 2), "disagree: 1 for response1 and 1 for response2"),
        (label_studio("right", "left"), "disagree: 1 for left and 1 for right.*on_bad_row=skip"),
        (argilla(FIRST, SECOND), "disagree: the mean ranks of all are equal"),
        (argilla(ABC[:2], ABC, fields=THREE), "must rank the same fields, got a, b and a, b, c"),
        (argilla(), "no submitted response"),
        (flat_argilla(["response2"], ["draft"]), "no submitted response"),
        (flat_argilla(None, None), "no submitted response"),
        (argilla_1(("discarded", RANKED_2)), "no submitted response"),
        (argilla_1(("submitted", {"rank": [1, None], "value": FIRST})), "rank must be a number, got None"),
        (
            argilla("response2", responses={q: [{"value": "response2"}] for q in ("helpful", "safe")}),
            "helpful and safe are both answered",
        ),
        (argilla("response2", metadata={"prompt": "x"}), "prompt is a column and also a field"),
        (written([GOOD, WRITTEN]), r"must have one text, got \['Sencha.', 'Oolong.'\]"),
        (written([GOOD], was_cancelled=True), "no annotation that was submitted has a result of type textarea"),
        (label_studio(), "no annotation that was submitted has a result of type pairwise"),
        (
            written() | {"annotations": [a for tag in "xy" for a in written([GOOD], tag=tag)["annotations"]]},
            "results of type textarea of x and y; keep those of one tag",
        ),
    ],
)  # fmt: skip
def test_a_record_on_which_people_disagree_is_refused_by_its_place(row, problem):
    with pytest.raises(ValueError, match=rf"^export.json:2: .*{problem}"):
        read([ROWS["tulu3"][0][0], row])


def test_what_a_project_knows_of_a_record_stays_with_it():
    (pair,) = read([label_studio("right", data=ROWS["label_studio"][0][0]["data"] | {"source": "s", "license": "MIT"})])
    assert pair.columns["source"] == "s" and pair.columns["license"] == "MIT" and pair.columns["id"] == 7
    (ranking,) = read([argilla(SECOND)])
    assert ranking.columns["source"] == "s" and "metadata" not in ranking.columns
    (ranking,) = read([argilla_1(("submitted", RANKED_2)) | {"metadata": '{"source": "s"}'}])
    assert ranking.columns["source"] == "s"
    for bad in ("[1]", "no", 7):
        with pytest.raises(ValueError, match="metadata must be an object, or its JSON text"):
            read([argilla_1(("submitted", RANKED_2)) | {"metadata": bad}])


@pytest.mark.parametrize(
    "row, expected",
    [
        (argilla("response2", "response1"), {"u0": "response2", "u1": "response1"}),
        (argilla(FIRST, SECOND), {"u0": "response1 > response2", "u1": "response2 > response1"}),
        (argilla(4, 5), {"u0": "4", "u1": "5"}),
        (flat_argilla(["response2", "response1"], ["draft", "submitted"]), {"u1": "response1"}),
        (argilla_1(("draft", RANKED_2), ("submitted", EQUAL)) | {"external_id": "1"}, {"u1": "response1 = response2"}),
        (label_studio("right", "left"), {"4": "right", "7": "left"}),
    ],
)  # fmt: skip
def test_each_persons_answer_is_a_vote_for_the_agreement(row, expected):
    for number, annotation in enumerate(row.get("annotations", [])):
        annotation["completed_by"] = (4, {"id": 7, "email": "a@b.c"})[number]
    places = [("export.json:1", row)]
    found = list(parse_rows(iter(places), parse_vote, BadRows("error"), VoteLayout(), None))
    assert {vote.annotator: vote.label for vote in found} == expected
    assert {(vote.item, vote.asked) for vote in found} == {(str(row.get("external_id") or row["id"]), ASK)}


def test_agreement_is_measured_on_an_export(tmp_path):
    rows = [argilla(*answers, id=str(i)) for i, answers in enumerate([("response1",) * 2, ("response2",) * 2] * 3)]
    (tmp_path / "export.json").write_text(json.dumps(rows))
    settings = dict(level="nominal", unacceptable=[], max_unacceptable=0.2, threshold=0.4, tie_labels=[], resamples=20)
    result = check_agreement(
        [str(tmp_path / "export.json")], tmp_path, **settings, max_pairs=5, min_shared=2, seed=0, on_bad_row="error"
    )
    assert result["passed"] and result["krippendorff_alpha"]["value"] == 1.0


# ---- trees


def node(name: str, text: str, role: str, *replies: dict, rank: int | None = None, **more) -> dict:
    return flat(name, "t", text, role, rank) | {"replies": list(replies)} | more


def tree(*replies: dict, **root) -> dict:
    return {"message_tree_id": "t", "prompt": node("t", ASK, "prompter", *replies, **root)}


GONE, SPAM = {"deleted": True}, {"review_result": False}
BEST, WORSE = node("g", GOOD, "assistant", rank=0), node("b", BAD, "assistant", rank=1)


@pytest.mark.parametrize(
    "row, problem",
    [
        (tree(), "has no answer: its prompt has no reply"),
        (tree(BEST | GONE, WORSE | SPAM, WORSE | GONE), "no answer: of 3 replies 2 were deleted and 1 rejected"),
        (tree(BEST, WORSE, **GONE), "the prompt of the tree was deleted or rejected in review"),
        (tree(BEST, WORSE, **SPAM), "the prompt of the tree was deleted or rejected in review"),
    ],
)  # fmt: skip
def test_a_tree_that_gives_no_row_is_a_bad_row_with_a_reason(row, problem, tmp_path):
    with pytest.raises(ValueError, match=rf"^export.json:1: .*{problem}"):
        read([row], formats.examples)
    (tmp_path / "trees.json").write_text(json.dumps([row, tree(BEST, WORSE)]))
    files = [str(tmp_path / "trees.json")]
    result = check_convert(files, tmp_path, layout=Layout(), license="x", on_bad_row="skip")
    assert result["rows"] == 1 and problem in result["skipped_rows"][0]


def test_a_tree_without_two_ranked_answers_is_no_ranking_and_it_is_said():
    for replies in ((BEST,), (BEST, WORSE | GONE), (BEST | {"rank": None}, WORSE | {"rank": None})):
        with pytest.raises(ValueError, match="no message of the tree has two ranked answers"):
            read([tree(*replies)], formats.preferences)
    assert learned(*read([tree(BEST, WORSE)], formats.preferences)) == ([GOOD, BAD], [0, 1])


def test_a_question_without_an_answer_does_not_take_the_answer_before_it():
    again = node("p", "And?", "prompter", node("d", "No.", "assistant", rank=0, **GONE))
    (record,) = read([tree(BEST | {"replies": [again]})], formats.examples)
    assert record.messages == said(ASK, GOOD)


def test_replies_in_other_languages_are_left_out_of_a_tree():
    spanish = node("e", "Té verde.", "assistant", rank=0, lang="es")
    (record,) = read([tree(spanish, BEST | {"rank": 1})], formats.examples, languages=("en",))
    assert record.messages == said(ASK, GOOD)
    (record,) = read([tree(spanish, BEST | {"rank": 1})], formats.examples)
    assert record.messages == said(ASK, "Té verde.")
    with pytest.raises(ValueError, match=r"export.json:1: .*none of the tree's replies is in languages=\['en'\]"):
        read([tree(spanish)], formats.examples, languages=("en",))


def test_flat_messages_follow_the_same_rules():
    lonely = flat("l", None, "Alone?", "prompter") | {"message_tree_id": "l"}
    with pytest.raises(ValueError, match="export.json:4: .*its prompt has no reply"):
        read([*OASST, lonely], formats.examples)
    (record,) = read(OASST, formats.examples)
    assert record.messages == [USER, {"role": "assistant", "content": GOOD}]
