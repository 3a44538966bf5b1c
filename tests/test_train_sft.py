import hashlib
import json
import os
import signal
import struct
from pathlib import Path

import pytest
import torch

import train_sft
from data.sft import sft_loader
from data.tokenizer import load_tokenizer
from model.build import load_policy
from model.packing import make_rows
from runtime.metrics import read_log
from runtime.run import Run


@pytest.fixture
def sft(run_script, sft_words):
    """sft(directory, *overrides) -> exit code of a short training there."""
    return lambda directory, *words: run_script(train_sft, *sft_words, f"hydra.run.dir={directory}", *words)


def weights_hash(directory: Path) -> str:
    return hashlib.sha256((directory / "model" / "model.safetensors").read_bytes()).hexdigest()


def transformers_losses(cfg, start: Path, batches: list[list[dict]], pad_id: int) -> list[float]:
    """The loop that anybody would write with transformers and torch: mean NLL of the targets, AdamW, clipping."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    model.model.embed_tokens.padding_idx = None  # it would drop the gradient of a token that happens to be the pad id
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": cfg.optim.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.optim.lr, betas=tuple(cfg.optim.betas), eps=cfg.optim.eps)
    losses = []
    for batch in batches:
        rows = make_rows(batch, pad_id)
        labels = rows.input_ids.masked_fill(~rows.completion_mask, -100)
        loss = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask.long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_the_loss_curve_is_that_of_a_plain_transformers_loop(sft, compose, sft_words, tmp_path):
    quiet = ["eval_every=0", "sample_every=0", "save_every=0", "optim.lr=1e-3"]
    assert sft(tmp_path / "start", *quiet, "num_steps=1") == 0
    start = tmp_path / "start" / "model"
    words = ["num_steps=20", "optim.schedule=constant", "optim.weight_decay=0.1", "optim.max_grad_norm=0.5", *quiet]
    words += [word for word in sft_words if word.startswith(("data.", "batch_size", "micro_batch"))] + [
        f"policy={start}"
    ]
    cfg = compose("train_sft", *words)
    with Run(compose("train_sft", *words, "log.wandb=disabled")) as run:
        train_sft.train(run.cfg, run)
    ours = [row["objective/loss"] for row in read_log(tmp_path / "run" / "metrics.jsonl")]
    tokenizer = load_tokenizer(start)
    loader = sft_loader(cfg.data, tokenizer, batch_size=cfg.batch_size, seed=cfg.seed, rank=0, world_size=1)
    theirs = transformers_losses(cfg, start, [next(loader) for _ in range(20)], tokenizer.pad_id)
    assert len(ours) == 20 and theirs[0] - theirs[-1] > 0.3, "nothing was learned, so nothing was compared"
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 1e-4


def test_the_size_of_micro_batches_changes_nothing_but_rounding(sft, tmp_path, read_metrics):
    for size in (8, 2, 1):
        assert sft(tmp_path / str(size), f"micro_batch_size={size}", "sample_every=0") == 0
    whole, *parts = [read_metrics(tmp_path / str(size)) for size in (8, 2, 1)]
    for part in parts:
        for a, b in zip(whole, part, strict=True):
            assert a == pytest.approx(b, rel=2e-5)


def test_a_template_that_strips_thinking_trains_a_row_for_each_turn(sft, run_script, tmp_path, read_metrics, capsys):
    """The whole command on a checkpoint with such a template: what is learned, said, shown and resumed."""
    words = ["num_steps=1", "eval_every=0", "sample_every=0", "save_every=0"]
    assert sft(tmp_path / "start", *words) == 0
    start = tmp_path / "start" / "model"
    settings = json.loads((start / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content and loop.last %}({{ m.reasoning_content }}) "
        "{% endif %}{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (start / "tokenizer_config.json").write_text(json.dumps(settings))
    thinks = [{"role": "assistant", "content": f"answer {i}", "reasoning_content": f"thought {i}"} for i in range(3)]
    asks = [{"role": "user", "content": f"question {i}"} for i in range(3)]
    talk = {"messages": [message for pair in zip(asks, thinks, strict=True) for message in pair]}
    plain = {"messages": [asks[0], {"role": "assistant", "content": "answer"}]}
    file = tmp_path / "talks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (plain, talk)))
    (start / "SHA256SUMS").unlink()
    words = [f"hydra.run.dir={tmp_path / 'out'}", f"policy={start}", f"data.train=[{file}]", "data.shuffle=false"]
    words += ["num_steps=2", "batch_size=4", "micro_batch_size=4", "view=true", "eval_every=0", "sample_every=0"]
    assert run_script(train_sft, *words, "log.wandb=disabled") == 0
    printed = capsys.readouterr().out
    assert "1 of 2 conversations become one row per assistant turn" in printed and "4 rows in total" in printed
    tokenizer = load_tokenizer(start)
    sizes = [len(tokenizer.encode(text)) + 1 for text in ("answer", *(f"(thought {i}) answer {i}" for i in range(3)))]
    assert [row["objective/tokens"] for row in read_metrics(tmp_path / "out")] == [sum(sizes)] * 2
    page = (tmp_path / "out" / "first_batch.html").read_text()
    assert page.count(f"{file}:2") == 3 and page.count(f"{file}:1") == 1


def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(sft, tmp_path, read_metrics, monkeypatch):
    """With dropout and NEFTune, so that every generator counts."""
    noise = ["residual_dropout=[0.1,0.3]", "neftune_alpha=5"]
    assert sft(tmp_path / "whole", *noise) == 0
    end_step = Run.end_step

    def interrupted(run, **words):
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        end_step(run, **words)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "end_step", interrupted)
        assert sft(tmp_path / "parts", *noise) == 75
    assert sft(tmp_path / "parts", *noise, "resume=true") == 0
    assert weights_hash(tmp_path / "parts") == weights_hash(tmp_path / "whole")
    assert read_metrics(tmp_path / "parts") == read_metrics(tmp_path / "whole")
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("parts", "whole")]
    assert samples[0] == samples[1]


def test_evaluation_and_samples_draw_nothing_from_the_training(sft, tmp_path):
    for name, words in {"seen": [], "blind": ["eval_every=0", "sample_every=0", "residual_dropout=[0.1,0.1]"]}.items():
        assert sft(tmp_path / name, "residual_dropout=[0.1,0.1]", *words) == 0
    assert weights_hash(tmp_path / "seen") == weights_hash(tmp_path / "blind")


def test_a_run_logs_what_it_promises(sft, tmp_path):
    assert sft(tmp_path) == 0
    rows = read_log(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(7))
    assert rows[0].keys() == {"step", "eval/loss", "eval/perplexity"}
    steps = {
        "step",
        "objective/loss",
        "objective/tokens",
        "optim/lr",
        "optim/grad_norm",
        "perf/tokens_per_second",
        "perf/peak_memory_gb",
        "perf/step_seconds",
    }
    for row in rows[1:]:
        assert row.keys() - {"eval/loss", "eval/perplexity"} == steps
        assert ("eval/loss" in row) == (row["step"] % 3 == 0)
    assert rows[-1]["eval/loss"] < rows[0]["eval/loss"] - 0.5, "six steps taught nothing"
    samples = read_log(tmp_path / "samples.jsonl")
    assert [row["step"] for row in samples] == [0, 0, 3, 3, 6, 6]
    assert {"prompt", "completion", "reference", "finish_reason"} < samples[0].keys()


def test_the_warm_up_begins_at_its_first_rate(sft, tmp_path):
    assert sft(tmp_path, "num_steps=2", "optim.warmup_steps=4", "sample_every=0", "eval_every=0", "save_every=0") == 0
    rates = [row["optim/lr"] for row in read_log(tmp_path / "metrics.jsonl")]
    assert rates == pytest.approx([2.5e-3, 5e-3])


def test_held_out_loss_is_the_mean_over_all_targets(sft, coffee, compose, sft_words, tmp_path):
    assert sft(tmp_path / "a") == 0
    tokenizer, policy = load_tokenizer(tmp_path / "a" / "model"), load_policy(tmp_path / "a" / "model")
    cfg = compose("train_sft", *sft_words)
    rows = make_rows(train_sft.eval_examples(cfg.data, tokenizer), tokenizer.pad_id)
    with torch.no_grad():
        logprobs = policy.logprobs(*rows)
    expected = -logprobs.sum().item() / rows.completion_mask.sum().item()
    assert read_log(tmp_path / "a" / "metrics.jsonl")[-1]["eval/loss"] == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_explodes_stops_the_run_with_exit_code_2(sft, tmp_path, capsys, monkeypatch, coffee):
    def poisoned(logprobs, mask, *, num_tokens):
        nll = torch.where(mask, -logprobs, 0.0)
        return nll.sum() / num_tokens * float("nan"), {"objective/loss": nll[mask].detach()}

    with monkeypatch.context() as patch:
        patch.setattr(train_sft, "sft_loss", poisoned)
        assert sft(tmp_path) == 1
    assert "step 1: the loss or its gradient is not finite" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_a_sweep_leaves_complete_runs_and_tears_each_down(run_script, sft_words, tmp_path, read_metrics):
    words = [w for w in sft_words if not w.startswith(("optim.lr", "num_steps"))]
    grid = ["-m", "optim.lr=1e-3,1e-2", "seed=0,1", f"hydra.sweep.dir={tmp_path}", "num_steps=2", "sample_every=0"]
    assert run_script(train_sft, *grid, *words) == 0
    runs = {path.name: read_metrics(path) for path in sorted(tmp_path.iterdir()) if path.is_dir()}
    assert sorted(runs) == ["0", "1", "2", "3"]
    assert all(len(rows) == 3 and (tmp_path / name / "model" / "config.json").exists() for name, rows in runs.items())
    assert len({weights_hash(tmp_path / name) for name in runs}) == 4
    alone = [*words, "optim.lr=1e-2", "seed=1", "num_steps=2", "sample_every=0", f"hydra.run.dir={tmp_path / 'alone'}"]
    assert run_script(train_sft, *alone) == 0
    assert weights_hash(tmp_path / "alone") == weights_hash(tmp_path / "3"), "a job depends on the jobs before it"


def wandb_records(path: Path) -> list:
    """The protobuf records of an offline run: a LevelDB log, blocks of 32 KB, records of crc, length, kind, data."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, records = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def test_wandbs_offline_run_holds_metrics_samples_config_and_group(sft, tmp_path, monkeypatch):
    import wandb

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert sft(tmp_path, "log.wandb=offline", "name=the_group", "num_steps=3") == 0
    wandb.teardown()  # its service writes the file, and may still be at it
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    records = wandb_records(file)
    kinds = [r.WhichOneof("record_type") for r in records]
    assert kinds.count("run") == 1, f"{file.stat().st_size} bytes: {kinds}"
    about = records[kinds.index("run")].run
    assert about.run_group == about.display_name == "the_group"
    config = {item.key: json.loads(item.value_json) for item in about.config.update}
    assert config["num_steps"] == 3 and config["optim"]["lr"] == 1e-2
    logged: dict[int, dict] = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            logged.setdefault(json.loads(items.pop("_step")), {}).update(items)
    for row in read_log(tmp_path / "metrics.jsonl"):
        step = row.pop("step")
        assert {name: json.loads(logged[step][name]) for name in row} == row
    assert logged[0]["samples/_type"] == '"table-file"' and logged[0]["samples/nrows"] == "2"
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/samples_0_*.table.json")
    first = read_log(tmp_path / "samples.jsonl")[0]
    assert first["completion"] in json.loads(table.read_text())["data"][0]
