"""The scripts on several gloo ranks: the same losses as on one, checkpoints for any number of ranks, no rank left.

Every test starts processes of its own through launch.py, as a user would.
"""

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.tokenizer import load_tokenizer, train_sentencepiece
from model.build import export_model, load_policy, load_reward_model, new_policy, new_reward_model
from runtime.distributed import gathered, shard_model, start_ranks, stop_ranks
from tests.tiny_models import batch_of, random_ids, shaken, tiny_config

ROOT = Path(__file__).parents[2]
SCRIPTS = ("train_sft", "train_rm", "train_dpo", "train_ppo")
STEPS = 10
LORA = ("lora.rank=4",)
# Until the first step the margins of DPO are 0 but for rounding, which decides how many count as positive.
OF_ROUNDING = ("rewards/accuracy", "eval/accuracy")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A tiny policy and reward model of one tokenizer; real pairs, conversations and prompts."""
    home = tmp_path_factory.mktemp("scale")
    files = {"pairs": ("pref_hh_helpful_train.jsonl.gz", 20), "chats": ("sft_coffee_train.jsonl.gz", 20)}
    for name, (file, count) in files.items():
        with gzip.open(ROOT / "data" / "embedded" / file, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for _, line in zip(range(count), lines, strict=False)]
        if name == "chats":
            rows = [row | {"messages": row["messages"][:2]} for row in rows]
        for part, kept in (("train", rows[:16]), ("eval", rows[17:])):  # 3 held-out rows: uneven on 2 and on 4 ranks
            (home / f"{name}_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    texts = [row["chosen"] for row in map(json.loads, (home / "pairs_train.jsonl").read_text().splitlines())]
    tokenizer = train_sentencepiece(texts, 400, home / "tokenizer")
    config = tiny_config(vocab_size=tokenizer.vocab_size, max_length=128, head_dim=16)
    export_model(shaken(new_policy(config, seed=0)), home / "policy", tokenizer)
    export_model(shaken(new_reward_model(config, seed=1, precision="fp32")), home / "rm", tokenizer)
    return home


def command(inputs, script, directory, *words):
    """The script and its command line: a few steps of 8 rows, everything on."""
    pairs = [f"data.train=[{inputs}/pairs_train.jsonl]", f"data.eval=[{inputs}/pairs_eval.jsonl]", "eval_every=5"]
    pairs += ["data.max_length=96", "data.max_prompt_length=48"]
    own = {
        "train_sft": [f"data.train=[{inputs}/chats_train.jsonl]", f"data.eval=[{inputs}/chats_eval.jsonl]",
                      "eval_every=5", "sample_every=5", "num_samples=2", "data.max_length=96"],
        "train_rm": [*pairs, "normalise=gain_bias", "normalise_samples=3"],
        "train_dpo": [*pairs, "sample_every=5", "num_prompts=3", "num_samples=2", f"ref_cache={directory}_cache"],
        "train_ppo": [f"data.prompts=[{inputs}/chats_train.jsonl]", f"data.eval=[{inputs}/chats_eval.jsonl]",
                      f"reward_model={inputs}/rm", "minibatch_size=4", "ppo_epochs=2", "kl_exact_every=5",
                      "eval_every=5", "missing_eos=none"],
    }  # fmt: skip
    shared = [
        f"policy={inputs}/policy",
        f"num_steps={STEPS}",
        "batch_size=8",
        "micro_batch_size=2",
        "save_every=5",
        "optim.lr=1e-3",
        "optim.warmup_steps=0",
        "optim.schedule=constant",
        "log.wandb=disabled",
        "sampling.max_new_tokens=6",
        f"hydra.run.dir={directory}",
    ]
    return [script, *shared, *own[script], *words]


@pytest.fixture
def job(inputs, tmp_path):
    """job(script, run, *words) -> the script and its command line, for a run under tmp_path."""
    return lambda script, run, *words: command(inputs, script, tmp_path / run, *words)


@pytest.fixture(scope="session")
def one_rank(inputs, tmp_path_factory):
    """one_rank(*words) -> a directory with every script's run on one rank, made once."""
    done = {}

    def one_rank(*words):
        if words not in done:
            done[words] = tmp_path_factory.mktemp("one_rank")
            run(1, [command(inputs, script, done[words] / script, *words) for script in SCRIPTS], done[words])
        return done[words]

    return one_rank


