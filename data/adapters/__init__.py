"""Convert published rows to ours. The format is recognised by the row's fields, or named with `data.format`.

`FORMATS` lists the formats. Each adapter is a function of one row (`demonstrations.py`, `comparisons.py`,
`exports.py`), with the source of its published schema. A row that fits no format must be one of ours, which
`data/formats.py` reads. A row that fits two formats is refused.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from data.adapters import comparisons, demonstrations, exports
from data.files import as_object


class Format(NamedTuple):
    """`needs` are the fields that identify the format, `fits` is a further condition on the row."""

    adapt: Callable[[dict], dict | list[dict]]  # several rows where several people answered
    needs: tuple[str, ...]
    source: str  # where the schema is published
    license: str  # the license of the set that published the schema; other sets in this schema have their own
    fits: Callable[[dict], bool] = lambda row: True


HUB = "https://huggingface.co/datasets/"


def _is_list(name: str, kind: type[Any], key: str | None = None) -> Callable[[dict], bool]:
    """Whether a field is a list whose first element has a given type (and key)."""

    def fits(row: dict) -> bool:
        first = row[name][0] if isinstance(row[name], list) and row[name] else None
        return isinstance(first, kind) and (key is None or key in first)

    return fits


def _without(*names: str) -> Callable[[dict], bool]:
    return lambda row: not set(names) & set(row)


def _results(*kinds: str | None) -> Callable[[dict], bool]:
    """Whether some annotation of a Label Studio export has a result of one of these types. None: no result at all."""

    def fits(row: dict) -> bool:
        found = {r.get("type") for a in row["annotations"] or [] for r in a.get("result") or []}
        return bool((found or {None}) & set(kinds))

    return fits


FORMATS: dict[str, Format] = {
    "alpaca": Format(
        demonstrations.alpaca, ("instruction", "output"), HUB + "tatsu-lab/alpaca", "CC-BY-NC-4.0",
        _without("instances", "conversations", "response"),
    ),
    "alpaca_prompt": Format(
        demonstrations.alpaca_prompt, ("instruction",), HUB + "tatsu-lab/alpaca_eval", "CC-BY-NC-4.0",
        _without("output", "response", "instances", "completions", "conversations", "messages", "prompt"),
    ),
    "dolly": Format(
        demonstrations.dolly, ("instruction", "response"), HUB + "databricks/databricks-dolly-15k", "CC-BY-SA-3.0",
        _without("conversations", "messages", "output", "completions"),
    ),
    "self_instruct": Format(
        demonstrations.self_instruct, ("instruction", "instances"),
        "https://github.com/yizhongw/self-instruct/blob/main/data/seed_tasks.jsonl", "Apache-2.0",
    ),
    "sharegpt": Format(
        demonstrations.sharegpt, ("conversations",), HUB + "anon8231489123/ShareGPT_Vicuna_unfiltered", "Apache-2.0",
        _is_list("conversations", dict, "from"),
    ),
    "lima": Format(
        demonstrations.lima, ("conversations",), HUB + "GAIR/lima", "CC-BY-NC-SA-4.0", _is_list("conversations", str)
    ),
    "ultrachat": Format(
        demonstrations.ultrachat, ("id", "data"), HUB + "openbmb/UltraChat", "MIT", _is_list("data", str)
    ),
    "capybara": Format(
        demonstrations.capybara, ("conversation",), HUB + "LDJnr/Capybara", "Apache-2.0",
        _is_list("conversation", dict, "input"),
    ),
    "chats": Format(
        demonstrations.chats, ("conversation",), HUB + "lmsys/lmsys-chat-1m", "LMSYS-Chat-1M",
        _is_list("conversation", dict, "role"),
    ),
    "openorca": Format(
        demonstrations.openorca, ("system_prompt", "question", "response"), HUB + "Open-Orca/OpenOrca", "MIT"
    ),
    "gsm8k": Format(
        demonstrations.gsm8k, ("question", "answer"), HUB + "openai/gsm8k", "MIT",
        _without("prompt", "messages", "context", "system_prompt", "response", "chosen", "question_id", "answers"),
    ),
    "math": Format(
        demonstrations.competition_math, ("problem", "solution"), HUB + "EleutherAI/hendrycks_math", "MIT",
        _without("prompt", "messages"),
    ),
    "mbpp": Format(
        demonstrations.mbpp, ("text", "test_list"), HUB + "google-research-datasets/mbpp", "CC-BY-4.0",
        _without("prompt", "messages"),
    ),
    "mbpp_sanitized": Format(
        demonstrations.mbpp, ("prompt", "test_list", "test_imports"), HUB + "google-research-datasets/mbpp",
        "CC-BY-4.0",
    ),
    "questions": Format(
        demonstrations.questions, ("question_id", "turns"),
        "https://github.com/lm-sys/FastChat/blob/main/fastchat/llm_judge/data/mt_bench/question.jsonl", "Apache-2.0",
        _without("choices", "conversation_a", "messages"),
    ),
    "mt_bench_prompts": Format(
        demonstrations.questions, ("prompt", "prompt_id", "category", "reference"),
        HUB + "HuggingFaceH4/mt_bench_prompts", "Apache-2.0", _is_list("prompt", str),
    ),
    "taskmaster": Format(
        demonstrations.taskmaster, ("conversation_id", "utterances"),
        "https://github.com/google-research-datasets/Taskmaster", "CC-BY-4.0",
    ),
    "taskmaster_reward": Format(
        demonstrations.taskmaster_reward, ("context", "generation", "reward"),
        "https://github.com/google-research-datasets/Taskmaster/tree/master/TM-4-2024/reward", "CC-BY-4.0",
        lambda row: isinstance(row["context"], str) and isinstance(row["generation"], str),
    ),
    "openai_preference": Format(
        comparisons.openai_preference, ("input", "preferred_output", "non_preferred_output"),
        "https://platform.openai.com/docs/guides/direct-preference-optimization", "the user's own",
    ),
    "orca_dpo": Format(
        comparisons.orca_dpo, ("question", "chosen", "rejected"), HUB + "Intel/orca_dpo_pairs", "Apache-2.0",
        _without("prompt"),
    ),
    "distilabel_orca": Format(
        comparisons.distilabel_orca, ("system", "input", "chosen", "rejected"),
        HUB + "argilla/distilabel-intel-orca-dpo-pairs", "Apache-2.0", _without("prompt"),
    ),
    "alpaca_dpo": Format(
        comparisons.alpaca_dpo, ("instruction", "chosen", "rejected"),
        "https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md", "Apache-2.0", _without("prompt"),
    ),
    "alpaca_farm": Format(
        comparisons.alpaca_farm, ("instruction", "output_1", "output_2", "preference"), HUB + "tatsu-lab/alpaca_farm",
        "CC-BY-NC-4.0",
    ),
    "sharegpt_dpo": Format(
        comparisons.sharegpt_dpo, ("conversations", "chosen", "rejected"),
        "https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md", "Apache-2.0",
        _is_list("conversations", dict, "from"),
    ),
    "ultrafeedback": Format(
        comparisons.ultrafeedback, ("instruction", "completions"), HUB + "openbmb/UltraFeedback", "MIT",
        lambda row: row["completions"] == [] or _is_list("completions", dict, "annotations")(row),
    ),
    "shp": Format(
        comparisons.shp, ("history", "human_ref_A", "human_ref_B", "labels"), HUB + "stanfordnlp/SHP",
        "as Reddit's API terms allow",
    ),
    "helpsteer": Format(
        comparisons.helpsteer, ("prompt", "response", "helpfulness"), HUB + "nvidia/HelpSteer2", "CC-BY-4.0"
    ),
    "helpsteer2_preference": Format(
        comparisons.helpsteer2_preference, ("prompt", "response_1", "response_2", "preference_strength"),
        HUB + "nvidia/HelpSteer2", "CC-BY-4.0",
    ),
    "helpsteer3": Format(
        comparisons.helpsteer3, ("context", "response1", "response2", "overall_preference"), HUB + "nvidia/HelpSteer3",
        "CC-BY-4.0",
    ),
    "pku_saferlhf_better": Format(
        comparisons.pku_better, ("prompt", "response_0", "response_1", "better_response_id"),
        HUB + "PKU-Alignment/PKU-SafeRLHF", "CC-BY-NC-4.0",
    ),
    "pku_saferlhf_safer": Format(
        comparisons.pku_safer, ("prompt", "response_0", "response_1", "safer_response_id"),
        HUB + "PKU-Alignment/PKU-SafeRLHF", "CC-BY-NC-4.0",
    ),
    "nectar": Format(
        comparisons.nectar, ("prompt", "answers"), HUB + "berkeley-nest/Nectar", "Apache-2.0",
        _is_list("answers", dict, "rank"),
    ),
    "arena": Format(
        comparisons.arena, ("conversation_a", "conversation_b", "winner"),
        HUB + "lmarena-ai/arena-human-preference-140k", "CC-BY-4.0 (prompts)",
    ),
    "arena_55k": Format(
        comparisons.arena_55k, ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie"),
        HUB + "lmarena-ai/arena-human-preference-55k", "Apache-2.0",
    ),
    "webgpt": Format(
        comparisons.webgpt, ("question", "answer_0", "answer_1", "score_0", "score_1"),
        HUB + "openai/webgpt_comparisons", "not stated",
    ),
    "summarize_from_feedback": Format(
        comparisons.summaries, ("info", "summaries", "choice"), HUB + "openai/summarize_from_feedback", "not stated"
    ),
    "argilla": Format(
        exports.argilla, ("fields", "responses", "metadata"),
        "https://docs.argilla.io/latest/how_to_guides/import_export/", "the user's own",
    ),
    "argilla_flat": Format(
        exports.argilla_flat, ("id", "_server_id"), "https://docs.argilla.io/latest/how_to_guides/import_export/",
        "the user's own", lambda row: any(name.endswith(".responses") for name in row),
    ),
    "argilla_1": Format(
        exports.argilla_1, ("metadata",), "https://docs.v1.argilla.io/en/latest/", "the user's own",
        lambda row: any(name.endswith("-suggestion") for name in row),
    ),
    "label_studio": Format(
        exports.label_studio, ("data", "annotations"), "https://labelstud.io/guide/export", "the user's own",
        _results("pairwise", None),
    ),
    "label_studio_text": Format(
        exports.label_studio_text, ("data", "annotations"), "https://labelstud.io/guide/export", "the user's own",
        _results("textarea"),
    ),
    "oasst": Format(  # adapted_rows joins the rows first
        lambda row: row, ("message_id", "parent_id", "text", "role"), HUB + "OpenAssistant/oasst2", "Apache-2.0",
        _without("replies", "prompt"),
    ),
}  # fmt: skip

# What the fields and types of a format were last compared with, 2026-11-29, where it was not the publisher's own card,
# files, code or page: "copy" is another upload of the set, "reader" is code of others that reads it.
COMPARED = dict.fromkeys(("alpaca_prompt", "dolly", "sharegpt", "capybara", "math", "orca_dpo", "arena_55k"), "copy")
COMPARED |= dict.fromkeys(("distilabel_orca", "pku_saferlhf_better", "pku_saferlhf_safer"), "reader")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")  # a text that refers to them means nothing alone
# data/formats.py reads these fields; they decide the kind of record.
OURS = "https://github.com/huggingface/trl/blob/main/docs/source/dataset_formats.md"


def _fits(one: Format, row: dict) -> bool:
    try:
        return one.fits(row)
    except (AttributeError, TypeError):  # a field with the right name has a value of another type
        return False


@dataclass(frozen=True)
class Layout:
    """How published rows are converted to ours: settings of the config group `data` or `check`."""

    format: str | None = None  # a name of FORMATS, or "ours"; None = recognised from the fields
    columns: Mapping[str, str] = field(default_factory=dict)  # our name -> theirs
    languages: tuple[str, ...] | None = None  # rows in other languages are left out

    @classmethod
    def of(cls, cfg: Any) -> "Layout":
        """The layout of a config group, from its keys format, columns and languages."""
        columns, languages = ({} if cfg.columns is None else cfg.columns), cfg.languages
        if not isinstance(columns, Mapping) or not all(isinstance(name, str) for name in columns.values()):
            raise ValueError(
                f"data.columns={columns} must map our fields to columns: data.columns={{prompt: question}}"
            )
        listed = languages is None or isinstance(languages, Sequence) and not isinstance(languages, str)
        if not listed or not all(isinstance(code, str) for code in languages or []):
            raise ValueError(f"data.languages={languages} must be a list of texts: data.languages=[en,de]")
        return cls(cfg.format, dict(columns), None if languages is None else tuple(languages))

    def __post_init__(self):
        if self.format is not None and self.format not in (*FORMATS, "ours"):
            raise ValueError(f"data.format={self.format!r} is unknown; known: ours, {', '.join(FORMATS)}")

    def name_of(self, row: dict) -> str:
        """The format of a row. Raises ValueError if the row fits several formats."""
        if self.format is not None:
            return self.format
        fitting = [name for name, one in FORMATS.items() if set(one.needs) <= set(row) and _fits(one, row)]
        more = [n for n in fitting if not any(set(FORMATS[n].needs) < set(FORMATS[o].needs) for o in fitting)]
        if "messages" in row and isinstance(row["messages"], list):
            more.append("ours")
        if len(more) > 1:
            raise ValueError(
                f"the row fits {' and '.join(more)}; choose one with format=NAME (data.format, check.format)"
            )
        return more[0] if more else "ours"

    def adapt(self, row: dict) -> list[dict]:
        """The rows in our format: one, or one for each person's answer. [] if its language is not selected."""
        row = self.renamed(row)
        if not self._speaks(row):
            return []
        if shown := [name for name in MEDIA if row.get(name)]:
            raise ValueError(f"the row has {', '.join(shown)}, and only text is read; remove such rows or the fields")
        if {"annotation_id", "lead_time"} <= set(row):
            raise ValueError(
                "Label Studio's JSON-MIN and CSV have a row per vote and no types; export the project as JSON"
            )
        name = self.name_of(row)
        if name == "ours":
            return [self._pruned(row)]
        missing = [field for field in FORMATS[name].needs if field not in row]
        if missing:
            raise ValueError(f"format={name} needs {', '.join(missing)}; the row has {', '.join(map(str, row))}")
        try:
            ours = FORMATS[name].adapt(row)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            source = FORMATS[name].source
            raise ValueError(f"not of format {name} ({source}): {type(error).__name__}: {error}") from error
        return ours if isinstance(ours, list) else [ours]

    def _pruned(self, row: dict) -> dict:
        """A tree without its replies in languages that are not selected. Other rows are unchanged."""
        tree = row.get("prompt")
        if self.languages is None or not isinstance(tree, dict) or not tree.get("replies"):
            return row
        kept = exports.in_languages(tree, self.languages)
        if not kept["replies"]:
            raise ValueError(f"none of the tree's replies is in languages={list(self.languages)}")
        return row | {"prompt": kept}

    def renamed(self, row: dict) -> dict:
        """The row with its columns renamed to our names."""
        missing = [theirs for theirs in self.columns.values() if theirs not in row]
        if missing:
            raise ValueError(f"columns names {', '.join(missing)}, but the row has {', '.join(map(str, row))}")
        used = set(self.columns.values())
        kept = {name: value for name, value in row.items() if name not in used and name not in self.columns}
        return {ours: row[theirs] for ours, theirs in self.columns.items()} | kept

    def _speaks(self, row: dict) -> bool:
        if self.languages is None:
            return True
        tree = row["prompt"] if isinstance(row.get("prompt"), dict) else {}
        language = next((r[n] for r in (row, tree) for n in ("lang", "language") if r.get(n)), None)
        if language is None:
            raise ValueError(f"languages={list(self.languages)} needs a field lang or language; the row has neither")
        return language in self.languages


