"""train_dpo.py on real pairs with a tiny model: the laws of its loop, every loss, and what it refuses."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_dpo
from data import formats
from data.chat import encode_completions
from data.preference_batch import mismatched
from data.preferences import PreferenceGroup
from data.tokenizer import load_tokenizer, train_sentencepiece
from model.build import export_model, load_policy, new_policy
from model.ref_cache import row_key
from tests.tiny_models import shaken, tiny_config

EMBEDDED = Path(__file__).parents[1] / "data" / "embedded"
LOSSES = ["ipo", "simpo", "orpo", "kto", "plackett_luce"]  # of each way to a loss, one


def read_package_rows(name, count):
    with gzip.open(EMBEDDED / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for _, line in zip(range(count), file, strict=False)]


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A tiny policy with a tokenizer of its own, and small files of real pairs, rankings and ratings."""
    home = tmp_path_factory.mktemp("dpo")
    pairs = read_package_rows("pref_hh_helpful_train.jsonl.gz", 24)
    rated = read_package_rows("reward_movie_train.jsonl.gz", 16)
    texts = [text for row in pairs for text in (row["chosen"], row["rejected"])]
    tokenizer = train_sentencepiece(texts, 400, home / "tokenizer")
    config = tiny_config(vocab_size=tokenizer.vocab_size, max_length=128)
    export_model(shaken(new_policy(config, seed=0)), home / "policy", tokenizer)
    other = train_sentencepiece(texts, 420, home / "other_tokenizer")
    export_model(new_policy(tiny_config(vocab_size=420, max_length=128), seed=1), home / "other", other)
    write(home / "train.jsonl", pairs[:16])
    write(home / "eval.jsonl", pairs[16:])
    write(home / "rated.jsonl", [row | {"reward": float(i % 2)} for i, row in enumerate(rated)])
    ranked = [
        {
            "prompt": row["prompt"],
            "completions": [row["chosen"], row["rejected"], "Yes.", "No."][: 2 + i % 3],
            "ranks": [0, 2, 1, 1][: 2 + i % 3],
        }
        for i, row in enumerate(pairs)
    ]
    write(home / "ranked.jsonl", ranked)
    return home


@pytest.fixture
def dpo(run_script, inputs, tmp_path):
    """dpo(*words, run="run") -> exit code; 3 steps of 4 pairs unless the words say otherwise."""

    def dpo(*words, run="run"):
        given = {word.split("=")[0] for word in words}
        defaults = [
            f"policy={inputs / 'policy'}", f"data.train=[{inputs / 'train.jsonl'}]", "data.max_length=96",
            "data.max_prompt_length=48", "num_steps=3", "batch_size=4", "micro_batch_size=2", "eval_every=0",
            "sample_every=0", "save_every=0", "optim.lr=1e-3", "optim.warmup_steps=0", "log.wandb=disabled",
            f"ref_cache={inputs / 'cache'}", "sampling.max_new_tokens=6", "num_prompts=4", "num_samples=2",
        ]  # fmt: skip
        kept = [word for word in defaults if word.split("=")[0] not in given]
        return run_script(train_dpo, f"hydra.run.dir={tmp_path / run}", *kept, *words)

    return dpo


@pytest.fixture
def weights(tmp_path):
    return lambda run="run": load_file(tmp_path / run / "model" / "model.safetensors")


