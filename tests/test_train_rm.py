"""train_rm.py on real judgements with a tiny model: K-wise elements, laws, normalisation, figures, refusals."""

import gzip
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

import train_rm
from data.preferences import PreferenceGroup
from data.tokenizer import train_sentencepiece
from evals.rm_accuracy import calibration, decided_pairs, evaluate_reward_model, length_bucket
from model.build import export_model, load_reward_model, new_policy
from model.packing import make_rows
from tests.tiny_models import shaken, tiny_config
from train_rm import group_loss, group_pairs

EMBEDDED = Path(__file__).parents[1] / "data" / "embedded"


def read_package_rows(name, count):
    with gzip.open(EMBEDDED / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for _, line in zip(range(count), file, strict=False)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A tiny policy, and small files of real pairs, rankings and ratings."""
    home = tmp_path_factory.mktemp("rm")
    pairs, rated = (
        read_package_rows("pref_hh_helpful_train.jsonl.gz", 24),
        read_package_rows("reward_movie_train.jsonl.gz", 24),
    )
    texts = [text for row in pairs for text in (row["chosen"], row["rejected"])]
    tokenizer = train_sentencepiece(texts, 400, home / "tokenizer")
    config = tiny_config(vocab_size=tokenizer.vocab_size, max_length=160)
    export_model(shaken(new_policy(config, seed=0)), home / "policy", tokenizer)
    write(home / "pairs.jsonl", pairs)
    write(home / "rated.jsonl", [row | {"reward": float(i % 2)} for i, row in enumerate(rated)])
    write(home / "good.jsonl", [row | {"reward": 1.0} for row in rated[:12]])
    ranked = [
        {
            "prompt": row["prompt"],
            "completions": [row["rejected"], row["chosen"], "Yes.", "No."][: 2 + i % 3],
            "ranks": [2, 0, 1, 1][: 2 + i % 3],
        }
        for i, row in enumerate(pairs)
    ]
    write(home / "ranked.jsonl", ranked)
    return home


@pytest.fixture
def rm(run_script, inputs, tmp_path):
    """rm(*words, run="run") -> exit code; 3 steps of 4 elements unless the words say otherwise."""

    def rm(*words, run="run"):
        defaults = {
            "policy": inputs / "policy",
            "data.train": f"[{inputs}/pairs.jsonl]",
            "data.eval": f"[{inputs}/pairs.jsonl]",
            "data.max_length": 96,
            "data.max_prompt_length": 48,
            "num_steps": 3,
            "batch_size": 4,
            "micro_batch_size": 2,
            "eval_every": 3,
            "save_every": 0,
            "log.wandb": "disabled",
            "optim.lr": 1e-3,
            "hydra.run.dir": tmp_path / run,
            "sampling.max_new_tokens": 6,
        }
        given = dict(word.split("=", 1) for word in words)
        return run_script(train_rm, *[f"{key}={value}" for key, value in (defaults | given).items()])

    return rm


def test_the_warm_up_begins_at_its_first_rate(rm, tmp_path, read_metrics):
    assert rm("num_steps=2", "optim.warmup_steps=4", "eval_every=0", "normalise=none") == 0
    assert [row["optim/lr"] for row in read_metrics(tmp_path / "run")] == pytest.approx([2.5e-4, 5e-4])


def group(ranks, margin=0.0, reward=None, tokens=3):
    mask = torch.tensor([False] + [True] * tokens).numpy()
    row = {"input_ids": torch.arange(1, tokens + 2).numpy(), "completion_mask": mask}
    return PreferenceGroup([row] * len(ranks), ranks, margin, reward, "made", "made:1")


@pytest.mark.parametrize("K", [2, 3, 5])
def test_an_element_costs_the_mean_over_its_pairs_in_a_loop(K, compose):
    cfg = compose("train_rm", "policy=x", "data.train=[x]", "center_coef=0.01")
    torch.manual_seed(0)
    scores, ranks = torch.randn(2 * K, dtype=torch.float64), [0.0, 1.0, 1.0, 2.0, 3.0][:K]
    loss, _ = group_loss(scores, [group(ranks), group(ranks)], cfg, torch.tensor(2.0))
    total = 0.0
    for values in (scores[:K].tolist(), scores[K:].tolist()):
        for i, j in itertools.combinations(range(K), 2):
            d = values[i] - values[j]
            tie = (math.log1p(math.exp(-d)) + math.log1p(math.exp(d))) / 2
            nll = tie if ranks[i] == ranks[j] else math.log1p(math.exp(-d))
            total += (nll + 0.01 * (values[i] + values[j]) ** 2) / math.comb(K, 2)
    assert loss.item() == pytest.approx(total / 2, abs=1e-6)


def test_margins_come_from_the_record_times_their_coefficient():
    _, _, weights, margins, ties = group_pairs([group([0.0, 1.0], margin=3.0)], 0.5, "cpu")
    assert weights.tolist() == [1.0] and margins.tolist() == [1.5] and ties.tolist() == [False]


def test_a_ranking_as_one_element_equals_its_pairs_one_by_one(inputs):
    """InstructGPT's K forwards give the loss and gradient of C(K, 2) separate comparisons."""
    model = load_reward_model(inputs / "policy", precision="fp32", seed=3)
    prompt, answers = [5, 6, 7, 8], [[9, 10], [11], [12, 13, 14]]
    rows = [{"input_ids": prompt + a, "completion_mask": [False] * 4 + [True] * len(a)} for a in answers]
    better, worse, weights, margins, ties = group_pairs(
        [PreferenceGroup(rows, [0, 1, 2], 0.0, None, "", "")], 1.0, "cpu"
    )

    def gradient(scores_of_pairs):
        model.zero_grad()
        chosen, rejected = scores_of_pairs()
        loss, _ = train_rm.reward_loss(chosen, rejected, weights, margins, ties, center_coef=0.0, num_groups=1)
        loss.backward()
        return loss.item(), model.head.weight.grad.clone(), model.transformer.embed.weight.grad.clone()

    def at_once():
        scores = model.score(*make_rows(rows, 0))
        return scores[better], scores[worse]

    def one_by_one():
        pairs = [model.score(*make_rows([rows[i], rows[j]], 0)) for i, j in itertools.combinations(range(3), 2)]
        return torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])

    for one, many in zip(gradient(at_once), gradient(one_by_one), strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(many), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["pairs", "ranked", "rated"])
