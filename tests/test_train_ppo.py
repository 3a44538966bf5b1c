"""train_ppo.py on real prompts with a tiny model: the laws of its loop, every variant, and what it refuses."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_ppo
from data.tokenizer import load_tokenizer, train_sentencepiece
from model.build import export_model, load_policy, new_policy, new_reward_model
from rollouts.trajectory import Episode, make_trajectory
from tests.tiny_models import shaken, tiny_config

EMBEDDED = Path(__file__).parents[1] / "data" / "embedded"
REWARDS = """
def length(prompts, completions):
    return [float(len(c)) for c in completions]

def constant(prompts, completions):
    return [0.5] * len(prompts)

def raises(prompts, completions):
    raise RuntimeError("no verdict")

def short(prompts, completions, id):
    return [0.0] * (len(id) - 1)
"""


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A tiny policy, a reward model with its tokenizer and one with another, prompts, reward functions."""
    home = tmp_path_factory.mktemp("ppo")
    with gzip.open(EMBEDDED / "sft_coffee_train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(24), file, strict=False)]
    rows = [row | {"messages": row["messages"][:2]} for row in rows]
    texts = [message["content"] for row in rows for message in row["messages"]]
    tokenizer = train_sentencepiece(texts, 400, home / "tokenizer")
    config = tiny_config(vocab_size=tokenizer.vocab_size, max_length=128)
    export_model(shaken(new_policy(config, seed=0)), home / "policy", tokenizer)
    export_model(shaken(new_reward_model(config, seed=1, precision="fp32")), home / "rm", tokenizer)
    broken = new_reward_model(config, seed=1, precision="fp32")
    torch.nn.init.constant_(broken.head.bias, float("nan"))
    export_model(broken, home / "nan_rm", tokenizer)
    other = train_sentencepiece(texts, 420, home / "other_tokenizer")
    small = tiny_config(vocab_size=420, max_length=128)
    export_model(new_reward_model(small, seed=1, precision="fp32"), home / "other_rm", other)
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (home / "rewards.py").write_text(REWARDS)
    return home


@pytest.fixture
def ppo(run_script, inputs, tmp_path):
    """ppo(*words, run="run") -> exit code; 2 rollouts of 8 prompts unless the words say otherwise."""

    def ppo(*words, run="run"):
        defaults = {
            "policy": inputs / "policy", "reward_model": inputs / "rm", "data.prompts": f"[{inputs}/rows.jsonl]",
            "num_steps": 2, "batch_size": 8, "minibatch_size": 4, "micro_batch_size": 2, "sampling.max_new_tokens": 8,
            "kl_exact_every": 1, "sample_every": 1, "save_every": 0, "log.wandb": "disabled", "optim.lr": 1e-3,
            "optim.warmup_steps": 0,
            "hydra.run.dir": tmp_path / run,
        }  # fmt: skip
        given = dict(word.split("=", 1) for word in words)
        return run_script(train_ppo, *[f"{key}={value}" for key, value in (defaults | given).items()])

    return ppo


def test_every_figure_is_logged_and_the_first_ratio_is_one(ppo, tmp_path, read_metrics):
    assert ppo() == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    names = (
        "objective/score objective/kl objective/kl_exact objective/rewards objective/entropy objective/length "
        "objective/truncated policy/ratio_first policy/approx_kl policy/clip_fraction policy/loss value/loss "
        "value/explained_variance optim/lr policy/grad_norm value/grad_norm "
        "perf/rollout_tokens_per_second perf/train_tokens_per_second"
    )
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert set(names.split()) <= set(row)
        assert row["policy/ratio_first"] == pytest.approx(1, abs=1e-5)  # law 4
        assert row["objective/kl_exact"] >= 0
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)  # the policy is its own reference
    assert rows[0]["objective/kl_exact"] == pytest.approx(0, abs=1e-5)
    assert rows[1]["objective/kl_exact"] > 1e-4
    load_policy(tmp_path / "run" / "model")
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[-1])
    lengths = {len(sample[f"token_{name}"]) for name in ("reward", "kl", "value", "advantage")}
    assert lengths == {len(sample["tokens"])}
    assert sum(sample["token_kl"]) == pytest.approx(sample["kl"], abs=1e-3)


