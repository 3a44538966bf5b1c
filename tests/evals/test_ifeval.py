"""IFEval against the official checkers (lm-eval's copy of them) on all 541 prompts and answers that follow and fail."""

import gzip
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest

from evals.benchmarks.ifeval import CHECKS, check_answer

PROMPTS = Path(__file__).parents[3] / "shared" / "reference" / "ifeval" / "input_data.jsonl.gz"
TALK = Path(__file__).parents[2] / "data" / "embedded" / "sft_oasst_train.jsonl.gz"


@pytest.fixture(scope="module")
def prompts():
    if not PROMPTS.exists():
        pytest.skip(f"the official prompts are not at {PROMPTS}")
    with gzip.open(PROMPTS, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """lm_eval/tasks/ifeval/utils.py, loaded without the rest of lm-eval; Punkt's files where NLTK looks for them."""
    home = importlib.util.find_spec("lm_eval")
    if home is None:
        pytest.skip("lm-eval is not installed (pip install 'helpful[harness]')")
    langdetect, nltk, punkt = (pytest.importorskip(name) for name in ("langdetect", "nltk", "punkt"))
    pytest.importorskip("immutabledict")
    langdetect.DetectorFactory.seed = 0
    data = tmp_path_factory.mktemp("nltk_data")
    folder = data / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    model = punkt.load_model("english")
    (folder / "abbrev_types.txt").write_text("\n".join(sorted(model.abbrev_types)))
    (folder / "collocations.tab").write_text("\n".join("\t".join(pair) for pair in sorted(model.collocations)))
    (folder / "sent_starters.txt").write_text("\n".join(sorted(model.sent_starters)))
    (folder / "ortho_context.tab").write_text("\n".join(f"{w}\t{n}" for w, n in model.ortho_context.items()))
    nltk.data.path.insert(0, str(data))
    source = Path(next(iter(home.submodule_search_locations))) / "tasks" / "ifeval"
    names = ("lm_eval", "lm_eval.tasks", "lm_eval.tasks.ifeval")
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        package = types.ModuleType(name)
        package.__path__ = [str(source)] if name == names[-1] else []
        sys.modules[name] = package
    for part in ("instructions_util", "instructions", "instructions_registry", "utils"):
        spec = importlib.util.spec_from_file_location(f"{names[-1]}.{part}", source / f"{part}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[f"{names[-1]}.{part}"] = module
        setattr(sys.modules[names[-1]], part, module)
        spec.loader.exec_module(module)
    yield module
    for name, kept in before.items():
        sys.modules.pop(name) if kept is None else sys.modules.update({name: kept})


def written_for(row: dict, style: int, filler: str) -> str:
    """An answer to a prompt: `style` says which of its instructions are obeyed, and how untidily."""
    text, lines = filler, []
    for i, (name, given) in enumerate(zip(row["instruction_id_list"], row["kwargs"], strict=True)):
        if (style + i) % 3 == 0:
            continue  # this one is ignored
        kind = name.split(":")[1]
        if kind in ("existence", "forbidden_words"):
            lines.append("Words: " + " ".join(given.get("keywords") or given.get("forbidden_words")))
        elif kind == "frequency":
            lines.append(" ".join([given["keyword"].upper()] * (given["frequency"] - style % 2)))
        elif kind == "letter_frequency":
            lines.append(given["letter"] * (given["let_frequency"] + style % 2))
        elif kind == "number_bullet_lists":
            lines += [f"{'*-'[j % 2]} point {j}" for j in range(given["num_bullets"])]
        elif kind == "number_highlighted_sections":
            lines.append(" ".join(["*this part*", "**that part**", "**", "* *"] * given["num_highlights"]))
        elif kind == "number_paragraphs":
            text = "\n***\n".join([filler[:60]] * given["num_paragraphs"]) + ("\n***\n" if style % 2 else "")
        elif kind == "nth_paragraph_first_word":
            parts = ["Some words."] * given["num_paragraphs"]
            parts[given["nth_paragraph"] - 1] = f"'{given['first_word'].title()}, so it is."
            text = "\n\n".join(parts)
        elif kind == "multiple_sections":
            lines += [f"{given['section_spliter']} {j + 1}\nx" for j in range(given["num_sections"])]
        elif kind == "number_placeholders":
            lines.append("[name] " * given["num_placeholders"])
        elif kind == "title":
            lines.insert(0, "<<A title>>" if style % 2 else "<< >>")
        elif kind == "postscript":
            lines.append(f"{given['postscript_marker']} bye" if style % 2 else "p. s. bye")
        elif kind == "json_format":
            return '```json\n{"a": [1, 2]}\n```' if style % 2 else "{a}"
        elif kind == "constrained_response":
            lines.append("My answer is maybe.")
        elif kind == "two_responses":
            text = f"{filler[:50]}\n******\n{filler[50:90] if style % 2 else filler[:50]}"
        elif kind == "repeat_prompt":
            text = given["prompt_to_repeat"] + "\n" + text
        elif kind == "end_checker":
            lines.append(given["end_phrase"])
        elif kind == "no_comma":
            text = text.replace(",", "")
        elif kind == "capital_word_frequency":
            lines.append("THE U.S. AND I'M SO GLAD, NASA! " * (given["capital_frequency"] // 6 + style % 2))
    answer = "\n".join([lines[0], text, *lines[1:]] if style % 2 and lines else [text, *lines])
    kinds = " ".join(row["instruction_id_list"])
    if style % 3 == 1:
        answer = answer.upper() if "english_capital" in kinds else answer.lower() if "lowercase" in kinds else answer
    if "startend:quotation" in kinds and style % 3:
        answer = f'"{answer}"'
    return f"Sure, here it is:\n{answer}\nHope it helps!" if style % 4 == 3 else answer


def test_all_25_kinds_are_judged_as_the_official_checkers_do(prompts, official):
    with gzip.open(TALK, "rt", encoding="utf-8") as file:
        fillers = [json.loads(line)["messages"][-1]["content"][:700] for line, _ in zip(file, range(200), strict=False)]
    fillers += [
        "Guten Tag, wie geht es Ihnen heute? Mir geht es gut.",
        "¿Qué tal?",
        "12345",
        "Dr. No left at 5 p.m. Why?",
    ]
    kinds, verdicts, checked = set(), set(), 0
    for number, row in enumerate(prompts[::2]):
        answer = written_for(row, number, fillers[number % len(fillers)])
        if any(given.get("letter") == "#" for given in row["kwargs"]):
            continue  # the official code draws a letter at random here
        asked = official.InputExample(**{k: row[k] for k in ("key", "instruction_id_list", "prompt", "kwargs")})
        strict = official.test_instruction_following_strict(asked, answer).follow_instruction_list
        loose = official.test_instruction_following_loose(asked, answer).follow_instruction_list
        assert check_answer(row["instruction_id_list"], row["kwargs"], answer) == (strict, loose), (row, answer)
        kinds |= set(row["instruction_id_list"])
        verdicts |= set(zip(row["instruction_id_list"], strict, strict=True))
        checked += 1
    assert checked >= 200 and kinds == set(CHECKS)
    assert len(verdicts) >= 45  # nearly every kind was seen followed and not followed


def test_keywords_are_text_thinking_is_no_answer_and_languages_are_judged():
    def strict(name, given, answer):
        return check_answer([name], [given], answer)[0] == [True]

    assert not strict("keywords:existence", {"keywords": ["C++"]}, "I like cats.")
    assert strict("keywords:existence", {"keywords": ["C++"]}, "I like c++.")
    assert not strict("keywords:forbidden_words", {"forbidden_words": ["C++"]}, "Use C++!")
    assert strict("language:response_language", {"language": "de"}, "Guten Tag, wie geht es Ihnen?")
    assert not strict("language:response_language", {"language": "de"}, "Good day, how are you?")
    assert strict("punctuation:no_comma", {}, "<think>a, b</think>fine") and not strict(
        "punctuation:no_comma", {}, "<think>a"
    )
    assert check_answer(["punctuation:no_comma"], [{}], "Sure, here:\nno comma") == ([False], [True])
