"""Best of n in closed form, the fits of Gao et al. on curves with known coefficients, and what a run must have left."""

import json
from itertools import combinations

import numpy as np
import pytest

from evals.barista import gold, score
from evals.best_of_n import best_of_n_kl, expected_best
from evals.overoptimization import fit, fit_prompts, peak, read_run
from evals.sweep import over_seeds, usual_settings
from evals.trainings import runs_by_training
from rollouts.scorers import reward_function_scorer
from tests.published_votes import SCRIPT


def test_best_of_n_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(0)
    proxy, values = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    for n in range(1, 7):
        subsets = [list(subset) for subset in combinations(range(6), n)]
        by_hand = [np.mean([v[s][p[s].argmax()] for s in subsets]) for p, v in zip(proxy, values, strict=True)]
        assert expected_best(proxy, values, np.array([n]))[:, 0] == pytest.approx(by_hand)


def test_the_best_of_one_is_the_policy_itself():
    assert best_of_n_kl(np.array([1, 2])) == pytest.approx([0, np.log(2) - 0.5])


@pytest.mark.parametrize("form, bent", [("best_of_n", lambda d: d**2), ("rl", lambda d: d * np.log(d))])
def test_a_fit_finds_the_coefficients_that_made_the_curve(form, bent):
    d = np.linspace(0.1, 4, 12)
    alpha, beta = fit(d, 1.5 * d - 0.4 * bent(d), form)
    assert (alpha, beta) == pytest.approx((1.5, 0.4))
    turn = peak(alpha, beta, form)
    around = [1.5 * x - 0.4 * bent(x) for x in (turn - 0.1, turn, turn + 0.1)]
    assert max(around) == around[1]


def test_intervals_of_a_fit_hold_the_truth_and_a_straight_rise_has_no_peak():
    rng, d = np.random.default_rng(0), np.linspace(0, 3, 10)
    noise = rng.normal(size=(200, 10)) * 0.3
    bent = fit_prompts(d**2, 1.0 * d - 0.25 * d**2 + noise, "best_of_n", rounds=200, seed=0)
    assert (
        bent["alpha"]["lower"] < 1.0 < bent["alpha"]["upper"] and bent["beta"]["lower"] < 0.25 < bent["beta"]["upper"]
    )
    assert bent["peak"]["lower"] < 2 < bent["peak"]["upper"] and bent["turns"] == 1
    assert np.isnan(fit_prompts(d**2, 1.0 * d + 0.1 * d**2 + noise, "best_of_n", rounds=20, seed=0)["peak"]["value"])


def write_samples(path, prompts_of_steps):
    rows = [
        {"step": step, "prompt": prompt, "completion": "Ok.", "score": 1.0, "kl": 0.5}
        for step, prompts in prompts_of_steps.items()
        for prompt in prompts
    ]
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_is_read_prompt_by_prompt_or_refused(tmp_path):
    write_samples(tmp_path, {0: ["p", "q", "r"], 4: ["p", "q", "r"]})
    run = read_run(str(tmp_path), gold)
    assert run["kl"].shape == run["gold"].shape == run["proxy"].shape == (3, 2) and run["steps"].tolist() == [0, 4]
    write_samples(tmp_path, {0: ["p", "q", "r"], 4: ["p", "q"]})
    with pytest.raises(ValueError, match="same prompts"):
        read_run(str(tmp_path), gold)


def test_the_gold_reward_wants_everything_once_and_briefly():
    good = "Ok, thank you. Your order will be ready at the coffee bar soon."
    assert score(good) == 5
    assert score(good + " Soon, soon.") < 5 and score("Ok.") == 1
    assert score("order " * 20) < 0
    assert reward_function_scorer("evals.barista:gold", seconds=60)([([{"role": "user", "content": "Hi"}], good)]) == [
        5
    ]


def test_jobs_of_a_sweep_are_told_over_seeds():
    jobs = [
        {"settings": {"seed": seed, "lr": lr}, "last": lr + noise}
        for lr, shift in ((1.0, 0.0), (1.0, 0.0), (3.0, 0.1))
        for seed, noise in ((0, 0.1), (1, -0.1))
    ]
    usual, other = over_seeds(jobs, usual_settings(jobs))
    assert usual["settings"] == "(usual)" and usual["mean"] == pytest.approx(1.0) and usual["difference"] is None
    assert other["settings"] == "lr=3.0" and other["difference"] == pytest.approx(2.0)
    assert other["difference_lower"] == pytest.approx(2.0)  # seed by seed there is no noise in the difference
    assert other["lower"] == pytest.approx(3 - 12.7062 * 0.1, abs=1e-3)  # t with one degree of freedom


