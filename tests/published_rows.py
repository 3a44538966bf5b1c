# ruff: noqa: E501
"""One row of each published format: the real fields, with texts written for these tests; and what it must be read as."""

import json

ASK, GOOD, BAD = "Name a tea.", "Sencha.", "Sand."
USER, SAID = {"role": "user", "content": ASK}, {"role": "assistant", "content": GOOD}
TALK = [USER, SAID]
PAIR = {"prompt": [USER], "chosen": GOOD, "rejected": BAD}


def rating(value: str) -> dict:
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    return {aspect: {"Rating": value, "Rationale": "So."} for aspect in aspects}


def parts(text: str) -> list[dict]:
    return [{"type": "text", "text": text, "image": None, "mimeType": None}]


def battle(winner: str, wrap=lambda text: text, **more) -> dict:
    first, second = (
        [{"role": "user", "content": wrap(ASK)}, {"role": "assistant", "content": wrap(t), **more}] for t in (GOOD, BAD)
    )
    return {"model_a": "m", "model_b": "n", "winner": winner, "conversation_a": first, "conversation_b": second}


def flat(message: str, parent: str | None, text: str, role: str, rank: int | None = None) -> dict:
    return {
        "message_id": message, "parent_id": parent, "user_id": "u", "created_date": "2023-02-05T14:23:50", "text": text,
        "role": role, "lang": "en", "review_count": 3, "review_result": True, "deleted": False, "rank": rank,
        "synthetic": False, "model_name": None, "message_tree_id": "t", "tree_state": "ready_for_export",
    }  # fmt: skip


OASST = [flat("t", None, ASK, "prompter"), flat("b", "t", BAD, "assistant", 1), flat("g", "t", GOOD, "assistant", 0)]
ANNOTATION = {"id": 1, "completed_by": 1, "was_cancelled": False, "lead_time": 3.1}

