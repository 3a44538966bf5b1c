#!/bin/bash
# Two machines without a scheduler: starts vLLM on ENGINE_HOST over SSH, trains here, and stops it at the end.
#   conf/cluster/ppo_with_engine_ssh.sh ENGINE_HOST POLICY_DIR reward=math data.prompts=[FILES]
# This repository, POLICY_DIR and the run directory must lie at the same shared path on both machines.
set -euo pipefail

usage="usage: conf/cluster/ppo_with_engine_ssh.sh ENGINE_HOST POLICY_DIR SETTINGS..."
host=${1:?$usage} policy=${2:?$usage}
shift 2
port=${ENGINE_PORT:-8000} gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}

serve="cd $(printf %q "$PWD") && VLLM_SERVER_DEV_MODE=1 exec .venv-vllm/bin/vllm serve $(printf %q "$policy")"
serve+=" --host 127.0.0.1 --port $port --data-parallel-size $gpus --enable-scale-out"
serve+=" --logprobs-mode processed_logprobs"
# Its port is forwarded, so nobody else on the network reaches it. A terminal (-tt) takes the server down with this.
ssh -tt -o ExitOnForwardFailure=yes -L "$port:127.0.0.1:$port" "$host" "$serve" </dev/null >engine.log 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null && wait "$server" || true' EXIT

.venv/bin/python launch.py --nproc-per-node "$gpus" train_ppo.py dist=fsdp policy="$policy" \
    engine=vllm engine.url="http://127.0.0.1:$port" engine.max_tries=40 "$@"
