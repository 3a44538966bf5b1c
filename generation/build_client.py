"""conf/client/*.yaml -> the client that it describes."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from generation.clients import Client
from generation.scripted_client import ScriptedClient, scripted_replies
from runtime.config import CONF, check_choice, check_types


def build_client(client: DictConfig) -> Client:
    """The client that `conf/client/*.yaml` describes."""
    check_choice("client.kind", client.get("kind"), ("openai", "local", "scripted"))
    check_types(client, f"client/{client.kind}", "client", nullable=("cache",))
    costs = {key: client[key] for key in ("cache", "prompt_price", "completion_price", "max_cost")}
    if client.kind == "openai":
        from generation.endpoint import OpenAIClient

        return OpenAIClient(
            client.model,
            base_url=client.base_url,
            api_key_env=client.api_key_env,
            max_parallel=client.max_parallel,
            requests_per_minute=client.requests_per_minute,
            timeout=client.timeout,
            max_tries=client.max_tries,
            served_as=client.served_as,
            thinking_tokens=client.thinking_tokens,
            reasoning_effort=client.reasoning_effort,
            extra_body=OmegaConf.to_container(client, resolve=True)["extra_body"],
            pre_query=client.pre_query,
            batch=client.batch,
            **costs,
        )
    if client.kind == "local":
        from generation.local_client import LocalClient

        return LocalClient(
            client.policy,
            batch_size=client.batch_size,
            top_k=client.top_k,
            top_p=client.top_p,
            precision=client.precision,
            thinking_tokens=client.thinking_tokens,
            **costs,
        )
    return ScriptedClient(scripted_replies(client.script), model=f"scripted:{client.script}", **costs)


def client_of(given: dict, directory: Path) -> Client:
    """The client that {kind: openai, model: ...} describes: conf/client/KIND.yaml has the other settings' defaults.

    Its answers are cached in directory/answers, so a resumed run asks nothing twice.
    """
    if not isinstance(given, dict) or given.get("kind") not in ("openai", "local", "scripted"):
        raise ValueError(f"client: {given} must be {{kind: openai | local | scripted, ...}}, as conf/client/ has them")
    defaults = OmegaConf.load(CONF / "client" / f"{given['kind']}.yaml")
    directory.mkdir(parents=True, exist_ok=True)
    return build_client(OmegaConf.merge(defaults, {"cache": str(directory / "answers")}, given))
