"""The judge that reads probabilities: against a full softmax, in both orders, and with a model that likes one place."""

import json
import math

import pytest
import torch
from omegaconf import OmegaConf

from data.chat import encode_prompt
from data.tokenizer import load_tokenizer, train_sentencepiece
from evals.judge import summarise_pairs
from evals.judge_items import choose_template, item_messages, make_items
from evals.logprob_judge import LogprobJudge
from evals.prompts import load_templates
from evals.verdicts import votes_table
from model.build import export_model, load_policy, new_policy
from tests.published_votes import SCRIPT, write_lines
from tests.tiny_models import shaken, tiny_config

TASK = OmegaConf.create({"mode": "pairwise", "models": None, "baseline": None, "turns": 1, "both_orders": True})
QUESTIONS = [{"question_id": str(i), "category": "writing", "turns": [f"Say {i}."]} for i in range(5)]
ANSWERS = {
    m: {q["question_id"]: [f"{m} says {int(q['question_id']) + n}"] for q in QUESTIONS}
    for n, m in enumerate(("x", "y"))
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    home = tmp_path_factory.mktemp("judge") / "policy"
    text = load_templates("alpaca_eval_clf", "pairwise")[1, False].text
    tokenizer = train_sentencepiece([*text.split("\n"), "m", "M"], 400, home.parent / "tokenizer")
    export_model(
        shaken(new_policy(tiny_config(vocab_size=tokenizer.vocab_size, max_length=2048), seed=0)), home, tokenizer
    )
    return home


@pytest.fixture
def judge(policy):
    """judge(**settings) -> the judge that is this policy."""
    settings = {"path": str(policy), "template": "alpaca_eval_clf", "precision": "fp32", "batch_size": 3}
    return lambda **changes: LogprobJudge(OmegaConf.create(settings | {"max_length": 2048} | changes))


def items():
    return make_items(QUESTIONS, ANSWERS, {}, TASK)


def test_the_share_is_that_of_whole_softmaxes_and_is_mapped_back(judge, policy):
    model, tokenizer = load_policy(str(policy)), load_tokenizer(str(policy))
    template = load_templates("alpaca_eval_clf", "pairwise")
    for item, verdict in zip(items(), judge().compare(items()), strict=True):
        prompt = encode_prompt(item_messages(item, choose_template(item, template)), tokenizer, max_length=2048)
        sums = []
        for text in ("m", "M"):
            ids = prompt + tokenizer.encode(text) + [tokenizer.stop_id]
            rows = torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)
            mask = torch.arange(len(ids))[None] >= len(prompt)
            sums.append(model.logprobs(*rows, mask).sum().item())
        of_second = 1 / (1 + math.exp(sums[0] - sums[1]))
        b = of_second if item.shown == "a" else 1 - of_second
        assert verdict.preference == pytest.approx(b, abs=1e-4)
        assert verdict.verdict == ("b" if b > 0.5 else "a") and verdict.shown == item.shown


def test_a_judge_of_places_decides_nothing(judge, monkeypatch):
    likes_the_first = judge()
    monkeypatch.setattr(likes_the_first, "shares", lambda batch: [0.1] * len(batch))
    verdicts = [vars(verdict) for verdict in likes_the_first.compare(items())]
    figures = summarise_pairs(votes_table(verdicts), OmegaConf.create({"alpha": 0.05, "power": 0.8}))["y"]["x"]
    assert figures["win_rate"] == 50 and figures["n_draws"] == 5
    monkeypatch.setattr(likes_the_first, "shares", lambda batch: [0.9 if i.shown == "a" else 0.1 for i in batch])
    verdicts = [vars(verdict) for verdict in likes_the_first.compare(items())]
    figures = summarise_pairs(votes_table(verdicts), OmegaConf.create({"alpha": 0.05, "power": 0.8}))["y"]["x"]
    assert figures["win_rate"] == 100


def test_what_it_cannot_read_is_refused(judge):
    with pytest.raises(ValueError, match="fastchat has .*use alpaca_eval_clf"):
        judge(template="fastchat")
    with pytest.raises(ValueError, match="question 0 with both answers is longer than 100 tokens"):
        judge(max_length=100).compare(items())


def test_the_script_asks_both_orders_and_refuses_grades(policy, tmp_path, run_script, capsys):
    answers = [
        {"question_id": q, "model_id": m, "choices": [{"turns": said}]}
        for m, own in ANSWERS.items()
        for q, said in own.items()
    ]
    names = write_lines(tmp_path / "q.jsonl", QUESTIONS), write_lines(tmp_path / "a.jsonl", answers)
    words = [
        "task=judge",
        "judge=logprobs",
        f"judge.path={policy}",
        f"task.questions={names[0]}",
        "task.turns=1",
        f"task.answers=[{names[1]}]",
        f"hydra.run.dir={tmp_path}/out",
    ]
    assert run_script(SCRIPT, *words) == 0
    rows = [json.loads(line) for line in (tmp_path / "out/verdicts.jsonl").read_text().splitlines()]
    assert [row["shown"] for row in rows] == ["a", "b"] * 5
    assert all(row["verdict"] == ("b" if row["preference"] > 0.5 else "a") for row in rows)
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["unreadable"] == 0 and result["models"]["y"]["x"]["n_total"] == 5
    assert run_script(SCRIPT, *words, "task.mode=single", "overwrite=true") == 2
    assert "judge.kind=logprobs chooses between two answers" in capsys.readouterr().err
