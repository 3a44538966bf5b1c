import json
import os
import re
import sys
from urllib.parse import unquote

import pytest
from hydra.core.global_hydra import GlobalHydra

import run_recipe as recipes
from evals.recipe_report import gains_of, marked, read_figure, spoken
from runtime.report import table
from runtime.script import enter

FAKE_SCRIPT = """
import json, os, sys, time
words = dict(word.split("=", 1) for word in sys.argv[1:])
directory = words["hydra.run.dir"]
os.makedirs(directory, exist_ok=True)
with open(os.path.join(os.path.dirname(directory), "calls"), "a") as file:
    file.write(f"{words['name']} resume={words.get('resume', 'false')}\\n")
if os.environ.get("FAKE_KILLED") == "while loading":
    sys.exit(75)
with open(os.path.join(directory, "run.json"), "w") as file:
    file.write(json.dumps({"started": time.time()}))
with open(os.path.join(directory, "metrics.jsonl"), "w") as file:
    file.write('{"step": 0, "eval/loss": 3.0}\\n{"step": 9, "eval/loss": 1.25}\\n')
with open(os.path.join(directory, "samples.jsonl"), "w") as file:
    for step, said in ((0, "gibberish"), (9, "a latte, please")):
        file.write(json.dumps({"step": step, "prompt": "What?", "completion": said, "reference": "tea"}) + "\\n")
with open(os.path.join(directory, "out"), "w") as file:
    file.write(words["seed"])
sys.exit(int(os.environ.get("FAKE_EXIT", "0")))
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """recipe(*words) -> exit code of a recipe of two steps, run in this process, whose script only notes its call."""
    (tmp_path / "recipe").mkdir()
    (tmp_path / "input.txt").write_text("first")
    (tmp_path / "script.py").write_text(FAKE_SCRIPT)
    (tmp_path / "recipe" / "two.yaml").write_text(
        "# @package _global_\nname: two\nsteps:\n"
        f"  - {{name: a, run: 'script.py name=a data.train=[{tmp_path / 'input.txt'}]', figures: [eval/loss]}}\n"
        "  - {name: b, run: 'script.py name=b policy=${dir}/a/out data.train=[x]', figures: [eval/loss]}\n"
    )
    (tmp_path / "script.yaml").write_text("defaults: [train_sft]\n")
    monkeypatch.setattr(recipes, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)

    def recipe(*words: str) -> int:
        where = ["--config-dir", str(tmp_path), "recipe=two", f"dir={tmp_path / 'out'}"]
        monkeypatch.setattr(sys, "argv", ["run_recipe.py", *where, *words])
        GlobalHydra.instance().clear()
        try:
            enter(recipes.run_recipe, "run_recipe")
        except SystemExit as exit:
            return exit.code
        return 0

    yield recipe
    GlobalHydra.instance().clear()


@pytest.fixture
def calls(tmp_path):
    """calls() -> what the scripts were called with since the last look."""
    path = tmp_path / "out" / "calls"

    def calls() -> list[str]:
        said = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return said

    return calls


def test_a_chain_runs_once_and_shows_figures_and_texts(recipe, calls, tmp_path, capfd):
    assert recipe() == 0
    assert calls() == ["a resume=false", "b resume=false"]
    told = capfd.readouterr().out
    for word in ("eval/loss", "1.25", "before: gibberish", "after: a latte, please"):
        assert word in told
    page = (tmp_path / "out" / "report.html").read_text()
    for word in ("a/metrics.jsonl", "1.25", "a latte, please", "python script.py name=a"):
        assert word in page
    assert "http" not in page and "src=" not in page.replace('src="data:', "")  # opens without a network
    assert "after a</dt><dd><mark>a latte, please</mark>" in page and str(tmp_path) not in page
    links = re.findall('href="([^"]+)"', page)
    assert "b/samples.jsonl" in links and all((tmp_path / "out" / unquote(link)).is_file() for link in links)
    assert page.count("<img") == 2  # a picture a step, of the figures that the recipe names
    assert recipe() == 0
    assert calls() == [] and "done before" in capfd.readouterr().out


def test_seeds_go_as_far_as_those_of_the_scripts(recipe, calls, capfd, tmp_path):
    assert recipe("all.seed=4294967296") == 2
    assert "a.seed=4294967296 must be at most 4294967295" in capfd.readouterr().err
    two = tmp_path / "recipe" / "two.yaml"
    text = two.read_text()
    two.write_text(text.replace("name=b", "name=b seed=4294967296"))
    assert recipe("~all.seed") == 2 and calls() == []  # the first step is not run for nothing
    assert "b.seed=4294967296" in capfd.readouterr().err
    two.write_text(text)
    assert recipe("all.seed=4294967295") == 0 and calls() == ["a resume=false", "b resume=false"]
    assert (tmp_path / "out" / "b" / "out").read_text() == "4294967295"


def test_steps_with_seeds_of_their_own_keep_them_apart(recipe, tmp_path):
    two = tmp_path / "recipe" / "two.yaml"
    two.write_text(two.read_text().replace("name=b", "name=b seed=2"))
    for seed, used in ((0, ("0", "2")), (3, ("3", "3002"))):
        assert recipe(f"all.seed={seed}") == 0
        assert tuple((tmp_path / "out" / step / "out").read_text() for step in "ab") == used


def test_the_page_begins_with_what_was_asked_and_what_came_of_it(tmp_path):
    look = {"step": 0, "kl": 0.0, "gold": {"value": 0.5}, "proxy": 1.0}
    run = {"looks": [look, look | {"kl": 2.5, "gold": {"value": 0.75}}]}
    gains = {
        "up": {"value": 0.25, "lower": 0.2, "upper": 0.3, "n": 64},
        "flat": {"value": 0.25, "lower": -0.1, "upper": 0.6, "n": 3},
    }
    methods = {name: {"gain": gain, "seeds": 1 if name == "up" else 3, "runs": [run]} for name, gain in gains.items()}
    (tmp_path / "result.json").write_text(json.dumps({"task": "gains", "reward_fn": "taste", "methods": methods}))
    up, flat = gains_of(tmp_path)
    assert up == (
        "up: better by taste: 0.5 before, 0.75 after (+0.250, 95 % interval 0.2 to 0.3, 64 prompts), 2.5 nats from "
        "its start."
    )
    assert flat.startswith("flat: no sure change by taste") and "3 seeds" in flat
    assert gains_of(tmp_path / "elsewhere") == []


def test_words_that_an_answer_did_not_have_are_marked_and_escaped():
    assert marked("Ok <b> soon", "Ok, <b> very soon") == "<mark>Ok,</mark> &lt;b&gt; <mark>very</mark> soon"
    assert (
        spoken("<s><|user|> Hi<|end|><|assistant|> Yes?<|end|><|user|> Tea<|end|><|assistant|>")
        == "user: Hi assistant: Yes? user: Tea"
    )


def test_what_follows_a_change_runs_again_and_nothing_else(recipe, calls, tmp_path):
    recipe()
    calls()
    (tmp_path / "input.txt").write_text("second")  # a's output does not depend on it, so b stays
    assert recipe() == 0 and calls() == ["a resume=false"]
    assert recipe("all.seed=1") == 0 and calls() == ["a resume=false", "b resume=false"]
    (tmp_path / "out" / "b" / "out").unlink()
    assert recipe("all.seed=1") == 0 and calls() == ["b resume=true"]


def test_a_pattern_stands_for_the_files_that_it_matches(recipe, calls, tmp_path):
    path = tmp_path / "recipe" / "two.yaml"
    path.write_text(path.read_text().replace(f"[{tmp_path / 'input.txt'}]", f'["{tmp_path}/in*.txt"]'))
    assert recipe() == 0 and len(calls()) == 2 and recipe() == 0 and calls() == []
    (tmp_path / "input.txt").write_text("second")
    assert recipe() == 0 and calls() == ["a resume=false"]


def test_what_runs_remember_for_each_other_is_no_input(recipe, calls, tmp_path):
    (tmp_path / "ref_cache").mkdir()
    (tmp_path / "script.yaml").write_text(f"defaults: [train_sft, _self_]\nref_cache: {tmp_path / 'ref_cache'}\n")
    assert recipe() == 0 and len(calls()) == 2
    (tmp_path / "ref_cache" / "of_another_run").write_text("log-probs")
    assert recipe() == 0 and calls() == []


def test_a_column_of_texts_reads_from_the_left_with_its_header():
    page = table([["figure", "said"], [1.5, "a latte, please"], [2.5, "tea"]])
    assert (
        page.count('class="text short"') == 3
        and '<td class="text short">tea</td>' in page
        and '<td class="">1.5</td>' in page
    )


def test_a_figure_of_a_result_is_named_by_its_path(tmp_path):
    (tmp_path / "result.json").write_text('{"models": {"ppo": {"sft": {"win_rate": 61.5}}}}')
    found = read_figure(tmp_path, "result.json:models.ppo.sft.win_rate")
    assert found == ("models.ppo.sft.win_rate", (None, 61.5), "result.json")
    with pytest.raises(ValueError, match="models.dpo"):
        read_figure(tmp_path, "result.json:models.dpo")


def test_an_interrupted_step_stops_the_chain_and_goes_on_where_it_was(recipe, calls, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("FAKE_EXIT", "75")
    assert recipe() == 75
    assert calls() == ["a resume=false"] and "was interrupted" in capfd.readouterr().out
    monkeypatch.delenv("FAKE_EXIT")
    manifest = tmp_path / "out" / "manifests" / "a.json"
    until_then = json.loads(manifest.read_text())["seconds"]
    assert recipe() == 0 and calls() == ["a resume=true", "b resume=false"]
    assert 0 < until_then < json.loads(manifest.read_text())["seconds"]  # both parts count


@pytest.mark.parametrize("killed", ["while loading", "", "while loading, then training"])
def test_a_changed_step_never_goes_on_with_what_it_replaces(recipe, calls, tmp_path, monkeypatch, killed):
    """Stopped before its script has replaced the old directory, a step begins there; stopped later, it goes on."""
    assert recipe() == 0 and calls()
    (tmp_path / "input.txt").write_text("second")
    for moment in killed.split(", then "):
        monkeypatch.setenv("FAKE_KILLED", moment)
        monkeypatch.setenv("FAKE_EXIT", "75")
        assert recipe() == 75 and calls() == ["a resume=false"]
    monkeypatch.delenv("FAKE_KILLED")
    monkeypatch.delenv("FAKE_EXIT")
    assert recipe() == 0
    assert calls() == [f"a resume={'false' if killed == 'while loading' else 'true'}"]


def test_a_failed_step_stops_the_chain_and_says_how_to_go_on(recipe, calls, monkeypatch, capfd):
    monkeypatch.setenv("FAKE_EXIT", "2")
    assert recipe() == 2
    assert len(calls()) == 1 and "the same command tries it again" in capfd.readouterr().out


def test_a_wrong_key_in_the_last_step_is_found_before_the_first_runs(recipe, calls, tmp_path, capfd):
    path = tmp_path / "recipe" / "two.yaml"
    path.write_text(path.read_text().replace("name=b", "nmae=b"))
    assert recipe() == 2
    assert calls() == [] and "nmae" in capfd.readouterr().err


def test_a_recipe_of_unchanged_outputs_is_told_by_content_not_by_clock(recipe, calls, tmp_path):
    recipe()
    calls()
    for path in (tmp_path / "out").rglob("*"):
        os.utime(path)
    manifest = json.loads((tmp_path / "out" / "manifests" / "a.json").read_text())
    assert manifest["outputs"].keys() == {"metrics.jsonl", "samples.jsonl", "out", "run.json"}
    assert recipe() == 0 and calls() == []