def test_every_kind_of_judgement_trains_and_is_measured(rm, inputs, tmp_path, read_metrics, kind):
    assert rm(f"data.train=[{inputs}/{kind}.jsonl]", f"data.eval=[{inputs}/{kind}.jsonl]") == 0
    first, *_, last = read_metrics(tmp_path / "run")
    main = {"eval/auc"} if kind == "rated" else {"eval/accuracy", "eval/accuracy_lower", "eval/accuracy_upper"}
    assert main | {"eval/loss", "eval/score_length_correlation"} <= set(first) & set(last)
    assert {"objective/loss", "rewards/accuracy", "optim/grad_norm"} <= set(last)
    assert (tmp_path / "run" / "calibration.png").stat().st_size > 1000
    load_reward_model(tmp_path / "run" / "model", precision="fp32")


def test_law_1_the_micro_batch_size_changes_nothing(rm, tmp_path, inputs, read_metrics):
    for size in (1, 4):
        assert rm(f"micro_batch_size={size}", f"data.train=[{inputs}/ranked.jsonl]", "data.eval=[]", run=str(size)) == 0
    for one, four in zip(read_metrics(tmp_path / "1"), read_metrics(tmp_path / "4"), strict=True):
        for name in one:
            assert one[name] == pytest.approx(four[name], rel=1e-3, abs=1e-5), name


def test_law_7_resumed_equals_uninterrupted(rm, tmp_path, read_metrics):
    words = ["num_steps=4", "optim.schedule=constant", "save_every=1", "eval_every=2", "data.eval=[]"]
    assert rm(*words, run="whole") == 0
    assert rm(*words, "num_steps=2", run="parts") == 0
    assert rm(*words, "resume=true", run="parts") == 0
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "parts")
    whole, parts = (load_reward_model(tmp_path / run / "model", precision="fp32") for run in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["reference_mean", "gain_bias"])
