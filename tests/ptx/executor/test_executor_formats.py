"""Half formats, conversions and fragments of less usual types, against NumPy's float16 and float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import ptx_executor as px
import pytest
from support.ptx_snippet import run_snippet

RNG = np.random.default_rng(3)
HALVES = np.concatenate([RNG.standard_normal(58), [0.0, -0.0, np.nan, np.inf, 6e4, -6e4]]).astype(np.float16)
OTHERS = np.concatenate([RNG.standard_normal(58), [-0.0, 0.0, 1.0, np.nan, 6e4, -6e4]]).astype(np.float16)


def wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)


HALF: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "add.f16": lambda a, b: (wide(a) + wide(b)).astype(np.float16),
    "sub.f16": lambda a, b: (wide(a) - wide(b)).astype(np.float16),
    "mul.f16": lambda a, b: (wide(a) * wide(b)).astype(np.float16),
    "mul.sat.f16": lambda a, b: np.nan_to_num(np.clip(wide(a) * wide(b), 0, 1), nan=0).astype(np.float16),
    "min.f16": np.fmin,
    "max.f16": np.fmax,
    "max.NaN.f16": np.maximum,
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of overflow and NaN, which are meant
@pytest.mark.parametrize("op", HALF)
def test_float16_instruction(op: str) -> None:
    got = run_snippet(f"{op} %o, %i0, %i1;", [HALVES, OTHERS], np.float16)
    np.testing.assert_array_equal(got, HALF[op](HALVES, OTHERS))
    assert (got.view(np.uint16)[np.isnan(got)] == 0x7FFF).all()  # the one NaN of half arithmetic


def test_float16_sign_instructions_touch_the_sign_alone() -> None:
    bits = HALVES.view(np.uint16)
    np.testing.assert_array_equal(run_snippet("neg.f16 %o, %i0;", [bits], np.uint16), bits ^ 0x8000)
    np.testing.assert_array_equal(run_snippet("abs.f16 %o, %i0;", [bits], np.uint16), bits & 0x7FFF)
    pairs = bits.view(np.uint32)
    np.testing.assert_array_equal(run_snippet("neg.f16x2 %o, %i0;", [pairs], np.uint32), pairs ^ 0x80008000)


def test_relu_of_an_fma_keeps_nan() -> None:
    one = np.full(64, 0x3C00, np.uint16)
    got = run_snippet("fma.rn.relu.f16 %o, %i0, %i1, %i0;", [HALVES.view(np.uint16), one], np.uint16).view(np.float16)
    with np.errstate(over="ignore"):
        want = np.where(np.isnan(HALVES), HALVES, np.maximum((2 * wide(HALVES)).astype(np.float16), 0))
    np.testing.assert_array_equal(got, want)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_comparisons_of_halves() -> None:
    a, b = HALVES.view(np.uint32), OTHERS.view(np.uint32)
    body = "setp.lt.f16x2 %p0|%p1, %i0, %i1; selp.b32 %t0, 1, 0, %p0; selp.b32 %t1, 2, 0, %p1; or.b32 %o, %t0, %t1;"
    less = (HALVES < OTHERS).reshape(-1, 2)
    np.testing.assert_array_equal(run_snippet(body, [a, b], np.uint32), less[:, 0] + 2 * less[:, 1])
    ones = run_snippet("set.ge.f16x2.f16x2 %o, %i0, %i1;", [a, b], np.uint32).view(np.float16)
    np.testing.assert_array_equal(ones, (HALVES >= OTHERS).astype(np.float16))
    masks = run_snippet("set.neu.u32.f16x2 %o, %i0, %i1;", [a, b], np.uint32).view(np.uint16)
    np.testing.assert_array_equal(masks, np.where(HALVES != OTHERS, 0xFFFF, 0))
    single = run_snippet("set.eq.f32.f32 %o, %i0, %i1;", [np.float32([1, 2]), np.float32([1, 3])], np.float32)
    assert single.tolist() == [1.0, 0.0]


def test_predicates_combine() -> None:
    a, b = np.uint32([1, 2, 3, 4]), np.uint32([2, 2, 2, 2])
    body = "setp.eq.u32 %p0, %i1, 2; setp.lt.xor.u32 %p1|%p2, %i0, %i1, !%p0; not.pred %p3, %p2; xor.pred %p4, %p1, !%p3;"
    got = run_snippet(body + "selp.b32 %o, 1, 0, %p1; @%p4 add.u32 %o, %o, 10;", [a, b], np.uint32)
    assert got.tolist() == [11, 10, 10, 10]


@pytest.mark.parametrize(
    ("instruction", "value", "want"),
    [
        ("cvt.sat.f32.f32", np.float32([-1, 0.25, 7, np.nan, -0.0]), np.float32([0, 0.25, 1, 0, 0])),
        ("cvt.rn.relu.f16.f32", np.float32([-1, 0.25, 1e6, -0.0]), np.float16([0, 0.25, np.inf, 0])),
        ("cvt.rpi.f32.f32", np.float32([0.1, -0.1, 2.5, -2.5]), np.float32([1, -0.0, 3, -2])),
        ("cvt.f32.f16", np.float16([1.5, -0.0, np.inf, 6e-8]), np.float32([1.5, -0.0, np.inf, np.float16(6e-8)])),
        ("cvt.rz.f64.u64", np.uint64([2**64 - 1, 2**53 + 1, 7]), np.float64([2**64 - 2048, 2**53, 7])),
        ("cvt.rp.f64.s64", np.int64([2**53 + 1, -(2**53) - 1, 7]), np.float64([2**53 + 2, -(2**53), 7])),
        ("cvt.rn.f16.s32", np.int32([2049, 2051, -7, 10**6]), np.float16([2048, 2052, -7, np.inf])),
        ("cvt.rzi.s32.f64", np.float64([1e10, -1.9, np.nan]), np.int32([2**31 - 1, -1, -(2**31)])),
        ("cvt.sat.s32.s64", np.int64([2**40, -(2**40), 5]), np.int32([2**31 - 1, -(2**31), 5])),
        ("cvt.rn.f32.f64", np.float64([1 + 2.0**-24, 1 + 3 * 2.0**-24]), np.float32([1, 1 + 2.0**-22])),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_conversion(instruction: str, value: np.ndarray, want: np.ndarray) -> None:
    got = run_snippet(f"{instruction} %o, %i0;", [value], want.dtype)
    np.testing.assert_array_equal(got, want)
    if want.dtype.kind == "f":
        np.testing.assert_array_equal(np.signbit(got), np.signbit(want))


def test_conversions_of_bfloat16() -> None:
    values = np.float32([1, -2.5, 3e38, 1 + 2.0**-8, 1 + 3 * 2.0**-8, np.inf])
    want = np.uint16([0x3F80, 0xC020, 0x7F62, 0x3F80, 0x3F82, 0x7F80])
    np.testing.assert_array_equal(run_snippet("cvt.rn.bf16.f32 %o, %i0;", [values], np.uint16), want)
    packed = run_snippet("cvt.rn.bf16x2.f32 %o, %i0, %i0;", [values], np.uint32)
    np.testing.assert_array_equal(packed, want.astype(np.uint32) << 16 | want)
    finite = run_snippet("cvt.rn.satfinite.bf16.f32 %o, %i0;", [np.float32([np.inf, -np.inf, 1])], np.uint16)
    assert finite.tolist() == [0x7F7F, 0xFF7F, 0x3F80]
    back = run_snippet("cvt.f32.bf16 %o, %i0;", [want], np.float32)
    np.testing.assert_array_equal(back.view(np.uint32) >> 16, want)
    assert run_snippet("cvt.rn.bf16.s32 %o, %i0;", [np.int32([257, 259])], np.uint16).tolist() == [0x4380, 0x4382]


def test_packing_of_two_floats_puts_the_first_on_top() -> None:
    a, b = np.float32([1, 2]), np.float32([3, 4])
    got = run_snippet("cvt.rn.f16x2.f32 %o, %i0, %i1;", [a, b], np.uint32).view(np.float16).reshape(2, 2)
    assert got.tolist() == [[3, 1], [4, 2]]


def test_float64_fma_keeps_what_a_product_would_lose() -> None:
    a = np.float64([1 + 2.0**-30])
    got = run_snippet("neg.f64 %d0, %i1; fma.rn.f64 %o, %i0, %i0, %d0;", [a, a * a], np.float64)
    assert got[0] == 2.0**-60


ODDMENTS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "copysign.f32 %o, %i0, %i1;": lambda a, b: np.copysign(b, a),
    "max.xorsign.abs.f32 %o, %i0, %i1;": lambda a, b: np.fmax(abs(a), abs(b)) * np.sign(a * b),
    "testp.subnormal.f32 %p0, %i0; selp.f32 %o, 0f3F800000, 0f00000000, %p0;": lambda a, b: abs(a) < 1e-38,
    "add.sat.f32 %o, %i0, %i1;": lambda a, b: np.clip(a + b, 0, 1),
    "slct.f32.s32 %o, %i0, %i1, -1;": lambda a, b: b,
    "slct.f32.s32 %o, %i0, %i1, 0;": lambda a, b: a,
    "bmsk.clamp.b32 %o, 1, 29;": lambda a, b: np.full(4, 0x3FFFFFFE, np.uint32).view(np.float32),
    "szext.clamp.s32 %o, %i0, 32;": lambda a, b: a,
}


@pytest.mark.parametrize("body", ODDMENTS, ids=lambda body: body.split(" ")[0])
def test_float32_oddments(body: str) -> None:
    a, b = np.float32([1, -1, 3e-39, -3]), np.float32([2, -2, 2, 2])
    np.testing.assert_array_equal(run_snippet(body, [a, b], np.float32), ODDMENTS[body](a, b).astype(np.float32))


def test_generic_addresses_reach_every_space() -> None:
    """Each lane through its own window: shared, local, a kernel parameter, global."""
    body = """
        mov.u64 %d0, scratch; cvta.shared.u64 %d1, %d0; cvt.u64.u32 %d2, %i0; add.u64 %d1, %d1, %d2; add.u64 %d1, %d1, %d2;
        mov.u64 %d3, stack; cvta.local.u64 %d3, %d3;
        setp.lt.u32 %p0, %i0, 16; selp.b64 %d4, %d1, %d3, %p0;
        st.u16 [%d4], %i1; ld.u16 %t0, [%d4]; isspacep.shared %p1, %d4; selp.b32 %t1, 1000, 0, %p1;
        mov.u64 %d5, p0; cvta.param.u64 %d5, %d5; ld.u64 %d6, [%d5]; mul.wide.u32 %d7, %i0, 4; add.u64 %d6, %d6, %d7;
        ld.u32 %t2, [%d6]; add.u32 %o, %t0, %t1; add.u32 %o, %o, %t2;"""
    lane = np.arange(32, dtype=np.uint32)
    got = run_snippet(body, [lane, lane + 7], np.uint32, declare=".local .align 8 .b8 stack[16];")
    np.testing.assert_array_equal(got, lane + 7 + np.where(lane < 16, 1000, 0) + lane)


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ("ld.local.u32 %o, [stack+16];", "out-of-bounds", "at byte 16 of the thread's 16 bytes of local memory"),
        (
            "mov.u64 %d0, p0; cvta.param.u64 %d0, %d0; st.u32 [%d0], 1; mov.u32 %o, 0;",
            "write-to-constant",
            "cannot be written",
        ),
        ("mov.u64 %d0, 4096; ld.global.u32 %o, [%d0];", "out-of-bounds", "before the 128-byte allocation"),
        (
            "brx.idx %i0, T; T: .branchtargets A, B; A: B: mov.u32 %o, 0;",
            "out-of-bounds",
            "branch table with 2 targets",
        ),
    ],
    ids=["local", "parameter", "low address", "branch table"],
)
def test_accesses_outside_of_a_space(body: str, kind: str, message: str) -> None:
    lane = np.arange(32, dtype=np.uint32)
    with pytest.raises(px.KernelFault, match=message) as caught:
        run_snippet(body, [lane], np.uint32, declare=".local .align 8 .b8 stack[16];")
    assert caught.value.kind == kind


def test_cp_async_that_ignores_its_source() -> None:
    """With the predicate the source is not read, and zeros arrive; without a commit, wait_all still covers the copy."""
    body = """mov.u32 %t0, scratch; shl.b32 %t1, %i0, 2; add.u32 %t0, %t0, %t1; setp.ge.u32 %p0, %i0, 16;
        ld.param.u64 %d0, [p1]; cvt.u64.u32 %d1, %t1; add.u64 %d0, %d0, %d1;
        cp.async.ca.shared.global [%t0], [%d0], 4, %p0; cp.async.wait_all; ld.shared.u32 %o, [%t0];"""
    lane = np.arange(32, dtype=np.uint32)
    np.testing.assert_array_equal(run_snippet(body, [lane, lane + 50], np.uint32), np.where(lane < 16, lane + 50, 0))


def test_matrix_transposes() -> None:
    """movmatrix, and stmatrix.trans (sm_90) read back by ldmatrix, on one 8 x 8 matrix of halves."""
    matrix = np.arange(64, dtype=np.uint16).reshape(8, 8)
    fragment = matrix.reshape(-1).view(np.uint32)  # lane 4 g + t holds columns 2 t, 2 t + 1 of row g
    moved = run_snippet("movmatrix.sync.aligned.m8n8.trans.b16 %o, %i0;", [fragment], np.uint32)
    np.testing.assert_array_equal(moved.view(np.uint16).reshape(8, 8), matrix.T)
    body = """mov.u32 %t0, scratch; mov.u32 %t1, %laneid; and.b32 %t1, %t1, 7; shl.b32 %t1, %t1, 4; add.u32 %t0, %t0, %t1;
        stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%t0], {%i0}; bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%o}, [%t0];"""
    np.testing.assert_array_equal(run_snippet(body, [fragment], np.uint32, target="sm_90"), moved)


def test_int4_product() -> None:
    """m8n8k32.s4 with ones in B: each row of A is summed over its nibbles."""
    a = RNG.integers(0, 2**32, 32, dtype=np.uint64).astype(np.uint32)
    body = "mov.u32 %t0, 0; mma.sync.aligned.m8n8k32.row.col.s32.s4.s4.s32 {%o, %t1}, {%i0}, {%i1}, {%t0, %t0};"
    got = run_snippet(body, [a, np.full(32, 0x11111111, np.uint32)], np.uint32).view(np.int32)
    nibbles = np.array([[(int(w) >> 4 * k & 15) for k in range(8)] for w in a])
    rows = np.where(nibbles > 7, nibbles - 16, nibbles).reshape(8, 32).sum(1)
    np.testing.assert_array_equal(got, np.repeat(rows, 4))


def test_half_accumulator_product() -> None:
    """m16n8k8 with f16 sums: B all ones gives the row sums of A, rounded to half once."""
    a = RNG.standard_normal((16, 8)).astype(np.float16)
    low, high = a[:8].reshape(-1).view(np.uint32), a[8:].reshape(-1).view(np.uint32)
    ones = np.full(32, 0x3C003C00, np.uint32)
    mma = "mov.u32 %t0, 0; mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%t1, %t2}, {%i0, %i1}, {%i2}, {%t0, %t0};"
    for register, rows in (("%t1", slice(0, 8)), ("%t2", slice(8, 16))):
        got = run_snippet(f"{mma} mov.b32 %o, {register};", [low, high, ones], np.uint32).view(np.float16)
        want = a[rows].astype(np.float64).sum(1).astype(np.float16)
        np.testing.assert_array_equal(got.reshape(8, 8), np.repeat(want[:, None], 8, axis=1))
