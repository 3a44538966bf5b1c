"""How often flex_attention is compiled, counted by torch's own counter on a CPU: no code is generated for that."""

import torch
from torch._dynamo.testing import CompileCounter

from model import attention
from model.packing import pack
from tests.tiny_models import batch_of, random_ids


def test_one_compilation_serves_streams_of_every_length(monkeypatch):
    """Without `mark_dynamic` the first stream was compiled for its two tiles, and the next one compiled anew."""
    counter = CompileCounter()
    monkeypatch.setattr(attention, "_compiled", None)
    run = attention.compiled_flex(backend=counter)
    for lengths in ([130, 71], [300, 20, 57], [129], [513, 400]):
        rows = [(random_ids(length // 2, 1), random_ids(length - length // 2, 2)) for length in lengths]
        stream = pack(*batch_of(rows, "right"))
        q, k, v = (torch.randn(1, heads, len(stream.tokens), 16) for heads in (4, 2, 2))
        mask = stream.blocks.block_mask(None)
        attention.mark_dynamic(mask)
        run(q, k, v, block_mask=mask, enable_gqa=True)
        assert counter.frame_count == 1, lengths