def test_methods_share_a_plane_with_the_best_of_n(run_script, tmp_path):
    """Two seeds of one method and one of another; best of n is chosen by the gold reward itself."""
    (tmp_path / "gold.py").write_text(
        "def gold(prompts, completions):\n    return [float(len(c)) for c in completions]\n"
    )
    for name, more in (("rloo_0", 1), ("rloo_1", 2), ("dpo", 3)):
        (tmp_path / name).mkdir()
        rows = [
            {"step": step, "prompt": p, "completion": "x" * (1 + more * step), "kl": 0.5 * step, "score": None}
            for step in (0, 2)
            for p in "ab"
        ]
        (tmp_path / name / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "best").mkdir()
    np.savez_compressed(tmp_path / "best" / "scores.npz", gold=np.array([[1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 2.0, 2.0]]))
    runs = ",".join(f"{tmp_path}/{name}" for name in ("rloo_0", "rloo_1", "dpo"))
    words = [f"task.input=[{runs}]", f"task.best_of_n={tmp_path}/best", f"task.reward_fn={tmp_path}/gold.py:gold"]
    assert run_script(SCRIPT, "task=plane", *words, f"hydra.run.dir={tmp_path}/out") == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [end["gold"] for end in result["ends"]["rloo"]] == [3, 5] and result["ends"]["dpo"][0]["kl"] == 1
    mean = result["means"]["rloo"]  # two values that differ by 2: 12.706 standard errors of 1
    assert [mean[key] for key in ("seeds", "gold", "lower")] == pytest.approx([2, 4, 4 - 12.706], abs=1e-3)
    assert result["means"]["dpo"]["gold"] == 7 and result["means"]["dpo"]["lower"] is None
    assert result["best_of_n"]["gold"] == pytest.approx(
        [2.25, (20 / 6 + 2) / 2, 3.0]
    )  # of the pairs of 1, 2, 3, 4 the best is 20 / 6
    assert (tmp_path / "out" / "plane.png").stat().st_size > 5000