def test_the_sampled_kl_is_paid_with_its_sign_and_agrees_with_the_exact_one(ppo, tmp_path, read_metrics):
    words = ["num_steps=5", "optim.lr=1e-2", "optim.schedule=constant", "missing_eos=none", "sample_every=0"]
    assert ppo(*words, "kl_coef=0.3", "batch_size=16", "minibatch_size=8", "micro_batch_size=8") == 0
    rows = read_metrics(tmp_path / "run")
    sampled, exact = (sum(row[f"objective/{name}"] for row in rows) for name in ("kl", "kl_exact"))
    assert exact > 1 and sampled == pytest.approx(exact, rel=0.3)
    for row in rows:
        assert row["objective/rewards"] == pytest.approx(row["objective/score"] - 0.3 * row["objective/kl"], abs=1e-4)


def test_values_are_drawn_to_advantages_plus_old_values(ppo, tmp_path, read_metrics):
    """On the first minibatch V = old_values, so (V - returns)^2 / 2 is half the squared advantage."""
    words = ["num_steps=1", "ppo_epochs=1", "minibatch_size=8", "whiten_advantages=false", "num_samples=8"]
    assert ppo(*words) == 0
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    advantages = torch.tensor([x for row in samples for x in row["token_advantage"]])
    assert read_metrics(tmp_path / "run")[0]["value/loss"] == pytest.approx(advantages.square().mean().item() / 2)


def test_law_1_the_micro_batch_size_changes_nothing(ppo, tmp_path, read_metrics):
    for size, run in ((1, "one"), (4, "four")):
        assert ppo(f"micro_batch_size={size}", run=run) == 0
    for one, four in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "four"), strict=True):
        for name in one:
            assert one[name] == pytest.approx(four[name], rel=2e-3, abs=2e-5), name


def test_law_7_resumed_equals_uninterrupted_with_everything_on(ppo, inputs, tmp_path, read_metrics):
    words = [
        "num_steps=4",
        "optim.schedule=constant",
        "ema_decay=0.9",
        "kl_controller=adaptive",
        "kl_horizon=50",
        "ptx_coef=0.5",
        f"data.ptx=[{inputs}/rows.jsonl]",
        "save_every=1",
        "samples_per_prompt=2",
        "keep_last=9",
    ]
    assert ppo(*words, run="whole") == 0
    assert ppo(*words, "num_steps=2", run="parts") == 0
    assert ppo(*words, "resume=true", run="parts") == 0
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "parts")
    whole, parts = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    coefs = [row["objective/kl_coef"] for row in read_metrics(tmp_path / "whole")]
    assert len(set(coefs)) == 4  # the controller moved, and its place was kept


VARIANTS = [
    ["score_position=after_eos", "missing_eos=subtract"],
    ["whiten_rewards=true", "whiten_advantages=false", "value_clip_range=null", "dual_clip=3"],
    ["kl_in=loss", "kl_estimator=k2", "reward_clip=0.5", "missing_eos=none"],
    ["kl_in=loss", "kl_estimator=k3", "advantage=grpo", "samples_per_prompt=2"],
    ["advantage=rloo", "samples_per_prompt=4"],
    ["precision=bf16", "sampling.temperature=0.7"],
]


@pytest.mark.parametrize("words", VARIANTS, ids=lambda words: words[0])
def test_every_variant_runs_and_begins_at_ratio_one(ppo, tmp_path, read_metrics, words):
    assert ppo(*words, "num_steps=1") == 0
    (row,) = read_metrics(tmp_path / "run")
    assert row["policy/ratio_first"] == pytest.approx(1, abs=1e-5 if "precision=bf16" not in words else 1e-2)


def test_rewards_are_summed_with_their_weights(ppo, inputs, tmp_path, read_metrics):
    one, weighed = f"reward={inputs}/rewards.py:length", f"{{name:'{inputs}/rewards.py:length',weight:0.1}}"
    assert ppo(one, "reward_model=null", run="fn") == 0
    assert ppo(run="rm") == 0
    assert ppo(f"reward=[{{name:reward_model,weight:2}},{weighed}]", run="both") == 0
    fn, rm, both = (read_metrics(tmp_path / run)[0]["objective/score"] for run in ("fn", "rm", "both"))
    assert both == pytest.approx(2 * rm + 0.1 * fn, rel=1e-4)  # the first rollout is the same: same policy and seeds


