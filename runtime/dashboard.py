"""Make a wandb workspace for a script: its main metrics in sections, a line for each setting with its seeds together.

python -m runtime.dashboard script=train_ppo entity=ME [save=false]
"""

from omegaconf import DictConfig

from runtime.script import enter


def build(cfg: DictConfig):
    """The workspace that conf/dashboard.yaml describes, not yet sent anywhere.

    Raises:
        ValueError: the script has no panels.
    """
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces
    from wandb_workspaces.expr import Config

    if cfg.script not in cfg.panels:
        raise ValueError(f"script={cfg.script!r} has no panels in conf/dashboard.yaml; known: {', '.join(cfg.panels)}")
    sections = [
        workspaces.Section(
            name=name, is_open=True, panels=[reports.LinePlot(x="Step", y=list(figures)) for figures in plots]
        )
        for name, plots in cfg.panels[cfg.script].items()
    ]
    grouped = workspaces.RunsetSettings(groupby=[Config("name"), Config("setting")])
    return workspaces.Workspace(
        entity=cfg.entity, project=cfg.log.project, name=cfg.script, sections=sections, runset_settings=grouped
    )


def show(cfg: DictConfig) -> None:
    """Send the workspace to wandb, or print it as JSON."""
    workspace = build(cfg)
    if cfg.save:
        workspace.save()
    print(workspace.url if cfg.save else workspace._to_model().model_dump_json(indent=1))


if __name__ == "__main__":
    enter(show, "dashboard")
