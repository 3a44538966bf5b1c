"""What judges write, in the styles of many models, and the verdict that a person would read in it."""

from pathlib import Path

import pytest

from evals.judge import read_answer
from evals.judge_grade import read_grade
from evals.judge_output import read_pair, read_ranking
from evals.published_parsers import (
    alpaca_eval_identifier,
    alpaca_eval_ranking,
    arena_hard,
    fastchat_grade,
    fastchat_pair,
    fastchat_scores,
)
from generation.clients import Answer

PAIRS = [
    # gpt-4: an explanation, then the mark
    ("Assistant A explains the steps. Assistant B is vague.\n\nMy final verdict is: [[A]]", "a"),
    ('You asked for "[[A]]" if assistant A is better. B is more accurate.\n\n[[B]]', "b"),
    ("Both answers are correct.\n\n[[C]]", "tie"),
    ('Following the format "[[A]]" if A is better, "[[B]]" if B is better, I conclude: [[B]].', "b"),
    ("[[A]]", "a"),
    ("[[a]]", "a"),
    ("[[ B ]]", "b"),
    ("**[[B]]**", "b"),
    ("[[**A**]]", "a"),
    ("Final Verdict: [[Tie]]", "tie"),
    ("At first I leaned to [[A]]. On checking the arithmetic, A is wrong. Final verdict: [[B]]", "b"),
    ("[[A>>B]]", "a"),
    ("My final verdict is Assistant B is slightly better: [[B>A]]", "b"),
    ("Verdict: A>>B", "a"),
    ("**Verdict:** B > A", "b"),
    ("My final verdict is tie: [[A=B]]", "tie"),
    ("[[A<B]]", "b"),
    # claude: headings and bold
    ("## Analysis\nResponse A is short.\nResponse B covers more.\n\n## Verdict\n\n**Response B**", "b"),
    ("**Final Verdict: Assistant A**", "a"),
    ("### Final Decision\n**Winner: B**\n\nB cites its sources.", "b"),
    ("Overall, Response A is the better response.", "a"),
    ("I'd go with Response B.", "b"),
    ("Both responses are equally helpful, so I'd call it a tie.", "tie"),
    ("<answer>A</answer>", "a"),
    ("<verdict>[[B]]</verdict>", "b"),
    ("<reasoning>A seems good [[A]]</reasoning>\n<answer>B</answer>", "b"),
    # deepseek, qwen: thinking in tags
    ("<think>Maybe [[A]]? No.</think>\n\n[[B]]", "b"),
    ("Maybe [[A]]? Let me see.</think>\nB is right. [[B]]", "b"),
    ("<think>\n[[A]]\n</think>\n\n**Final verdict: [[A]]**", "a"),
    ("<think>I would say [[A]] but", "error"),
    ("A first.</think> So [[A]] is my guess.</think>\nI have no view of these two.", "error"),
    ("[THINK]so [[B]][/THINK]The winner is A.", "a"),
    ("◁think▷[[B]]◁/think▷[[A]]", "a"),
    ("<|channel|>analysis<|message|>[[A]] perhaps<|end|><|start|>assistant<|channel|>final<|message|>[[B]]", "b"),
    ("The final answer is $\\boxed{B}$.", "b"),
    ("\\boxed{\\text{A}}", "a"),
    ("\\boxed{Tie}", "tie"),
    ("最终判断：【【A】】", "a"),
    ("综合来看，助手B更好。", "b"),
    ("［［B］］", "b"),
    ("【A】", "a"),
    ("最终结论：平局", "tie"),
    # llama: words
    ("Assistant A is better because it is complete.", "a"),
    ("I think Assistant B wins here.", "b"),
    ("Assistant A's answer is significantly better than Assistant B's.", "a"),
    ("Assistant B is not better than Assistant A. Assistant A is the clear winner.", "a"),
    ("The first response is better.", "a"),
    ("I prefer the second answer.", "b"),
    ("Model 2 is the better one.", "b"),
    ("A is better than B in style, and B is better in accuracy. Overall, B is better.", "b"),
    ("A is better in style. B is better in accuracy.", "error"),
    ("Neither answer is better; it's a tie.", "tie"),
    ("Assistant A is worse than Assistant B.", "b"),
    # gemini: JSON and code
    ('```json\n{"winner": "A", "reason": "clear"}\n```', "a"),
    ('{"explanation": "B is wrong about [[A]].", "verdict": "B"}', "b"),
    ('{"verdict": "tie"}', "tie"),
    ('{"preferred": "Assistant A"}', "a"),
    ('{"better_response": "response_b"}', "b"),
    ("{'winner': 'model_a'}", "a"),
    ('{"choice": 2, "why": "x"}', "error"),
    ("```\n[[B]]\n```", "b"),
    ("The code:\n```python\nx = [[A]]\n```\nVerdict: [[B]]", "b"),
    ("My verdict: `[[A]]`", "a"),
    ("> Output [[A]] or [[B]]\n\n[[B]]", "b"),
    # mistral: bare names
    ("[A]", "a"),
    ("Answer: B", "b"),
    ("B", "b"),
    ("**A**", "a"),
    ("(B)", "b"),
    ("Verdict: B.", "b"),
    ("The better answer is A.", "a"),
    ("The answer is a good one.", "error"),
    ("Assistant [A] is concise and [B] is long.\n\n[B]", "b"),
    ("Tie", "tie"),
    ("Result: Draw", "tie"),
    ("Winner: Assistant 1", "a"),
    # phi, gemma: scores
    ("Assistant A: 8/10\nAssistant B: 6/10", "a"),
    ("8 9", "b"),
    ("[[7, 7]]", "tie"),
    ("Response A gets a score of 7. Response B gets a score of 9.", "b"),
    # refusals and the rest
    ("I'm sorry, but I can't compare these answers.", "error"),
    ("I cannot choose between [[A]] or [[B]].", "error"),
    ("", "error"),
    ("Write [[A]] if A is better, [[B]] if B is better and [[C]] for a tie.", "error"),
    ("Both have merits.", "error"),
    ("Assistant A mentions an array [1] and a list [2].", "error"),
]


