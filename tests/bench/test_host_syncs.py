"""The host waits for a GPU twice an optimizer step: for the gradient's norm and for the row of metrics."""

from bench.host_syncs import WINDOW, count, files, jobs

MINIBATCHES = 2  # optimizer steps that PPO makes of a rollout
ROLLOUT = (
    "rollouts/",
    "model/sampling.py",
    "train_ppo.py",
)  # once a rollout or once a sampled token, never a minibatch


def test_training_waits_twice_a_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths, steps = files(tmp_path), WINDOW[1] - WINDOW[0]
    for script, words in jobs(tmp_path, paths):
        sites = count(script, words)
        learning = {site: n for site, n in sites.items() if script != "train_ppo" or not site.startswith(ROLLOUT)}
        optimizer_steps = steps * (MINIBATCHES if script == "train_ppo" else 1)
        assert sum(learning.values()) == optimizer_steps + steps, (script, sites)
        assert sum(sites.values()) <= 60 * steps, (script, sites)