@pytest.mark.parametrize("words", [["ref=live", "precision=bf16"], ["average_logprobs=true"]])
def test_the_first_loss_is_ln_2_in_bf16_and_per_token_too(dpo, tmp_path, read_metrics, words):
    assert dpo(*words, "num_steps=1", "beta=1") == 0
    assert read_metrics(tmp_path / "run")[0]["objective/loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_first_loss_is_ln_2_and_a_cached_reference_is_a_live_one(dpo, tmp_path, read_metrics, weights):
    for ref in ("cached", "live"):
        assert dpo(f"ref={ref}", run=ref) == 0
    cached, live = (read_metrics(tmp_path / ref) for ref in ("cached", "live"))
    assert cached[0]["objective/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert live[0]["objective/loss"] == pytest.approx(math.log(2), abs=1e-6)
    for one, two in zip(cached, live, strict=True):
        assert one == pytest.approx(two, abs=1e-5)
    for name, tensor in weights("cached").items():
        assert torch.allclose(tensor, weights("live")[name], atol=1e-6), name


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_do_not_change_the_step(dpo, inputs, loss, weights, tmp_path, read_metrics):
    words = [f"loss={loss}", "num_steps=1", "optim.lr=1e-2", "nll_coef=0.5", "optim.eps=1e-3"]
    if loss == "plackett_luce":
        words.append(f"data.train=[{inputs / 'ranked.jsonl'}]")
    for size in (1, 4):
        assert dpo(*words, f"micro_batch_size={size}", run=f"by{size}") == 0
    one, four = (read_metrics(tmp_path / f"by{size}")[0] for size in (1, 4))
    assert one == pytest.approx(four, rel=2e-4, abs=2e-5)
    for name, tensor in weights("by1").items():
        assert torch.allclose(tensor, weights("by4")[name], atol=2e-5), name


def test_the_nll_term_is_that_of_the_chosen_completions_per_token(dpo, inputs, tmp_path, read_metrics):
    assert dpo("nll_coef=0.5", "num_steps=1", "batch_size=16", "micro_batch_size=8") == 0
    (row,) = read_metrics(tmp_path / "run")
    tokenizer, cut = load_tokenizer(inputs / "policy"), {"max_length": 96, "max_prompt_length": 48}
    records = [record for line in read_lines(inputs / "train.jsonl") for record in formats.preferences(line)]
    pairs = [encode_completions(r.prompt, [r.chosen, r.rejected], tokenizer, **cut) for r in records]
    num_tokens = sum(sum(chosen["completion_mask"]) for chosen, _ in pairs)
    nll = -row["logprobs/chosen"] * len(pairs) / num_tokens
    assert row["objective/loss"] == pytest.approx(math.log(2) + 0.5 * nll, rel=1e-5)


def test_training_raises_the_margin_of_the_pairs_it_sees(dpo, tmp_path, read_metrics):
    assert dpo("num_steps=12", "batch_size=16", "micro_batch_size=8", "optim.lr=3e-3") == 0
    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["rewards/accuracy"] > 0.9
    assert rows[-1]["rewards/margin"] > rows[1]["rewards/margin"] > 0
    assert rows[-1]["objective/loss"] < 0.6


def test_interrupted_and_resumed_is_uninterrupted(dpo, weights, inputs):
    words = [f"data.eval=[{inputs / 'eval.jsonl'}]", "save_every=2", "eval_every=2", "optim.schedule=constant"]
    assert dpo(*words, "num_steps=4", run="whole") == 0
    assert dpo(*words, "num_steps=2", run="halves") == 0
    assert dpo(*words, "num_steps=4", "resume=true", run="halves") == 0
    for name, tensor in weights("whole").items():
        assert torch.equal(tensor, weights("halves")[name]), name


def test_survey_and_evaluation_begin_at_the_reference(dpo, inputs, tmp_path, read_metrics):
    assert dpo(f"data.eval=[{inputs / 'eval.jsonl'}]", "eval_every=3", "sample_every=3", "optim.lr=1e-2") == 0
    before, *_, after = read_metrics(tmp_path / "run")
    assert before["step"] == 0 and before["objective/kl"] == pytest.approx(0, abs=1e-6)
    assert before["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert after["objective/kl"] > 0.01
    assert {"eval/accuracy", "eval/margin", "eval/chosen", "eval/rejected", "logprobs/chosen"} <= after.keys()
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [0, 0, 3, 3]
    assert samples[0]["prompt"] == samples[2]["prompt"] and samples[0]["reference"]


@pytest.mark.parametrize("loss, file", [("kto", "rated"), ("kto", "train"), ("plackett_luce", "ranked")])
def test_single_rated_rows_and_rankings_train(dpo, inputs, tmp_path, read_metrics, loss, file):
    data = inputs / f"{file}.jsonl"
    words = [f"data.train=[{data}]", f"data.eval=[{data}]", "eval_every=3", "data.max_prompt_length=32"]
    assert dpo(f"loss={loss}", *words, "optim.lr=1e-2", "batch_size=8", "beta=0.5") == 0
    before, *_, after = read_metrics(tmp_path / "run")
    assert after["eval/loss"] < before["eval/loss"] - 0.01
    assert after["eval/chosen"] > after["eval/rejected"]
    if loss == "kto":
        assert before["eval/loss"] == pytest.approx(0.5, abs=1e-6)


def group(prompt, *completions):
    rows = [
        {"input_ids": np.array(prompt + c), "completion_mask": np.arange(len(prompt + c)) >= len(prompt)}
        for c in completions
    ]
    return PreferenceGroup(rows, list(range(len(rows))), 0.0, None, "file", "file:1")


def test_mismatched_rows_keep_the_prompt_and_take_another_prompts_completion():
    groups = [group([1, 2], [10], [11]), group([1, 2], [12], [13]), group([3], [20, 21], [22])]
    kl_rows = mismatched(groups, max_length=1000)
    got = [kl_rows[row_key(row)]["input_ids"] for e in groups for row in e.rows]
    assert got == [[1, 2, 20, 21], [1, 2, 22], [1, 2, 20, 21], [1, 2, 22], [3, 12], [3, 13]]
    assert mismatched(groups, max_length=3)[row_key(groups[0].rows[0])]["input_ids"] == [1, 2, 20]
    with pytest.raises(ValueError, match="same prompt"):
        mismatched(groups[:2], max_length=1000)


@pytest.mark.parametrize("sizes", [[2] * 8, [1] * 16, [4, 2, 6, 2], [2, 1, 3, 1, 1]])
def test_every_completion_is_the_partner_of_one_row_so_good_and_bad_are_alike(sizes):
    """Rows of a prompt good first, as pairs lie, or a file of ratings made from pairs."""
    rows = [(prompt, [100 + 10 * prompt + k]) for prompt, size in enumerate(sizes) for k in range(size)]
    groups = [group([prompt], completion) for prompt, completion in rows]
    kl_rows = mismatched(groups, max_length=1000)
    got = [kl_rows[row_key(e.rows[0])]["input_ids"] for e in groups]
    assert [ids[0] for ids in got] == [prompt for prompt, _ in rows]  # each its own prompt
    assert sorted(ids[1] for ids in got) == sorted(c for _, (c,) in rows)  # each completion once
    assert all(ids[1] // 10 - 10 != ids[0] for ids in got)  # of another prompt


def mean_log_ratio(policy, ref_policy, rows, per_token):
    """Of rows (prompt ids, completion ids), one at a time: no padding, no batch."""
    ratios = []
    for prompt, completion in rows:
        ids = torch.tensor([[*prompt, *completion]])
        batch = (ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(ids.shape[1])[None] >= len(prompt))
        with torch.no_grad():
            ratio = (policy.logprobs(*batch) - ref_policy.logprobs(*batch)).sum().item()
        ratios.append(ratio / len(completion) if per_token else ratio)
    return sum(ratios) / len(ratios)


@pytest.mark.parametrize("per_token", [False, True])
def test_ktos_reference_point_is_the_mean_ratio_over_all_completions_beside_other_prompts(
    dpo, inputs, tmp_path, read_metrics, per_token
):
    """Through the whole command: half of them chosen, half rejected, in the unit of the rewards."""
    near = shaken(load_policy(inputs / "policy"))
    export_model(near, tmp_path / "near", load_tokenizer(inputs / "policy"))
    words = [
        "loss=kto",
        f"average_logprobs={per_token}",
        "num_steps=1",
        "batch_size=16",
        f"ref_policy={tmp_path / 'near'}",
    ]
    for ref in ("cached", "live"):
        assert dpo(*words, f"ref={ref}", run=ref) == 0
    cut = {"max_length": 96, "max_prompt_length": 48}
    tokenizer = load_tokenizer(inputs / "policy")
    records = [record for line in read_lines(inputs / "train.jsonl") for record in formats.preferences(line)]
    pairs = [encode_completions(r.prompt, [r.chosen, r.rejected], tokenizer, **cut) for r in records]
    split = [
        (ids[:start], ids[start:])
        for pair in pairs
        for row in pair
        for ids, start in [(list(row["input_ids"]), row["completion_mask"].index(True))]
    ]
    rows = [(split[i][0], split[(i + 2) % len(split)][1][: 96 - len(split[i][0])]) for i in range(len(split))]
    expected = max(0.0, mean_log_ratio(load_policy(inputs / "policy"), near, rows, per_token))
    for ref in ("cached", "live"):
        (row,) = read_metrics(tmp_path / ref)
        assert row["objective/reference_point"] == pytest.approx(expected, rel=1e-3) and expected > 0


def test_ktos_reference_point_is_never_below_zero(dpo, inputs, tmp_path, read_metrics):
    """The policy far from a reference that likes the data: the mean ratio is negative, the reference point 0."""
    export_model(shaken(load_policy(inputs / "policy")), tmp_path / "far", load_tokenizer(inputs / "policy"))
    words = [
        "loss=kto",
        "num_steps=1",
        "batch_size=16",
        f"policy={tmp_path / 'far'}",
        f"ref_policy={inputs / 'policy'}",
    ]
    assert dpo(*words) == 0
    (row,) = read_metrics(tmp_path / "run")
    assert row["objective/reference_point"] == 0.0
    assert row["rewards/chosen"] < 0 and row["rewards/rejected"] < 0  # the completions' own ratios are: none is clamped


def test_log_probs_per_token_are_over_completion_tokens_alone(dpo, inputs, tmp_path, read_metrics):
    """SimPO through the whole command, its value by hand from rows read one at a time."""
    assert dpo("loss=simpo", "num_steps=1", "batch_size=16", "beta=2", "target_margin=0.5") == 0
    (row,) = read_metrics(tmp_path / "run")
    policy, tokenizer = load_policy(inputs / "policy"), load_tokenizer(inputs / "policy")
    records = [record for line in read_lines(inputs / "train.jsonl") for record in formats.preferences(line)]
    total, cut = 0.0, {"max_length": 96, "max_prompt_length": 48}
    for r in records:
        means = []
        for encoded in encode_completions(r.prompt, [r.chosen, r.rejected], tokenizer, **cut):
            ids, mask = torch.tensor([encoded["input_ids"]]), torch.tensor([encoded["completion_mask"]])
            with torch.no_grad():
                means.append(policy.logprobs(ids, torch.ones_like(mask), mask).sum().item() / mask.sum().item())
        total += math.log1p(math.exp(-(2 * (means[0] - means[1]) - 0.5)))
    assert row["objective/loss"] == pytest.approx(total / len(records), rel=1e-4)


def test_the_first_step_is_taken_at_the_first_rate_of_the_warm_up(dpo, inputs, weights):
    """AdamW's first step moves a weight by the rate: a quarter of optim.lr where the warm-up has four steps."""
    assert dpo("num_steps=1", "optim.lr=1e-2", "optim.warmup_steps=4", "optim.eps=1e-12") == 0
    before = load_file(inputs / "policy" / "model.safetensors")
    moved = max((tensor - before[name]).abs().max().item() for name, tensor in weights().items())
    assert moved == pytest.approx(2.5e-3, rel=1e-2)


@pytest.mark.parametrize("loss, nll_coef", [("orpo", 1.0), ("cpo", 0.7), ("dpo", 0.3)])
def test_the_held_out_loss_is_what_training_lowers(dpo, inputs, tmp_path, read_metrics, loss, nll_coef):
    """The same pairs, in parts of other sizes, before a step: one number by both ways."""
    words = [f"loss={loss}", f"nll_coef={nll_coef}", "num_steps=1", "batch_size=16", "eval_every=1"]
    assert dpo(*words, f"data.eval=[{inputs / 'train.jsonl'}]", "micro_batch_size=8") == 0
    before, after = read_metrics(tmp_path / "run")
    assert before["eval/loss"] == pytest.approx(after["objective/loss"], rel=1e-5)
    assert before["eval/loss"] > nll_coef  # the NLL is there: above 1 nat per token from random weights


def test_rows_with_a_label_are_rated_rows(dpo, inputs, tmp_path, read_metrics):
    """As KTO's published sets have them: label true or false in the place of a reward."""
    rows = [{"prompt": f"Name {i}.", "completion": f"Word {i * i}.", "reward": float(i % 2)} for i in range(8)]
    labelled = [{k: v for k, v in row.items() if k != "reward"} | {"label": bool(row["reward"])} for row in rows]
    for name, written in (("reward", rows), ("label", labelled)):
        assert dpo("loss=kto", f"data.train=[{write(tmp_path / f'{name}.jsonl', written)}]", run=name) == 0
    assert read_metrics(tmp_path / "reward") == read_metrics(tmp_path / "label")


def test_margins_of_the_pairs_are_the_target(dpo, inputs, tmp_path, read_metrics):
    """Before anything is learned a pair's loss is -log sigmoid(-(target_margin + margin_coef * its margin))."""
    rows = [row | {"margin": float(i % 3)} for i, row in enumerate(read_lines(inputs / "train.jsonl"))]
    file = write(tmp_path / "margins.jsonl", rows)
    words = ["margin_coef=0.5", "target_margin=0.25", f"data.train=[{file}]", "batch_size=16", "num_steps=1"]
    assert dpo(*words) == 0
    expected = sum(math.log1p(math.exp(0.25 + 0.5 * row["margin"])) for row in rows) / len(rows)
    assert read_metrics(tmp_path / "run")[0]["objective/loss"] == pytest.approx(expected, abs=1e-6)


def test_ranks_that_begin_at_1_spell_the_same_ranking(dpo, inputs, tmp_path, read_metrics):
    rows = read_lines(inputs / "ranked.jsonl")
    from_one = [row | {"ranks": [rank + 1 for rank in row["ranks"]]} for row in rows]
    for name, written in (("zero", rows), ("one", from_one)):
        file = write(tmp_path / f"{name}.jsonl", written)
        assert dpo("loss=plackett_luce", "nll_coef=1", "num_steps=1", f"data.train=[{file}]", run=name) == 0
    assert read_metrics(tmp_path / "one") == read_metrics(tmp_path / "zero")


def test_a_held_out_row_of_the_other_kind_does_not_make_one_class_two(dpo, inputs, tmp_path, capsys):
    rated = read_lines(inputs / "rated.jsonl")
    good = write(tmp_path / "good.jsonl", [row | {"reward": 1.0} for row in rated])
    assert dpo("loss=kto", f"data.train=[{good}]", f"data.eval=[{inputs / 'rated.jsonl'}]") == 2
    assert "all 16 are rated good" in capsys.readouterr().err


def test_pairs_of_which_none_spells_a_ranking_are_refused_where_rankings_are_asked_for(dpo, tmp_path, capsys):
    """As make_data.py leaves them where method.min_margin drops close ones: A over B and over C, nothing of B and C."""
    rows = [
        {"prompt": f"Name {i}.", "chosen": "Good.", "rejected": text} for i in range(4) for text in ("Bad.", "So so.")
    ]
    file = write(tmp_path / "pairs.jsonl", rows)
    assert dpo("loss=plackett_luce", f"data.train=[{file}]", "num_steps=1") == 2
    assert (
        "pairs.jsonl: data.kwise=true makes rankings of pairs, but for none of the 4 prompts" in capsys.readouterr().err
    )
    two_sided = [row | {"prompt": f"{row['prompt']} {row['rejected']}"} for row in rows]
    assert dpo("loss=plackett_luce", f"data.train=[{write(file, two_sided + rows[:2])}]", "num_steps=1", run="two") == 0
    rows.append({"prompt": "Name 0.", "chosen": "So so.", "rejected": "Bad."})
    assert dpo("loss=plackett_luce", f"data.train=[{write(file, rows)}]", "num_steps=1") == 0


def test_kto_refuses_one_class_and_ratings_that_say_neither(dpo, inputs, tmp_path, capsys):
    rated = read_lines(inputs / "rated.jsonl")
    for reward, says in (
        (1.0, "all 16 are rated good"),
        (0.0, "all 16 are rated bad"),
        (0.5, "rated completion (0.5)"),
    ):
        path = write(tmp_path / "one.jsonl", [row | {"reward": reward} for row in rated])
        assert dpo("loss=kto", f"data.train=[{path}]") == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, says",
    [
        (["margin_coef=1"], "no row of data.train has a margin"),
        (["margin_coef=1", "data.kwise=true"], "makes rankings of pairs"),
    ],
)
def test_margins_that_are_not_there_are_not_learned_in_silence(dpo, words, says, capsys):
    assert dpo(*words) == 2
    assert says in capsys.readouterr().err


GOOD = {"prompt": "Name a colour.", "chosen": "Blue is a colour.", "rejected": "Seven."}
BAD_ROWS = {
    "answer different prompts": {
        "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}],
        "rejected": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "y"}],
    },
    "identical": GOOD | {"rejected": GOOD["chosen"]},
    "rejected is empty": GOOD | {"rejected": " "},
    "a tie": GOOD | {"tie": True},
    "3 completions": {"prompt": "Count.", "completions": ["one", "two", "three"], "ranks": [0, 1, 2]},
    "a rated completion": {"prompt": "Count.", "completion": "one", "reward": 1.0},
}


@pytest.mark.parametrize("says", BAD_ROWS)
def test_a_row_that_is_no_pair_is_refused_by_file_and_line(dpo, tmp_path, capsys, says):
    rows = [BAD_ROWS[says]] if "rated" in says else [GOOD, BAD_ROWS[says]]
    path = write(tmp_path / "bad.jsonl", rows)
    assert dpo(f"data.train=[{path}]") == 2
    error = capsys.readouterr().err
    assert says in error and f"bad.jsonl:{len(rows)}" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words, says",
    [
        (["beta=0"], "beta"),
        (["loss=cdpo", "label_smoothing=0.5"], "label_smoothing"),
        (["loss=nonsense"], "nonsense"),
        (["beta=nan"], "beta=nan"),
        (["nll_coef=some"], "nll_coef=some must be a finite number"),
        (["loss=ipo", "label_smoothing=0.1"], "loss=ipo has no label_smoothing"),
        (["loss=simpo", "ref=cached"], "ref=none"),
        (["loss=orpo", "average_logprobs=false"], "per token"),
        (["ref=never"], "cached, live, none"),
        (["data.max_length=30", "data.max_prompt_length=30"], "max_length"),
        (["batch_size=3"], "micro_batch_size"),
        (["sample_every=1", "sampling.max_new_tokens=500"], "sampling.max_new_tokens"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_before_anything_is_written(dpo, tmp_path, capsys, words, says):
    assert dpo(*words) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_reference_of_another_vocabulary_is_refused(dpo, inputs, capsys):
    for ref in ("cached", "live"):
        assert dpo(f"ref_policy={inputs / 'other'}", f"ref={ref}") == 2
        assert "another vocabulary" in capsys.readouterr().err


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_cached_reference_computes_the_rows_that_the_run_reads_and_no_others(
    dpo, inputs, tmp_path, monkeypatch, loss
):
    """Three pairs of sixteen a step, two steps; with evaluation, the held-out ones too; a longer run adds the rest."""
    seen, total = [], train_dpo.total_logprobs
    monkeypatch.setattr(
        train_dpo, "total_logprobs", lambda policy, rows: seen.append(len(rows[0])) or total(policy, rows)
    )
    words = [f"loss={loss}", "batch_size=3", "micro_batch_size=3", f"ref_cache={tmp_path / 'cache'}"]

    def computed():
        return sum(len(load_file(path)["logprobs"]) for path in (tmp_path / "cache").rglob("*.safetensors"))

    per_pair = {"dpo": 2, "kto": 4}[loss]  # KTO's rows have a partner each
    assert dpo(*words, "num_steps=2", run="short") == 0
    assert computed() == 6 * per_pair
    assert dpo(*words, "num_steps=2", "eval_every=2", f"data.eval=[{inputs / 'eval.jsonl'}]", run="eval") == 0
    assert computed() == (6 + 8) * per_pair
    seen.clear()
    assert dpo(*words, "num_steps=6", "optim.lr=1e-9", run="long") == 0
    assert computed() == (16 + 8) * per_pair


def test_a_damaged_cache_is_named_and_a_changed_policy_does_not_find_it(dpo, inputs, tmp_path, capsys, read_metrics):
    words = [f"ref_cache={tmp_path / 'cache'}", "num_steps=1"]
    assert dpo(*words) == 0
    path = next((tmp_path / "cache").rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-4] + b"oops")
    assert dpo(*words, run="again") == 2
    assert str(path) in capsys.readouterr().err
    assert dpo(*words, f"policy={tmp_path / 'run' / 'model'}", run="next") == 0  # trained by now: other weights
    assert read_metrics(tmp_path / "next")[0]["objective/loss"] == pytest.approx(math.log(2), abs=1e-6)