OTHER_WORDINGS = [
    ("**Verdict**\n\n**B**\n\nReason: B is complete.", "b"),
    ("The final verdict is [[A]], because [[B]] has errors.", "a"),
    ("Assistant A > Assistant B", "a"), ("Better: B", "b"), ("Tie: both good", "tie"), ("[[Assistant B]]", "b"),
    ("[[A is better]]", "a"), ("While Assistant A is better at style, Assistant B is better overall.", "b"),
    ("**A**: concise.\n**B**: verbose.", "error"), ("- A: concise.\n- B: verbose.\n\n**B**", "b"),
    ('{"A": 8, "B": 6}', "a"), ('Final verdict: "[[B]]"', "b"), ("The answer is A, not B.", "a"),
    ("[[D]]", "error"),
    ("final verdict: b", "b"), ("assistant a is better", "a"), ("Verdict=A", "a"), ("$\\boxed{\\textbf{B}}$", "b"),
    ("A: 8/10, B: 7/10", "a"), ("Judge: [[A]].\n\n```\n[[B]]\n```", "a"),
]  # fmt: skip
CURRENT_STYLES = [  # thinking models, JSON, tables, LaTeX, ranks, hedged and cut judgements
    ('{"score_a": 7, "score_b": 9}', "b"),
    ("综上所述，助手B的回答更好。", "b"),
    ("I'd call this one a draw.", "tie"),
    ("The second assistant did a better job.", "b"),
    ("Ranking: B > A", "b"),
    ("Assistant A is accurate. Assistant B is also accurate. Assistant A is better organised but", "error"),
    ("Final verdict: [[A", "error"),
    ("[[A]] [[B]]", "error"),
    ("Verdict: [[A]] or [[B]]", "error"),
    ("\\[\\[A\\]\\]", "a"),
    ("Verdict: A is better than B in style, but B is more accurate overall, so B wins.", "b"),
    ("Assistant A is outperformed by Assistant B.", "b"),
    ("Gewinner: B", "b"),
    ("[[A>B]] [[B>A]]", "error"),
    ("[[A&gt;B]]", "a"),
    ("Feedback: Both are fine, yet B is more complete. [RESULT] B", "b"),
    ("Feedback: ... So the overall score is 4. [RESULT] A", "a"),
    ("8/10 vs 6/10", "a"),
    ("A 8/10, B 7/10", "a"),
    ("A: 8/10 for accuracy, 4/10 for style\nB: 7/10 for accuracy, 9/10 for style", "error"),
    ("| Assistant | Score |\n|---|---|\n| A | 8 |\n| B | 6 |", "a"),
    ("A loses to B.", "b"),
    ("Assistant A was beaten by Assistant B.", "b"),
    ("B has been surpassed by A.", "a"),
    ("Assistant B's response is less helpful than Assistant A's.", "a"),
    ("Assistant A is more helpful than Assistant B.", "a"),
    ("Overall, Assistant B is more accurate and helpful.", "b"),
    ("I can't say that A is better.", "error"),
    ("It's hard to say whether A or B is better.", "error"),
    ("Is A better? Or B?", "error"),
    ("Is Assistant A better than Assistant B? No. Assistant B is better.", "b"),
    ("A would be better if it had no errors. B is the winner.", "b"),
    ("Both responses are of equal quality.", "tie"),
    ("A and B are tied.", "tie"),
    ("The two answers are on par.", "tie"),
    ("Winner: none", "tie"),
    ("My verdict: they are tied", "tie"),
    ("<answer>[[A]]</answer><answer>[[B]]</answer>", "error"),
    ("Accuracy winner: A\nClarity winner: B", "error"),
    ("Loser: A", "b"),
    ("The worse answer is A.", "b"),
    ("The worst response is B.", "a"),
    ("Worse: A", "b"),
    ("\\boxed{A \\succ B}", "a"),
    ("$A \\succ B$", "a"),
    ("<|begin_of_box|>A<|end_of_box|>", "a"),
    ("→ B", "b"),
    ("✅ Assistant A", "a"),
    ("Assistant A ❌\nAssistant B ✅", "b"),
    ('{"winner": "A or B"}', "error"),
    ('{"winner": "A"}\n{"winner": "B"}', "error"),
    ("winner: 'B'", "b"),
    ("Sorry. [[A]] cannot be evaluated.", "error"),
    ("[[C", "error"),
    ("The verdict: [[A>", "error"),
    ("Final verdict: [[A>>B", "error"),
    ("判定：B", "b"),
    ("El ganador es B.", "b"),
    ("Veredicto: A", "a"),
    ("Definitely A.", "a"),
    ("Slight preference for A.", "a"),
    ("Slight edge to B.", "b"),
    ("Assistant A has the edge.", "a"),
    ("The better of the two is Assistant B.", "b"),
    ("B does a better job than A.", "b"),
    ("Evaluation: A good answer by B.", "error"),
    ("Conclusion: A strong response from Assistant B.", "error"),
    ("The correct answer is B. Assistant A says B. Assistant B says C. So Assistant A is better.", "a"),
    ("The right answer is B, which Assistant A gives. A wins.", "a"),
    ("Assistant A's score: 8/10\nAssistant B's score: 5/10", "a"),
    ("Assistant A has 3 examples and Assistant B has 5 examples.", "error"),
    ("Assistant A: 3 errors\nAssistant B: 1 error", "error"),
    ("Assistant A lists 10 items, Assistant B lists 5.", "error"),
    ("A: 2 errors, B: 0 errors.", "error"),
    ("**[[B]]**\n\n(Where [[A]] = Assistant A better, [[B]] = Assistant B better, [[C]] = tie)", "b"),
    ("[[A]] > [[B]]", "a"),
    ("Assistant A is less useful in math, but overall Assistant A is better.", "a"),
    ("The correct answer is A.\n\n[[B]]", "b"),
    ("There is no doubt that A is better.", "a"),
    ("I could not find any errors in B, so B is better.", "b"),
    ("Verdict: B is right and A is wrong.", "b"),
    ("Winner: A, although B is close.", "a"),
    ("Options: [[A]], [[B]], [[C]]. I choose [[A]].", "a"),
    ("[[A]][[A]][[A]]", "a"),
    ("If we value brevity, A is better; if we value depth, B is better.", "error"),
    ("It is not a tie: [[B]]", "b"),
]
PAGE = Path(__file__).parents[2] / "docs" / "verdicts.md"