def start(ranks, jobs, tmp_path, how=("dist=fsdp",)):
    """The process that runs the jobs one after the other, on so many ranks."""
    path = tmp_path / f"jobs_{ranks}_{len(list(tmp_path.iterdir()))}.json"
    path.write_text(json.dumps([[*words, *(how if ranks > 1 else [])] for words in jobs]))
    return launch(ranks, ROOT / "tests" / "run_scripts.py", path)


def launch(ranks, script, *words):
    command = [sys.executable, str(script), *map(str, words)]
    if ranks > 1:
        launcher = [sys.executable, "launch.py", "--nproc-per-node", str(ranks)]
        command = [*launcher, "--master-addr", "localhost", "--master-port", str(free_port()), *command[1:]]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def run(ranks, jobs, tmp_path, *how):
    finish(start(ranks, jobs, tmp_path, *how))


def finish(process):
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output[-4000:]
    return output


def figures(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def assert_same_curve(one, many, but="-", rel=1e-5):
    left, right = figures(one), figures(many)
    assert [row.keys() for row in left] == [row.keys() for row in right] and len(left) >= 4
    for a, b in zip(left, right, strict=True):
        for name in {n for n in a if not n.startswith(but)} - set(OF_ROUNDING if a["step"] <= 1 else ()):
            assert b[name] == pytest.approx(a[name], rel=rel, abs=1e-5), f"step {a['step']}: {name}"


def assert_same_weights(one, many):
    left, right = (load_file(path / "model" / "model.safetensors") for path in (one, many))
    assert left.keys() == right.keys()
    for name in left:
        assert (left[name] - right[name]).abs().max() < 1e-4, name


def test_sft_on_two_ranks_is_sft_on_one(job, tmp_path):
    words = ["num_steps=4", "save_every=0", "sample_every=4"]
    run(1, [job("train_sft", "one", *words)], tmp_path)
    run(2, [job("train_sft", "two", *words)], tmp_path)
    assert_same_curve(tmp_path / "one", tmp_path / "two")
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == sorted(p.name for p in (tmp_path / "two").iterdir())
    load_policy(tmp_path / "two" / "model")  # refuses what is missing, left over or misshapen


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_next"])
def test_gated_deltanets_and_shared_experts_on_two_ranks_are_those_on_one(family, inputs, job, tmp_path):
    tokenizer = load_tokenizer(inputs / "policy")
    config = tiny_config(family, vocab_size=tokenizer.vocab_size, max_length=128, head_dim=16, num_layers=3)
    export_model(shaken(new_policy(config, seed=0)), tmp_path / "policy", tokenizer)
    words = [f"policy={tmp_path}/policy", "num_steps=4", "save_every=0", "eval_every=4", "optim.lr=1e-4"]
    for ranks, name in ((1, "one"), (2, "two")):
        jobs = [job(script, f"{name}_{script}", *words) for script in ("train_sft", "train_ppo")]
        run(ranks, jobs, tmp_path)
    for script in ("train_sft", "train_ppo"):
        one, two = tmp_path / f"one_{script}", tmp_path / f"two_{script}"
        assert_same_curve(one, two, but="experts/", rel=2e-4)  # means over forwards; the recurrence's rounding
        assert_same_weights(one, two)


@pytest.fixture
def group_of_one(monkeypatch):
    """What start_ranks("fsdp") reads; the test starts and stops the group."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))


def test_no_thread_of_gloo_outlives_the_process_group(group_of_one):
    before = set(os.listdir("/proc/self/task"))  # other tests' threads are not this one's matter

    def threads():
        new = set(os.listdir("/proc/self/task")) - before
        return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm") if path.parts[-2] in new]

    def train():
        _, _, device = start_ranks("fsdp")
        policy = shard_model(new_policy(tiny_config(), seed=0), device, shard_size=None, cpu_offload=False)
        policy.logprobs(*batch_of([(random_ids(5, 1), random_ids(4, 2))], "right")).sum().backward()
        assert any("gloo" in name for name in threads())

    train()
    stop_ranks()
    for _ in range(100):  # a thread that was told to end may need a moment
        if not any("gloo" in name for name in threads()):
            return
        time.sleep(0.1)
    raise AssertionError(threads())


def test_weights_in_bf16_products_travel_in_bf16_and_are_exported_whole(inputs, tmp_path, group_of_one):
    """What lies on a rank, its gradients and what is exported are float32, the export of a rollout's server too."""
    _, _, device = start_ranks("fsdp")
    try:
        for path, load in ((inputs / "policy", load_policy), (inputs / "rm", load_reward_model)):
            model = shard_model(load(path, precision="bf16"), device, shard_size=None, cpu_offload=False)
            rows = batch_of([(random_ids(5, 1), random_ids(4, 2))], "right")
            (model.score if hasattr(model, "score") else model.logprobs)(*rows).sum().backward()
            learned = [p for p in model.parameters() if p.grad is not None]
            assert {p.dtype for p in learned} == {p.grad.dtype for p in learned} == {torch.float32}
            with torch.no_grad():
                for p in learned:
                    p.mul_(1.001)  # a step too small for bf16
            with gathered(model):
                assert not hasattr(model, "head") or model.head.weight.dtype == torch.float32
                assert all(p.dtype == torch.bfloat16 for p in model.transformer.parameters())
                export_model(model, tmp_path / "model", load_tokenizer(inputs / "policy"))
                assert model.transformer.embed.weight.dtype == torch.bfloat16  # as it was
            before, after = (load_file(home / "model.safetensors") for home in (path, tmp_path / "model"))
            for name in before:
                assert torch.equal(after[name], before[name] * 1.001), name
    finally:
        stop_ranks()


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), LORA], ids=["full", "lora"])
def test_two_ranks_in_bf16_are_one_within_what_a_seed_or_fp32_moves(job, tmp_path, words):
    words = [*words, "num_steps=6", "save_every=0"]
    others = {"one": ["precision=bf16"], "seed": ["precision=bf16", "seed=1"], "fp32": ["precision=fp32"]}
    jobs = [job(script, f"{kind}_{script}", *words, *more) for kind, more in others.items() for script in SCRIPTS]
    run(1, jobs, tmp_path)
    run(
        2,
        [job(script, f"two_{script}", *words, "precision=bf16", "micro_batch_size=2") for script in SCRIPTS],
        tmp_path,
    )
    for script in SCRIPTS:
        runs = {kind: figures(tmp_path / f"{kind}_{script}") for kind in (*others, "two")}
        for name in ("objective/loss", "objective/score", "eval/loss"):
            curves = {kind: [row[name] for row in rows if name in row] for kind, rows in runs.items()}
            if curves["one"]:
                moved = {
                    kind: max(abs(a - b) for a, b in zip(curves["one"], curve, strict=True))
                    for kind, curve in curves.items()
                }
                noise = max(moved["seed"], moved["fp32"])
                noise *= 3 if script == "train_ppo" else 1  # a rounding may draw other tokens, as another seed does
                assert moved["two"] < noise, f"{script} {name}: {moved}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, how, words",
    [
        (2, ["dist=fsdp"], ()),
        (4, ["dist=fsdp"], ()),
        (4, ["dist=hsdp", "dist.shard_size=2"], ()),
        (2, ["dist=fsdp", "dist.cpu_offload=true"], ()),
        (2, ["dist=fsdp"], LORA),
    ],
    ids=["2", "4", "hsdp", "offload", "lora"],
)
def test_every_script_gives_one_ranks_curve(one_rank, job, tmp_path, ranks, how, words):
    size = f"micro_batch_size={4 // ranks}"
    run(ranks, [job(script, script, *words, size) for script in SCRIPTS], tmp_path, how)
    for script in SCRIPTS:
        assert_same_curve(one_rank(*words) / script, tmp_path / script)
        assert_same_weights(one_rank(*words) / script, tmp_path / script)


