"""Every config in conf/ composes, with every choice of every group."""

import shlex
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

CONF = Path(__file__).parents[1] / "conf"
DOORS = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "run")
RECIPES = sorted(path.stem for path in (CONF / "recipe").glob("*.yaml"))
SWEEPS = sorted(path.stem for path in (CONF / "sweep").glob("*.yaml"))


def groups_of(door: str) -> set[str]:
    """Config groups that the door's defaults list names."""
    defaults = yaml.safe_load((CONF / f"{door}.yaml").read_text())["defaults"]
    named = {key for item in defaults if isinstance(item, dict) for key in item}
    return {key.removeprefix("optional ") for key in named if not key.startswith("override")}


CHOICES = [
    (door, group, path.stem)
    for door in DOORS
    for group in sorted(groups_of(door) - {"recipe"})
    for path in sorted((CONF / group).glob("*.yaml"))
]


@pytest.mark.parametrize("door", DOORS)
def test_a_door_composes(door, compose):
    compose(door, *(["+run_dir=x"] if door == "run_recipe" else []))


@pytest.mark.parametrize("door, group, choice", CHOICES)
def test_a_door_composes_with_every_choice(door, group, choice, compose):
    cfg = compose(door, f"{group}={choice}")
    assert group in cfg or group in cfg.hydra


@pytest.mark.parametrize("door", DOORS)
def test_every_choice_that_a_door_may_make_is_a_file(door):
    for item in yaml.safe_load((CONF / f"{door}.yaml").read_text())["defaults"]:
        for group, choice in item.items() if isinstance(item, dict) else []:
            if choice is not None and not group.startswith("override"):
                assert (CONF / group.removeprefix("optional ") / f"{choice}.yaml").exists(), f"{door}: {group}={choice}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_step_of_a_recipe_composes(recipe, compose):
    steps = compose("run_recipe", "+run_dir=x", f"recipe={recipe}").steps
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    for step in steps:
        door, *overrides = shlex.split(step.run)
        cfg = compose(door.removesuffix(".py"), *overrides)
        missing = OmegaConf.missing_keys(cfg)
        assert not missing, f"{recipe}, step {step.name}: {sorted(missing)} have no value"


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_sweep_names_keys_that_some_door_has(sweep, compose):
    params = yaml.safe_load((CONF / "sweep" / f"{sweep}.yaml").read_text())["hydra"]["sweeper"]["params"]
    fits = [door for door in DOORS if all(has(compose, door, key, str(v)) for key, v in params.items())]
    assert fits, f"no door has all of {sorted(params)}"


def has(compose, door: str, key: str, values: str) -> bool:
    words = ["+run_dir=x"] if door == "run_recipe" else []
    return OmegaConf.select(compose(door, *words), key, default="absent") != "absent"


def test_unknown_keys_are_refused(compose):
    with pytest.raises(Exception, match="kl_coeff"):
        compose("train_sft", "kl_coeff=1")
