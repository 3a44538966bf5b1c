"""Exports of annotation tools, and OpenAssistant's flat files, whose rows are one message each.

Only submitted answers count: drafts, discarded and cancelled ones do not. Of several votes the majority decides, of
several rankings the mean, and each written answer becomes a row. A record on which people disagree is refused.
"""

import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from data.adapters.comparisons import number_of, pair
from data.adapters.demonstrations import alternating, beside, rest, text

SIDES = (("answer1", "answer2"), ("text1", "text2"))  # field names in Label Studio's templates
PROMPTS = ("prompt", "instruction", "question", "context", "conversation", "messages")
IDS = ("id", "external_id", "status", "_server_id")  # Argilla's own columns that hold texts
ALONE = "ask one more person, or leave such records out with on_bad_row=skip"


class Annotated(NamedTuple):
    """An Argilla record: its fields, (person, value) of the submitted answers to each question, and other columns."""

    fields: dict
    given: dict[str, list[tuple[Any, Any]]]
    columns: dict


def argilla(row: dict) -> list[dict]:
    """Argilla 2's JSON: `fields`, and under `responses` one value per person and question.

    A ranking of fields becomes a ranking, the name of a field a preference for it, and a text a written answer to a
    record that has only a prompt. Beside other fields a text may be a label, and is refused. `to_json` writes no
    status, so a draft looks like a submitted answer there; `argilla_flat` knows the status.
    """
    return _read(*_argilla(row))


def _argilla(row: dict) -> Annotated:
    columns = rest(row, "fields", "responses", "suggestions", "vectors", "metadata") | (row["metadata"] or {})
    given = {name: _submitted(answers) for name, answers in (row["responses"] or {}).items()}
    return Annotated(row["fields"], given, columns)


def argilla_flat(row: dict) -> list[dict]:
    """Argilla 2's `to_datasets`: a column for each field and metadata, and for a question Q `Q.responses`,
    `Q.responses.status` and the like.
    """
    return _read(*_argilla_flat(row))


def _argilla_flat(row: dict) -> Annotated:
    questions = [name.removesuffix(".responses") for name in row if name.endswith(".responses")]
    made = tuple(f"{name}.{what}" for name in questions for what in ("responses", "suggestion"))
    given = {}
    for name in questions:
        values, column = row[f"{name}.responses"] or [], f"{name}.responses"
        users, states = (row.get(f"{column}.{of}") or [None] * len(values) for of in ("users", "status"))
        answers = zip(values, users, states, strict=True)
        given[name] = _submitted([{"value": v, "user_id": user, "status": state} for v, user, state in answers])
    return _of_columns({name: value for name, value in row.items() if not name.startswith(made)}, given)


def argilla_1(row: dict) -> list[dict]:
    """Argilla 1's FeedbackDataset on the Hub: fields are columns, a question is a list of {user_id, value, status}."""
    return _read(*_argilla_1(row))


def _argilla_1(row: dict) -> Annotated:
    questions = [name for name in row if f"{name}-suggestion" in row]
    given = {name: _submitted(row[name]) for name in questions}
    kept = {name: value for name, value in row.items() if name.partition("-suggestion")[0] not in questions}
    known = row["metadata"] or {}
    if isinstance(known, str):
        with contextlib.suppress(ValueError):
            known = json.loads(known)
    if not isinstance(known, dict):
        raise ValueError(f"metadata must be an object, or its JSON text, got {row['metadata']!r}")
    return _of_columns(rest(kept, "metadata", "vectors"), given, known)


RECORDS = {"argilla": _argilla, "argilla_flat": _argilla_flat, "argilla_1": _argilla_1}


def _submitted(answers: Any) -> list[tuple[Any, Any]]:
    """(person, value) of each submitted answer. Arrow may store a list of structs as a struct of lists."""
    if isinstance(answers, dict):
        answers = [dict(zip(answers, items, strict=True)) for items in zip(*answers.values(), strict=True)]
    kept = [answer for answer in answers or [] if answer.get("status") in (None, "submitted")]
    return [(answer.get("user_id"), answer["value"]) for answer in kept if answer["value"] not in (None, "", [])]


def _of_columns(columns: dict, given: dict[str, list], metadata: dict | None = None) -> Annotated:
    """A record whose fields are columns: texts and conversations."""
    fields = {name: value for name, value in columns.items() if name not in IDS and _is_field(value)}
    return Annotated(fields, given, rest(columns, *fields) | (metadata or {}))


def _is_field(value: Any) -> bool:
    return isinstance(value, str) or isinstance(value, list) and isinstance(next(iter(value), None), dict)