@pytest.mark.slow
def test_no_rank_ever_holds_the_whole_model(tmp_path, inputs):
    shapes = dict(hidden_size=512, intermediate_size=1536, num_layers=12, num_heads=8, num_kv_heads=4, head_dim=64)
    policy = new_policy(tiny_config(vocab_size=4000, **shapes), seed=0)
    export_model(policy, tmp_path / "model", load_tokenizer(inputs / "policy"))
    megabytes = sum(weight.nbytes for weight in policy.parameters()) / 1e6  # 150
    peaks = {}
    for ranks in (1, 2):
        output = finish(launch(ranks, ROOT / "tests" / "load_on_ranks.py", tmp_path / "model"))
        peaks[ranks] = [float(line.split()[1]) for line in output.splitlines() if line.startswith("peak_mb")]
        assert len(peaks[ranks]) == ranks
    assert peaks[1][0] > megabytes > 1.4 * max(peaks[2])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_two_ranks_checkpoint_goes_on_on_another_number(job, tmp_path, ranks):
    run(1, [job("train_sft", "whole")], tmp_path)
    run(2, [job("train_sft", "part", "num_steps=5")], tmp_path)
    run(ranks, [job("train_sft", "part", "resume=true")], tmp_path)
    assert_same_curve(tmp_path / "whole", tmp_path / "part")
    assert_same_weights(tmp_path / "whole", tmp_path / "part")


