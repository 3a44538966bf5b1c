"""Exports of annotation tools, and OpenAssistant's flat files, whose rows are one message each.

Only submitted answers count: drafts, discarded and cancelled ones do not. Of several votes the majority decides, of
several rankings the mean, and each written answer becomes a row. A record on which people disagree is refused.
"""

import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from data.adapters.comparisons import number_of, pair
from data.adapters.demonstrations import alternating, beside, rest, text

SIDES = (("answer1", "answer2"), ("text1", "text2"))  # field names in Label Studio's templates
PROMPTS = ("prompt", "instruction", "question", "context", "conversation", "messages")
IDS = ("id", "external_id", "status", "_server_id")  # Argilla's own columns that hold texts
ALONE = "ask one more person, or leave such records out with on_bad_row=skip"


def argilla(row: dict) -> list[dict]:
    """Argilla 2's JSON: `fields`, and under `responses` one value per person and question.

    A ranking of fields becomes a ranking, the name of a field a preference for it, and a text a written answer to a
    record that has only a prompt. Beside other fields a text may be a label, and is refused. `to_json` writes no
    status, so a draft looks like a submitted answer there; `argilla_flat` knows the status.
    """
    columns = rest(row, "fields", "responses", "suggestions", "vectors", "metadata") | (row["metadata"] or {})
    given = {name: _submitted(answers) for name, answers in (row["responses"] or {}).items()}
    return _read(row["fields"], given, columns)


def argilla_flat(row: dict) -> list[dict]:
    """Argilla 2's `to_datasets`: a column for each field and metadata, and for a question Q `Q.responses`,
    `Q.responses.status` and the like.
    """
    questions = [name.removesuffix(".responses") for name in row if name.endswith(".responses")]
    made = tuple(f"{name}.{what}" for name in questions for what in ("responses", "suggestion"))
    given = {}
    for name in questions:
        values, states = row[f"{name}.responses"] or [], row.get(f"{name}.responses.status")
        states = [None] * len(values) if states is None else states
        given[name] = _submitted([{"value": v, "status": state} for v, state in zip(values, states, strict=True)])
    return _read_columns({name: value for name, value in row.items() if not name.startswith(made)}, given)


def argilla_1(row: dict) -> list[dict]:
    """Argilla 1's FeedbackDataset on the Hub: fields are columns, a question is a list of {user_id, value, status}."""
    questions = [name for name in row if f"{name}-suggestion" in row]
    given = {name: _submitted(row[name]) for name in questions}
    kept = {name: value for name, value in row.items() if name.partition("-suggestion")[0] not in questions}
    known = row["metadata"] or {}
    if isinstance(known, str):
        with contextlib.suppress(ValueError):
            known = json.loads(known)
    if not isinstance(known, dict):
        raise ValueError(f"metadata must be an object, or its JSON text, got {row['metadata']!r}")
    return _read_columns(rest(kept, "metadata", "vectors"), given, known)


def _submitted(answers: Any) -> list[Any]:
    """The submitted values. Arrow may store a list of structs as a struct of lists."""
    if isinstance(answers, dict):
        answers = [dict(zip(answers, items, strict=True)) for items in zip(*answers.values(), strict=True)]
    kept = [answer["value"] for answer in answers or [] if answer.get("status") in (None, "submitted")]
    return [value for value in kept if value not in (None, "", [])]


def _read_columns(columns: dict, given: dict[str, list], metadata: dict | None = None) -> list[dict]:
    """The rows of a record whose fields are columns: texts and conversations."""
    fields = {name: value for name, value in columns.items() if name not in IDS and _is_field(value)}
    return _read(fields, given, rest(columns, *fields) | (metadata or {}))


def _is_field(value: Any) -> bool:
    return isinstance(value, str) or isinstance(value, list) and isinstance(next(iter(value), None), dict)


def _read(fields: dict, given: dict[str, list], columns: dict) -> list[dict]:
    """The rows of a record, from its fields and the submitted values of each question."""
    if not any(given.values()):
        raise ValueError(f"no submitted response; questions of the row: {', '.join(given) or 'none'}")
    prompt = next((fields[name] for name in PROMPTS if name in fields), None)
    found = {name: _answered(prompt, fields, values) for name, values in given.items() if values}
    found = {name: rows for name, rows in found.items() if rows}
    if len(found) > 1:
        raise ValueError(f"{' and '.join(found)} are both answered, and one row is made of one question; keep one")
    if not found:
        raise ValueError(
            "a response must rank fields, name a field, or be a text in a record that has only a prompt; questions of "
            f"the row: {', '.join(given)}; its fields: {', '.join(fields)}"
        )
    return [beside(row, columns) for rows in found.values() for row in rows]


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
    for result in (results := _results(row, "pairwise")):
        if (selected := result["value"]["selected"]) not in ("left", "right"):
            raise ValueError(f"selected must be left or right, got {selected!r}")
        votes.append(selected)
    tags = results[-1]["to_name"]
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
    for result in _results(row, "textarea"):
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


def _results(row: dict, kind: str) -> list[dict]:
    """The results of a type in the annotations that were not cancelled."""
    kept = [annotation for annotation in row["annotations"] or [] if not annotation.get("was_cancelled")]
    results = [result for annotation in kept for result in annotation["result"] or [] if result.get("type") == kind]
    if not results:
        raise ValueError(f"no annotation that was submitted has a result of type {kind}")
    if len(tags := {str(result.get("from_name")): None for result in results}) > 1:
        raise ValueError(f"there are results of type {kind} of {' and '.join(tags)}; keep those of one tag")
    return results


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