def test_two_runs_with_one_seed_are_not_two_seeds(run_script, tmp_path, capsys):
    for name, seed in (("rloo_0", 0), ("rloo_1", 1), ("rloo_2", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"seed: {seed}\n")
    assert runs_by_training([f"{tmp_path}/rloo_0", f"{tmp_path}/rloo_1"]) == {
        "rloo": [f"{tmp_path}/rloo_0", f"{tmp_path}/rloo_1"]
    }
    with pytest.raises(ValueError, match="rloo_0 and .*rloo_2 are seeds of rloo, but both have seed=0; run one"):
        runs_by_training([f"{tmp_path}/rloo_{n}" for n in range(3)])


def test_gains_are_paired_by_prompt_and_averaged_over_seeds(run_script, tmp_path):
    """The gold of a run rises by 2 on half of the prompts and by 0 on the others, another seed's by 1 on all."""
    (tmp_path / "gold.py").write_text(
        "def gold(prompts, completions, per):\n    return [len(c) * p for c, p in zip(completions, per, strict=True)]\n"
    )
    for name, rises in (("dpo_0", (2, 0)), ("dpo_1", (1, 1)), ("ppo", (2, 0))):
        (tmp_path / name).mkdir()
        rows = [{"step": step, "prompt": f"p{i}", "completion": "x" * (i + 1 + step * rises[i % 2]), "kl": 0.5 * step,
                 "score": 3.0, "columns": {"per": 1.0}} for step in (0, 1) for i in range(40)]  # fmt: skip
        (tmp_path / name / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = ",".join(f"{tmp_path}/{name}" for name in ("dpo_0", "dpo_1", "ppo"))
    words = [f"task.input=[{runs}]", f"task.reward_fn={tmp_path}/gold.py:gold", "task.spread=2"]
    assert run_script(SCRIPT, "task=gains", *words, f"hydra.run.dir={tmp_path}/out") == 0
    methods = json.loads((tmp_path / "out" / "result.json").read_text())["methods"]
    ppo = methods["ppo"]["gain"]
    assert ppo["value"] == 1 and ppo["n"] == 40 and 0 < ppo["lower"] < 1 - 1.96 * (1 / 39) ** 0.5 < ppo["upper"] < 2
    assert methods["dpo"]["gain"] == {"value": 1, "lower": 1, "upper": 1, "n": 2} and methods["dpo"]["seeds"] == 2
    first, last = methods["ppo"]["runs"][0]["looks"]
    assert (first["kl"], last["kl"], last["proxy"]) == (0, 0.5, 3) and first["gold"]["value"] == 20.5
    assert (tmp_path / "out" / "gains.png").stat().st_size > 5000


def test_curves_of_seeds_have_a_mean_with_an_interval_over_seeds_and_prompts(run_script, tmp_path, capsys):
    """Three seeds of one proxy and a single run; the gold score is the answer's length."""
    (tmp_path / "gold.py").write_text(
        "def gold(prompts, completions):\n    return [float(len(c)) for c in completions]\n"
    )
    lengths = {"rm_0": (4, 9, 5), "rm_1": (4, 7, 4), "rm_2": (4, 8, 3), "other": (4, 5, 6)}
    for name, of_steps in lengths.items():
        (tmp_path / name).mkdir()
        rows = [{"step": step, "prompt": f"p{i}", "completion": "x" * (length + i % 3), "kl": step + 0.1 * (i % 2),
                 "score": step + i / 10} for step, length in enumerate(of_steps) for i in range(12)]  # fmt: skip
        (tmp_path / name / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "best").mkdir()
    rng = np.random.default_rng(0)
    scores = {name: rng.normal(size=(12, 4)) for name in ("gold", "rm")}
    np.savez_compressed(tmp_path / "best" / "scores.npz", **scores)
    inputs = ",".join(f"{tmp_path}/{name}" for name in lengths)
    words = [
        "task=overoptimization",
        f"task.input=[{inputs}]",
        f"task.best_of_n={tmp_path}/best",
        "task.rounds=20",
        f"task.reward_fn={tmp_path}/gold.py:gold",
    ]
    assert run_script(SCRIPT, *words, "task.seeds=[rm]", f"hydra.run.dir={tmp_path}/out") == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    mean, runs = result["seeds"]["rl"]["rm"], [result["rl"][f"rm_{i}"] for i in range(3)]
    assert (mean["num_seeds"], mean["num_prompts"]) == (3, 12) and "other" not in result["seeds"]["rl"]
    falls = [run["fall"]["value"] * result["gold_sd"] for run in runs]
    assert falls == pytest.approx([4, 3, 5])  # the answers' lengths above, 9 - 5 and so on
    # every prompt falls alike, so the interval is that over seeds: t with two degrees of freedom, 4.3027
    half = 4.3027 * 1 / 3**0.5 / result["gold_sd"]
    assert mean["fall"]["value"] == pytest.approx(4 / result["gold_sd"])
    assert mean["fall"]["upper"] - mean["fall"]["value"] == pytest.approx(half, rel=1e-3)
    own = runs[0]["last_gold"]  # lengths 5, 6, 7 four times each: t with 11 degrees of freedom, 2.2010
    error = (8 / 11 / 12) ** 0.5 / result["gold_sd"]
    assert own["upper"] - own["value"] == pytest.approx(2.2010 * error, rel=1e-3)
    over_seeds_alone = 4.3027 * np.std([run["last_gold"]["value"] for run in runs], ddof=1) / 3**0.5
    wide = np.hypot(over_seeds_alone, 2.2010 * error)  # the luck of the prompts is common to the seeds
    assert mean["last_gold"]["upper"] - mean["last_gold"]["value"] == pytest.approx(wide, rel=1e-3)
    page = (tmp_path / "out" / "overoptimization.html").read_text()
    assert "rm, mean of 3 seeds" in page and "prompts</th>" in page
    capsys.readouterr()
    assert run_script(SCRIPT, *words, "task.seeds=[other]", f"hydra.run.dir={tmp_path}/no") == 2
    assert "task.seeds=other needs results of two or more models" in capsys.readouterr().err