def _only(given: dict[str, list]) -> list[tuple[Any, Any]]:
    """The answers to the one question that was answered."""
    answered = {name: answers for name, answers in given.items() if answers}
    if not answered:
        raise ValueError(f"no submitted response; questions of the row: {', '.join(given) or 'none'}")
    if len(answered) > 1:
        raise ValueError(f"{' and '.join(answered)} are both answered, and one row is made of one question; keep one")
    return next(iter(answered.values()))


def _read(fields: dict, given: dict[str, list], columns: dict) -> list[dict]:
    """The rows of a record, from its fields and the submitted answers to each question."""
    prompt = _prompt(fields)
    rows = {name: _answered(prompt, fields, [v for _, v in answers]) for name, answers in given.items() if answers}
    used = {name: given[name] for name, made in rows.items() if made}
    if rows and not used:
        raise ValueError(
            "a response must rank fields, name a field, or be a text in a record that has only a prompt; questions of "
            f"the row: {', '.join(given)}; its fields: {', '.join(fields)}"
        )
    _only(used or given)
    return [beside(row, columns) for made in rows.values() for row in made]


def _answered(prompt: Any, fields: dict, values: list) -> list[dict]:
    """The rows that the values of one question make. None if they are no preference and no answer."""
    ranks = [_ranks(value) for value in values]
    if all(one and set(one) <= set(fields) for one in ranks):
        return [_ranking(prompt, fields, ranks)]
    if not all(isinstance(value, str) for value in values):
        return []  # a rating, or several labels
    if all(value in fields for value in values):
        return [_voted(prompt, fields, values)]
    return _written(prompt, values) if set(fields) <= set(PROMPTS) else []


def _ranks(value: Any) -> dict[str, float]:
    """The rank of each name, 0 for the best: of names, best first, or of {rank, value} with ranks from 1."""
    if isinstance(value, dict) and set(value) == {"rank", "value"}:
        value = [{"rank": r, "value": name} for r, name in zip(value["rank"], value["value"], strict=True)]
    if not isinstance(value, list) or not value:
        return {}
    if all(isinstance(one, dict) and set(one) >= {"rank", "value"} for one in value):
        return {one["value"]: number_of(one["rank"], "rank") - 1 for one in value}
    return {name: float(i) for i, name in enumerate(value)} if all(isinstance(name, str) for name in value) else {}


def _ranking(prompt: Any, fields: dict, ranks: list[dict[str, float]]) -> dict:
    if any(set(one) != set(ranks[0]) for one in ranks):
        raise ValueError(f"all people must rank the same fields, got {' and '.join(', '.join(one) for one in ranks)}")
    mean = {name: sum(one[name] for one in ranks) / len(ranks) for name in ranks[0]}
    names = sorted(mean, key=lambda name: mean[name])
    if len(set(mean.values())) == 1 and any(len(set(one.values())) > 1 for one in ranks):
        raise ValueError(f"the annotators disagree: the mean ranks of all are equal; {ALONE}")
    return {"prompt": prompt, "completions": [fields[n] for n in names], "ranks": [mean[n] for n in names]}


def _voted(prompt: Any, fields: dict, votes: Sequence[str]) -> dict:
    """A pair from votes for one of two fields."""
    sides = [name for name, value in fields.items() if name not in PROMPTS and isinstance(value, str)]
    if len(sides) != 2:
        raise ValueError(f"a vote for one field needs two fields beside the prompt, got {', '.join(sides) or 'none'}")
    return pair(prompt, fields[sides[0]], fields[sides[1]], _majority(votes, *sides), {})


def _majority(votes: Sequence[str], first: str, second: str) -> int:
    """The votes for the first side minus those for the second. Raises ValueError if there are equally many."""
    counts = Counter(votes)
    if counts[first] == counts[second]:
        raise ValueError(
            f"the annotators disagree: {counts[first]} for {first} and {counts[second]} for {second}; {ALONE}"
        )
    return counts[first] - counts[second]


def _written(prompt: Any, answers: list[str]) -> list[dict]:
    """A demonstration for each of the written answers. Equal ones are one."""
    if isinstance(prompt, str):
        prompt = alternating(prompt)
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"no prompt: the data need a text or messages in one of {', '.join(PROMPTS)}")
    return [{"messages": [*prompt, {"role": "assistant", "content": answer}]} for answer in dict.fromkeys(answers)]