@pytest.mark.parametrize("text, verdict", [*PAIRS, *CURRENT_STYLES])
def test_the_verdict_is_the_one_that_a_person_reads(text, verdict):
    reading = read_pair(text)
    assert reading.verdict == verdict
    assert bool(reading.why) == (verdict == "error")


def test_strong_verdicts_weigh_three():
    texts = ("[[A>>B]]", "[[B<<A]]", "**A ≫ B**\nVerdict: A ≫ B", "Assistant A is significantly better.")
    assert [tuple(read_pair(text))[:2] for text in texts] == [("a", 3.0)] * 4
    assert read_pair("[[A>B]]").weight == 1.0


@pytest.mark.parametrize(
    "text, verdict",
    [("m", "a"), ("M", "b"), ("**M**", "b"), ('"m"', "a"), ("The best model is M.", "b"), ("`m`", "a"), ("mM", "error"),
     ("Model m is better.", "a"), ("[[M]]", "b"), ("<answer>m</answer>", "a"), ('{"best": "M"}', "b")],
)  # fmt: skip
def test_identifiers_keep_their_case(text, verdict):
    assert read_pair(text, identifiers=True).verdict == verdict


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("[{'model': 'model_2', 'rank': 1}, {'model': 'model_1', 'rank': 2}]", "b"),
        ('```json\n[{"model": "model_1", "rank": 1}, {"model": "model_2", "rank": 2}]\n```', "a"),
        ("[{'rank': 1, 'model': 'model_1'}, {'rank': 2, 'model': 'model_2'}]", "a"),
        ("[{'model': 'model_1', 'rank': 1}, {'model': 'model_2', 'rank': 1}]", "error"),
        ("[{'model': 'model_1', 'rank': 1}]", "error"),
        ("model_2 is better", "b"),
    ],
)
def test_rankings_are_read(text, verdict):
    assert read_ranking(text).verdict == verdict


