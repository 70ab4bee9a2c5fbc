"""bn, bn_relu and bn_add_relu: y = act((x − mean) · weight / sqrt(var + eps) + bias + residual).

Without `mean` and `var`, statistics are those of the batch, taken over all processes of `group` if it names a process group
(SyncBatchNorm); with them they are constants. Each op gives y, and the batch's mean, biased and unbiased variance, which the
caller needs for running statistics (empty where statistics are constants). Saved for backward: x, y (its sign is ReLU's mask),
and values by channel; x not even, where statistics are constants and the parameters need no gradient.

In eager mode an autograd.Function calls the backend's kernels directly; tracing, functional transforms and subclasses go
through the registered operators. Both use the same forward, setup_context and backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused.backends.batch_norm import passes
from resnet_fused.ops import common
from resnet_fused.runtime import calls

Result = tuple[Tensor, Tensor, Tensor, Tensor]


class Saved(NamedTuple):
    """What backward needs beside dy. `batch`: statistics were taken from the batch, over the processes of `group`."""

    x: Tensor | None
    y: Tensor | None
    weight: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float
    batch: bool
    group: str


def activation_format(x: Tensor) -> torch.memory_format:
    """Stock PyTorch's rule for a batch norm's result: x's own format, where x has holes the one that its strides look like."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.channels_last if calls.suggests_channels_last(x) else torch.contiguous_format


def _by_channel(t: Tensor | None) -> Tensor | None:
    """A parameter or running statistic as kernels take it: contiguous float32, or float64."""
    if t is None or t.dtype in (torch.float32, torch.float64):
        return t if t is None else t.contiguous()
    return t.float().contiguous()


# ---- exchange between processes -----------------------------------------------------------------------------------------


