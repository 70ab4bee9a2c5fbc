"""Binds a problem to a kernel: one backend's for the whole op, or a composition of kernels for its parts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.backends import BackendError, Kernel, by_rules, candidates, first_call, get, records, resolve
from resnet_fused.backends.cpu_chain import Chain, ChainKernel
from resnet_fused.backends.problem import Conv, Folded, Problem

_WHOLE_OPS = ("basic_block", "bottleneck", "stem")


_Serve = Callable[[Problem, Folded], Kernel | None]
_serve: ContextVar[_Serve | None] = ContextVar("resnet_fused_serve", default=None)


@contextlib.contextmanager
def served(serve: _Serve) -> Iterator[None]:
    """Within the `with` block, `serve` is asked first for the kernel of every problem that is left to the automatic choice.

    Where it gives None, the choice is made as ever. Kernels that were bound before are bound anew, and those bound here
    are not used behind it.
    """
    token = _serve.set(serve)
    records.forget()
    try:
        yield
    finally:
        _serve.reset(token)
        records.forget()


def serving() -> bool:
    """Whether this is within `served`, where the kernels may be others at every call."""
    return _serve.get() is not None


class Bound(NamedTuple):
    """A kernel and the name of the backend that made it; "onednn+reference" where the parts of a block differ."""

    kernel: Kernel
    backend: str


def bind(problem: Problem, folded: Folded, chosen: str) -> Bound:
    """The kernel that computes `problem` with the parameters `folded`, on the backend `chosen` or the best one ("auto").

    A whole op (basic_block, bottleneck, stem) goes to a backend that serves it in one piece, where that wins, and is
    otherwise composed of the ops that it is made of, each bound by the same choice.

    Raises:
        BackendError: `chosen` names a backend that can serve neither the op nor its parts.
    """
    serve = _serve.get()
    kernel = serve(problem, folded) if serve is not None and chosen == "auto" else None
    if kernel is not None:
        return Bound(kernel, "served")
    if not is_whole(problem):
        if chosen == "auto":
            first_call.trial(problem, folded)
        return _bind_part(problem, folded, chosen)
    name = _backend_of_whole(problem, chosen)
    return compose(problem, folded, chosen) if name == records.PARTS else Bound(get(name).prepare(problem, folded), name)


def _bind_part(problem: Problem, folded: Folded, chosen: str) -> Bound:
    backend = resolve(problem, chosen)
    try:
        return Bound(backend.prepare(problem, folded), backend.name)
    except BackendError:  # which is known only when it is tried, for cuDNN
        if chosen != "auto":
            raise
        return Bound(get("reference").prepare(problem, folded), "reference")


def rules(problem: Problem) -> str:
    """The backend that the automatic choice takes where nothing was recorded; `records.PARTS` for a whole op in its parts."""
    if not is_whole(problem):
        return by_rules(problem).name
    for name in candidates(problem):
        # Composed of its parts an op computes what the reference does, with the best backend for each part.
        if name != "reference" and get(name).wins(problem) and records.rejected(problem, name) is None:
            return name
    return records.PARTS


def is_whole(problem: Problem) -> bool:
    """Whether the op is a whole one, made of others that can take its place."""
    return problem.op in _WHOLE_OPS and problem.convs != ()


def _backend_of_whole(problem: Problem, chosen: str) -> str:
    """The backend that computes a whole op in one piece; `records.PARTS` for none."""
    if chosen != "auto":
        # Which backend was chosen; whether it computes the op in one piece is its own rule, as ever.
        backend = get(chosen)
        serves = backend.unavailable() is None and backend.unsupported(problem) is None
        return chosen if serves and backend.wins(problem) else records.PARTS
    recorded = records.choice(problem)
    if recorded is not None and recorded.backend in (records.PARTS, *candidates(problem)):
        return recorded.backend
    return rules(problem)


def compose(problem: Problem, folded: Folded, chosen: str) -> Bound:
    """The kernel of a whole op, made of its parts' kernels.

    Raises:
        BackendError: `chosen` names a backend that can't serve a part.
    """
    bound = [bind(part, own, chosen) for part, own in parts(problem, folded, chosen)]
    kernels = [part.kernel for part in bound]
    composed = Bound(
        _stem(problem, kernels) if problem.op == "stem" else _block(problem, kernels),
        "+".join(sorted({part.backend for part in bound})),
    )
    if composed.backend == "reference":
        return Bound(get("reference").prepare(problem, folded), "reference")
    if problem.memory_format == torch.channels_last:
        return composed

    def kernel(x: Tensor, residual: Tensor | None) -> Tensor:
        return composed.kernel(x.contiguous(memory_format=torch.channels_last), residual).contiguous()

    return Bound(kernel, composed.backend)


def parts(problem: Problem, folded: Folded, chosen: str = "auto") -> list[tuple[Problem, Folded]]:
    """The ops that a whole op is made of, one for each of its convolutions and in their order.

    On a GPU the shift of a projection shortcut is added with that of the main path's last convolution: cuDNN has no
    convolution with a shift alone, and a pass for it would take longer than the convolution.
    """
    # They work in channels_last, so that nothing is converted between them.
    inside = replace(problem, memory_format=torch.channels_last)
    if problem.op == "stem":
        return [_part(inside, folded, 0, "conv2d_bn_relu", *problem.shape[2:])]
    h, w = problem.shape[2:]
    main = len(problem.main_path)
    moves = problem.shortcut and problem.device.type == "cuda" and chosen in ("auto", "cudnn")
    found = []
    for index, conv in enumerate(problem.main_path):
        op = "conv2d_bn_relu" if index < main - 1 else "conv2d_bn_add_relu"
        part, own = _part(inside, folded, index, op, h, w)
        if moves and index == main - 1:
            own = own.with_shift_of(folded.part(main))
        found.append((part, own))
        h, w = conv.output_size(h, w)
    if problem.shortcut:
        found.append(_part(inside, folded, main, "conv2d" if moves else "conv2d_bn", *problem.shape[2:]))
    return found


def _part(problem: Problem, folded: Folded, index: int, op: str, height: int, width: int) -> tuple[Problem, Folded]:
    """Convolution `index` of a whole op as an op of its own, on an input of height × width pixels."""
    conv: Conv = problem.convs[index]
    shape = (problem.shape[0], conv.in_channels, height, width)
    part = replace(problem, op=op, shape=shape, convs=(conv,), shortcut=False, pool=None)
    return part, folded.part(index)


def _block(problem: Problem, kernels: list[Kernel]) -> Kernel:
    main = len(problem.main_path)
    chained = [kernel for kernel in kernels if isinstance(kernel, ChainKernel)]

    def through(call: Callable[[Any, Any, Any], Any], parts: Sequence[Any], x: Any) -> Any:
        """The block's result for x, by call(part, x, residual)."""
        residual = call(parts[main], x, None) if problem.shortcut else x
        y = x
        for layer in parts[: main - 1]:
            y = call(layer, y, None)
        return call(parts[main - 1], y, residual)

    if len(chained) < len(kernels):
        return lambda x, residual: through(lambda kernel, *args: kernel(*args), kernels, x)

    def record(chain: Chain, x: int, residual: int | None) -> int:
        return through(lambda kernel, *args: kernel.record(chain, *args), chained, x)

    return ChainKernel(problem.shape, problem.dtype, record)


def _stem(problem: Problem, kernels: list[Kernel]) -> Kernel:
    (conv,) = kernels
    assert problem.pool is not None
    pool = problem.pool

    def kernel(x: Tensor, residual: Tensor | None) -> Tensor:
        return F.max_pool2d(conv(x, None), pool.kernel, pool.stride, pool.padding)

    return kernel