@pytest.mark.parametrize(
    "text, grade",
    [
        ("Rating: [[7]]", 7), ("Rating: [[8.5]]", 8.5), ("[[8/10]]", 8), ("**Rating: 9/10**", 9),
        ("Score: 8 out of 10", 8),
        ("If it were vague I would give [[3]], but it is complete and right. Rating: [[9]]", 9),
        ("It cites a source [1] and is right.", None), ("It cites a source [1] and is right. **Rating: 9/10**", 9),
        ("<think>[[3]]</think>[[6]]", 6), ('{"rating": 8, "why": "good"}', 8),
        ('{"why": "f(x) = {x}", "rating": 8}', 8), ('{"parts": {"rating": 3}, "rating": 8, "why": "{"}', 8),
        ("\\boxed{7}", 7), ("7", 7),
        ("**8**", 8),
        ("[[11]]", None), ("[[0]]", None), ("seven", None), ("4/5", None), ("[[85/100]]", None), ("", None),
        ("On a scale of 1 to 10, I rate it an 8.", 8), ("Accuracy: 8/10, style: 6/10.", None),
        ("Accuracy: 8/10, style: 6/10. Overall rating: 7/10", 7), ("I would give it a 6.", 6), ("<score>9</score>", 9),
        ("Rating: [7]", 7), ("评分：【【8】】", 8), ("I'm sorry, I can't rate this.", None),
        ("```\nRating: [[5]]\n```", 5),
        ("<think>[[9]]", None), ('The format is "[[5]]". Rating: [[4]]', 4), ("Rating: 10", 10),
        ("Rating: 8,5/10", 8.5),
        ("$\\boxed{\\text{Rating: } 8}$", 8),
        ("Accuracy: 8/10\nClarity: 6/10\nOverall: 7/10", 7),
        ("Rating: eight out of ten", 8),
        ("Rating: 7 or 8", None),
        ("Rating: [[8", None),
        ("[RESULT] 4", 4),
        ("Feedback: good. [RESULT] 4", 4),
        ("| Criterion | Score |\n|---|---|\n| Accuracy | 8/10 |\n| Depth | 6/10 |\n\n**Overall: 7/10**", 7),
        ("Not a 10/10.", None),
        ("評価: 7", 7),
        ("评分：8分", 8),
        ("8分", 8),
        ("Rating: 7+", None),
        ("[[7]] or [[8]]", None),
        ("It answers 9/10 questions.", None),
        ("I'm sorry, but I cannot provide a rating. The content is rated 10/10 harmful.", None),
        ("Score (out of 10): 7", 7),
        ("Rating (1 to 10): 9", 9),
        ("Rating [1-10]: 9", 9),
        ("As an AI judge, I rate this 8/10.", 8),
        ("I cannot verify the claim. Rating: 6/10", 6),
        ("Overall 3 of its 5 claims are wrong.", None),
    ],
)  # fmt: skip
def test_grades_are_read_or_missing(text, grade):
    assert read_grade(text) == grade


