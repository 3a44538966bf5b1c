"""AdamW with moments in 8 bits: Dettmers et al. 2022 (arXiv:2110.02861), quantised in blocks to the dynamic map.

It needs 2.03 bytes per weight instead of 8. Blocks lie within a row, so neither ranks nor a resume on another number of
ranks change a number. There is one difference: the square root of the second moment is stored. If the second moment
itself were stored, weights with a gradient below 1/2000 of the largest in their block would have a second moment of 0
and a first moment that is not 0.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

BLOCK = 256  # columns that share a scale
LEAST = 4096  # as in the paper, moments of smaller tensors and of vectors are not quantised
AT_ONCE = 2**24  # number of weights that are updated together


def dynamic_map(signed: bool) -> Tensor:
    """(256,) float32, rising: 0, 1, and numbers of 7 powers of ten whose mantissas double with each power."""
    values = [0.0, 1.0]
    for power in range(7):  # 10^-6 .. 10^0
        bounds = torch.linspace(0.1, 1, 2 ** (power + (not signed)) + 1, dtype=torch.float64)
        means = ((bounds[:-1] + bounds[1:]) / 2 * 10.0 ** (power - 6)).tolist()
        values += means + ([-x for x in means] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


MAPS = {"exp_avg": dynamic_map(True), "exp_avg_sq": dynamic_map(False)}


def quantize(x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (rows, columns) uint8 and scales (rows, blocks) float32 of x. Each block is divided by its largest
    magnitude and rounded to the nearest of `values`."""
    blocks = F.pad(x, (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    scales = blocks.abs().amax(-1)
    middles = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(blocks / scales.clamp(min=1e-38)[..., None], middles, out_int32=True)
    return codes.to(torch.uint8).flatten(1)[:, : x.shape[1]], scales


def dequantize(codes: Tensor, scales: Tensor, values: Tensor) -> Tensor:
    """(rows, columns) float32."""
    return values[codes.int()] * scales.repeat_interleave(BLOCK, 1)[:, : codes.shape[1]]


class AdamW8bit(torch.optim.Optimizer):
    """The parameter groups have the settings of AdamW: lr, betas, eps, weight_decay."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, group)

    def init_state(self, p: Tensor) -> None:
        state = self.state[p]
        state["step"] = 0
        small = p.ndim != 2 or p.numel() < LEAST
        for name in MAPS:
            if small:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
            else:
                zeros = torch.zeros_like(local(p))
                codes, scales = quantize(zeros[:1], MAPS[name].to(zeros.device))
                state[name] = like(p, codes.expand_as(zeros).contiguous(), p.shape[1])
                state[f"{name}_scale"] = like(p, scales.new_zeros(len(zeros), scales.shape[1]), scales.shape[1])

    def move(self, p: Tensor, group: dict) -> None:
        if not self.state[p]:
            self.init_state(p)
        state = self.state[p]
        state["step"] += 1
        values = {name: values.to(local(p).device) for name, values in MAPS.items()}
        weights, grads = local(p), local(p.grad)
        moments = {name: local(state[name]) for name in MAPS}
        if "exp_avg_scale" not in state:
            update(weights, grads, moments["exp_avg"], moments["exp_avg_sq"], state["step"], group)
            return
        scales = {name: local(state[f"{name}_scale"]) for name in MAPS}
        rows = max(1, AT_ONCE // p.shape[1])
        for start in range(0, len(weights), rows):
            some = slice(start, start + rows)
            m, root = (dequantize(moments[name][some], scales[name][some], values[name]) for name in MAPS)
            v = root.square_()
            update(weights[some], grads[some], m, v, state["step"], group)
            for name, x in (("exp_avg", m), ("exp_avg_sq", v.sqrt_())):
                moments[name][some], scales[name][some] = quantize(x, values[name])

    def load_state_dict(self, saved: dict) -> None:
        """Load the moments. Settings come from the config. (torch's own method would turn codes into float32.)"""
        weights = [p for group in self.param_groups for p in group["params"]]
        for number, state in saved["state"].items():
            self.state[weights[number]] = dict(state)


def update(weights: Tensor, grads: Tensor, m: Tensor, v: Tensor, step: int, group: dict) -> None:
    """AdamW's step in place: Loshchilov & Hutter 2019 (arXiv:1711.05101), Algorithm 2."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    m.lerp_(grads, 1 - beta1)
    v.mul_(beta2).addcmul_(grads, grads, value=1 - beta2)
    weights.mul_(1 - lr * group["weight_decay"])
    scale = (v / (1 - beta2**step)).sqrt_().add_(group["eps"])
    weights.addcdiv_(m, scale, value=-lr / (1 - beta1**step))


def local(x: Tensor) -> Tensor:
    """The rows of x on this rank."""
    return x.to_local() if isinstance(x, DTensor) else x


def like(p: Tensor, rows: Tensor, columns: int) -> Tensor:
    """`rows` of this rank as a tensor with `columns` columns, sharded like p."""
    if not isinstance(p, DTensor):
        return rows
    shape = torch.Size((p.shape[0], columns))
    return DTensor.from_local(rows, p.device_mesh, p.placements, shape=shape, stride=(columns, 1), run_check=False)
