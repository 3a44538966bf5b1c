"""The scripts of conf/cluster, run with stand-ins for Slurm, SSH, vLLM and the trainer that write down their words."""

import os
import subprocess
from pathlib import Path

import pytest

CLUSTER = Path(__file__).parents[2] / "conf" / "cluster"
WAITS = 'trap "echo stopped >> $LOG; exit 0" TERM; while true; do sleep 0.05; done'
STANDINS = {
    "bin/scontrol": '[ "$1" = show ] && printf "trainer1\\nengine2\\n" || echo "scontrol $*" >> $LOG',
    "bin/srun": 'while [ "${1#--}" != "$1" ]; do echo "srun $1" >> $LOG; shift; done; exec "$@"',
    "bin/nvidia-smi": "echo one; echo two",
    "bin/ssh": f'echo "ssh $*" >> $LOG; {WAITS}',
    ".venv-vllm/bin/vllm": f'echo "$VLLM_SERVER_DEV_MODE vllm $*" >> $LOG; {WAITS}',
    ".venv/bin/python": 'sleep 0.5; echo "python $*" >> $LOG; exit $CODE',
}


@pytest.fixture
def run(tmp_path):
    """run(script, *words, code=0) -> (exit code, what the stand-ins wrote)."""
    for name, body in STANDINS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def run(script, *words, code=0):
        slurm = {"SLURM_JOB_NODELIST": "x[1-2]", "SLURM_JOB_ID": "41", "SLURM_GPUS_ON_NODE": "4"}
        env = os.environ | slurm | {"LOG": str(tmp_path / "log"), "CODE": str(code)}
        env["PATH"] = f"{tmp_path}/bin:{env['PATH']}"
        done = subprocess.run(["bash", CLUSTER / script, *words], cwd=tmp_path, env=env, timeout=60)
        return done.returncode, (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""

    return run


@pytest.mark.parametrize("code", [0, 3, 75])
def test_the_slurm_script_starts_an_engine_on_one_node_and_the_training_on_the_other(run, code):
    got, log = run("ppo_with_engine.sbatch", "a policy", "reward=math", code=code)
    assert got == code
    assert "1 vllm serve a policy --host 0.0.0.0 --port 20041" in log and "--enable-scale-out" in log
    assert "python launch.py --nproc-per-node 4 train_ppo.py dist=fsdp policy=a policy engine=vllm" in log
    assert "engine.url=http://engine2:20041" in log and log.rstrip().count("reward=math") == 1
    assert "srun --nodelist=engine2" in log and "srun --nodelist=trainer1" in log and "stopped" in log
    assert ("scontrol requeue 41" in log) == (code == 75)


def test_the_ssh_script_takes_its_server_down_with_it(run):
    got, log = run("ppo_with_engine_ssh.sh", "other", "a policy", "reward=math", code=5)
    assert got == 5 and "-L 8000:127.0.0.1:8000 other" in log and "vllm serve a\\ policy" in log
    assert "--nproc-per-node 2 train_ppo.py dist=fsdp policy=a policy engine=vllm" in log and "stopped" in log


@pytest.mark.parametrize("script", ["ppo_with_engine.sbatch", "ppo_with_engine_ssh.sh"])
def test_a_script_without_its_arguments_says_its_usage(run, script, capfd):
    assert run(script)[0] != 0
    assert "usage" in capfd.readouterr().err