def test_the_exported_policy_is_the_average_where_one_is_asked_for(ppo, tmp_path):
    assert ppo("ema_decay=0.999999", run="slow") == 0
    assert ppo(run="last") == 0
    start = load_file(Path(tmp_path, "slow", "model", "model.safetensors"))
    last = load_file(Path(tmp_path, "last", "model", "model.safetensors"))
    moved = max((start[name] - last[name]).abs().max() for name in start)
    assert moved > 1e-4


def test_held_out_prompts_are_answered_before_and_after(ppo, inputs, tmp_path, read_metrics):
    words = [f"data.eval=[{inputs}/rows.jsonl]", "eval_every=2", "num_prompts=5", "sample_every=0"]
    assert ppo(*words) == 0
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "eval/score" in row] == [0, 2]
    assert rows[0]["eval/kl"] == pytest.approx(0, abs=1e-5) and rows[-1]["eval/kl"] > 1e-5
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in samples if row["step"] == 0] == [
        row["prompt"] for row in samples if row["step"] == 2
    ]


def test_the_viewer_shows_every_token_of_the_first_rollout(ppo, capsys):
    assert ppo("view=true", "num_steps=1") == 0
    text = capsys.readouterr().out
    assert text.count("target ") >= 8 and "advantage" in text and "<|assistant|>" in text


def test_signs_of_a_run_that_cannot_learn_are_said_with_figures(ppo, inputs, capsys):
    assert ppo(f"reward={inputs}/rewards.py:constant", "reward_model=null", "sampling.max_new_tokens=1") == 0
    said = capsys.readouterr().out
    assert "step 1: all 8 scores are 0.5" in said
    assert "step 1: 0 of 8 completions ended with a stop token" in said