class Unjoined(Exception):
    """A row is one message of a tree, so reading it needs all rows of the file."""


def adapted_rows(
    rows: Iterator[tuple[str, Any]], layout: Layout, at: Callable[[str], AbstractContextManager], *, join: bool = True
) -> Iterator[tuple[str, dict | None]]:
    """(FILE:LINE, row of ours) for each item of `each_row`. A bad row gives none, and one in another language None.

    `at(where)` is a context that handles a ValueError. OpenAssistant's flat messages are collected and joined to trees
    at the end. Without `join` they raise Unjoined.
    """
    messages: list[tuple[str, dict]] = []
    for where, raw in rows:
        ours: list[dict | None] = []
        with at(where):
            row = as_object(raw)
            if "parent_id" in row and layout.name_of(row) == "oasst":
                if not join:
                    raise Unjoined
                exports.check_message(row)
                messages.append((where, row))
                continue
            ours = [*layout.adapt(row)] or [None]
        yield from ((where, one) for one in ours)
    if messages:
        yield from _joined(messages, layout, at)


def _joined(messages: list, layout: Layout, at: Callable[[str], AbstractContextManager]) -> Iterator:
    trees, tree_layout = [], Layout("ours", languages=layout.languages)
    with at(messages[0][0]):
        trees = exports.trees(messages)
    for where, tree in trees:
        ours: list[dict | None] = []
        with at(where):
            ours = [*tree_layout.adapt(tree)] or [None]
        yield from ((where, one) for one in ours)
