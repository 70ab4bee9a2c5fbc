"""Runs a few PTX instructions over arrays of at most 1024 elements, a thread for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import ptx_executor as px

_TYPE = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}


def run_snippet(body: str, inputs: Sequence[np.ndarray], output: Any, declare: str = "", target: str = "sm_80") -> np.ndarray:
    """The results %o of ``body`` on inputs %i0, %i1, ... (bit-typed registers as wide as the arrays' elements).

    Also there: predicates %p0..7, 32-bit %t0..15, 64-bit %d0..7 and a kilobyte of shared memory named ``scratch``.
    """
    count, size = len(inputs[0]), np.dtype(output).itemsize
    sizes = [*(a.dtype.itemsize for a in inputs), size]
    registers = [*(f"%i{k}" for k in range(len(inputs))), "%o"]
    text = [".version 8.0", f".target {target}", ".address_size 64"]
    text += [".visible .entry snippet(" + ", ".join(f".param .u64 p{k}" for k in range(len(sizes))) + ") {"]
    text += [".reg .pred %p<8>; .reg .b32 %t<16>; .reg .b64 %d<8>; .reg .b64 %a<3>; .reg .b32 %g;"]
    text += [".shared .align 16 .b8 scratch[1024];", declare]
    text += [f".reg .{_TYPE[s]} {r};" for s, r in zip(sizes, registers, strict=True)]
    text += ["mov.u32 %g, %tid.x;"]
    place = "ld.param.u64 %a0, [p{k}]; mul.wide.u32 %a1, %g, {s}; add.s64 %a2, %a0, %a1;"
    for k, s in enumerate(sizes[:-1]):
        text += [place.format(k=k, s=s), f"ld.global.b{8 * s} %i{k}, [%a2];"]
    text += [body, place.format(k=len(inputs), s=size), f"st.global.b{8 * size} [%a2], %o;", "ret;", "}"]
    memory = px.Memory()
    addresses = [memory.upload(a) for a in inputs] + [memory.empty(count * size)]
    px.Module("\n".join(text)).launch("snippet", 1, count, addresses, memory=memory)
    return memory.download(addresses[-1], output, count)
