"""Serving the page, and the export when it is closed."""

import os
import socket
import threading
import time

from omegaconf import DictConfig

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported: no usage statistics are sent

from arena.annotate import SHORTCUTS, Desk, annotate_tab, load_items  # noqa: E402
from arena.battle import Arena, battle_tab  # noqa: E402
from arena.board import board_tab  # noqa: E402
from arena.export import export  # noqa: E402
from arena.guard import Guard  # noqa: E402
from arena.limits import Limits  # noqa: E402
from arena.settings import allowed_names, check  # noqa: E402
from arena.speakers import load_speakers  # noqa: E402
from arena.store import Store  # noqa: E402
from runtime.run import Run  # noqa: E402
from runtime.script import RunFailed  # noqa: E402

TABLES = (  # of the guidelines: words are not broken, a wide table scrolls
    ".prose table { display: block; overflow-x: auto } "
    ".prose td, .prose th { overflow-wrap: normal !important; word-break: normal !important }"
)


def serve(cfg: DictConfig, run: Run) -> float:
    """Serve the page until it is closed, then export. With export=true, only export."""
    accounts = check(cfg)
    database = run.dir / "arena.sqlite"
    if cfg.export and not database.exists():
        raise ValueError(
            f"{run.dir} has no arena.sqlite, so there is nothing to export; set hydra.run.dir to the arena's directory"
        )
    if cfg.overwrite and database.exists():
        raise ValueError(f"{database} holds people's votes; set resume=true, or move the file away yourself")
    speakers = load_speakers(cfg.models or {}, precision=cfg.precision, sampling=cfg.sampling)
    items = load_items(cfg.annotate, double_share=cfg.double_share, seed=cfg.seed)

    run.begin()
    store = Store(database)
    store.add_items(items)
    if not cfg.export:
        open_page(cfg, run, store, speakers, accounts)
    counts = export(store, run.dir)
    store.close()
    run.terminal.say("\n".join(f"{run.dir}/{name}: {count} rows" for name, count in counts.items()))
    return float(counts["verdicts.jsonl"])


def open_page(cfg: DictConfig, run: Run, store: Store, speakers: dict, accounts: list | None) -> None:
    """Serve the three tabs until a stop signal arrives."""
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    limits = Limits(messages_per_minute=cfg.messages_per_minute, max_characters=cfg.max_characters)
    plain = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # nothing is fetched
    with gr.Blocks(title="arena", analytics_enabled=False) as page:
        if len(speakers) > 1:
            with gr.Tab("Battle"):
                arena = Arena(store, speakers, limits, seed=cfg.seed, max_turns=cfg.max_turns)
                battle_tab(arena, parallel=cfg.parallel)
        if cfg.annotate:
            with gr.Tab("Annotate"):
                annotate_tab(Desk(store, limits, seed=cfg.seed), page)
        with gr.Tab("Board"):
            board_tab(store, list(speakers), page, refresh_seconds=cfg.refresh_seconds)
    page.queue(max_size=cfg.max_waiting, default_concurrency_limit=cfg.parallel)
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None), page, path="", server_name=cfg.host, server_port=cfg.port, auth=accounts,
        theme=plain, head=SHORTCUTS, css=TABLES, footer_links=[], ssr_mode=False, max_file_size=1, show_error=False,
    )  # fmt: skip
    guard = Guard(app, hosts=allowed_names(cfg.host, cfg.hosts), max_characters=cfg.max_characters)
    listening = socket.create_server((cfg.host, cfg.port))
    server = uvicorn.Server(uvicorn.Config(guard, log_level="warning"))
    serving = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    serving.start()
    while serving.is_alive() and not server.started:
        time.sleep(0.01)
    if server.started:
        run.terminal.say(f"the arena is open at http://{cfg.host}:{cfg.port} (Ctrl-C closes it)")
    while not run.stopping and serving.is_alive():
        time.sleep(0.2)
    if not run.stopping:
        raise RunFailed(
            "the page's server ended by itself; its messages are above. The votes are stored: start it again"
        )
    server.should_exit = True
    serving.join(timeout=5)