def test_normalisation_is_stored_with_the_model(rm, inputs, tmp_path, kind, capsys):
    assert rm("data.eval=[]", run="plain") == 0
    assert rm(f"normalise={kind}", "data.eval=[]", "normalise_samples=8") == 0
    assert f"normalise={kind}: " in capsys.readouterr().out
    plain, model = (load_reward_model(tmp_path / run / "model", precision="fp32") for run in ("plain", "run"))
    gain = (model.head.weight / plain.head.weight).mean()
    torch.testing.assert_close(model.head.weight, plain.head.weight * gain)
    assert model.head.bias != plain.head.bias * gain
    assert ((gain - 1).abs() > 1e-3) == (kind == "gain_bias")


@pytest.mark.parametrize("kind", ["reference_mean", "gain_bias"])
def test_normalised_scores_have_mean_0_and_gain_bias_also_deviation_1(inputs, kind, monkeypatch):
    """Whatever gain and shift the model came with."""
    model = load_reward_model(inputs / "policy", precision="fp32", seed=3)
    model.gain.fill_(2.0), model.shift.fill_(0.5)
    rows = [{"input_ids": [5, 6 + i, 9, 7 + 3 * i], "completion_mask": [False, True, True, True]} for i in range(6)]
    groups = [PreferenceGroup([row], [0.0], 0.0, 1.0, "made", "made:1") for row in rows]
    monkeypatch.setattr(train_rm, "policy_samples", lambda *args: rows)
    cfg = OmegaConf.create({"normalise": kind, "normalise_samples": 6, "micro_batch_size": 4})
    run = SimpleNamespace(device="cpu", terminal=SimpleNamespace(say=print))
    before = model.score(*make_rows(rows, 0))
    train_rm.normalise(cfg, run, model, SimpleNamespace(pad_id=0), groups)
    scores = model.score(*make_rows(rows, 0))
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    wanted = 1.0 if kind == "gain_bias" else before.std(correction=0).item()
    assert scores.std(correction=0).item() == pytest.approx(wanted, rel=1e-4)


def test_margins_are_learned_only_where_asked_for(rm, inputs, tmp_path, read_metrics):
    """Pairs of make_data.py carry the gap of their scores."""
    rows = read_package_rows("pref_hh_helpful_train.jsonl.gz", 24)
    write(tmp_path / "gaps.jsonl", [row | {"margin": 5.0} for row in rows])
    words = [f"data.train=[{tmp_path}/gaps.jsonl]", "data.eval=[]", "num_steps=1"]
    assert rm("data.eval=[]", "num_steps=1", run="plain") == 0
    for margin_coef in (0, 1):
        assert rm(*words, *([f"margin_coef={margin_coef}"] if margin_coef else []), run=str(margin_coef)) == 0
    plain, without, learned = (read_metrics(tmp_path / run)[0]["objective/loss"] for run in ("plain", "0", "1"))
    assert without == plain
    assert learned > plain + 3


@pytest.mark.parametrize("kind", ["pairs", "ranked", "rated"])
def test_the_held_out_loss_is_what_training_lowers(rm, inputs, tmp_path, read_metrics, kind):
    """The same elements, before a step: one number by both ways, with everything that the objective holds."""
    rows = [json.loads(line) for line in (inputs / f"{kind}.jsonl").read_text().splitlines()]
    write(
        tmp_path / "own.jsonl", [row | ({"margin": 0.5 * i} if kind == "pairs" else {}) for i, row in enumerate(rows)]
    )
    files = [f"data.{name}=[{tmp_path}/own.jsonl]" for name in ("train", "eval")]
    words = ["center_coef=0.3", "num_steps=1", "batch_size=24", "micro_batch_size=8", "eval_every=1"]
    assert rm(*files, *words, f"margin_coef={float(kind == 'pairs')}") == 0
    before, after = read_metrics(tmp_path / "run")
    assert before["eval/loss"] == pytest.approx(after["objective/loss"], rel=1e-5)