def label_studio(row: dict) -> dict:
    """Label Studio's JSON with a Pairwise tag. `selected` is left or right, with one vote per annotation.

    `to_name` has names of tags, in a list or as one text. They are names of the data's fields in some projects only.
    """
    data, votes = row["data"], []
    for _, result in (results := _results(row, "pairwise")):
        if (selected := result["value"]["selected"]) not in ("left", "right"):
            raise ValueError(f"selected must be left or right, got {selected!r}")
        votes.append(selected)
    tags = results[-1][1]["to_name"]
    tags = tags.split(",") if isinstance(tags, str) else tags
    names = next((n for n in (tags, *SIDES) if len(n) == 2 and set(n) <= set(data)), None)
    if names is None:
        known = ", ".join(" and ".join(n) for n in SIDES)
        raise ValueError(f"data has {', '.join(data)}; the two sides must be named {known}: rename them")
    left, right = (text(data, name) for name in names)
    found = pair(_prompt(data), left, right, _majority(votes, "left", "right"), {})
    return beside(found, _known(row, *names))


def label_studio_text(row: dict) -> list[dict]:
    """Label Studio's JSON with a TextArea: the text of each annotation is an answer to the prompt."""
    texts: list[str] = []
    for _, result in _results(row, "textarea"):
        written = result["value"]["text"]
        texts += [written] if isinstance(written, str) else written
        if not isinstance(written, str) and len(written) != 1:
            raise ValueError(f"an annotation must have one text, got {written}")
    return [beside(one, _known(row)) for one in _written(_prompt(row["data"]), texts)]


def _prompt(data: dict) -> Any:
    return next((data[name] for name in PROMPTS if name in data), None)


def _known(row: dict, *used: str) -> dict:
    """What the task and its data say beside the prompt and the sides."""
    prompt = next((name for name in PROMPTS if name in row["data"]), "")
    return rest(row, "data", "annotations", "predictions") | rest(row["data"], prompt, *used)


def _results(row: dict, kind: str) -> list[tuple[Any, dict]]:
    """(person, result) of a type in the annotations that were not cancelled."""
    kept = [annotation for annotation in row["annotations"] or [] if not annotation.get("was_cancelled")]
    results = [(a.get("completed_by"), r) for a in kept for r in a["result"] or [] if r.get("type") == kind]
    if not results:
        raise ValueError(f"no annotation that was submitted has a result of type {kind}")
    if len(tags := {str(result.get("from_name")): None for _, result in results}) > 1:
        raise ValueError(f"there are results of type {kind} of {' and '.join(tags)}; keep those of one tag")
    return results


def votes(name: str, row: dict) -> list[dict]:
    """A row of check=agreement for each person who submitted an answer, in an export of the format `name`.

    A label is a vote, a number, a text, or the names of a ranking in their order.
    """
    if name in RECORDS:
        fields, given, _ = RECORDS[name](row)
        answers = [(who, _label(value)) for who, value in _only(given)]
        item, prompt = row.get("id") or row.get("external_id"), _prompt(fields)
    else:
        answers = [(who, result["value"]["selected"]) for who, result in _results(row, "pairwise")]
        item, prompt = row.get("id"), _prompt(row["data"])
    people = [who.get("id") if isinstance(who, dict) else who for who, _ in answers]
    rows = [{"item": item, "annotator": p, "label": label} for p, (_, label) in zip(people, answers, strict=True)]
    return [one | ({"prompt": prompt} if isinstance(prompt, str) else {}) for one in rows]


def _label(value: Any) -> Any:
    ranks = _ranks(value)
    return " > ".join(" = ".join(n for n in ranks if ranks[n] == r) for r in sorted(set(ranks.values()))) or value


def in_languages(node: dict, languages: Sequence[str]) -> dict:
    """A message of a tree without the replies, at any depth, that are in other languages."""
    kept = [r for r in node.get("replies") or [] if r.get("lang") is None or r["lang"] in languages]
    return node | {"replies": [in_languages(reply, languages) for reply in kept]}


def check_message(row: dict) -> None:
    """Raises ValueError if a flat message has no id that can be joined."""
    text(row, "message_id")
    if row["parent_id"] is not None:
        text(row, "parent_id")


def trees(rows: Sequence[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """OpenAssistant's flat messages, joined to trees. Each tree is at the place of its first message."""
    children, roots = defaultdict(list), []
    places: dict[str, str] = {}
    for where, row in rows:
        if (first := places.setdefault(row["message_id"], where)) != where:
            raise ValueError(f"message {row['message_id']} is twice in the file: {first} and {where}")
        node = {name: value for name, value in row.items() if value is not None}
        if row.get("parent_id") is None:
            roots.append((where, node))
        else:
            children[row["parent_id"]].append(node)
    nodes = [node for _, node in roots]
    for node in nodes:  # the list grows during the loop, until it has all descendants of the roots
        node["replies"] = children.pop(node["message_id"], [])
        nodes += node["replies"]
    if children:
        raise ValueError(
            f"message {next(iter(children))} is missing: {len(children)} parents of replies are not in the file"
        )
    return [(where, {"message_tree_id": node.get("message_tree_id"), "prompt": node}) for where, node in roots]
