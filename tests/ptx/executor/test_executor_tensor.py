"""Tensor-core fragments whose layout a compiler chose: Triton's matrix products and convolutions, and nvcuda::wmma.

Nothing here knows where an element of a fragment lies; results are right only if mma, ldmatrix, cp.async and the conversions
between layouts agree with what the compiler had in mind. The truth is float64, from the operands as the tensor core sees them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import ptx_executor as px
import pytest
import torch
from support.tolerances import FLOOR, relative_error

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton (torch for Linux brings it)")
import triton.language as tl  # noqa: E402

TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FLOAT32_SUMS = FLOOR[torch.float32]  # exact products summed in float32


@triton.jit
def matmul(a, b, c, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SUM: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), SUM)
    for k0 in range(0, k, BK):
        rk = k0 + tl.arange(0, BK)
        x = tl.load(a + rm[:, None] * k + rk[None, :], mask=(rm < m)[:, None] & (rk < k)[None, :], other=0)
        y = tl.load(b + rk[:, None] * n + rn[None, :], mask=(rk < k)[:, None] & (rn < n)[None, :], other=0)
        total = tl.dot(x, y, total, out_dtype=SUM)
    tl.store(c + rm[:, None] * n + rn[None, :], total, mask=(rm < m)[:, None] & (rn < n)[None, :])


@triton.jit
def conv3x3(x, w, residual, y, batch, height, width, c, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Implicit GEMM over NHWC, padding 1, then add and ReLU."""
    pixel = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    p, q = pixel // width % height, pixel % width
    total = tl.zeros((BM, BN), tl.float32)
    for tap in range(9):
        row, column = p + tap // 3 - 1, q + tap % 3 - 1
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & (pixel < batch * height * width)
        base = (pixel + (tap // 3 - 1) * width + tap % 3 - 1) * c
        for c0 in range(0, c, BK):
            rc = c0 + tl.arange(0, BK)
            image = tl.load(x + base[:, None] + rc[None, :], mask=inside[:, None], other=0)
            total = tl.dot(image, tl.load(w + (tap * c + rc)[:, None] * k + rn[None, :]), total)
    out, valid = pixel[:, None] * k + rn[None, :], (pixel < batch * height * width)[:, None]
    total += tl.load(residual + out, mask=valid, other=0).to(tl.float32)
    tl.store(y + out, tl.maximum(total, 0).to(y.dtype.element_ty), mask=valid)


@triton.jit
def softmax(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    row = tl.program_id(0) * n
    value = tl.load(x + row + at, mask=at < n, other=-float("inf"))
    power = tl.exp(value - tl.max(value, 0))
    tl.store(y + row + at, power / tl.sum(power, 0), mask=at < n)


def tf32(x: torch.Tensor) -> torch.Tensor:
    """What the tensor core sees of a float32: the low 13 bits are not there."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


MATMULS = [
    ("fp16", 80, (64, 64, 32), 4, "m16n8k16.f32.f16.f16.f32"),
    ("fp16", 80, (128, 32, 64), 8, "m16n8k16.f32.f16.f16.f32"),
    ("bf16", 80, (64, 32, 32), 2, "m16n8k16.f32.bf16.bf16.f32"),
    ("fp32", 80, (32, 64, 32), 4, "m16n8k8.f32.tf32.tf32.f32"),
    ("i8", 80, (64, 64, 64), 4, "m16n8k32.s32.s8.s8.s32"),
    ("fp16", 86, (64, 64, 32), 4, "m16n8k16.f32.f16.f16.f32"),
    ("fp16", 75, (32, 32, 16), 2, None),  # Triton multiplies without tensor cores there
]


@pytest.mark.parametrize(
    ("kind", "arch", "tile", "warps", "instruction"), MATMULS, ids=[f"{m[0]}-sm_{m[1]}-{m[2]}" for m in MATMULS]
)
def test_triton_matrix_product(kind: str, arch: int, tile: tuple[int, int, int], warps: int, instruction: str | None) -> None:
    m, n, k = 100, 80, 80  # ragged in every dimension
    if kind == "i8":
        a, b = (torch.randint(-128, 128, s, dtype=torch.int8) for s in ((m, k), (k, n)))
        c, truth = torch.empty(m, n, dtype=torch.int32), (a.long() @ b.long()).double()
    else:
        a, b = torch.randn(m, k).to(TORCH[kind]), torch.randn(k, n).to(TORCH[kind])
        c = torch.empty(m, n)
        truth = tf32(a).double() @ tf32(b).double() if kind == "fp32" else a.double() @ b.double()
    bm, bn, bk = tile
    signature = {
        "a": f"*{kind}",
        "b": f"*{kind}",
        "c": "*i32" if kind == "i8" else "*fp32",
        "m": "i32",
        "n": "i32",
        "k": "i32",
    }
    constants = {"BM": bm, "BN": bn, "BK": bk, "SUM": tl.int32 if kind == "i8" else tl.float32}
    compiled = px.compile_triton(matmul, signature, constants, arch, ["a", "b", "c", "n", "k"], num_warps=warps, num_stages=3)
    blocks = (-(-m // bm), -(-n // bn))
    counters = px.launch_triton(compiled, blocks, [a, b, px.Output(c), m, n, k])
    if kind == "i8":
        assert torch.equal(c.double(), truth)
    else:
        assert relative_error(c, truth) <= FLOAT32_SUMS
    padded = 2 * blocks[0] * bm * blocks[1] * bn * -(-k // bk) * bk
    assert counters.flops["tensor"] == (padded if instruction else 0)
    assert list(counters.tensor) == ([instruction] if instruction else [])
    assert counters.bytes_written == c.nbytes
    assert counters.bytes_read == a.nbytes + b.nbytes


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_triton_convolution(kind: str) -> None:
    batch, height, width, c, k = 2, 7, 5, 32, 32
    x, w = torch.randn(batch, height, width, c).to(TORCH[kind]), torch.randn(3, 3, c, k).to(TORCH[kind])
    residual, y = (
        torch.randn(batch, height, width, k).to(TORCH[kind]),
        torch.empty(batch, height, width, k).to(TORCH[kind]),
    )
    p = f"*{kind}"
    signature = {"x": p, "w": p, "residual": p, "y": p} | dict.fromkeys(("batch", "height", "width", "c", "k"), "i32")
    compiled = px.compile_triton(
        conv3x3, signature, {"BM": 32, "BN": 32, "BK": 32}, 80, ["x", "w", "residual", "y", "c", "k"], num_warps=2
    )
    arguments = {"x": x, "w": w, "residual": residual, "y": px.Output(y)}
    arguments |= {"batch": batch, "height": height, "width": width, "c": c, "k": k}
    counters = px.launch_triton(compiled, -(-batch * height * width // 32), arguments)
    nchw, oihw = x.double().permute(0, 3, 1, 2), w.double().permute(3, 2, 0, 1)
    truth = (torch.conv2d(nchw, oihw, padding=1).permute(0, 2, 3, 1) + residual.double()).relu()
    assert relative_error(y, truth) <= FLOOR[TORCH[kind]]
    assert counters.bytes_read == x.nbytes + w.nbytes + residual.nbytes
    assert counters.flops["tensor"] == 2 * 96 * k * 9 * c


def test_triton_reduction_through_shuffles_and_shared_memory() -> None:
    x, y = torch.randn(3, 300), torch.empty(3, 300)
    compiled = px.compile_triton(softmax, {"x": "*fp32", "y": "*fp32", "n": "i32"}, {"BLOCK": 512}, 80, num_warps=4)
    px.launch_triton(compiled, 3, [x, px.Output(y), 300])
    assert relative_error(y, x.double().softmax(1)) <= FLOAT32_SUMS


@triton.jit
def add_with_hints(x, y, z, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + at, mask=at < n, eviction_policy="evict_first")
    b = tl.load(y + at, mask=at < n, eviction_policy="evict_last")
    tl.store(z + at, a + b, mask=at < n, eviction_policy="evict_first")


def test_triton_cache_hints_and_a_tensor_given_twice() -> None:
    x = torch.randn(1000).half()
    want = x + x
    signature = {"x": "*fp16", "y": "*fp16", "z": "*fp16", "n": "i32"}
    compiled = px.compile_triton(add_with_hints, signature, {"BLOCK": 512}, 80, ["x", "y", "z"])
    assert "createpolicy" in compiled.asm["ptx"]
    counters = px.launch_triton(compiled, 2, [x, x, x, 1000])  # in place
    assert torch.equal(x, want)
    assert counters.bytes_read == counters.bytes_written == 2000


def test_triton_output_left_out_is_refused() -> None:
    x, y = torch.randn(3, 300), torch.empty(3, 300)
    compiled = px.compile_triton(softmax, {"x": "*fp32", "y": "*fp32", "n": "i32"}, {"BLOCK": 512}, 80, num_warps=4)
    with pytest.raises(ValueError, match="1200 of 3600 bytes were never written"):
        px.launch_triton(compiled, 2, [x, px.Output(y), 300])  # one row too few


def wmma_operands(kernel: str, m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if kernel == "wmma_int8":
        a, b = (torch.randint(-128, 128, s, dtype=torch.int8) for s in ((m, k), (k, n)))
        return a, b, (a.long() @ b.long()).double()
    dtype = {"wmma_bfloat16": torch.bfloat16, "wmma_tf32": torch.float32}.get(kernel, torch.float16)
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    return a, b, tf32(a).double() @ tf32(b).double() if kernel == "wmma_tf32" else a.double() @ b.double()


@pytest.mark.parametrize(
    ("kernel", "arch"),
    [
        ("wmma_float16", "sm_80"),
        ("wmma_float16", "sm_75"),
        ("wmma_bfloat16", "sm_80"),
        ("wmma_tf32", "sm_80"),
        ("wmma_int8", "sm_80"),
    ],
)
def test_wmma_product(cuda: Callable[..., px.Module], memory: px.Memory, kernel: str, arch: str) -> None:
    m, n, k = 32, 64, 48
    a, b, truth = wmma_operands(kernel, m, n, k)
    c = memory.empty(4 * m * n)
    dtype = torch.int32 if kernel == "wmma_int8" else torch.float32
    counters = cuda("tensor.cu", arch).launch(
        kernel, (n // 32, m // 16), (32, 2), [memory.upload(a), memory.upload(b), c, n, k], memory=memory
    )
    assert relative_error(memory.download(c, dtype, (m, n)), truth) <= FLOAT32_SUMS
    assert counters.flops["tensor"] == 2 * m * n * k


def test_wmma_with_half_sums_in_shared_memory(cuda: Callable[..., px.Module], memory: px.Memory) -> None:
    m, n, k = 16, 32, 32
    a, b, truth = wmma_operands("wmma_shared", m, n, k)
    c = memory.empty(2 * m * n)
    arguments = [memory.upload(a), memory.upload(b.T.contiguous()), c, n, k]
    cuda("tensor.cu").launch("wmma_shared", (n // 16, m // 16), 32, arguments, memory=memory)
    result = memory.download(c, torch.float16, (m, n))
    assert relative_error(result, truth) <= 2 * FLOOR[torch.float16]  # rounded after each 16 of k, twice


def test_fragments_against_an_explicit_layout() -> None:
    """m16n8k16 with one nonzero element in A and B each: the element of D must be where the manual's figures say."""
    text = """.version 8.0
    .target sm_80
    .address_size 64
    .visible .entry one(.param .u64 a, .param .u64 b, .param .u64 d) {
    .reg .b32 %r<12>; .reg .f32 %f<5>; .reg .b64 %d<8>;
    mov.u32 %r0, %tid.x; mov.f32 %f0, 0f00000000;
    ld.param.u64 %d0, [a]; mul.wide.u32 %d1, %r0, 16; add.s64 %d2, %d0, %d1; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d2];
    ld.param.u64 %d3, [b]; mul.wide.u32 %d4, %r0, 8; add.s64 %d5, %d3, %d4; ld.global.v2.b32 {%r5, %r6}, [%d5];
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1, %f2, %f3, %f4}, {%r1, %r2, %r3, %r4}, {%r5, %r6},
        {%f0, %f0, %f0, %f0};
    ld.param.u64 %d6, [d]; add.s64 %d7, %d6, %d1; st.global.v4.f32 [%d7], {%f1, %f2, %f3, %f4}; ret; }"""
    module = px.Module(text)
    for row, depth, column in [(0, 0, 0), (3, 5, 6), (12, 9, 1), (15, 15, 7), (8, 2, 4)]:
        a, b = np.zeros((32, 8), np.float16), np.zeros((32, 4), np.float16)
        a[row % 8 * 4 + depth % 8 // 2, row // 8 * 2 + depth // 8 * 4 + depth % 2] = 3
        b[column * 4 + depth % 8 // 2, depth // 8 * 2 + depth % 2] = 5
        memory = px.Memory()
        d = memory.empty(512)
        module.launch("one", 1, 32, [memory.upload(a), memory.upload(b), d], memory=memory)
        want = np.zeros((32, 4), np.float32)
        want[row % 8 * 4 + column // 2, row // 8 * 2 + column % 2] = 15
        np.testing.assert_array_equal(memory.download(d, np.float32, (32, 4)), want)
