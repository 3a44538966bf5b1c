"""lm-eval as the engine: its command line, and its results in our form."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from data.tokenizer import train_sentencepiece
from evals.harness import command, figures_from
from model.build import export_model, new_policy
from tests.published_votes import SCRIPT
from tests.tiny_models import shaken, tiny_config

CONF = Path(__file__).parents[2] / "conf" / "task" / "lm_eval.yaml"


def test_results_become_figures_with_intervals_that_stay_between_0_and_1():
    measures = {"alias": "own", "acc,none": 0.25, "acc_stderr,none": 0.12, "word_perplexity,none": 9.0}
    figures = figures_from({"results": {"own": measures}, "n-samples": {"own": {"effective": 12}}})
    assert [row["measure"] for row in figures] == ["acc", "word_perplexity"]
    assert 0 < figures[0]["lower"] < 0.25 < figures[0]["upper"] < 1 and figures[0]["n"] == 12
    assert figures[1]["reason"] == "lm-eval gives no standard error"
    task = OmegaConf.merge(OmegaConf.load(CONF), {"policy": "p", "tasks": ["arc_easy", "hellaswag"], "num_fewshot": 5})
    words = command(task, Path("/m"), Path("/r"))
    assert "arc_easy,hellaswag" in words and words[words.index("--num_fewshot") + 1] == "5" and "--limit" not in words


def test_a_folder_without_a_model_is_refused(tmp_path, run_script, capsys):
    words = ("task=lm_eval", f"task.policy={tmp_path}", "task.tasks=[arc_easy]", f"hydra.run.dir={tmp_path}/out")
    assert run_script(SCRIPT, *words) == 2
    said = capsys.readouterr().err  # without the extra, that is said first
    assert "lm_eval" in said or "holds no config.json" in said


@pytest.mark.slow
def test_an_exported_model_is_evaluated_in_one_command(tmp_path, run_script):
    pytest.importorskip("lm_eval")
    text = ["the sky is blue and the grass is green", "one two three four five"] * 20
    tokenizer = train_sentencepiece(text, 300, tmp_path / "tokenizer")
    policy = shaken(new_policy(tiny_config(vocab_size=tokenizer.vocab_size, max_length=256), seed=0))
    export_model(policy, tmp_path / "model", tokenizer)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [{"question": f"the sky is {i}", "choices": ["blue", "green", "two"], "answer": i % 3} for i in range(12)]
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "own.yaml").write_text(
        "task: own_choice\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tasks}/rows.jsonl}}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{question}}"\n'
        'doc_to_choice: "{{choices}}"\ndoc_to_target: answer\nmetric_list: [{metric: acc}]\n'
    )
    words = ("task=lm_eval", f"task.policy={tmp_path}/model", "task.tasks=[own_choice]", f"task.include_path={tasks}")
    assert run_script(SCRIPT, *words, f"hydra.run.dir={tmp_path}/out") == 0
    (figure,) = json.loads((tmp_path / "out/result.json").read_text())["figures"]
    assert (figure["benchmark"], figure["measure"], figure["n"]) == ("own_choice", "acc", 12)