def test_the_published_parsers_are_theirs():
    assert [fastchat_pair(t).verdict for t in ("[[B]] not [[A]]", "[[C]]", "A", "[[b]]")] == [
        "a",
        "tie",
        "error",
        "error",
    ]
    assert [fastchat_grade(t) for t in ("I'd give [[3]], no: [[9]]", "source [1], 9/10", "nine")] == [3.0, 1.0, None]
    assert [fastchat_scores(t).verdict for t in ("[[8,8.05]]", "[[7, 9]]", "8 9")] == ["tie", "b", "error"]
    said = ("[[A>>B]] then [[b>a]]", "[A=B]", "[[A<<B]]", "[[AB]]", "none")
    assert [tuple(arena_hard(t))[:2] for t in said] == [
        ("b", 1.0),
        ("tie", 1.0),
        ("b", 3.0),
        ("error", 1.0),
        ("error", 1.0),
    ]
    ranking = "[{'model': 'model_1', 'rank': 2}, {'model': 'model_2', 'rank': 1}]"
    assert [alpaca_eval_ranking(t).verdict for t in (ranking, f"So: {ranking}", "[]")] == ["b", "error", "error"]
    assert [alpaca_eval_identifier(t).verdict for t in ("m", "M", "**M**")] == ["a", "b", "error"]


@pytest.mark.parametrize("text, verdict", OTHER_WORDINGS)
def test_other_wordings_are_read_by_the_same_rules(text, verdict):
    assert read_pair(text).verdict == verdict


def verdict_page() -> str:
    """docs/verdicts.md: what a judge writes and what is read, from the tables above."""
    lines = [
        "# Verdicts: a judge's text and what is read from it",
        "",
        "`python -m tests.evals.test_judge_output` writes this page from that test's tables and checks it.",
        "The answer shown first is A. An error is counted with its reason and is no vote.",
        "",
        "| judge's text | verdict | reason of an error |",
        "| --- | --- | --- |",
    ]
    for text, _ in [*PAIRS, *OTHER_WORDINGS, *CURRENT_STYLES]:
        reading = read_pair(text)
        shown = text.replace("|", "\\|").replace("\n", "⏎").replace("`", "'") or " "
        lines.append(f"| `{shown}` | {reading.verdict} | {reading.why} |")
    return "\n".join(lines) + "\n"


def test_the_page_of_verdicts_is_this_table():
    assert PAGE.read_text(encoding="utf-8") == verdict_page()


@pytest.mark.parametrize(
    "finish_reason, why",
    [("length", "cut by judge.max_tokens"), ("content_filter", "filtered"), ("refused", "refused")],
)
def test_an_answer_that_did_not_end_is_an_error_whatever_its_text_says(finish_reason, why):
    def reading(finish_reason):
        return read_answer(Answer("[[A]]", finish_reason, 1, 1), read_pair)

    assert reading("stop").verdict == "a"
    assert reading(finish_reason)[::2] == ("error", why)


if __name__ == "__main__":
    PAGE.write_text(verdict_page(), encoding="utf-8")