@pytest.mark.slow
def test_a_killed_rank_stops_all_and_is_named(job, tmp_path):
    process = start(2, [job("train_sft", "long", "num_steps=100000", "sample_every=0", "eval_every=0")], tmp_path)
    try:
        wait_for(tmp_path / "long" / "metrics.jsonl", process)
        ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        os.kill(ranks[1], signal.SIGKILL)
        killed = time.monotonic()
        output, _ = process.communicate(timeout=60)
        assert process.returncode not in (0, None) and time.monotonic() - killed < 60
        assert "SIGKILL" in output
        assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_an_error_on_one_rank_stops_all_with_its_message(job, tmp_path):
    code = ["import os", "def score(prompts, completions):", "    return [0.0 / (os.environ['RANK'] != '1')]"]
    (tmp_path / "reward.py").write_text("\n".join(code))
    words = ["reward_model=null", f"reward={tmp_path}/reward.py:score", "value_start=policy"]
    process = start(2, [job("train_ppo", "run", *words)], tmp_path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode not in (0, None)
    assert "error: reward function score raised ZeroDivisionError" in output
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.slow
def test_ranks_that_are_told_to_stop_save_and_go_on_with_the_same_bits(job, tmp_path):
    """SIGTERM to the launcher: exit code 75, and what is resumed ends as what was left alone."""
    words = ("num_steps=40", "sample_every=0", "eval_every=0", "save_every=0")
    run(2, [job("train_sft", "whole", *words)], tmp_path)
    process = start(2, [job("train_sft", "stopped", *words)], tmp_path)
    wait_for(tmp_path / "stopped" / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and output.count("which is saved") == 2, output[-2000:]
    run(2, [job("train_sft", "stopped", *words, "resume=true")], tmp_path)
    whole, stopped = ((tmp_path / run / "model/model.safetensors").read_bytes() for run in ("whole", "stopped"))
    assert whole == stopped


@pytest.mark.slow
def test_bad_input_on_ranks_is_exit_code_2(job, tmp_path):
    process = start(2, [job("train_sft", "run", "num_steps=0")], tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "error: num_steps=0" in output and "Traceback" not in output


def wait_for(path, process):
    for _ in range(600):
        if path.exists() and path.stat().st_size:
            return
        assert process.poll() is None, process.stdout.read()[-4000:]
        time.sleep(0.2)
    raise AssertionError(f"{path} was not written")


@pytest.mark.slow
def test_each_job_of_a_sweep_runs_on_ranks_of_its_own(inputs, tmp_path):
    words = ["num_steps=4", "sample_every=0", "save_every=0", "precision=fp32"]
    script, *words = command(inputs, "train_sft", tmp_path / "one", *words)
    finish(launch(1, f"{script}.py", *words, "optim.lr=3e-3"))
    swept = [word for word in words if not word.startswith(("hydra.run.dir", "optim.lr"))]
    swept += ["+launcher=submitit_local", "hydra.launcher.tasks_per_node=2", "dist=fsdp", "optim.lr=1e-3,3e-3"]
    finish(launch(1, f"{script}.py", "-m", *swept, f"hydra.sweep.dir={tmp_path / 'sweep'}"))
    assert_same_curve(tmp_path / "one", tmp_path / "sweep" / "1")
    assert figures(tmp_path / "one") != figures(tmp_path / "sweep" / "0")
