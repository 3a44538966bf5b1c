"""task=best_of_n: choose the best of n samples by a proxy reward, and score it with a gold reward. Nothing is trained.

KL(best of n || sampled policy) = log n - (n - 1) / n nats (Stiennon et al. 2020, arXiv:2009.01325, appendix G.3). So
the gold score over sqrt(KL) shows up to which KL optimising the proxy improves the gold reward.
"""

from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from scipy.special import gammaln

from data.prompts import encode_prompts
from data.tokenizer import check_same_tokenizer, load_tokenizer
from evals.intervals import t_interval
from model.reading import read_policy, read_reward_model
from model.sampling import generate
from rollouts.reward_process import RewardProcess
from rollouts.rewards import Scorer
from rollouts.sources import REWARD_MODEL, Source
from rollouts.trajectory import from_rows
from runtime.config import check_positive
from runtime.files import named_in_errors
from runtime.report import print_table


def best_of_n_kl(n: np.ndarray) -> np.ndarray:
    """KL in nats of best-of-n from the sampled policy, if all scores are distinct."""
    return np.log(n) - (n - 1) / n


def expected_best(proxy: np.ndarray, values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(P, S) the expected `values` of the best of n samples by `proxy`, for every n of `sizes`.

    It is the mean over all subsets of n of the N samples (Nakano et al. 2021, arXiv:2112.09332, appendix I). The sample
    with i samples below it is the best of C(i, n - 1) of the C(N, n) subsets.

    Args:
        proxy, values: (P, N), one row per prompt. sizes: (S,) integers from 1 to N.
    """
    below, num = np.arange(proxy.shape[1]), proxy.shape[1]
    n = np.asarray(sizes)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        log_subsets = gammaln(below + 1) - gammaln(n) - gammaln(below - n + 2)
    log_share = np.where(below >= n - 1, log_subsets, -np.inf) - (
        gammaln(num + 1) - gammaln(n + 1) - gammaln(num - n + 1)
    )
    by_proxy = np.take_along_axis(values, np.argsort(proxy, axis=1, kind="stable"), axis=1)
    return by_proxy @ np.exp(log_share).T


def sample_scores(task: DictConfig, *, seed: int) -> dict[str, np.ndarray]:
    """{"gold" or a proxy's name: (P, N) scores} of num_completions samples of every prompt."""
    tokenizer = load_tokenizer(task.policy, template=task.template, date=task.date)
    policy = read_policy(task.policy, precision=task.precision)
    gold = Source("gold", RewardProcess(task.reward_fn, seconds=task.reward_timeout, key="task.reward_fn"))
    scorers = {"gold": Scorer(None, [gold], tokenizer, micro_batch_size=1)}
    for path in task.reward_models:
        check_same_tokenizer(path, tokenizer)
        model = read_reward_model(path, precision=task.precision)
        scorers[proxy_name(path)] = Scorer(model, [Source(REWARD_MODEL)], tokenizer, micro_batch_size=task.batch_size)
    room = policy.config.max_length - task.sampling.max_new_tokens
    encoded = encode_prompts("task.input", task.input, task, tokenizer, max_length=room)
    prompts, num = encoded.items[: task.num_prompts], task.num_completions
    scores: dict[str, list] = {name: [] for name in scorers}
    for p, prompt in enumerate(prompts):
        made = generate(
            policy,
            [list(prompt["input_ids"])] * num,
            seeds=[seed + p * num + i for i in range(num)],
            stop_ids=tokenizer.stop_ids,
            pad_id=tokenizer.pad_id,
            **task.sampling,
        )
        rollout = from_rows(made.rows, [reason == "stop" for reason in made.finish_reasons], [prompt] * num)
        for name, scorer in scorers.items():
            scores[name].append(scorer(rollout).sum(1).cpu().numpy())
        if p % 16 == 15:
            print(f"{p + 1} of {len(prompts)} prompts", flush=True)
    return {name: np.stack(columns) for name, columns in scores.items()}


def proxy_name(path: str) -> str:
    """runs/x/rm_small/model -> rm_small."""
    return Path(path).absolute().parent.name


def check(task: DictConfig) -> None:
    """Raise ValueError if a setting is wrong, before a model is loaded."""
    if task.num_completions < 2 or task.num_prompts < 2:
        raise ValueError(
            f"task.num_completions={task.num_completions} and task.num_prompts={task.num_prompts} must be 2 or more"
        )
    check_positive(task__reward_timeout=task.reward_timeout)


def run(cfg: DictConfig, out: Path) -> dict:
    """task=best_of_n: scores.npz with the scores of every sample, result.json with the means for every n."""
    check(cfg.task)
    scores = sample_scores(cfg.task, seed=cfg.seed)
    with named_in_errors(out / "scores.npz"):
        np.savez_compressed(out / "scores.npz", **{name: values.astype(np.float32) for name, values in scores.items()})
    sizes = 2 ** np.arange(int(np.log2(cfg.task.num_completions)) + 1)
    kl, curves, rows = best_of_n_kl(sizes), {}, []
    for name in scores.keys() - {"gold"} or ["gold"]:
        best = {by: expected_best(scores[name], scores[key], sizes) for by, key in (("proxy", name), ("gold", "gold"))}
        bounds = {by: np.array([t_interval(column.tolist()) for column in values.T]) for by, values in best.items()}
        curves[name] = {"n": sizes, "kl": kl, "prompts": len(scores["gold"])}
        for by, (value, lower, upper) in {by: found.T for by, found in bounds.items()}.items():
            curves[name] |= {by: value, f"{by}_lower": lower, f"{by}_upper": upper}
        rows += [
            (name, int(n), *point, *own, *gold)
            for n, point, own, gold in zip(sizes, kl[:, None], *bounds.values(), strict=True)
        ]
    head = ("chosen by", "n", "KL, exact", "proxy score", "lower", "upper", "gold score", "lower", "upper")
    print_table(f"best of n, t intervals over {len(scores['gold'])} prompts", head, sorted(rows))
    return {"curves": curves, "gold_mean": scores["gold"].mean(), "gold_sd": scores["gold"].std()}
