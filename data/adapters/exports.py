"""Exports of annotation tools, and OpenAssistant's flat files, whose rows are one message each."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from data.adapters.comparisons import pair
from data.adapters.demonstrations import alternating, rest, text

SIDES = (("answer1", "answer2"), ("text1", "text2"))  # field names in Label Studio's templates
PROMPTS = ("prompt", "instruction", "question", "context", "conversation", "messages")


def argilla(row: dict) -> dict:
    """Argilla 2: `fields`, and under `responses` one value per person and question.

    A ranking of fields becomes a ranking, the name of a field a preference for it, and a text a written answer to a
    record that has only a prompt. Beside other fields a text may be a label, and is refused.
    """
    fields = row["fields"]
    columns = rest(row, "fields", "responses", "suggestions", "vectors") | (row["metadata"] or {})
    prompt = next((fields[name] for name in PROMPTS if name in fields), None)
    given = {name: [r["value"] for r in said_by if r.get("value")] for name, said_by in row["responses"].items()}
    for values in (values for values in given.values() if values):
        if all(isinstance(value, list) and value and set(value) <= set(fields) for value in values):
            names = list(dict.fromkeys(name for value in values for name in value))
            ranks = [sum(value.index(name) for value in values) / len(values) for name in names]
            return {"prompt": prompt, "completions": [fields[n] for n in names], "ranks": ranks} | columns
        if not all(isinstance(value, str) for value in values):
            continue  # a rating, or several labels: no preference
        if all(value in fields for value in values):
            return _voted(prompt, fields, values, columns)
        if set(fields) <= set(PROMPTS):
            return {"messages": [*_asked(prompt), {"role": "assistant", "content": values[0]}]} | columns
    raise ValueError(
        "a response must rank fields, name a field, or be a text in a record that has only a prompt; questions of the "
        f"row: {', '.join(given) or 'none'}; its fields: {', '.join(fields)}"
    )


def _voted(prompt: Any, fields: dict, votes: Sequence[str], columns: dict) -> dict:
    """A pair from votes for one of two fields."""
    sides = [name for name, value in fields.items() if name not in PROMPTS and isinstance(value, str)]
    if len(sides) != 2:
        raise ValueError(f"a vote for one field needs two fields beside the prompt, got {', '.join(sides) or 'none'}")
    counts = Counter(votes)
    return pair(prompt, fields[sides[0]], fields[sides[1]], counts[sides[0]] - counts[sides[1]], columns)


def _asked(prompt: Any) -> list[dict]:
    """The turns of a prompt, which is a text or a list of messages."""
    if isinstance(prompt, str):
        return alternating(prompt)
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"no prompt: the data need a text or messages in one of {', '.join(PROMPTS)}")
    return prompt


def argilla_1(row: dict) -> dict:
    """Argilla 1's FeedbackDataset on the Hub: fields are columns, a question is a list of {user_id, value, status}."""
    kept = rest(row, "metadata", "external_id")
    fields = {name: value for name, value in kept.items() if isinstance(value, str)}
    questions = {name: _submitted(value) for name, value in row.items() if f"{name}-suggestion" in row}
    responses = {
        name: [{"value": _in_order(answer)} for answer in answers] for name, answers in questions.items() if answers
    }
    used = {n for n in row if n in questions or n.partition("-suggestion")[0] in questions}
    fields = rest(fields, *used)
    columns = rest(row, *used, *fields, "metadata")
    return argilla({"fields": fields, "responses": responses, "metadata": {}} | columns)


def _submitted(value: Any) -> list[Any]:
    """The submitted values. Arrow may store a list of structs as a struct of lists."""
    if isinstance(value, dict):
        value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    return [answer["value"] for answer in value or [] if answer.get("status") == "submitted"]


def _in_order(value: Any) -> Any:
    """A ranking's names, best first."""
    if isinstance(value, dict) and set(value) == {"rank", "value"}:
        return [name for _, name in sorted(zip(value["rank"], value["value"], strict=True))]
    return value


def label_studio(row: dict) -> dict:
    """Label Studio's JSON with a Pairwise tag. `selected` is left or right, with one vote per annotation.

    `to_name` has names of tags, in a list or as one text. They are names of the data's fields in some projects only.
    """
    data, tags = row["data"], []
    votes: Counter[str] = Counter()
    for annotation in row["annotations"]:
        for result in [] if annotation.get("was_cancelled") else annotation["result"]:
            if result.get("type") == "pairwise":
                if (selected := result["value"]["selected"]) not in ("left", "right"):
                    raise ValueError(f"selected must be left or right, got {selected!r}")
                votes[selected] += 1
                tags = result["to_name"]
    if not votes:
        raise ValueError("no annotation has a result of type pairwise")
    tags = tags.split(",") if isinstance(tags, str) else tags
    names = next((n for n in (tags, *SIDES) if len(n) == 2 and set(n) <= set(data)), None)
    if names is None:
        known = ", ".join(" and ".join(n) for n in SIDES)
        raise ValueError(f"data has {', '.join(data)}; the two sides must be named {known}: rename them")
    prompt = next((data[name] for name in PROMPTS if name in data), None)
    left, right = (text(data, name) for name in names)
    return pair(prompt, left, right, votes["left"] - votes["right"], rest(row, "data", "annotations", "predictions"))


def label_studio_text(row: dict) -> dict:
    """Label Studio's JSON with a TextArea: the first annotator's text is the answer to the prompt."""
    results = (r for a in row["annotations"] if not a.get("was_cancelled") for r in a["result"])
    answer = next((r["value"]["text"] for r in results if r.get("type") == "textarea"), None)
    if not answer:
        raise ValueError("no annotation has a result of type textarea")
    prompt = next((row["data"][name] for name in PROMPTS if name in row["data"]), None)
    answer = answer if isinstance(answer, str) else "\n".join(answer)
    messages = [*_asked(prompt), {"role": "assistant", "content": answer}]
    return {"messages": messages} | rest(row, "data", "annotations", "predictions")


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
