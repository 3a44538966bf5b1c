"""The judge's prompts: the template of an item, and the parser of its verdict."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import Formatter

from data.files import read_rows
from evals import published_parsers as published
from evals.judge_grade import read_grade
from evals.judge_output import read_pair, read_ranking

HERE = Path(__file__).parent / "templates"
NEED_REFERENCE = ("math", "reasoning", "coding", "arena-hard-200")
REQUIRED = {"pairwise": ("question", "answer_a", "answer_b"), "single": ("question", "answer")}
# judge.rule -> output_format -> parser of a verdict (or, for [[rating]], of a grade)
PARSERS: dict[str, dict[str, Callable]] = {
    "last": {
        "[[A]]": read_pair,
        "[[A>>B]]": read_pair,
        "[[rating_a,rating_b]]": read_pair,
        "rank": read_ranking,
        "m": partial(read_pair, identifiers=True),
        "[[rating]]": read_grade,
    },
    "fastchat": {
        "[[A]]": published.fastchat_pair,
        "[[rating_a,rating_b]]": published.fastchat_scores,
        "[[rating]]": published.fastchat_grade,
    },
    "arena_hard": {"[[A>>B]]": published.arena_hard},
    "alpaca_eval": {"rank": published.alpaca_eval_ranking, "m": published.alpaca_eval_identifier},
}


@dataclass(frozen=True)
class Template:
    """One prompt with fields like `{question}` and `{answer_a}`. `output_format` is the format of its verdict."""

    name: str
    system: str
    text: str
    output_format: str  # [[A]] | [[A>>B]] | [[rating_a,rating_b]] | rank | m for pairs, [[rating]] for one answer

    def messages(self, fields: dict[str, str]) -> list[dict[str, str]]:
        """The conversation that the judge gets. Braces in questions and answers are not changed."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": fill(self.text, fields)}]


def fill(text: str, fields: dict[str, str]) -> str:
    """The text with `{name}` replaced for the names in `fields`. Other braces are text.

    If the whole text is a valid format string of these names (as FastChat's are), `{{` stands for a brace.
    """
    try:
        names = [name for _, name, spec, conversion in Formatter().parse(text) if name is not None]
        formatted = all(name in fields for name in names)
    except ValueError:
        formatted = False
    if formatted:
        return text.format(**fields)
    return re.sub(r"\{(\w+)\}", lambda found: fields.get(found[1], found[0]), text)


def template_fields(text: str) -> set[str]:
    """The names in braces in a template."""
    return set(re.findall(r"\{(\w+)\}", text))


def load_templates(name: str, mode: str) -> dict[tuple, Template]:
    """{(turn, with reference) or (turn, with reference, category): template} of a set or a file.

    Built-in sets: fastchat, alpaca_eval, alpaca_eval_clf, arena_hard, short.

    A file has one JSON object per line: name, type (pairwise | single), system_prompt, prompt_template, output_format.
    `only_category` restricts a template to questions of one category. A template with "multi-turn" in its name is for
    the second turn. A template with {ref_answer_1} in its text is the one with references.

    Raises:
        ValueError: there is no such set, or it has no template of this mode.
    """
    ours = HERE / f"{name}.jsonl"
    if not ours.exists() and not Path(name).is_file():
        known = ", ".join(sorted(path.stem for path in HERE.glob("*.jsonl")))
        raise ValueError(f"judge.template={name!r} is neither a file nor a built-in set: {known}")
    templates: dict[tuple, Template] = {}
    for where, row in read_rows(str(ours if ours.exists() else name)):
        missing = [
            key for key in ("name", "type", "system_prompt", "prompt_template", "output_format") if key not in row
        ]
        if missing:
            raise ValueError(f"{where} lacks {', '.join(missing)}")
        if row["type"] != mode:
            continue
        turn = 2 if "multi-turn" in row["name"] else 1
        key: tuple = turn, "{ref_answer_1}" in row["prompt_template"]
        key = (*key, row["only_category"]) if row.get("only_category") else key
        if key in templates:
            raise ValueError(f"{where}: {row['name']} and {templates[key].name} serve the same turn; keep one")
        parts = (row[key] for key in ("name", "system_prompt", "prompt_template", "output_format"))
        templates[key] = Template(*parts)
        if templates[key].output_format not in PARSERS["last"]:
            known = ", ".join(PARSERS["last"])
            raise ValueError(f"{where}: output_format must be one of {known}, got {row['output_format']!r}")
        asked = template_fields(row["prompt_template"])
        lacking = [name for name in REQUIRED[mode] if not any(field.startswith(name) for field in asked)]
        if lacking:
            raise ValueError(
                f"{where}: the template does not contain {{{'} or {'.join(lacking)}}}; check the names in braces"
            )
    if (1, False) not in templates:
        raise ValueError(f"judge.template={name} has no {mode} template for a first turn without reference")
    return templates


def parser_of(rule: str, templates: dict) -> dict[str, Callable]:
    """{output_format: parser} of `judge.rule` for the templates.

    Raises:
        ValueError: there is no such rule, or its publisher has no parser for one of the formats.
    """
    if rule not in PARSERS:
        raise ValueError(f"judge.rule={rule!r} must be one of {', '.join(PARSERS)}")
    lacking = {template.output_format for template in templates.values()} - set(PARSERS[rule])
    if lacking:
        raise ValueError(
            f"judge.rule={rule} does not read output_format {', '.join(sorted(lacking))}, only "
            f"{', '.join(PARSERS[rule])}; use judge.rule=last, or another judge.template"
        )
    return PARSERS[rule]


def check_identifiers(templates: dict, name: str, kind: str) -> None:
    """Raise ValueError if a template's verdict is not one of the two identifiers m and M."""
    formats = {template.output_format for template in templates.values()}
    if formats != {"m"}:
        raise ValueError(
            f"judge.kind={kind} compares two identifiers, so judge.template needs output_format m; "
            f"{name} has {', '.join(sorted(formats))}; use alpaca_eval_clf"
        )


def pair_fields(question: list[str], answer_a: list[str], answer_b: list[str], reference: list[str] | None) -> dict:
    """The fields of pairwise templates. Lists have one text per turn."""
    fields = {"question": question[0], "answer_a": answer_a[0], "answer_b": answer_b[0]}
    named = {"question": question, "answer_a": answer_a, "answer_b": answer_b, "ref_answer": reference or []}
    return fields | {f"{name}_{i}": text for name, texts in named.items() for i, text in enumerate(texts, 1)}


def single_fields(question: list[str], answer: list[str], reference: list[str] | None) -> dict:
    """The fields of grading templates. Lists have one text per turn."""
    named = {"question": question, "answer": answer, "ref_answer": reference or []}
    fields = {f"{name}_{i}": text for name, texts in named.items() for i, text in enumerate(texts, 1)}
    return fields | {"question": question[0], "answer": answer[0]}
