"""The wandb workspace of each script, built without a network."""

import json

import pytest

from runtime.dashboard import build

pytest.importorskip("wandb_workspaces")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the package's own validators
SCRIPTS = ("train_sft", "train_rm", "train_dpo", "train_ppo")


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_workspace_has_a_plot_for_every_panel_of_the_config(compose, name):
    cfg = compose("dashboard", f"script={name}", "entity=me")
    sent = json.loads(build(cfg)._to_model().model_dump_json(by_alias=True))
    assert (sent["entity"], sent["project"]) == ("me", cfg.log.project)
    sections = sent["spec"]["section"]["panelBankConfig"]["sections"]
    shown = {s["name"]: [panel["config"]["metrics"] for panel in s["panels"]] for s in sections if s["panels"]}
    assert shown == {name: [list(figures) for figures in plots] for name, plots in cfg.panels[name].items()}
    assert [key["name"] for key in sent["spec"]["section"]["runSets"][0]["grouping"]] == ["name.value", "setting.value"]


def test_a_script_without_panels_is_refused(compose):
    with pytest.raises(ValueError, match="script='train'"):
        build(compose("dashboard", "script=train", "entity=me"))