def _process_group(name: str) -> Any:
    from torch.distributed import distributed_c10d

    return distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def _combine_statistics(mean: Tensor, var: Tensor, count: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance over all processes by Chan's formula, and the number of values of a channel."""
    import torch.distributed as dist

    processes = _process_group(group)
    own = torch.cat([mean, var, torch.full_like(mean[:1], count)])
    every = own.new_empty(dist.get_world_size(processes) * own.numel())
    dist.all_gather_into_tensor(every, own, group=processes)
    means, vars, counts = every.view(-1, own.numel()).split([mean.numel(), var.numel(), 1], dim=1)
    total = counts.sum()
    shares = counts / total
    mean = (shares * means).sum(0)
    return mean, (shares * (vars + (means - mean) ** 2)).sum(0), total


def _combine_sums(dweight: Tensor, dbias: Tensor, count: int, group: str) -> tuple[Tensor, Tensor, float]:
    """dweight and dbias summed over all processes, divided by the number of values; the 1 says that they are."""
    import torch.distributed as dist

    every = torch.cat([dweight, dbias, torch.full_like(dbias[:1], count)])
    dist.all_reduce(every, group=_process_group(group))
    dweight, dbias = (every[:-1] / every[-1]).view(2, -1).unbind(0)
    return dweight, dbias, 1.0


# ---- forward and backward -----------------------------------------------------------------------------------------------


# Whether a residual is added, and whether ReLU follows, by the op's name.
_EPILOGUES = {"bn": (False, False), "bn_relu": (False, True), "bn_add_relu": (True, True)}


def forward(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    group: str,
) -> Result:
    adds, relu = _EPILOGUES[op]
    kernels = passes(x, adds, relu)
    format = activation_format(x)
    x = x.contiguous(memory_format=format)
    if residual is not None:
        residual = residual.contiguous(memory_format=format)
    mean, var = _by_channel(mean), _by_channel(var)
    if mean is not None and var is not None:
        given = (mean.new_empty(0), mean.new_empty(0), mean.new_empty(0))
    else:
        count: int | Tensor = x.numel() // x.shape[1]
        if count:
            mean, var = kernels.statistics(x)
        else:
            # This process has no values; it takes part in the exchange all the same.
            mean = torch.zeros(x.shape[1], dtype=_statistics_dtype(x), device=x.device)
            var = torch.zeros_like(mean)
        if group:
            mean, var, count = _combine_statistics(mean, var, int(count), group)
        given = (mean, var, var * (count / (count - 1)) if not isinstance(count, int) or count > 1 else var * math.nan)
    y = kernels.apply(x, residual, mean, var, _by_channel(weight), _by_channel(bias), eps, relu)
    return y, *given


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def fake_forward(x: Tensor, batch: bool) -> Result:
    y = torch.empty_like(x, memory_format=activation_format(x))
    size = x.shape[1] if batch else 0
    mean, var, unbiased = (x.new_empty(size, dtype=_statistics_dtype(x)) for _ in range(3))
    return y, mean, var, unbiased


def backward(
    op: str,
    dy: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch: bool,
    group: str,
    needs: Sequence[bool],
) -> Result:
    """dx, dresidual, dweight and dbias; empty where `needs` (x, residual, parameters) says that it isn't needed."""
    like = x if x is not None else y if y is not None else dy
    kernels = passes(like, *_EPILOGUES[op])
    format = activation_format(like)
    dy = dy.contiguous(memory_format=format)
    x = x.contiguous(memory_format=format) if x is not None else None
    y = y.contiguous(memory_format=format) if y is not None else None
    need_x, need_residual, need_parameters = needs
    dweight = dbias = masked = sums = None
    if need_parameters or (batch and need_x):
        assert x is not None
        if x.numel():
            dweight, dbias, masked = kernels.backward_reduce(dy, x, y, mean, var, eps, need_residual)
        else:
            dweight, dbias = torch.zeros_like(mean), torch.zeros_like(mean)
        if masked is not None:
            dy, y, need_residual = masked, None, False
        if batch and need_x:
            count = x.numel() // x.shape[1]
            sums = _combine_sums(dweight, dbias, count, group) if group else (dweight, dbias, float(count))
    dx = None
    if need_x:
        dx, more = kernels.backward_apply(dy, x, y, mean, var, _by_channel(weight), sums, eps, need_residual)
        masked = more if masked is None else masked
    elif need_residual:
        masked = dy.clone() if y is None else common.relu_backward(dy, y)
    dtype = weight.dtype if weight is not None else mean.dtype
    if not need_parameters:
        dweight = dbias = None
    # Results of an operator are tensors, and distinct ones.
    dx, masked = (dy.new_empty(0) if t is None else t for t in (dx, masked))
    dweight, dbias = (mean.new_empty(0, dtype=dtype) if t is None else t.to(dtype) for t in (dweight, dbias))
    return dx, masked, dweight, dbias


def _fake_backward(
    op: str,
    dy: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch: bool,
    group: str,
    needs: Sequence[bool],
) -> Result:
    like = x if x is not None else y if y is not None else dy
    parameter = mean if weight is None else weight

    def activation(needed: bool) -> Tensor:
        return torch.empty_like(like, memory_format=activation_format(like)) if needed else dy.new_empty(0)

    def by_channel() -> Tensor:
        return parameter.new_empty(like.shape[1] if needs[2] else 0)

    return activation(needs[0]), activation(needs[1]), by_channel(), by_channel()


def _differentiable_backward(dy: Tensor, saved: Saved, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Backward in stock PyTorch ops that have a derivative themselves."""
    if saved.group:
        raise RuntimeError(
            "a second derivative through a batch norm whose statistics are shared by processes (SyncBatchNorm) is not "
            "defined; call backward without create_graph=True, or use nn.BatchNorm2d."
        )
    g = dy if saved.y is None else common.relu_backward(dy, saved.y)
    mean, var, weight = saved.mean, saved.var, saved.weight
    if saved.x is None:
        inverse = (var + saved.eps).rsqrt()
        scale = inverse if weight is None else inverse * weight
        return (g * scale.view(1, -1, 1, 1)).to(g.dtype), g, None, None
    mask = [needs[0], needs[2], needs[2]]
    inverse = (var + saved.eps).rsqrt()
    running = (None, None) if saved.batch else (mean, var)
    dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        g, saved.x, weight, *running, mean, inverse, saved.batch, saved.eps, mask
    )
    return dx, g, dweight, dbias


_TAIL = "Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps, str group"

common.register(
    "bn_backward(str op, Tensor dy, Tensor? x, Tensor? y, Tensor? weight, Tensor mean, Tensor var, float eps, bool batch, "
    "str group, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    backward,
    _fake_backward,
)


class _Family:
    """The registered operator of an epilogue, and calls of it: of the kernels directly where that is possible.

    Operands are x, residual (where the epilogue adds one), weight, bias, mean, var; they are followed by eps and group.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.residual, self.relu = _EPILOGUES[name]
        self.first = 2 if self.residual else 1
        more = "Tensor residual, " if self.residual else ""
        common.register(f"{name}(Tensor x, {more}{_TAIL}) -> (Tensor, Tensor, Tensor, Tensor)", self._eager, self._fake)
        common.register_autograd(name, self._setup_context, self._derivative)
        self.operator: Callable[..., Result] = getattr(torch.ops.resnet_fused, name).default
        self.function = common.function(name, self._eager, self._setup_context, self._derivative)

    def __call__(self, *args: Any) -> Result:
        tensors = args[: self.first + 4]
        if not calls.plain(*tensors):
            return self.operator(*args)
        return self.function.apply(*args) if calls.needs_grad(*tensors) else self._eager(*args)

    def _eager(self, *args: Any) -> Result:
        return forward(self.name, args[0], args[1] if self.residual else None, *args[self.first :])

    def _fake(self, *args: Any) -> Result:
        return fake_forward(args[0], args[self.first + 2] is None)

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
        first = self.first
        weight, _, mean, var, eps, group = inputs[first:]
        batch = mean is None
        needs = ctx.needs_input_grad
        ctx.needs = (needs[0], self.residual and needs[1], bool(needs[first] or needs[first + 1]))
        ctx.batch, ctx.eps, ctx.group = batch, eps, group
        if batch:
            mean, var = output[1:3]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        x = inputs[0] if batch or ctx.needs[2] else None
        ctx.save_for_backward(x, output[0] if self.relu else None, weight, mean, var)

    def _derivative(self, ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if dy is None:
            return (None,) * (self.first + 6)
        x, y, weight, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():
            saved = Saved(x, y, weight, mean, var, ctx.eps, ctx.batch, ctx.group)
            dx, dresidual, dweight, dbias = _differentiable_backward(dy, saved, ctx.needs)
        else:
            own = (_by_channel(mean), _by_channel(var), ctx.eps, ctx.batch, ctx.group, ctx.needs)
            plain = calls.plain(dy, x, y, weight)
            run: Callable[..., Result] = backward if plain else torch.ops.resnet_fused.bn_backward.default
            dx, dresidual, dweight, dbias = run(self.name, dy, x, y, weight, *own)
        needed = ctx.needs_input_grad
        grads = (dx, dresidual, dweight, dbias) if self.residual else (dx, dweight, dbias)
        return (*(g if needed[i] else None for i, g in enumerate(grads)), None, None, None, None)


_bn, _bn_relu, _bn_add_relu = _Family("bn"), _Family("bn_relu"), _Family("bn_add_relu")

_Vector = Tensor | None


def bn(x: Tensor, weight: _Vector, bias: _Vector, mean: _Vector, var: _Vector, eps: float, group: str) -> Result:
    """y = (x − mean) · weight / sqrt(var + eps) + bias, batch norm by itself (projection shortcuts)."""
    return _bn(x, weight, bias, mean, var, eps, group)


def bn_relu(x: Tensor, weight: _Vector, bias: _Vector, mean: _Vector, var: _Vector, eps: float, group: str) -> Result:
    """y = relu((x − mean) · weight / sqrt(var + eps) + bias)."""
    return _bn_relu(x, weight, bias, mean, var, eps, group)


def bn_add_relu(
    x: Tensor, residual: Tensor, weight: _Vector, bias: _Vector, mean: _Vector, var: _Vector, eps: float, group: str
) -> Result:
    """y = relu((x − mean) · weight / sqrt(var + eps) + bias + residual), the end of a residual block in training."""
    return _bn_add_relu(x, residual, weight, bias, mean, var, eps, group)
