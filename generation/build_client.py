"""conf/client/*.yaml -> the client that it describes."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from generation.clients import Client
from generation.scripted_client import ScriptedClient, scripted_replies
from runtime.config import check_choice, check_types
from runtime.script import CONF


def build_client(cfg: DictConfig) -> Client:
    """The client that `conf/client/*.yaml` describes."""
    check_choice("client.kind", cfg.get("kind"), ("openai", "local", "scripted"))
    check_types(cfg, f"client/{cfg.kind}", "client", nullable=("cache",))
    settings = {key: cfg[key] for key in ("cache", "prompt_price", "completion_price", "max_cost")}
    if cfg.kind == "openai":
        from generation.endpoint import OpenAIClient

        own: tuple[str, ...] = (
            "base_url", "api_key_env", "max_parallel", "requests_per_minute", "timeout", "max_tries", "served_as",
            "thinking_tokens", "reasoning_effort", "extra_body", "pre_query", "batch",
        )  # fmt: skip
        given = OmegaConf.to_container(cfg, resolve=True)
        return OpenAIClient(cfg.model, **{key: given[key] for key in own}, **settings)
    if cfg.kind == "local":
        from generation.local_client import LocalClient

        own = ("batch_size", "top_k", "top_p", "precision", "thinking_tokens")
        return LocalClient(cfg.policy, **{key: cfg[key] for key in own}, **settings)
    return ScriptedClient(scripted_replies(cfg.script), model=f"scripted:{cfg.script}", **settings)


def client_of(given: dict, directory: Path) -> Client:
    """The client that {kind: openai, model: ...} describes: conf/client/KIND.yaml has the other settings' defaults.

    Its answers are cached in directory/answers, so a resumed run asks nothing twice.
    """
    if not isinstance(given, dict) or given.get("kind") not in ("openai", "local", "scripted"):
        raise ValueError(f"client: {given} must be {{kind: openai | local | scripted, ...}}, as conf/client/ has them")
    defaults = OmegaConf.load(CONF / "client" / f"{given['kind']}.yaml")
    directory.mkdir(parents=True, exist_ok=True)
    return build_client(OmegaConf.merge(defaults, {"cache": str(directory / "answers")}, given))