def test_normalising_without_a_liked_completion_is_refused_before_the_training(rm, inputs, tmp_path, capsys):
    rows = [json.loads(line) | {"reward": 0.5 * (i % 2)} for i, line in enumerate((inputs / "rated.jsonl").open())]
    write(tmp_path / "bad.jsonl", rows)
    assert rm("normalise=reference_mean", f"data.train=[{tmp_path}/bad.jsonl]", "data.eval=[]") == 2
    assert "none of the 24 ratings is above 0.5" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_fails_after_the_training_does_not_lose_the_model(rm, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("the disk, the plot, anything")

    monkeypatch.setattr(train_rm, "normalise", fail)
    with pytest.raises(RuntimeError):
        rm("data.eval=[]")
    assert load_reward_model(tmp_path / "run" / "model", precision="fp32").shift == 0  # it is there


# ---- figures


def test_accuracy_and_its_interval_are_statsmodels_wilson():
    pytest.importorskip("statsmodels")
    groups = [group([0.0, 1.0]) for _ in range(10)] + [group([0.0, 0.0])]  # the tie does not count
    scores = [torch.tensor([1.0, 0.0]).numpy()] * 8 + [torch.tensor([0.0, 1.0]).numpy()] * 3
    figures = evaluate_reward_model(groups, scores, plot=None)
    assert figures["eval/accuracy"] == pytest.approx(0.8)
    z, p, n = 1.959963984540054, 0.8, 10
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert figures["eval/accuracy_lower"] == pytest.approx((middle - half) / (1 + z * z / n))
    assert figures["eval/accuracy_upper"] == pytest.approx((middle + half) / (1 + z * z / n))
    assert figures["eval/pairs/made"] == 10 and figures["eval/pairs/1-32 tokens"] == 10


def test_auc_is_the_share_of_good_above_bad():
    pytest.importorskip("sklearn")
    scores = [0.1, 0.4, 0.35, 0.8]
    groups = [group([0.0], reward=y) for y in (0.0, 0.0, 1.0, 1.0)]
    figures = evaluate_reward_model(groups, [torch.tensor([s]).numpy() for s in scores], plot=None)
    assert figures["eval/auc"] == pytest.approx(0.75)
    assert figures["eval/auc_lower"] <= 0.75 <= figures["eval/auc_upper"]


def test_calibration_bins_hold_everything_once():
    predicted, observed = torch.linspace(0, 1, 101).numpy(), (torch.linspace(0, 1, 101) > 0.5).numpy()
    table = calibration(predicted, observed, bins=10)
    assert sum(row["n"] for row in table) == 101
    assert sum(row["n"] * row["observed"] for row in table) == pytest.approx(50)


def test_small_rules():
    assert decided_pairs([0, 1, 1]) == [(0, 1), (0, 2)]
    assert [length_bucket(n) for n in (1, 32, 33, 513)] == [
        "1-32 tokens",
        "1-32 tokens",
        "33-128 tokens",
        "over 512 tokens",
    ]


# ---- refusals


@pytest.mark.parametrize(
    "words, message",
    [
        (["policy=null"], "give exactly one"),
        (["normalise=gain_bias", "policy=null", "model=tiny"], "normalise=gain_bias"),
        (["normalise=mean"], "normalise='mean'"),
        (["normalise=gain_bias", "sampling.max_new_tokens=160"], "no room for a prompt"),
        (["data.eval=[{home}/rated.jsonl]"], "differ in kind"),
        (["data.train=[{home}/pairs.jsonl,{home}/rated.jsonl]"], "different losses"),
        (["data.train=[{home}/rated.jsonl]", "data.eval=[{home}/good.jsonl]"], "all 12 ratings lie on one side"),
        (["batch_size=5"], "batch_size=5"),
        (["margin_coef=-1"], "margin_coef"),
        (["center_coef=nan"], "center_coef=nan"),
        (["normalise_samples=0.5"], "normalise_samples=0.5"),
    ],
)
def test_bad_input_is_refused_by_name_with_exit_code_2(rm, inputs, capsys, tmp_path, words, message):
    assert rm(*[word.format(home=inputs) for word in words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
