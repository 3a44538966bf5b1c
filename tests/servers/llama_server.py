"""llama.cpp's server, run inside .venv-llamacpp: llama_server.py GGUF NAME PORT CONTEXT."""

import sys
import time

import xllamacpp

path, name, port, context = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.model_alias = path, {name}
params.hostnames, params.port = ["127.0.0.1"], int(port)
params.n_parallel, params.n_ctx = 2, 2 * int(context)
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
while True:
    time.sleep(60)