@pytest.mark.parametrize(
    "words, message",
    [
        (["reward_model={home}/other_rm"], "another tokenizer"),
        (["reward_model={home}/policy"], "holds a policy, not a reward model"),
        (["sampling.max_new_tokens=126"], "the prompt takes"),
        (["reward_model={home}/nan_rm"], "the score of row 0 is nan"),
        (["reward={home}/rewards.py:raises"], "raised RuntimeError: no verdict"),
        (["reward={home}/rewards.py:short"], "returned 7 rewards for 8 completions"),
        (["reward_model=null"], "nothing gives a reward"),
        (["sampling.top_p=0.9"], "PPO samples from the policy itself"),
        (["kl_in=loss"], "use k2 or k3 or exact"),
        (["advantage=rloo"], "samples_per_prompt"),
        (["advantage=rloo", "samples_per_prompt=2", "whiten_advantages=true"], "whiten_advantages=true"),
        (["seed=4294967296"], "seed=4294967296 must be at most 4294967295"),
        (["minibatch_size=6"], "minibatch_size=6"),
        (["missing_eos=zero"], "missing_eos"),
        (["ema_decay=1.5"], "ema_decay"),
        (["kl_controller=adaptive", "kl_horizon=0"], "kl_horizon"),
        (["kl_controller=adaptive", "kl_horizon=1"], "take kl_coef below 0"),
        (["kl_coef=nan"], "kl_coef=nan must be a finite number"),
        (["kl_coef=much"], "kl_coef=much must be a finite number"),
        (["missing_eos_value=inf"], "missing_eos_value=inf"),
        (["clip_range=0"], "clip_range=0"),
        (["value_clip_range=-1"], "value_clip_range=-1"),
        (["reward_clip=0"], "reward_clip=0"),
        (["dual_clip=1"], "dual_clip=1"),
        (["dual_clip=some"], "dual_clip=some must be a number"),
        (["sampling.temperature=hot"], "sampling.temperature=hot must be a finite number"),
        (["data.ptx=[texts.jsonl]"], "data.ptx has no effect with ptx_coef=0"),
        (["gamma=1.1"], "gamma=1.1"),
        (["gae_lambda=-1"], "gae_lambda=-1"),
        (["kl_exact_every=-1"], "kl_exact_every=-1"),
        (["ppo_epochs=0"], "ppo_epochs=0"),
    ],
)
def test_bad_input_is_refused_by_name_with_exit_code_2(ppo, inputs, capsys, tmp_path, words, message):
    assert ppo(*[word.format(home=inputs) for word in words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists()
    sees_a_rollout = any(place in words[0] for place in ("nan_rm", "rewards.py"))
    assert sees_a_rollout or not (tmp_path / "run").exists()  # everything else is known before anything is written


def test_the_first_ratio_is_the_farthest_of_all_micro_batches():
    ratios = [
        torch.tensor([1.0, 1.1]),
        torch.tensor([0.85, 1.0]),
    ]  # both means are nearer
    assert train_ppo.first_ratio(ratios, 0)["policy/ratio_first"] == torch.tensor(0.85)
    assert train_ppo.first_ratio(ratios, 1) == {}


# ---- the functions that the loop calls


def trajectory_of(lengths, finished, **settings):
    episodes = [
        Episode({}, ids=[1, 2, *range(3, 3 + n)], turns=[-1, -1, *[0] * n], logprobs=None, finished=stopped)
        for n, stopped in zip(lengths, finished, strict=True)
    ]
    how = {"score_position": "eos", "max_new_tokens": 6, "pad_id": 0, "device": "cpu"} | settings
    return make_trajectory(episodes, [{"where": f"f:{i}"} for i in range(len(lengths))], **how)


def test_after_eos_gives_a_value_to_one_state_more_where_there_was_room():
    lengths, finished = [2, 6, 4], [True, True, False]
    rollout = trajectory_of(lengths, finished, score_position="after_eos")
    assert rollout.action_mask.sum(1).tolist() == [2, 6, 4]
    assert rollout.value_mask.sum(1).tolist() == [3, 6, 4]  # no room after 6 tokens; the third did not stop
    assert rollout.value_mask[0].nonzero().flatten().tolist() == [2, 3, 4]
    assert rollout.done.nonzero().tolist() == [[0, 4], [1, 7], [2, 5]]
    assert rollout.states.attention_mask.sum(1).tolist() == [5, 8, 6]
    at_eos = trajectory_of(lengths, finished)
    assert torch.equal(at_eos.value_mask, at_eos.action_mask) and at_eos.done.nonzero().tolist()[0] == [0, 3]


def test_what_is_left_out_keeps_its_tokens_and_has_no_action():
    rollout = trajectory_of([2, 3], [True, True])
    rollout.leave_out(torch.tensor([True, False]))
    assert rollout.action_mask.sum(1).tolist() == rollout.value_mask.sum(1).tolist() == [0, 3]
    assert rollout.done.sum(1).tolist() == [0, 1] and rollout.attention_mask.sum(1).tolist() == [4, 5]


class OneRank:
    """What an engine asks of a run."""

    def __init__(self, rank=0, world_size=1):
        self.rank, self.world_size, self.device, self.dir = rank, world_size, torch.device("cpu"), Path("unused")


def test_a_row_draws_by_its_number_and_step_not_by_its_place(inputs, compose):
    policy, tokenizer = load_policy(inputs / "policy", frozen=True), load_tokenizer(inputs / "policy")
    cfg = compose("train_ppo", f"policy={inputs}/policy", "sampling.max_new_tokens=6", "seed=5")
    prompts = [
        {"input_ids": tokenizer.encode(text), "messages": [], "where": text}
        for text in ("one latte", "a mocha please", "two teas", "a cake")
    ]

    def completions(prompts, step=3, rank=0, world_size=1, **more):
        engine = train_ppo.load_engine(cfg, OneRank(rank, world_size), tokenizer, policy)
        rollout = engine.rollout(policy, prompts, step=step, **more)
        return [ids[mask].tolist() for ids, mask in zip(rollout.tokens, rollout.action_mask, strict=True)]

    whole = completions(prompts, samples_per_prompt=2)
    odd = completions(prompts[1::2], rank=1, world_size=2, samples_per_prompt=2)
    assert odd == [*whole[2:4], *whole[6:8]]  # as a second rank draws them
    assert whole[0] != whole[1]
    assert completions(prompts, step=4, samples_per_prompt=2) != whole
    assert completions(prompts, batch=1, samples_per_prompt=2) != whole
