"""A mixture of experts in place of an MLP. Rows are sorted by expert, and one grouped matmul computes all experts."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.config import ModelConfig
from model.functions import swiglu
from model.linear import Linear


class Experts(nn.Module):
    """The weighted sum of the MLPs that the router gives most probability. Shazeer et al. 2017 (arXiv:1701.06538).

    weights = softmax(router x) of the top `experts_per_token` experts, normalised to sum 1 where the family does so.
    Some families add a shared expert, which computes every token: sigmoid(gate x) MLP(x).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, F_, facts = config.hidden_size, config.intermediate_size, config.facts
        self.count, self.top = config.num_experts, config.experts_per_token
        self.normalised = config.normalise_experts or facts.normalise_experts
        self.router = Linear(D, self.count, bias=facts.expert_bias)
        halves = 1 if facts.activation == "clamped" else 2  # its gates and ups alternate
        self.gate_up = Stack(self.count, D, 2 * F_, bias=facts.expert_bias, halves=halves)
        self.down = Stack(self.count, F_, D, bias=facts.expert_bias)
        shared = config.shared_expert_size
        self.shared_gate_up = Linear(D, 2 * shared, bias=False, parts=(shared, shared)) if shared else None
        self.shared_down = Linear(shared, D, bias=False) if shared else None
        self.shared_gate = Linear(D, 1, bias=False) if shared else None
        self.gated = clamped_swiglu if facts.activation == "clamped" else swiglu
        self.routing: tuple[Tensor, Tensor] | None = None  # logits and choices of the last forward, for router_loss

    def forward(self, x: Tensor, adapted: bool) -> Tensor:
        """(N, D), in float32 or wider, from x (N, D)."""
        logits = self.router(x, adapted)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (N, E)
        weights, chosen = logits.softmax(-1).topk(self.top, dim=-1)  # (N, top)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.training and torch.is_grad_enabled():
            self.routing = logits, chosen
        owners, order = chosen.flatten().sort(stable=True)  # (N x top,) sorted by expert
        ends = torch.searchsorted(owners, torch.arange(self.count, device=x.device), right=True).int()  # (E,)
        y = self.gated(self.gate_up.grouped(x[order // self.top], owners, ends, adapted))
        y = self.down.grouped(y.to(x.dtype), owners, ends, adapted)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        y = (y[back].unflatten(0, (-1, self.top)).to(weights.dtype) * weights[..., None]).sum(1)
        if self.shared_gate is None:
            return y
        shared = self.shared_down(swiglu(self.shared_gate_up(x, adapted)), adapted).to(y.dtype)
        return y + self.shared_gate(x, adapted).to(y.dtype).sigmoid() * shared


class Stack(Linear):
    """The stacked matrices of all experts: `weight` (E x out, in), or (E, in, out) with biases, as in GPT-OSS."""

    def __init__(self, count: int, in_features: int, out_features: int, *, bias: bool, halves: int = 1):
        nn.Module.__init__(self)
        self.count, self.in_features, self.out_features, self.lora = count, in_features, out_features, None
        shape = (count, in_features, out_features) if bias else (count * out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(count, out_features)) if bias else None
        self.parts = {"weight": (out_features // halves,) * (halves * count)}
        self.prepared = self.kept = None

    def grouped(self, x: Tensor, owners: Tensor, ends: Tensor, adapted: bool) -> Tensor:
        """(M, out) each row of x (M, in) times the matrix of its expert `owners` (M,). The rows of e end at ends[e].

        With an adapter the sum is float32 or wider: in bf16 it would lose most of what a new adapter adds.
        """
        weight = self.weight if self.prepared is None else self.prepared
        copy = weight if weight.dtype == x.dtype else self.cast(x.dtype)
        if self.bias is None:
            shape = self.count, self.out_features, self.in_features
            weight, copy = (w.view(shape).transpose(1, 2) for w in (weight, copy))
        y = GroupedProduct.apply(x, weight, copy, ends)
        y = y if self.bias is None else y + self.bias.to(y.dtype)[owners]
        if self.lora is None or not adapted:
            return y
        wide = torch.promote_types(y.dtype, torch.float32)
        return y.to(wide) + self.lora.grouped(x, ends).to(wide)

    def prepare(self, dtype: torch.dtype, batch: int, adapted: bool) -> None:
        """Cast the weight once before decoding, instead of at every token. An adapter stays separate."""
        self.prepared = self.weight.detach().to(dtype)


class GroupedProduct(torch.autograd.Function):
    """x (M, in) times the matrices (E, in, out) of the rows' experts, given a copy of them in x's dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, copy: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, copy, ends)
        ctx.dtype = weight.dtype
        return grouped_mm(x, copy, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, copy, ends = ctx.saved_tensors
        grad, (need_x, need_weight, *_) = grad.contiguous(), ctx.needs_input_grad
        grad_x = grouped_mm(grad, copy.transpose(1, 2), ends) if need_x else None
        grad_weight = grouped_mm(x.t(), grad, ends).to(ctx.dtype) if need_weight else None
        return grad_x, grad_weight, None, None


def grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """torch._grouped_mm, or a loop where it is not supported: MPS, float64, rows that are no multiple of 16 bytes."""
    if a.is_meta:  # there torch knows the product in bf16 alone
        return a.new_empty((len(ends), a.shape[0], b.shape[1]) if b.ndim == 2 else (a.shape[0], b.shape[-1]))
    aligned = all(side * a.element_size() % 16 == 0 for side in (a.shape[0 if b.ndim == 2 else 1], b.shape[-1]))
    if a.dtype != torch.float64 and a.device.type != "mps" and aligned:
        return torch._grouped_mm(a, b, offs=ends)
    starts = [0, *ends.tolist()]
    if b.ndim == 2:  # a (in, M), b (M, out): one product per expert
        return torch.stack([a[:, i:j] @ b[i:j] for i, j in zip(starts, starts[1:], strict=False)])
    return torch.cat([a[i:j] @ matrix for i, j, matrix in zip(starts, starts[1:], b, strict=False)])


def clamped_swiglu(gate_up: Tensor) -> Tensor:
    """(N, F) (up + 1) gate sigmoid(1.702 gate), with gate <= 7 and -7 <= up <= 7.

    gate_up: (N, 2F), where even columns are gates and odd columns are ups.
    """
    gate, up = gate_up[:, ::2].clamp(max=7.0), gate_up[:, 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def router_loss(
    *models: nn.Module, share: float, balance_coef: float, z_coef: float
) -> tuple[Tensor | float, dict[str, Tensor]]:
    """() auxiliary loss that balances the experts' load, and metrics. Without experts it returns 0.0 and no metrics.

        balance = E sum_e f_e p_e,   f_e: share of choices that fell on expert e, p_e: its mean probability; minimum 1
        z       = mean over tokens of logsumexp(logits)^2

    Fedus et al. 2021 (arXiv:2101.03961), Eq. 4; Zoph et al. 2022 (arXiv:2202.08906), Eq. 5. These are means over the
    layers of the models' last forwards, and over the tokens that each layer computed. The tokens of a shared prompt
    count once. In the last layer only tokens that predict count.

    share: the part of the optimizer step's batch in this forward. f is a count per forward: micro_batch_size matters.
    """
    layers = [m for model in models for m in model.modules() if isinstance(m, Experts) and m.routing is not None]
    if not layers:
        return 0.0, {}
    balances, zs, loads = [], [], []
    for layer in layers:
        logits, chosen = layer.routing
        layer.routing = None
        load = F.one_hot(chosen, layer.count).sum((0, 1)) / chosen.numel()  # (E,)
        balances.append(layer.count * (load * logits.softmax(-1).mean(0)).sum())
        zs.append(logits.logsumexp(-1).square().mean())
        loads.append(load * layer.count)
    balance, z, load = (torch.stack(values) for values in (balances, zs, loads))
    metrics = {
        "experts/balance_loss": balance,
        "experts/z_loss": z,
        "experts/largest_load": load.amax(1),  # of the busiest expert, where 1 is an equal share
        "experts/unused": (load == 0).float(),
    }
    loss = share * (balance_coef * balance.mean() + z_coef * z.mean())
    return loss, {name: value.detach() for name, value in metrics.items()}
