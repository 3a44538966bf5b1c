"""Each method end to end against a scripted model, its rules one by one, and what a killed run leaves."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from data import formats
from generation.camel import DONE, Session, as_assistant, camel, flip_fault
from generation.camel import as_user as as_user_agent
from generation.clients import Answer, Client, Request, hash_json
from generation.constitutional import constitutional
from generation.evol_instruct import evol_instruct, evolution_fault, says_nothing
from generation.filters import rouge_l
from generation.magpie import magpie
from generation.preferences import preferences, rate, read_rating
from generation.progress import Progress
from generation.rows import Drops, GeneratedData, manifest
from generation.scripted_client import ScriptedClient
from generation.self_instruct import Task, read_instances, read_seeds, self_instruct
from generation.ultrachat import as_user, read_list, ultrachat, user_fault
from generation.ultrafeedback import PRINCIPLES, read_ratings, ultrafeedback, under_principle

ROOT = Path(__file__).parents[2]
SEEDS = [str(ROOT / "data/embedded/self_instruct_seed_tasks.jsonl.gz")]
NOUNS = ("river", "lamp", "horse", "violin", "bridge", "garden", "rocket", "teapot", "anchor", "pencil", "carpet")
VERBS = ("describe", "compare", "praise", "sketch", "invent", "explain", "defend", "question", "rename", "paint")

SELF_INSTRUCT = {
    "num": 12, "max_rounds": 20, "tasks_per_round": 6, "num_human": 6, "num_generated": 2, "num_examples": 3,
    "threshold": 0.7, "min_instruction_tokens": 4, "max_instruction_tokens": 150, "max_output_tokens": 200,
    "count_tokens": lambda text: len(text.split()), "temperature": 0.8, "max_tokens": 200,
}  # fmt: skip
ULTRACHAT = {
    "topics": ["sea travel", "old music"], "num": 5, "num_subtopics": 3, "num_questions": 2, "material_share": 0.4,
    "min_rounds": 3, "max_rounds": 5, "max_similarity": 0.7, "max_tries": 3, "temperature": 0.8, "max_tokens": 200,
}  # fmt: skip
CAMEL = {
    "ideas": ["sell tea", "map a cave"],
    "num": 3,
    "max_turns": 6,
    "min_turns": 1,
    "max_similarity": 0.9,
    "max_tries": 2,
    "temperature": 0.7,
    "max_tokens": 200,
}


MAGPIE = {
    "num": 7,
    "system": None,
    "batch_size": 4,
    "max_rounds": 5,
    "threshold": 0.7,
    "min_instruction_tokens": 4,
    "max_instruction_tokens": 60,
    "count_tokens": lambda text: len(text.split()),
    "temperature": 1.0,
    "answer_temperature": 0.0,
    "max_tokens": 50,
}
EVOL = {
    "num_rounds": 2,
    "breadth_share": 0.2,
    "max_growth": 40,
    "count_tokens": lambda text: len(text.split()),
}
CONSTITUTIONAL = {"principles": [], "num_revisions": 2, "max_similarity": 0.9, "max_tries": 2}
ULTRAFEEDBACK = {
    "num_completions": 3,
    "principles": ["honesty", "brevity"],
    "aspects": ["helpfulness", "honesty"],
    "pairs": "best_random",
    "min_margin": 0.0,
    "judge_max_tokens": 99,
}


def sentence(request: Request, salt: str = "") -> str:
    random = Random(request.key + salt)
    return f"{random.choice(VERBS)} {' and '.join(random.sample(NOUNS, 4))} number {random.randrange(999)}"


def strong(request: Request) -> str:
    """A model that does what each prompt asks."""
    asked, system = request.messages[-1]["content"], request.messages[0]
    if asked is None:
        return sentence(request).capitalize() + "?"
    if asked.startswith("Rate "):
        count = int(asked.split()[1])
        return json.dumps({"reasons": ["r"] * count, "ratings": [1 + int(c, 16) % 5 for c in request.key[:count]]})
    if asked.startswith("Do these two"):
        return "Yes." if int(request.key[0], 16) < 4 else "No."
    if asked.startswith("Write one new task"):
        return sentence(request).capitalize() + "."
    if "fixed set of labels" in asked:
        return "Yes." if int(request.key[0], 16) % 2 else "No"
    if asked.startswith("Name a label"):
        return f"Label: good\nInput: {sentence(request, 'g')}\nLabel: bad\nInput: {sentence(request, 'b')}"
    if asked.startswith("Write an input"):
        return f"Input: None\nOutput: {sentence(request)}."
    if "sub-topics" in asked or "different questions" in asked:
        return "\n".join(f"{n}. {sentence(request, str(n))}" for n in range(1, 5))
    if "Name a fitting profession" in asked:
        return "Assistant: Chemist\nUser: Tea Trader"
    if system["role"] == "system" and "single word" in system["content"] and len(request.messages) > 6:
        return DONE
    return sentence(request).capitalize() + "."


class Recorder(ScriptedClient):
    """Counts what it is asked, and dies after `lives` questions."""

    def __init__(self, reply=strong, lives: int = 10**9, **settings):
        super().__init__(reply, **settings)
        self.asked, self.lives = Counter(), lives

    def _answer(self, requests):
        for key, answer in super()._answer(requests):
            if not self.lives:
                raise ValueError("the server died")
            self.lives -= 1
            self.asked[key] += 1
            yield key, answer


def run_method(method: str, client: Client) -> GeneratedData:
    if method == "self_instruct":
        return self_instruct(client, read_seeds(SEEDS), seed=3, **SELF_INSTRUCT)
    if method == "ultrachat":
        return ultrachat(client, client, seed=3, **ULTRACHAT)
    if method == "camel":
        return camel(client, client, seed=3, **CAMEL)
    prompts = [(f"p{i}", [{"role": "user", "content": f"what is {noun}"}]) for i, noun in enumerate(NOUNS[:5])]
    sampled = {"seed": 3, "temperature": 1.0, "max_tokens": 50}
    if method == "magpie":
        return magpie(client, **MAGPIE, seed=3)
    if method == "evol_instruct":
        return evol_instruct(client, prompts, **EVOL, **sampled)
    if method == "constitutional":
        return constitutional(client, prompts, **CONSTITUTIONAL, rows="pairs", **sampled)
    if method == "ultrafeedback":
        return ultrafeedback({"client": client}, prompts, judge=ScriptedClient(strong), **ULTRAFEEDBACK, **sampled)
    return preferences(
        {"client": client},
        prompts,
        judge=ScriptedClient(lambda r: f"Rating: [[{1 + int(r.key[:4], 16) % 5}]]"),
        reward_model=None,
        num_completions=3,
        pairs="all",
        aspects=["helpfulness", "honesty"],
        min_margin=0.5,
        seed=3,
        temperature=1.0,
        max_tokens=50,
    )


METHODS = (
    "self_instruct",
    "ultrachat",
    "camel",
    "preferences",
    "magpie",
    "evol_instruct",
    "constitutional",
    "ultrafeedback",
)
PAIRS = ("preferences", "ultrafeedback", "constitutional")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_died_half_way_makes_the_same_rows_and_asks_nothing_twice(method, tmp_path):
    whole = Recorder()
    expected = run_method(method, whole)
    total = sum(whole.asked.values())
    first = Recorder(lives=total // 2, cache=str(tmp_path))
    with pytest.raises(ValueError, match="died"):
        run_method(method, first)
    second = Recorder(cache=str(tmp_path))
    made = run_method(method, second)
    assert made == expected and len(made.rows) > 1
    assert sum(first.asked.values()) == total // 2 and not first.asked.keys() & second.asked.keys()
    assert first.asked + second.asked == whole.asked


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_records_with_unique_ids_and_full_provenance(method):
    made = run_method(method, Recorder())
    parse = formats.preferences if method in PAIRS else formats.examples
    for row in made.rows:
        assert parse(row)
        assert set(row["provenance"]) == {"method", "prompts_hash", "model", "seed", "parents"}
        assert len(row["provenance"]["prompts_hash"]) == 64 and row["provenance"]["parents"]
    assert len({row["id"] for row in made.rows}) == len(made.rows)


def test_another_seed_makes_another_set():
    client = Recorder()
    rows = [self_instruct(client, read_seeds(SEEDS), seed=seed, **SELF_INSTRUCT).rows for seed in (1, 2)]
    assert rows[0] != rows[1]


def test_self_instruct_keeps_only_instructions_unlike_all_others():
    made = run_method("self_instruct", Recorder())
    seeds = [task.instruction for task in read_seeds(SEEDS)]
    kept = []
    for row in made.rows:
        text = row["messages"][0]["content"].partition("\n\n")[0]
        if text not in kept:
            assert max(rouge_l(text, other) for other in seeds + kept) < 0.7
            kept.append(text)
    assert len(made.rows) == SELF_INSTRUCT["num"] and made.facts["classification"] > 0
    assert any(row["is_classification"] and row["messages"][1]["content"] == "bad" for row in made.rows)


def test_self_instruct_counts_each_drop_once():
    replies = iter(
        ["Too short", "Describe the picture of a river now", "Write a program that adds numbers", "", "x" * 3]
    )

    def reply(request):
        asked = request.messages[-1]["content"]
        return next(replies, "Recite the alphabet backwards, slowly please") if asked.startswith("Write one") else "hm"

    made = self_instruct(Recorder(reply), read_seeds(SEEDS), seed=0, **SELF_INSTRUCT | {"max_rounds": 1})
    assert made.rows == []
    assert made.drops.counts == Counter(
        instruction_too_short=2, keyword_beyond_text=1, write_a_program=1, answer_empty=1, kind_not_answered=1
    )


@pytest.mark.parametrize(
    "text, is_classification, expected",
    [
        ("Input: None\nOutput: yes", False, [("", "yes")]),
        ("input: a\nb\noutput: c\nd", False, [("a\nb", "c\nd")]),
        ("Input: 1\nOutput: 2\nInput: 3\nOutput: 4", False, [("1", "2"), ("3", "4")]),
        ("Just the answer.", False, [("", "Just the answer.")]),
        ("Input: only", False, []),
        ("Label: spam\nInput: buy now", True, [("buy now", "spam")]),
        ("Label: a\nInput: x\nLabel: b\nInput: y\nTask: other", True, [("x", "a"), ("y", "b")]),
        ("spam", True, []),
    ],
)
def test_instances_are_read_as_they_are_written(text, is_classification, expected):
    assert read_instances(text, is_classification=is_classification) == expected


def test_seed_tasks_of_one_kind_or_without_instances_are_refused(tmp_path):
    file = tmp_path / "seeds.jsonl"
    file.write_text(json.dumps({"instruction": "a", "instances": [], "is_classification": True}))
    with pytest.raises(ValueError, match="instance"):
        read_seeds([str(file)])
    task = {"instruction": "a", "instances": [{"input": "", "output": "b"}], "is_classification": True}
    file.write_text(json.dumps(task))
    with pytest.raises(ValueError, match="both kinds"):
        read_seeds([str(file)])


def test_ultrachat_talks_for_three_to_seven_rounds_and_ends_with_an_answer():
    made = run_method("ultrachat", Recorder())
    assert len(made.rows) == ULTRACHAT["num"]
    for row in made.rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and 3 <= len(roles) // 2 <= 5
    with_text = [row for row in made.rows if "this text:\n\n" in row["messages"][0]["content"]]
    assert len(with_text) == round(ULTRACHAT["num"] * ULTRACHAT["material_share"])


@pytest.mark.parametrize(
    "text, reason",
    [
        ("Thank you so much! What about sails?", "user_thanks_or_answers"),
        ("Certainly, here is the list.", "user_thanks_or_answers"),
        ('"Thanks, that helps."', "user_thanks_or_answers"),
        ("How may I help you today?", "user_thanks_or_answers"),
        ("You are very welcome! Anything else?", "user_thanks_or_answers"),
        ("I'm sorry, but I can't continue this talk.", "user_refuses"),
        ("What is a sail made of?", "user_repeats"),
        (" ", "user_empty"),
        ("Which ropes hold it?", None),
    ],
)
def test_a_user_neither_thanks_nor_answers_nor_repeats(text, reason):
    said = [{"role": "user", "content": "What is a sail made of?"}, {"role": "assistant", "content": "Of cloth."}]
    assert user_fault(text, said, max_similarity=0.7) == reason


def test_a_user_who_thanks_is_asked_again_and_then_ends_the_talk_with_a_count():
    thanks = 0

    def reply(request):
        nonlocal thanks
        if request.messages[0]["role"] == "system":
            thanks += 1
            return "Thanks a lot!"
        return strong(request)

    made = ultrachat(Recorder(reply), Recorder(reply), seed=0, **ULTRACHAT)
    assert made.rows == [] and made.drops.counts == Counter(user_thanks_or_answers=5)
    assert thanks == 5 * ULTRACHAT["max_tries"]


def test_the_users_model_sees_the_talk_with_roles_turned():
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    turned = as_user(said)
    assert turned[2] == {"role": "assistant", "content": "q"} and turned[3]["content"].startswith("a\n\n")
    assert said[-1]["content"] == "a"  # the talk itself is as it was
    assert [m["role"] for m in turned[:2]] == ["system", "user"]


def test_lists_are_read_numbered_or_dashed():
    assert read_list("Sure:\n1. a b\n 2) **c**\n- d\n* e\nend") == ["a b", "c", "d", "e"]


def test_camel_ends_when_the_user_says_that_the_task_is_done():
    made = run_method("camel", Recorder())
    assert made.facts["ends"] == {"done": 3}
    for row in made.rows:
        assert row["roles"] == {"assistant": "Chemist", "user": "Tea Trader"} and row["end"] == "done"
        assert row["messages"][0]["role"] == "system" and row["messages"][-1]["role"] == "assistant"
        assert not any(DONE in message["content"] for message in row["messages"])


def test_each_camel_agent_sees_its_own_words_as_the_assistants():
    said = [{"role": "user", "content": "do"}, {"role": "assistant", "content": "done"}]
    session = Session("idea", 0, ("Chemist", "Trader"), "blend", said)
    assert as_assistant(session)[1:] == said
    assert [(m["role"], m["content"]) for m in as_user_agent(session)[2:]] == [("assistant", "do"), ("user", "done")]


@pytest.mark.parametrize(
    "text, role, flipped",
    [
        ("Instruction: buy tea", "assistant", True),
        ("**Instruction:** buy tea", "assistant", True),
        ("Solution: the tea is bought", "assistant", False),
        ("Solution: bought", "user", True),
        ("Instruction: buy tea", "user", False),
    ],
)
def test_a_flipped_role_is_seen(text, role, flipped):
    assert flip_fault(text, role) == (f"role_flip_{role}" if flipped else None)


@pytest.mark.parametrize("fault", ["loop", "role_flip_assistant"])
def test_camel_cuts_a_talk_where_it_loops_or_flips(fault):
    def reply(request):
        system = request.messages[0]["content"] if request.messages[0]["role"] == "system" else ""
        turns = len(request.messages)
        if "you instruct" in system and fault == "loop" and turns > 5:
            return "Instruction: the same again and again"
        if "they instruct" in system and fault != "loop" and turns > 5:
            return "Instruction: now you do it"
        return strong(request)

    made = camel(Recorder(reply), Recorder(reply), seed=0, **CAMEL)
    assert made.facts["ends"] == {fault: 3}
    for row in made.rows:
        texts = [message["content"] for message in row["messages"] if message["role"] == "user"]
        assert len(texts) == len(set(texts)) and not re.search("now you do it", str(row["messages"]))


def test_the_better_rated_completion_is_chosen_and_ties_are_dropped():
    texts = {"0": "bad answer", "1": "good answer", "2": "another good answer"}
    client = ScriptedClient(lambda r: texts[str(r.seed)])
    judge = ScriptedClient(
        lambda r: "It is so. Rating: [[5]]" if "good answer\n" in r.messages[0]["content"] else "[[2]]"
    )
    settings = {
        "judge": judge,
        "reward_model": None,
        "num_completions": 3,
        "aspects": ["helpfulness"],
        "min_margin": 0.5,
        "seed": 0,
        "temperature": 1.0,
        "max_tokens": 9,
    }
    prompts = [("p", [{"role": "user", "content": "ask"}])]
    made = preferences({"client": client}, prompts, pairs="all", **settings)
    pairs = {(row["chosen"], row["rejected"]) for row in made.rows}
    assert pairs == {("good answer", "bad answer"), ("another good answer", "bad answer")}
    assert made.drops.counts == Counter(tie=1) and {row["margin"] for row in made.rows} == {3.0}
    assert len(preferences({"client": client}, prompts, pairs="best_worst", **settings).rows) == 1


def test_with_a_judge_and_a_reward_model_only_pairs_that_both_order_alike_stay():
    client = ScriptedClient(lambda r: f"answer {r.seed}")
    judge = ScriptedClient(lambda r: f"Rating: [[{1 + int(re.search('answer ([0-9])', str(r.messages)).group(1))}]]")
    settings = {
        "judge": judge,
        "num_completions": 3,
        "pairs": "all",
        "aspects": ["honesty"],
        "min_margin": 0.5,
        "seed": 0,
        "temperature": 1.0,
        "max_tokens": 9,
    }
    prompts = [("p", [{"role": "user", "content": "ask"}])]
    agree = preferences(
        {"c": client}, prompts, reward_model=lambda rows: [float(text[-1]) for _, text in rows], **settings
    )
    oppose = preferences(
        {"c": client}, prompts, reward_model=lambda rows: [9 - float(text[-1]) for _, text in rows], **settings
    )
    assert len(agree.rows) == 3 and oppose.rows == [] and oppose.drops.counts["judge_and_reward_model_disagree"] == 3


@pytest.mark.parametrize(
    "text, rating",
    [
        ("[[4]]", 4),
        ("[[1]] no, Rating: [[3]]", 3),
        ("Rating: 5", 5),
        ("**Rating**: 2", 2),
        ("[[7]]", None),
        ("4", None),
        ("Rating: 4/5", 4),
        ("[[3]] out of 5", 3),
        ("Rating: 4/10", None),  # of another scale
        ("[[4]] out of 10", None),
        ("Rating: [[1-5]]", None),  # the scale
        ("On a rating 1 to 5, it is [[2]]", 2),
    ],
)
def test_a_rating_is_read_or_counted_as_missing(text, rating):
    assert read_rating(Answer(text, "stop", 0, 0)) == rating


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"judge": None}, "nothing ranks"),
        ({"num_completions": 1}, "no pair"),
        ({"pairs": "some"}, "best_worst"),
        ({"aspects": ["beauty"]}, "beauty"),
    ],
)
def test_settings_that_give_no_comparison_are_refused(changed, message):
    settings = {
        "judge": ScriptedClient(lambda r: "x"),
        "reward_model": None,
        "num_completions": 2,
        "pairs": "all",
        "aspects": ["honesty"],
        "min_margin": 0.0,
        "seed": 0,
        "temperature": 1.0,
        "max_tokens": 9,
    }
    with pytest.raises(ValueError, match=message):
        preferences({"c": ScriptedClient(lambda r: "x")}, [], **settings | changed)


def test_the_manifest_tells_models_cost_drops_and_license():
    client = ScriptedClient(lambda r: "two words", prompt_price=1e6, completion_price=2e6)
    client.ask([[{"role": "user", "content": "three words here"}]], temperature=0.0, max_tokens=5, seed=0)
    made = GeneratedData([{"id": "a"}], Drops([{"reason": "too_short", "text": t} for t in "ab"]), {"rounds": 4})
    facts = manifest("m", made, {"client": client}, {"num": 1}, seed=7, license="CC0")
    assert facts["cost"] == 3 * 1 + 2 * 2 and facts["models"] == {"client": "scripted"} and facts["rounds"] == 4
    assert facts["drops"] == {"too_short": 2} and facts["dropped"] == 2 and facts["license"] == "CC0"
    assert json.loads(json.dumps(facts)) == facts


def test_equal_content_has_equal_hashes_whatever_the_order_of_keys():
    assert hash_json({"a": 1, "b": "ü"}) == hash_json({"b": "ü", "a": 1}) != hash_json({"a": 1, "b": "u"})


def test_a_task_made_without_instances_is_empty():
    assert Task().instances == [] and Task().instances is not Task().instances


def test_magpie_asks_for_the_users_turn_and_then_what_came(tmp_path):
    client = Recorder(cache=str(tmp_path))
    seen = []
    client.reply = lambda r: seen.append(r) or strong(r)
    made = magpie(client, **MAGPIE | {"system": "You teach chemistry."}, seed=3)
    drawn = [r for r in seen if r.messages[-1]["content"] is None]
    assert len(made.rows) == 7 and len({r.seed for r in drawn}) == len(drawn) == 8  # two rounds, each draw another seed
    assert {r.temperature for r in drawn} == {1.0} and {r.temperature for r in seen if r not in drawn} == {0.0}
    texts = {row["messages"][1]["content"] for row in made.rows}
    assert texts < {strong(r) for r in drawn} and made.rows[0]["messages"][0]["content"] == "You teach chemistry."


def test_magpie_drops_what_repeats_refuses_or_is_cut():
    drawn = iter(
        ["Tell me about the river Danube please", "Tell me about the river Danube please!", "Why", "Say the words"]
    )

    def reply(request):
        if request.messages[-1]["content"] is None:
            return next(drawn, "- a dash begins this one")
        return "I'm sorry, but I cannot help." if "words" in str(request.messages) else "It is long."

    made = magpie(Recorder(reply), **MAGPIE | {"max_rounds": 1, "min_instruction_tokens": 3}, seed=0)
    assert len(made.rows) == 1
    assert made.drops.counts == Counter(too_similar=1, instruction_too_short=1, refusal=1)
    assert {row["text"] for row in made.drops.rows} >= {"Why", "I'm sorry, but I cannot help."}


def test_evolved_instructions_keep_their_ancestry_and_the_seeds_are_rows():
    made = run_method("evol_instruct", Recorder())
    how = Counter(row["evolution"] == "seed" for row in made.rows)
    assert how[True] == 5 and how[False] >= 3 and made.drops.counts["nothing_new"] > 0
    depths = {len(row["provenance"]["parents"]) for row in made.rows}
    assert depths == {1, 2, 3} and len(made.rows) + len(made.drops.rows) == 5 * 3


def test_an_eliminated_instruction_goes_on_as_it_was():
    client = Recorder(lambda r: "Yes" if r.messages[0]["content"].startswith("Do these") else strong(r))
    prompts = [("p", [{"role": "user", "content": "what is a sail"}])]
    made = evol_instruct(client, prompts, **EVOL, seed=0, temperature=1.0, max_tokens=50)
    assert [row["messages"][0]["content"] for row in made.rows] == ["what is a sail"]
    assert [row["before"] for row in made.drops.rows] == ["what is a sail"] * 2


@pytest.mark.parametrize(
    "text, same, reason",
    [
        ("Name three seas and their salt.", "No.", None),
        ("Name three seas.", "Yes", "nothing_new"),
        ("#Rewritten Prompt#: name a sea", "No", "copies_the_prompt"),
        ("...", "No", "evolution_empty"),
        ("I'm sorry, but I can't do that.", "No", "refusal"),
    ],
)
def test_an_evolution_is_eliminated_for_the_named_reason(text, same, reason):
    assert evolution_fault(text, same) == reason


def test_an_answer_that_says_sorry_and_little_else_is_a_refusal():
    assert says_nothing("Sorry to say so, no.") == says_nothing("As an AI, I pass.") == "refusal"
    assert says_nothing("sorry " + "but this goes on " * 30) is None and says_nothing("!!") == "answer_empty"


def test_critique_and_revision_work_on_the_last_text_and_the_row_has_both_ends():
    def reply(request):
        asked = request.messages[-1]["content"]
        if "Criticise the answer" in asked:
            return "fault in " + re.search(r"--- answer ---\n(.*)\n", asked).group(1)
        if "Rewrite the answer" in asked:
            return "better than " + re.search(r"--- critique ---\nfault in (.*)\n", asked).group(1)
        return "first draft of a long text"

    settings = {"seed": 0, "temperature": 1.0, "max_tokens": 50}
    prompts = [("p", [{"role": "user", "content": "ask"}])]
    made = constitutional(Recorder(reply), prompts, **CONSTITUTIONAL, rows="pairs", **settings)
    row = made.rows[0]
    assert row["chosen"] == "better than better than first draft of a long text"
    assert row["rejected"] == "first draft of a long text" and len(row["revisions"]) == 2
    same = constitutional(Recorder(lambda r: "one and the same"), prompts, **CONSTITUTIONAL, rows="pairs", **settings)
    assert same.rows == [] and same.drops.counts == Counter(nothing_revised=1)
    rows = constitutional(Recorder(reply), prompts, **CONSTITUTIONAL, rows="demonstrations", **settings).rows
    assert rows[0]["messages"][-1] == {"role": "assistant", "content": row["chosen"]}


def test_ultrafeedback_draws_different_models_and_the_best_mean_wins():
    pool = {name: Recorder(lambda r, n=name: f"{n} says {r.seed}", model=name) for name in "abcd"}
    seen = []

    def rate(request):
        text = request.messages[0]["content"]
        seen.append(text)
        shown = re.findall(r"--- answer \d ---\n(\w)", text)
        return json.dumps({"reasons": [], "ratings": [5 - "abcd".index(one) for one in shown]})

    prompts = [(f"p{i}", [{"role": "user", "content": f"ask {i}"}]) for i in range(20)]
    settings = {"seed": 0, "temperature": 1.0, "max_tokens": 50} | ULTRAFEEDBACK
    made = ultrafeedback(pool, prompts, judge=ScriptedClient(rate), **settings)
    assert len(made.rows) == 20
    for row in made.rows:
        assert row["chosen"][0] < row["rejected"][0] and row["margin"] == ord(row["rejected"][0]) - ord(
            row["chosen"][0]
        )
        assert row["chosen_scores"]["principle"] in ULTRAFEEDBACK["principles"]
    assert {row["rejected"][0] for row in made.rows} > {"c"}  # drawn at random of the others, not the worst alone
    everything = ultrafeedback(pool, prompts, judge=ScriptedClient(rate), **settings | {"pairs": "all"})
    assert len(everything.rows) == 60
    orders = {tuple(re.findall(r"--- answer \d ---\n(\w)", text)) for text in seen}
    assert len(orders) > 8  # three of four models, in any order


def test_a_principle_joins_the_system_message():
    said = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "q"}]
    assert under_principle(said, "brevity")[0]["content"] == "Be kind.\n\n" + PRINCIPLES["brevity"]
    assert [m["role"] for m in under_principle(said[1:], "brevity")] == ["system", "user"]


@pytest.mark.parametrize(
    "text, ratings",
    [
        ('{"reasons": ["a", "b"], "ratings": [4, 2]}', [4, 2]),
        ('```json\n{"ratings": [1, 5]}\n```', [1, 5]),
        ("Answer 1: good. Rating 4\nAnswer 2: 3", [4, 3]),
        ('{"ratings": [4]}', None),
        ('{"ratings": [4, 6]}', None),
        ('{"ratings": [4.0, 3]}', None),
        ("Both are fine.", None),
        ("Answer 1: 4", None),
        ('{"ratings": 7}', None),
        ("Answer 1: 4/10\nAnswer 2: 3/10", None),
        ("Answer 1: 4/5\nAnswer 2: 3 out of 5", [4, 3]),
        ('{"reasons": ["Answer 1: has 3 faults", "Answer 2: has 2 faults"]}', None),
    ],
)
def test_ratings_are_read_from_json_or_from_lines(text, ratings):
    assert read_ratings(Answer(text, "stop", 0, 0), 2) == ratings
    assert read_ratings(Answer(text, "length", 0, 0), 2) is None


def test_a_rating_that_the_token_limit_cuts_is_none():
    class Cuts(ScriptedClient):
        def _answer(self, requests):
            yield from ((key, replace(answer, finish_reason="length")) for key, answer in super()._answer(requests))

    judge = Cuts(lambda request: "It is better than a [[2]], and so")
    assert rate(judge, [([{"role": "user", "content": "q"}], "a")], aspects=["helpfulness"], seed=0) == [None]


def test_thinking_reaches_no_row_of_ultrachat_or_preferences():
    def thinks(request):
        return f"<think>\nThe person wants something.\n</think>\n\n{strong(request)}"

    for method in METHODS:
        made = run_method(method, Recorder(thinks))
        assert made.rows, method
        for row in made.rows:
            said = [m["content"] for m in row.get("messages", row.get("prompt"))]
            said += [row[side] for side in ("chosen", "rejected") if side in row]
            assert not any("think>" in text or "wants something" in text for text in said)
    assert run_method("preferences", Recorder(thinks)).rows[0]["reasoning"]["chosen"] == "The person wants something."


def test_every_text_that_is_dropped_is_kept_with_its_reason():
    made = run_method("self_instruct", Recorder(lambda r: "Too short"))
    assert made.rows == [] and {row["reason"] for row in made.drops.rows} == {"instruction_too_short"}
    assert all(row["text"] == "Too short" for row in made.drops.rows)


def test_progress_tells_share_time_rows_drops_and_cost(monkeypatch):
    said, clock = [], iter(range(0, 10_000, 6))
    monkeypatch.setattr("generation.progress.time.monotonic", lambda: next(clock))
    client = Recorder(prompt_price=1e6)
    progress = Progress(said.append, [client])
    ultrachat(client, client, seed=3, progress=progress, **ULTRACHAT)
    assert len(said) > 3 and re.fullmatch(
        r"\d+ % done, about [\d:]+ left: \d+ rows kept, \d+ dropped.*, \d+ answers, cost [\d.]+".replace(" %", "%"),
        said[-1],
    )
    assert Progress().line(0.25, 60.0) == "25% done, about 3:00 left: 0 rows kept, 0 dropped, 0 answers, cost 0.0000"
