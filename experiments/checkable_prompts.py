"""Make data/embedded/prompts_checkable_train and _test: questions with one instruction that a program can check.

    python -m experiments.checkable_prompts data/embedded

The instructions are nine of IFEval's kinds (rewards/ifeval.py), chosen so that one line can follow them; their wording
is ours. A question occurs once, so none is in both files.
"""

import hashlib
import json
import sys
from pathlib import Path

from data.files import read_rows
from data.records import write_jsonl

SOURCES = ("data/embedded/prompts_ppo.jsonl.gz", "data/embedded/task_kinds.jsonl")
MORE = "data/embedded/pref_hh_helpful_train.jsonl.gz"  # first turns of these conversations, to learn from only
NUM_MORE = 242
KINDS = (
    "brainstorming",
    "chat",
    "generation",
    "open_qa",
    None,
)  # None: prompts_ppo; others speak of a text beside them
LONGEST = 90  # characters of a question
NUM_TEST = 128
WORDS = ("water", "time", "people", "home", "music", "light", "friend", "garden", "river", "money")
INSTRUCTIONS: tuple[tuple[str, dict, str], ...] = (  # kind, its settings, the sentence; {word} is one of WORDS
    ("change_case:english_lowercase", {}, "Use lowercase letters only."),
    ("change_case:english_capital", {}, "Use capital letters only."),
    ("startend:quotation", {}, "Put your whole answer in double quotation marks."),
    ("punctuation:no_comma", {}, "Do not use any commas."),
    ("length_constraints:number_words", {"relation": "less than", "num_words": 12}, "Use less than 12 words."),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 20}, "Use at least 20 words."),
    ("detectable_format:title", {}, "Begin with a title in double angular brackets, such as <<title>>."),
    ("keywords:existence", {"keywords": ["{word}"]}, "Use the word {word}."),
    ("keywords:forbidden_words", {"forbidden_words": ["the"]}, "Do not use the word the."),
)


def number_of(text: str) -> int:
    """A number that depends on the text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def first_turns(file: str) -> set[str]:
    """First user turns that are one line of at most LONGEST characters."""
    found = set()
    for _, row in read_rows(file):
        turns = [row["prompt"]] if isinstance(row["prompt"], str) else [turn["content"] for turn in row["prompt"]]
        single = "chosen" in row or len(turns) == 1
        if single and row.get("category") in KINDS and len(turns[0]) <= LONGEST and "\n" not in turns[0]:
            found.add(turns[0].strip())
    return found


def with_instructions(questions: list[str], license: str) -> list[dict]:
    """One record per question, with IFEval's columns; the instructions take turns."""
    records = []
    for i, question in enumerate(questions):
        kind, settings, sentence = INSTRUCTIONS[i % len(INSTRUCTIONS)]
        word = WORDS[number_of(question) % len(WORDS)]
        given = json.loads(json.dumps(settings).replace("{word}", word))
        prompt = f"{question}\n{sentence.format(word=word)}"
        records.append({"prompt": prompt, "instruction_id_list": [kind], "kwargs": [given], "license": license})
    return records


def both_files() -> tuple[list[dict], list[dict]]:
    """The records to test with, and those to learn from."""
    questions = set().union(*map(first_turns, SOURCES))
    records = with_instructions(sorted(questions, key=number_of), "Apache-2.0")
    more = sorted(first_turns(MORE) - questions, key=number_of)[:NUM_MORE]
    return records[:NUM_TEST], records[NUM_TEST:] + with_instructions(more, "MIT")


if __name__ == "__main__":
    directory, (test, train) = Path(sys.argv[1]), both_files()
    write_jsonl(directory / "prompts_checkable_test.jsonl.gz", test)
    write_jsonl(directory / "prompts_checkable_train.jsonl.gz", train)
    print(f"{len(train)} prompts to learn from, {len(test)} to test with")