# name -> (rows of the file, what the first is read as, the format that recognises it or None for one of ours,
#          settings that it needs)
ROWS: dict[str, tuple] = {
    "alpaca": ([{"instruction": "Name a tea.", "input": "", "output": GOOD, "text": "..."}], {"messages": TALK}, "alpaca"),
    "alpaca_eval": ([{"instruction": ASK, "dataset": "koala", "generator": "g"}], {"prompt": [USER]}, "alpaca_prompt"),
    "alpaca_eval_reference": ([{"dataset": "helpful_base", "instruction": ASK, "output": GOOD, "generator": "g"}], {"messages": TALK}, "alpaca"),
    "dolly": (
        [{"instruction": "Name", "context": "a tea.", "response": GOOD, "category": "open_qa"}],
        {"messages": [USER | {"content": "Name\n\na tea."}, SAID], "category": "open_qa"}, "dolly",
    ),
    "self_instruct": (
        [{"id": "s", "name": "tea", "instruction": ASK, "instances": [{"input": "", "output": GOOD}], "is_classification": False}],
        {"messages": TALK}, "self_instruct",
    ),
    "sharegpt": (
        [{"id": "x", "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": ASK}, {"from": "gpt", "value": GOOD}]}],
        {"messages": [{"role": "system", "content": "Be brief."}, *TALK]}, "sharegpt",
    ),
    "lima": ([{"conversations": [ASK, GOOD], "source": "stackexchange"}], {"messages": TALK}, "lima"),
    "ultrachat": ([{"id": "0", "data": [ASK, GOOD]}], {"messages": TALK}, "ultrachat"),
    "ultrachat_200k": ([{"prompt": ASK, "prompt_id": "p", "messages": TALK}], {"messages": TALK, "prompt": ASK}, None),
    "openai_chat": (
        [{"messages": [USER, SAID | {"weight": 0}, USER, SAID | {"weight": 1}]}],
        {"messages": [USER, SAID | {"weight": 0}, USER, SAID | {"weight": 1}]}, None,
    ),
    "tulu3": ([{"id": "t", "messages": TALK, "source": "ai2-adapt-dev/flan"}], {"messages": TALK}, None),
    "capybara": ([{"source": "Amplify", "conversation": [{"input": ASK, "output": GOOD}]}], {"messages": TALK}, "capybara"),
    "capybara_binarized": (
        [{"source": "Dove", "conversation": [{"input": ASK, "output": GOOD}], "original_response": GOOD, "prompt": ASK,
          "chosen": TALK, "rejected": [USER, SAID | {"content": BAD}], "rating_chosen": 5, "rating_rejected": 3}],
        {"messages": TALK, "chosen": TALK}, "capybara",
    ),
    "lmsys_chat_1m": (
        [{"conversation_id": "c", "model": "vicuna", "conversation": TALK, "turn": 1, "language": "English", "redacted": False}],
        {"messages": TALK}, "chats",
    ),
    "openorca": (
        [{"id": "niv.1", "system_prompt": "Be brief.", "question": ASK, "response": GOOD}],
        {"messages": [{"role": "system", "content": "Be brief."}, *TALK]}, "openorca",
    ),
    "gsm8k": ([{"question": ASK, "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}], {"answer": "2 + 2 = <<2+2=4>>4\n#### 4"}, "gsm8k"),
    "math": (
        [{"problem": ASK, "level": "Level 1", "type": "Algebra", "solution": "It is $\\boxed{4}$."}],
        {"answer": "It is $\\boxed{4}$."}, "math",
    ),
    "math_500": (
        [{"problem": ASK, "solution": "It is $\\boxed{4}$.", "answer": "4", "subject": "Algebra", "level": 1, "unique_id": "u"}],
        {"answer": "4"}, "math",
    ),
    "mbpp": (
        [{"task_id": 11, "text": "Write a function.", "code": "def f(): pass", "test_list": ["assert f() is None"],
          "test_setup_code": "", "challenge_test_list": []}], {"test_list": ["assert f() is None"]}, "mbpp",
    ),
    "mbpp_setup": (
        [{"task_id": 12, "text": "Write a function.", "code": "def f(): pass", "test_list": ["assert f() is None"],
          "test_setup_code": "x = 1", "challenge_test_list": []}],
        {"prompt": [USER | {"content": "Write a function.\nYour code should pass this test:\nassert f() is None"}],
         "test_list": ["x = 1", "assert f() is None"]}, "mbpp",
    ),
    "mbpp_sanitized": (
        [{"source_file": "Benchmark Questions Verification V2.ipynb", "task_id": 2, "prompt": "Write a function.", "code": "def f(): pass",
          "test_imports": ["import math"], "test_list": ["assert f() is None"]}],
        {"prompt": [USER | {"content": "Write a function.\nYour code should pass this test:\nassert f() is None"}],
         "test_list": ["import math", "assert f() is None"]}, "mbpp_sanitized",
    ),
    "mt_bench": (
        [{"question_id": 81, "category": "writing", "turns": [ASK, "Another."]}],
        {"prompt": [USER], "later_turns": ["Another."]}, "questions",
    ),
    "mt_bench_prompts": (
        [{"prompt": [ASK, "Another."], "prompt_id": 35, "category": "writing", "reference": []}],
        {"prompt": [USER], "later_turns": ["Another."]}, "mt_bench_prompts",
    ),
    "arena_hard": ([{"question_id": "q", "cluster": "c", "turns": [{"content": ASK}]}], {"prompt": [USER]}, "questions"),
    "taskmaster_1": (
        [{"conversation_id": "d", "instruction_id": "i", "utterances": [
            {"index": 0, "speaker": "USER", "text": "Name"}, {"index": 1, "speaker": "USER", "text": "a tea."},
            {"index": 2, "speaker": "ASSISTANT", "text": GOOD, "segments": []}]}],
        {"messages": [USER | {"content": "Name\na tea."}, SAID]}, "taskmaster",
    ),
    "taskmaster_3": (
        [{"conversation_id": "d", "vertical": "Movie Tickets", "instructions": "", "scenario": "s", "utterances": [
            {"index": 0, "speaker": "user", "text": ASK, "segments": []},
            {"index": 1, "speaker": "assistant", "text": GOOD, "segments": [],
             "apis": [{"name": "find_tea", "index": 0, "args": {"kind": "green"}, "response": {"tea": "sencha"}}]}]}],
        {"messages": [USER, {"role": "assistant", "content": 'call find_tea {"kind": "green"}'},
                      {"role": "tool", "content": '{"find_tea": {"tea": "sencha"}}'}, SAID]}, "taskmaster",
    ),
    "taskmaster_4": (
        [{"conversation_id": "d", "vertical": "Coffee", "scenario": "s", "instructions": None, "utterances": [
            {"index": 0, "speaker": "user", "text": ASK, "segments": [], "annotations": [
                {"name": "api_call", "value": "get_menu", "context": "api_call_0"},
                {"name": "request", "value": '{"query": "tea"}', "context": "api_call_0"},
                {"name": "api_response", "value": "get_menu", "context": "api_response_0"},
                {"name": "response", "value": '{"items": []}', "context": "api_response_0"}]},
            {"index": 1, "speaker": "assistant", "text": GOOD, "segments": [], "annotations": []}]}],
        {"messages": [USER, {"role": "assistant", "content": 'call get_menu {"query": "tea"}'},
                      {"role": "tool", "content": '{"get_menu": {"items": []}}'}, SAID]}, "taskmaster",
    ),
    "taskmaster_4_reward": (
        [{"conversation_id": "d", "context": json.dumps([{"role": "user", "text": ASK}]),
          "generation": json.dumps({"role": "agent", "text": GOOD}), "reward": 1.0}],
        {"prompt": [USER], "completion": GOOD, "reward": 1.0}, "taskmaster_reward",
    ),
    "oasst_flat": (OASST, {"messages": TALK}, "oasst"),
    "oasst_tree": (
        [{"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": OASST[0] | {"replies": [
            OASST[1] | {"replies": []}, OASST[2] | {"replies": []}]}}],
        {"messages": TALK}, None,
    ),
    "openai_preference": (
        [{"input": {"messages": [USER], "tools": [], "parallel_tool_calls": True}, "preferred_output": [SAID],
          "non_preferred_output": [SAID | {"content": BAD}]}], PAIR, "openai_preference",
    ),
    "orca_dpo": (
        [{"system": "Be brief.", "question": ASK, "chosen": GOOD, "rejected": BAD}],
        PAIR | {"prompt": [{"role": "system", "content": "Be brief."}, USER]}, "orca_dpo",
    ),
    "distilabel_orca": (
        [{"system": "", "input": ASK, "chosen": GOOD, "rejected": BAD, "generations": [GOOD, BAD], "order": ["a", "b"],
          "labelling_model": "gpt-4", "rating": [9.0, 8.0], "rationale": "", "status": "unchanged", "chosen_score": 9.0}],
        PAIR, "distilabel_orca",
    ),
    "llama_factory_dpo": ([{"instruction": "Name a tea.", "input": "", "chosen": GOOD, "rejected": BAD}], PAIR, "alpaca_dpo"),
    "llama_factory_sharegpt_dpo": (
        [{"conversations": [{"from": "human", "value": ASK}], "chosen": {"from": "gpt", "value": GOOD},
          "rejected": {"from": "gpt", "value": BAD}}], PAIR, "sharegpt_dpo",
    ),
    "alpaca_farm": (
        [{"instruction": "Name", "input": "a tea.", "output_1": BAD, "output_2": GOOD, "preference": 2, "raw_preference": 4}],
        PAIR | {"prompt": [USER | {"content": "Name\n\na tea."}]}, "alpaca_farm",
    ),
    "ultrafeedback": (
        [{"source": "evol_instruct", "instruction": ASK, "models": ["a", "b"], "correct_answers": ["None"],
          "incorrect_answers": ["None"], "completions": [
              {"model": "a", "principle": "honesty", "custom_system_prompt": "", "response": BAD, "critique": "",
               "overall_score": 10.0, "fine-grained_score": 1.0, "annotations": rating("1")},
              {"model": "b", "principle": "honesty", "custom_system_prompt": "", "response": GOOD, "critique": "",
               "overall_score": 8.0, "fine-grained_score": 4.5, "annotations": rating("4") | {"honesty": {"Rating": "N/A"}}}]}],
        {"prompt": [USER], "completions": [BAD, GOOD], "ranks": [-1.0, -4.0]}, "ultrafeedback",
    ),
    "ultrafeedback_binarized": (
        [{"prompt": ASK, "prompt_id": "p", "chosen": TALK, "rejected": [USER, SAID | {"content": BAD}], "messages": TALK,
          "score_chosen": 8.5, "score_rejected": 7.0}], {"messages": TALK}, None,
    ),
    "ultrafeedback_cleaned": (
        [{"source": "s", "prompt": ASK, "chosen": TALK, "chosen-rating": 5.0, "chosen-model": "a",
          "rejected": [USER, SAID | {"content": BAD}], "rejected-rating": 2.0, "rejected-model": "b"}], PAIR, None,
    ),
    "shp": (
        [{"post_id": "p", "domain": "askbaking_train", "history": ASK, "human_ref_A": BAD, "human_ref_B": GOOD,
          "labels": 0, "score_A": 2, "score_B": 9, "score_ratio": 4.5}], PAIR, "shp",
    ),
    "helpsteer2": (
        [{"prompt": f"Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\n{ASK}", "response": GOOD, "helpfulness": 3,
          "correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 1}],
        {"prompt": [USER | {"content": "Hi"}, SAID | {"content": "Hello"}, USER], "completion": GOOD, "reward": 0.75}, "helpsteer",
    ),
    "helpsteer2_preference": (
        [{"split": "train", "prompt": f"Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\n{ASK}", "response_1": BAD,
          "response_2": GOOD, "preference_strength": 2, "preference_statement": "", "preference_elaboration": ""}],
        PAIR | {"prompt": [USER | {"content": "Hi"}, SAID | {"content": "Hello"}, USER], "margin": 2.0}, "helpsteer2_preference",
    ),
    "helpsteer3": (
        [{"domain": "general", "language": "english", "context": [USER], "response1": GOOD, "response2": BAD,
          "overall_preference": -3, "individual_preference": [{"score": -3, "reasoning": "", "feedback1": "", "feedback2": ""}]}],
        PAIR | {"margin": 3.0}, "helpsteer3",
    ),
    "pku_saferlhf": (
        [{"prompt": ASK, "response_0": BAD, "response_1": GOOD, "prompt_source": "B", "is_response_0_safe": True,
          "is_response_1_safe": True, "better_response_id": 1, "safer_response_id": 0}],
        PAIR, "pku_saferlhf_better", {"format": "pku_saferlhf_better"},
    ),
    "nectar": (
        [{"prompt": f"\n\nHuman: {ASK}\n\nAssistant: ", "turns": 1, "num_responses": 2, "source": ["lmsys"], "good_natured": True,
          "answers": [{"answer": GOOD, "model": "a", "rank": 1.0}, {"answer": BAD, "model": "b", "rank": 2.0}]}],
        {"prompt": [USER], "completions": [GOOD, BAD], "ranks": [1.0, 2.0]}, "nectar",
    ),
    "kto_mix": ([{"prompt": [USER], "completion": [SAID], "label": True}], {"prompt": [USER], "completion": GOOD, "reward": 1.0}, None),
    "arena_33k": (
        [battle("model_a") | {"question_id": "q", "judge": "arena_user_1", "turn": 1, "anony": True, "language": "English",
                              "tstamp": 1.0, "openai_moderation": {}, "toxic_chat_tag": {}}], PAIR, "arena",
    ),
    "arena_140k": (
        [battle("model_a", parts, num_tokens=3) | {"id": "i", "evaluation_session_id": "e", "evaluation_order": 1,
         "full_conversation": [], "conv_metadata": {}, "category_tag": {}, "language": "en", "is_code": False, "timestamp": "2025"}],
        PAIR, "arena",
    ),
    "arena_55k": (
        [{"id": 1, "model_a": "m", "model_b": "n", "prompt": json.dumps([ASK]), "response_a": json.dumps([BAD]),
          "response_b": json.dumps([GOOD]), "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}], PAIR, "arena_55k",
    ),
    "hh_raw": (
        [{"chosen": f"\n\nHuman: {ASK}\n\nAssistant: {GOOD}", "rejected": f"\n\nHuman: {ASK}\n\nAssistant: {BAD}"}], PAIR, None,
    ),
    "hh_processed": (
        [{"prompt": f"\n\nHuman: {ASK}\n\nAssistant:", "response": f" {GOOD}", "chosen": GOOD, "rejected": BAD}], PAIR, None,
    ),
    "webgpt": (
        [{"question": {"dataset": "eli5", "id": "1", "full_text": ASK}, "quotes_0": {}, "answer_0": GOOD, "tokens_0": {},
          "score_0": 0.5, "quotes_1": {}, "answer_1": BAD, "tokens_1": {}, "score_1": -0.5}], PAIR, "webgpt",
    ),
    "summarize_from_feedback": (
        [{"info": {"id": "t3", "post": ASK, "title": "", "subreddit": "tea"}, "split": "train", "batch": "b", "extra": {},
          "summaries": [{"text": BAD, "policy": "sup", "note": None}, {"text": GOOD, "policy": "ref", "note": None}],
          "choice": 1, "worker": "w"}],
        PAIR | {"prompt": [USER | {"content": f"{ASK}\n\nTL;DR:"}]}, "summarize_from_feedback",
    ),
    "argilla_2": (
        [{"id": "1", "fields": {"prompt": ASK, "response1": BAD, "response2": GOOD}, "metadata": {"source": "s"},
          "suggestions": {}, "vectors": {}, "_server_id": "x", "responses": {"preference": [
              {"value": ["response2", "response1"], "user_id": "u"}]}}],
        {"prompt": [USER], "completions": [GOOD, BAD], "ranks": [0.0, 1.0]}, "argilla",
    ),
    "argilla_flat": (
        [{"id": "1", "status": "completed", "_server_id": "x", "prompt": ASK, "response1": BAD, "response2": GOOD, "terms": 2,
          "preference.responses": [["response2", "response1"]], "preference.responses.users": ["u"],
          "preference.responses.status": ["submitted"], "preference.suggestion": None, "preference.suggestion.score": None,
          "preference.suggestion.agent": None}],
        {"prompt": [USER], "completions": [GOOD, BAD], "ranks": [0.0, 1.0], "terms": 2}, "argilla_flat",
    ),
    "argilla_1": (
        [{"prompt": ASK, "response1": BAD, "response2": GOOD, "external_id": None, "metadata": "{}",
          "preference": [{"user_id": "u", "status": "submitted",
                          "value": {"rank": [2, 1], "value": ["response1", "response2"]}}],
          "preference-suggestion": None, "preference-suggestion-metadata": None}],
        {"prompt": [USER], "completions": [GOOD, BAD], "ranks": [0.0, 1.0]}, "argilla_1",
    ),
    "label_studio": (
        [{"id": 7, "data": {"prompt": ASK, "answer1": BAD, "answer2": GOOD}, "project": 1, "predictions": [], "annotations": [
            ANNOTATION | {"result": [{"id": "r", "type": "pairwise", "from_name": "pw", "to_name": ["answer1", "answer2"],
                                      "value": {"selected": "right"}, "origin": "manual"}]}]}], PAIR, "label_studio",
    ),
    "label_studio_template": (  # as its own template names the fields, and its tests the tag
        [{"id": 7, "data": {"prompt": ASK, "text1": BAD, "text2": GOOD}, "annotations": [
            ANNOTATION | {"result": [{"from_name": "pw", "to_name": "text1,text2", "type": "pairwise",
                                      "value": {"selected": "right"}}]},
            ANNOTATION | {"result": [{"from_name": "pw", "to_name": "text", "type": "pairwise",
                                      "value": {"selected": "right"}}]}]}], PAIR, "label_studio",
    ),
    "label_studio_text": (
        [{"id": 7, "data": {"prompt": ASK}, "project": 1, "predictions": [], "annotations": [
            ANNOTATION | {"result": [{"id": "r", "type": "textarea", "from_name": "answer", "to_name": "prompt",
                                      "value": {"text": [GOOD]}, "origin": "manual"}]}]}],
        {"messages": TALK}, "label_studio_text",
    ),
}  # fmt: skip
