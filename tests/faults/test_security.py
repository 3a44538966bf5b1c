"""What comes from outside is read, never run; what is secret is not written; what a model wrote is shown as text."""

import ast
import json
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

import train_sft
from model.weights.paths import find_model
from rollouts.reward_functions import load_reward_function
from runtime import report
from runtime.run import main

ROOT = Path(__file__).parents[2]
PACKAGES = [path.parent for path in ROOT.glob("*/__init__.py")]
CODE = [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in package.rglob("*.py"))]
RUNS_CODE = {
    "pickle",
    "dill",
    "marshal",
    "shelve",
    "joblib",
    "cloudpickle",
    "diskcache",
}  # formats that run code when they are read
NASTY = "</td></table><script>alert(1)</script><img src=x onerror=alert(1)> [/bold] & \"'"


def test_every_package_is_searched():
    assert {path.name for path in PACKAGES} >= {"data", "evals", "model", "rollouts", "runtime"}


def test_every_refusal_is_a_sentence():
    """docs/errors.md shows one row a kind; the rest says by itself what is wrong: a ValueError without words, or with
    a value alone, tells nobody anything."""
    bare = []
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("ValueError", "RunFailed", "RewardFailed"):
                texts = [n.value for n in ast.walk(call) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
                given = call.args and isinstance(
                    call.args[0], ast.Name | ast.Attribute | ast.Call | ast.Subscript
                )  # made elsewhere
                if not given and not "".join(texts).strip():
                    bare.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
            elif isinstance(node, ast.Raise) and isinstance(call, ast.Name) and call.id == "ValueError":
                bare.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert bare == []


def test_no_code_reads_a_format_that_can_run_code():
    """Nor does any evaluate text, load tensors without weights_only, or hand a shell a line."""
    found = []
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path.relative_to(ROOT)}: import {n}" for n in names if n.split(".")[0] in RUNS_CODE]
            if not isinstance(node, ast.Call):
                continue
            called, words = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            bad = called in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen")
            bad |= called == "torch.load" and words.get("weights_only") != "True"
            bad |= words.get("shell", "False") != "False" or words.get("trust_remote_code", "False") != "False"
            bad |= words.get("allow_pickle", "False") != "False"
            found += [f"{path.relative_to(ROOT)}: {called}"] if bad else []
    assert found == []


@pytest.mark.parametrize(
    "place", ["os:system", "..losses:dpo_loss", "data..rewards:call_reward", "/etc/passwd:x", ":f"]
)
def test_a_reward_outside_the_project_must_be_named_as_a_file(place):
    told = "not a module of this project|must be NAME, package.module:function|is not a ready reward"
    with pytest.raises(ValueError, match=told):
        load_reward_function(place)


@pytest.mark.parametrize("path", ["json/../../x.gguf", "json//etc/passwd", "../x/y.gguf", "json/..", "os.path/x"])
def test_a_path_in_a_package_cannot_leave_it(path):
    with pytest.raises(ValueError, match="leads out|must read"):
        find_model(f"package:{path}")


def test_keys_in_the_environment_are_not_in_what_a_run_leaves(run_script, sft_words, tmp_path, monkeypatch, capfd):
    for name in ("OPENAI_API_KEY", "WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "sk-fake-0123456789")
    words = [*sft_words, "num_steps=1", "log.wandb=offline", f"hydra.run.dir={tmp_path}/run"]
    assert run_script(train_sft, *words) == 0
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    told = capfd.readouterr()
    assert "sk-fake" not in told.out + told.err
    assert not [path for path in files if b"sk-fake" in path.read_bytes()]


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.text = set(), ""

    def handle_starttag(self, tag, attributes):
        self.seen |= {tag, *(name for name, _ in attributes)}

    def handle_data(self, data):
        self.text += data


def test_a_report_shows_what_a_model_wrote_as_text(tmp_path, capsys):
    blocks = [report.heading(NASTY), report.paragraph(NASTY), report.bullets([NASTY])]
    rows = [[NASTY, "figure"], [NASTY, 1.0]]
    report.write_page(tmp_path / "page.html", NASTY, *blocks, report.table(rows, kinds=["bad"]))
    page = Tags()
    page.feed((tmp_path / "page.html").read_text())
    assert not page.seen & {"script", "img", "onerror", "src"}
    assert page.text.count(NASTY) == 7
    report.print_table("names", ["name", "figure"], rows[1:])  # brackets are no markup of the screen either
    assert "[/bold]" in capsys.readouterr().out


def test_a_row_of_data_may_hold_anything_and_stays_text(tmp_path, run_script, sft_words, capfd):
    """Markup of the terminal, control characters, line separators: samples are printed and logged as they are."""
    talk = [
        {"role": "user", "content": f"[/red] [bold] \x1b[2J \u2028 {NASTY}"},
        {"role": "assistant", "content": "[/]"},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"messages": talk}) + "\n" for _ in range(8)))
    words = [word for word in sft_words if not word.startswith(("data.", "num_samples", "sample_every"))]
    words += [f"data.train=[{data}]", f"data.eval=[{data}]", "num_steps=1", "sample_every=1"]
    words += ["num_samples=2", "model.vocab_size=340"]
    assert run_script(train_sft, *words, f"hydra.run.dir={tmp_path}/run") == 0
    rows = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().rstrip("\n").split("\n")]
    assert NASTY in rows[0]["prompt"] and "[/]" in rows[0]["reference"]


@pytest.mark.parametrize(
    "script, words",
    [
        ("arena", ["models={a:{base_url:http://127.0.0.1:9/v1,model:m,api_key:sk-fake-0123456789},b:x}"]),
        ("make_data", ["method=camel", "client=openai", "client.model=m", "+client.api_key=sk-fake-0123456789"]),
        ("make_data", ["method=camel", "client=openai", "client.model=m", "client.api_key_env=sk-fake-0123456789"]),
    ],
)
def test_a_key_on_the_command_line_is_refused_and_written_nowhere(script, words, tmp_path, monkeypatch, capfd):
    module = import_module("arena.serving" if script == "arena" else script)
    monkeypatch.setattr("sys.argv", [f"{script}.py", *words, f"hydra.run.dir={tmp_path}/run"])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as exit:
        main(module.serve if script == "arena" else module.make_data, script)
    told = capfd.readouterr()
    assert exit.value.code == 2
    message = told.err.partition("error: ")[2]  # before it Hydra repeats the command
    assert message and "sk-fake" not in told.out + message and "Traceback" not in told.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"sk-fake" in path.read_bytes()]
