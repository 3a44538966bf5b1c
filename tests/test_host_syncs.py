"""The host waits for a GPU twice an optimizer step: for the gradient's norm and for the row of metrics."""

from bench.host_syncs import WINDOW, count, files, jobs

MINIBATCHES = 2  # optimizer steps that PPO makes of a rollout


def test_training_waits_twice_a_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = files(tmp_path)
    steps = WINDOW[1] - WINDOW[0]
    for script, words in jobs(tmp_path, paths):
        sites = count(script, words)
        learning = {site: n for site, n in sites.items() if not site.startswith(("rollouts/", "model/sampling.py"))}
        if script != "train_ppo":
            assert sum(sites.values()) == 2 * steps, (script, sites)
            continue
        of_rollouts = {site: n for site, n in learning.items() if n < MINIBATCHES * steps}  # once or never a rollout
        assert sum(of_rollouts.values()) <= 6 * steps, sites
        each = {site: n for site, n in learning.items() if site not in of_rollouts}
        assert sum(each.values()) == MINIBATCHES * steps, sites  # once for each optimizer step
