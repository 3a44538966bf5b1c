"""The address and the key of an endpoint."""

import os
import re
from urllib.parse import urlsplit


def check_url(base_url: str | None) -> str | None:
    """The address of an endpoint. Raises ValueError where it is no address or contains a secret."""
    if base_url is None:
        return None
    parts = urlsplit(str(base_url))
    try:
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0  # port: ValueError over 65535
    except ValueError:
        good = False
    if not good:
        raise ValueError(f"base_url={base_url!r} is no address; write it like http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query:
        raise ValueError("base_url carries a name, password or query; put the key into the environment instead")
    return base_url


def read_key(base_url: str | None, api_key_env: str) -> str:
    """The key in the environment variable. A server on this machine needs none."""
    if not isinstance(api_key_env, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", api_key_env):
        raise ValueError(
            "api_key_env is the name of an environment variable, such as OPENAI_API_KEY, not the key itself"
        )
    key = os.environ.get(api_key_env, "")
    local = base_url is not None and urlsplit(base_url).hostname in ("127.0.0.1", "localhost", "::1")
    if not key and not local:
        raise ValueError(f"no API key: set the environment variable {api_key_env} (api_key_env names it)")
    if not key.isascii() or not key.isprintable():
        raise ValueError(f"the key in the environment variable {api_key_env} has characters that no header can carry")
    return key or "-"  # a server on this machine asks for none


def redact(key: str, text: str) -> str:
    """The text without the key, which a server may repeat, and without terminal control characters."""
    shown = text.replace(key, "[key]") if len(key) > 3 else text
    return "".join(c if c.isprintable() else " " for c in shown)
