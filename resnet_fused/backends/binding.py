"""Binds a problem to a kernel: one backend's for the whole op, or a composition of kernels for its parts."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.backends import Kernel, candidates, get, resolve
from resnet_fused.backends.problem import Conv, Folded, Problem

_WHOLE_OPS = ("basic_block", "bottleneck", "stem")


class Bound(NamedTuple):
    """A kernel and the name of the backend that made it; "onednn+reference" where the parts of a block differ."""

    kernel: Kernel
    backend: str


def bind(problem: Problem, folded: Folded, chosen: str) -> Bound:
    """The kernel that computes `problem` with the parameters `folded`, on the backend `chosen` or the best one ("auto").

    A whole op (basic_block, bottleneck, stem) goes to a backend that serves it in one piece, and is otherwise composed
    of the ops that it is made of, each bound by the same choice.

    Raises:
        BackendError: `chosen` names a backend that can serve neither the op nor its parts.
    """
    if problem.op not in _WHOLE_OPS or problem.convs == ():
        backend = resolve(problem, chosen)
        return Bound(backend.prepare(problem, folded), backend.name)
    for name in candidates(problem) if chosen == "auto" else [chosen]:
        whole = get(name)
        if name == "reference" and chosen == "auto":
            # The composition below computes the same, with the best backend for each part.
            continue
        if whole.unavailable() is None and whole.unsupported(problem) is None and (chosen == name or whole.wins(problem)):
            return Bound(whole.prepare(problem, folded), name)

    # The parts work in channels_last, so that nothing is converted between them.
    inside = replace(problem, memory_format=torch.channels_last)
    compose = _compose_stem if problem.op == "stem" else _compose_block
    composed = compose(inside, folded, chosen)
    if composed.backend == "reference":
        return Bound(get("reference").prepare(problem, folded), "reference")
    if problem.memory_format == torch.channels_last:
        return composed

    def kernel(x: Tensor, residual: Tensor | None) -> Tensor:
        return composed.kernel(x.contiguous(memory_format=torch.channels_last), residual).contiguous()

    return Bound(kernel, composed.backend)


def _part(problem: Problem, folded: Folded, index: int, op: str, height: int, width: int, chosen: str) -> Bound:
    """Convolution `index` of a whole op as an op of its own, on an input of height × width pixels."""
    conv: Conv = problem.convs[index]
    shape = (problem.shape[0], conv.in_channels, height, width)
    part = replace(problem, op=op, shape=shape, convs=(conv,), shortcut=False, pool=None)
    own = folded.pack(("part", index), lambda: Folded((folded.weights[index],), (folded.shifts[index],)))
    return bind(part, own, chosen)


def _compose_block(problem: Problem, folded: Folded, chosen: str) -> Bound:
    h, w = problem.shape[2:]
    main = len(problem.main_path)
    parts = []
    for index, conv in enumerate(problem.main_path):
        op = "conv2d_bn_relu" if index < main - 1 else "conv2d_bn_add_relu"
        parts.append(_part(problem, folded, index, op, h, w, chosen))
        h, w = conv.output_size(h, w)
    *inner, last = [part.kernel for part in parts]
    shortcut: Kernel | None = None
    if problem.shortcut:
        parts.append(_part(problem, folded, main, "conv2d_bn", *problem.shape[2:], chosen))
        shortcut = parts[-1].kernel

    def kernel(x: Tensor, residual: Tensor | None) -> Tensor:
        residual = x if shortcut is None else shortcut(x, None)
        y = x
        for layer in inner:
            y = layer(y, None)
        return last(y, residual)

    return Bound(kernel, "+".join(sorted({part.backend for part in parts})))


def _compose_stem(problem: Problem, folded: Folded, chosen: str) -> Bound:
    conv, name = _part(problem, folded, 0, "conv2d_bn_relu", *problem.shape[2:], chosen)
    assert problem.pool is not None
    pool = problem.pool

    def kernel(x: Tensor, residual: Tensor | None) -> Tensor:
        return F.max_pool2d(conv(x, None), pool.kernel, pool.stride, pool.padding)

    return Bound(kernel, name)
