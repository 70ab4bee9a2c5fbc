"""Single instructions against models written from the PTX ISA in Python's integers, fractions and NumPy's float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from support.ptx_snippet import run_snippet

EDGES = [
    0,
    1,
    2,
    3,
    31,
    32,
    33,
    64,
    255,
    0x7FFF,
    0x7FFFFFFF,
    0x80000000,
    0x80000001,
    0xFFFFFFFF,
    0xFFFFFFFE,
    0xFFFF8000,
]
RNG = np.random.default_rng(0)
A = np.concatenate([RNG.integers(0, 1 << 32, 48, dtype=np.uint64), np.repeat(EDGES, 5)]).astype(np.uint32)
B = np.concatenate([RNG.integers(0, 1 << 32, 40, dtype=np.uint64), RNG.integers(0, 40, 8), np.tile(EDGES, 5)]).astype(np.uint32)
WIDE = A.astype(np.uint64) << np.uint64(32) | B[::-1]


def signed(value: int, bits: int = 32) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def octets(word: int) -> list[int]:
    return [word >> 8 * k & 255 for k in range(4)]


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else -1


def field(a: int, position: int, length: int, is_signed: bool) -> int:
    """bfe: past the top, the sign (of bit 31 or the field's own) or zero comes in."""
    top = min(position + length - 1, 31)
    sign = a >> top & 1 if is_signed and length else 0
    return sum(
        (a >> k & 1 if k < 32 else sign) << (k - position) for k in range(position, min(position + length, position + 32))
    ) | ((-sign << length) if length < 32 else 0)


def pick(selector: int, a: int, b: int) -> int:
    octet = (octets(a) + octets(b))[selector & 7]
    return (255 if octet & 128 else 0) if selector & 8 else octet


INTEGER: dict[str, Callable[[int, int], int]] = {
    "add.s32 %o, %i0, %i1;": lambda a, b: a + b,
    "sub.sat.s32 %o, %i0, %i1;": lambda a, b: max(-(1 << 31), min((1 << 31) - 1, signed(a) - signed(b))),
    "mul.lo.s32 %o, %i0, %i1;": lambda a, b: a * b,
    "mul.hi.s32 %o, %i0, %i1;": lambda a, b: signed(a) * signed(b) >> 32,
    "mul.hi.u32 %o, %i0, %i1;": lambda a, b: a * b >> 32,
    "mul24.lo.s32 %o, %i0, %i1;": lambda a, b: signed(a, 24) * signed(b, 24),
    "mad.hi.u32 %o, %i0, %i1, 9;": lambda a, b: (a * b >> 32) + 9,
    "sad.s32 %o, %i0, %i1, 3;": lambda a, b: abs(signed(a) - signed(b)) + 3,
    "div.s32 %o, %i0, %i1;": lambda a, b: quotient(signed(a), signed(b)),
    "div.u32 %o, %i0, %i1;": lambda a, b: a // b if b else -1,
    "rem.s32 %o, %i0, %i1;": lambda a, b: signed(a) - quotient(signed(a), signed(b)) * signed(b) if b else a,
    "max.s32 %o, %i0, %i1;": lambda a, b: max(signed(a), signed(b)),
    "min.u32 %o, %i0, %i1;": min,
    "abs.s32 %o, %i0;": lambda a, b: abs(signed(a)),
    "shl.b32 %o, %i0, %i1;": lambda a, b: a << b if b < 32 else 0,
    "shr.u32 %o, %i0, %i1;": lambda a, b: a >> b if b < 32 else 0,
    "shr.s32 %o, %i0, %i1;": lambda a, b: signed(a) >> min(b, 31),
    "shf.l.wrap.b32 %o, %i0, %i1, %i1;": lambda a, b: (b << 32 | a) << (b & 31) >> 32,
    "shf.r.clamp.b32 %o, %i0, %i1, %i1;": lambda a, b: (b << 32 | a) >> min(b, 32),
    "lop3.b32 %o, %i0, %i1, 0x0F0F3333, 0xE8;": lambda a, b: (a & b) | (a & 0x0F0F3333) | (b & 0x0F0F3333),
    "prmt.b32 %o, %i0, %i1, 0x2B14;": lambda a, b: sum(pick(0x2B14 >> 4 * k & 15, a, b) << 8 * k for k in range(4)),
    "prmt.b32 %o, %i0, %i1, %i1;": lambda a, b: sum(pick(b >> 4 * k & 15, a, b) << 8 * k for k in range(4)),
    "and.b32 %t0, %i1, 31; bfe.u32 %o, %i0, %t0, 7;": lambda a, b: field(a, b & 31, 7, False),
    "and.b32 %t0, %i1, 31; bfe.s32 %o, %i0, %t0, 7;": lambda a, b: field(a, b & 31, 7, True),
    "bfi.b32 %o, %i0, %i1, 5, 11;": lambda a, b: b & ~(0x7FF << 5) | (a & 0x7FF) << 5,
    "popc.b32 %o, %i0;": lambda a, b: a.bit_count(),
    "clz.b32 %o, %i0;": lambda a, b: 32 - a.bit_length(),
    "bfind.s32 %o, %i0;": lambda a, b: (a if signed(a) >= 0 else ~a & 0xFFFFFFFF).bit_length() - 1,
    "brev.b32 %o, %i0;": lambda a, b: int(f"{a:032b}"[::-1], 2),
    "dp4a.s32.u32 %o, %i0, %i1, 7;": lambda a, b: sum(signed(x, 8) * y for x, y in zip(octets(a), octets(b), strict=True)) + 7,
    "add.cc.u32 %t0, %i0, %i1; addc.u32 %o, %i1, 5;": lambda a, b: b + 5 + (a + b >> 32),
    "sub.cc.u32 %t0, %i0, %i1; subc.u32 %o, %i1, 5;": lambda a, b: b - 5 - (a < b),
    "mad.lo.cc.u32 %t0, %i0, %i1, %i1; madc.hi.u32 %o, %i0, %i1, 0;": lambda a, b: a * b + b >> 32,
    "setp.lt.and.s32 %p0|%p1, %i0, %i1, 1; selp.b32 %o, 1, 0, %p0; @%p1 add.u32 %o, %o, 2;": lambda a, b: (
        1 if signed(a) < signed(b) else 2
    ),
    "set.gt.u32.u32 %o, %i0, %i1;": lambda a, b: -(a > b),
    "cvt.s32.s8 %o, %i0;": lambda a, b: signed(a, 8),
    "cvt.sat.u8.s32 %t0, %i0; mov.b32 %o, %t0;": lambda a, b: max(0, min(255, signed(a))),
    "cvt.pack.sat.s8.s32.b32 %o, %i0, %i1, %i0;": lambda a, b: (
        a << 16 | (max(-128, min(127, signed(a))) & 255) << 8 | max(-128, min(127, signed(b))) & 255
    ),
    "st.shared.v2.b32 [scratch+8], {%i0, %i1}; ld.shared.u8 %o, [scratch+13];": lambda a, b: b >> 8 & 255,
}


@pytest.mark.parametrize("body", INTEGER, ids=lambda body: body.split(" %")[0])
def test_integer_instruction(body: str) -> None:
    shared = "scratch" in body  # one thread at a time, since they share the place
    chunks = [(A[k : k + 1], B[k : k + 1]) for k in range(0, len(A), 16)] if shared else [(A, B)]
    for a, b in chunks:
        got = run_snippet(body, [a, b], np.uint32)
        want = [INTEGER[body](int(x), int(y)) & 0xFFFFFFFF for x, y in zip(a, b, strict=True)]
        assert got.tolist() == want


LONG: dict[str, Callable[[int, int], int]] = {
    "mul.hi.s64 %o, %i0, %i1;": lambda a, b: signed(a, 64) * signed(b, 64) >> 64,
    "mul.hi.u64 %o, %i0, %i1;": lambda a, b: a * b >> 64,
    "div.s64 %o, %i0, %i1;": lambda a, b: quotient(signed(a, 64), signed(b, 64)),
    "cvt.u32.u64 %t0, %i0; cvt.u32.u64 %t1, %i1; mad.wide.s32 %o, %t0, %t1, %i0;": lambda a, b: signed(a) * signed(b) + a,
    "bfe.u64 %o, %i0, 20, 40;": lambda a, b: a >> 20 & (1 << 40) - 1,
    "mov.b64 {%t0, %t1}, %i0; mov.b64 %o, {%t1, %t0};": lambda a, b: a << 32 | a >> 32,
    "clz.b64 %t0, %i0; cvt.u64.u32 %o, %t0;": lambda a, b: 64 - a.bit_length(),
}


@pytest.mark.parametrize("body", LONG, ids=lambda body: body.split(" %")[0])
def test_64_bit_instruction(body: str) -> None:
    other = WIDE[RNG.permutation(len(WIDE))]
    got = run_snippet(body, [WIDE, other], np.uint64)
    assert got.tolist() == [LONG[body](int(x), int(y)) & (1 << 64) - 1 for x, y in zip(WIDE, other, strict=True)]


X = np.concatenate([RNG.standard_normal(90) * 10.0 ** RNG.integers(-9, 9, 90), [0.0, -0.0, 1.0, 2.5, -3.5, 1e-40]]).astype(
    np.float32
)
Y = np.concatenate([RNG.standard_normal(90), [3.0, 2.0**-24, -1.0, 0.5, 2.0**-25, 1e-3]]).astype(np.float32)


def rounded(value: Fraction, mode: str, bits: int = 24, lowest: int = -149) -> float:
    """A fraction rounded to a binary format with that many significant bits and that lowest exponent of a bit."""
    if value == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(value))) - bits + 1, lowest)
    while abs(value) >= Fraction(2) ** (exponent + bits):
        exponent += 1
    while exponent > lowest and abs(value) < Fraction(2) ** (exponent + bits - 1):
        exponent -= 1
    scaled = value / Fraction(2) ** exponent
    whole = {"rn": round, "rz": math.trunc, "rm": math.floor, "rp": math.ceil}[mode](scaled)
    return float(whole * Fraction(2) ** exponent)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("op", ["add", "mul", "fma", "div"])
def test_float32_arithmetic_is_rounded_once(op: str, mode: str) -> None:
    operands = "%i0, %i1, %i0" if op == "fma" else "%i0, %i1"
    got = run_snippet(f"{op}.{mode}.f32 %o, {operands};", [X, Y], np.float32)
    exact = {
        "add": lambda x, y: x + y,
        "mul": lambda x, y: x * y,
        "fma": lambda x, y: x * y + x,
        "div": lambda x, y: x / y,
    }[op]
    want = [rounded(exact(Fraction(float(x)), Fraction(float(y))), mode) for x, y in zip(X, Y, strict=True)]
    assert got.tolist() == want


def test_fma_decides_a_tie_by_the_exact_remainder() -> None:
    """1 + 2^-24 lies in the middle of two float32; what is far below decides, and a float64 sum has lost it."""
    a, b = np.float32([2.0**-24, 2.0**-24]), np.float32([1 + 2.0**-23, 1 - 2.0**-23])
    got = run_snippet("fma.rn.f32 %o, %i0, %i1, 0f3F800000;", [a, b], np.float32)
    assert got.tolist() == [1 + 2.0**-23, 1.0]
    tiny = np.float32([2.0**-60]), np.float32([2.0**-60])
    assert run_snippet("fma.rn.f32 %o, %i0, %i1, 0f3F800001;", tiny, np.float32)[0] == np.float32(1 + 2.0**-23)


SPECIAL = np.float32([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -2.0, np.nan])
OTHER = np.float32([1.0, np.nan, 3.0, -0.0, 0.0, -np.inf, np.nan, np.nan])


@pytest.mark.parametrize(
    ("instruction", "want"),
    [
        ("max.f32", [1.0, np.inf, 3.0, 0.0, 0.0, 1.0, -2.0, np.nan]),
        ("min.f32", [1.0, np.inf, -np.inf, -0.0, -0.0, -np.inf, -2.0, np.nan]),
        ("max.NaN.f32", [np.nan, np.nan, 3.0, 0.0, 0.0, 1.0, np.nan, np.nan]),
    ],
)
def test_min_and_max_of_nan_and_signed_zero(instruction: str, want: list[float]) -> None:
    got = run_snippet(f"{instruction} %o, %i0, %i1;", [SPECIAL, OTHER], np.float32)
    np.testing.assert_array_equal(got, np.float32(want))
    zeros = got == 0
    np.testing.assert_array_equal(np.signbit(got[zeros]), np.signbit(np.float32(want)[zeros]))


@pytest.mark.parametrize(("compare", "with_nan"), [("lt", 0), ("ltu", 1), ("ne", 0), ("neu", 1), ("num", 0), ("nan", 1)])
def test_ordered_and_unordered_comparisons(compare: str, with_nan: int) -> None:
    got = run_snippet(f"setp.{compare}.f32 %p0, %i0, %i1; selp.b32 %o, 1, 0, %p0;", [SPECIAL, OTHER], np.uint32)
    nan = np.isnan(SPECIAL) | np.isnan(OTHER)
    assert (got[nan] == with_nan).all()
    truth = {"lt": np.less, "ltu": np.less, "ne": np.not_equal, "neu": np.not_equal}.get(compare)
    want = truth(SPECIAL[~nan], OTHER[~nan]) if truth else np.full((~nan).sum(), compare == "num")
    np.testing.assert_array_equal(got[~nan], want)


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize(("kind", "bits", "lowest"), [("f16", 11, -24), ("bf16", 8, -133)])
def test_conversion_to_half_formats(kind: str, bits: int, lowest: int, mode: str) -> None:
    values = np.concatenate([X[np.abs(X) < 6e4], np.float32([1 + 2.0**-11, 1 + 3 * 2.0**-11, 2.0**-25, 1 + 2.0**-8])])
    got = run_snippet(f"cvt.{mode}.{kind}.f32 %o, %i0;", [values], np.uint16)
    want = np.float32([rounded(Fraction(float(v)), mode, bits, lowest) for v in values])
    pattern = want.astype(np.float16).view(np.uint16) if kind == "f16" else (want.view(np.uint32) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(got & 0x7FFF, pattern & 0x7FFF)


def test_conversion_to_integers_rounds_and_clamps() -> None:
    values = np.float32([2.5, 3.5, -2.5, 1e10, -1e10, np.nan, 0.999, -0.999])
    half, top = [2, 4, -2], [2**31 - 1, -(2**31), 0]
    assert run_snippet("cvt.rni.s32.f32 %o, %i0;", [values], np.int32).tolist() == [*half, *top, 1, -1]
    assert run_snippet("cvt.rmi.s32.f32 %o, %i0;", [values], np.int32).tolist() == [2, 3, -3, *top, 0, -1]
    assert run_snippet("cvt.rzi.u32.f32 %o, %i0;", [values], np.uint32).tolist() == [2, 3, 0, 2**32 - 1, 0, 0, 0, 0]
    assert run_snippet("cvt.rzi.s64.f32 %o, %i0;", [values[5:6]], np.int64)[0] == -(2**63)  # as the manual has it


def test_conversion_of_integers_is_rounded_once() -> None:
    values = np.uint64([(1 << 63) + 1, (1 << 40) + (1 << 16), (1 << 40) + (1 << 16) + 1, 3])
    for mode in ("rn", "rz", "rp"):
        got = run_snippet(f"cvt.{mode}.f32.u64 %o, %i0;", [values], np.float32)
        assert got.tolist() == [rounded(Fraction(int(v)), mode) for v in values]


def test_tf32_rounds_halves_away_from_zero() -> None:
    values = np.float32([1 + 2.0**-11, -(1 + 2.0**-11), 1 + 2.0**-12, np.inf])
    got = run_snippet("cvt.rna.tf32.f32 %o, %i0;", [values], np.float32)
    assert got.tolist() == [1 + 2.0**-10, -(1 + 2.0**-10), 1.0, np.inf]


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_packed_half_fma_is_rounded_once(kind: str) -> None:
    pairs = [RNG.standard_normal((64, 2)).astype(np.float32) for _ in range(3)]
    if kind == "f16x2":
        halves = [p.astype(np.float16) for p in pairs]
        words, exact, bits, lowest = (
            [h.view(np.uint32).reshape(-1) for h in halves],
            [h.astype(float) for h in halves],
            11,
            -24,
        )
    else:
        cut = [p.view(np.uint32) & 0xFFFF0000 for p in pairs]
        exact, bits, lowest = [c.view(np.float32).astype(float) for c in cut], 8, -133
        words = [(c[:, 0] >> 16 | c[:, 1]).astype(np.uint32) for c in cut]
    got = run_snippet(f"fma.rn.{kind} %o, %i0, %i1, %i2;", words, np.uint32).view(np.uint16).reshape(64, 2)
    want = np.empty((64, 2), np.float32)
    for k in np.ndindex(64, 2):
        a, b, c = (Fraction(float(e[k])) for e in exact)
        want[k] = rounded(a * b + c, "rn", bits, lowest)
    pattern = want.astype(np.float16).view(np.uint16) if kind == "f16x2" else want.view(np.uint32) >> 16
    np.testing.assert_array_equal(got, pattern)


@pytest.mark.parametrize("name", ["ex2", "lg2", "sin", "rsqrt", "sqrt", "rcp", "tanh"])
def test_approximate_functions(name: str) -> None:
    values = np.float32([0.1, 0.5, 1.0, 1.7, 3.0])
    functions = {"ex2": np.exp2, "lg2": np.log2, "sin": np.sin, "sqrt": np.sqrt, "tanh": np.tanh}
    functions |= {"rsqrt": lambda x: 1 / np.sqrt(x), "rcp": lambda x: 1 / x}
    got = run_snippet(f"{name}.approx.f32 %o, %i0;", [values], np.float32)
    np.testing.assert_array_equal(got, functions[name](values.astype(np.float64)).astype(np.float32))


def test_branch_table() -> None:
    table = "T: .branchtargets L0, L1, L2; and.b32 %t0, %i0, 3; min.u32 %t0, %t0, 2; brx.idx %t0, T;"
    body = table + " L0: mov.u32 %o, 10; bra E; L1: mov.u32 %o, 20; bra E; L2: mov.u32 %o, 30; E:"
    got = run_snippet(body, [np.arange(8, dtype=np.uint32)], np.uint32)
    assert got.tolist() == [10, 20, 30, 30] * 2


def test_undefined_register_is_poison_not_zero() -> None:
    assert np.isnan(run_snippet("mov.b32 %o, %t5;", [np.zeros(4, np.uint32)], np.float32)).all()


def test_flush_to_zero() -> None:
    small = np.float32([1e-40, -1e-40, 1e-20, 1.0])
    got = run_snippet("mul.ftz.f32 %o, %i0, %i0;", [small], np.float32)
    assert got.tolist() == [0.0, 0.0, 0.0, 1.0]
    assert run_snippet("add.ftz.f32 %o, %i0, 0f00000000;", [small], np.float32).tolist() == [
        0.0,
        0.0,
        float(small[2]),
        1.0,
    ]


WARP = np.arange(100, 132, dtype=np.uint32)
LANE = np.arange(32)


@pytest.mark.parametrize(
    ("body", "want"),
    [
        ("shfl.sync.bfly.b32 %o, %i0, 5, 31, -1;", WARP[LANE ^ 5]),
        ("shfl.sync.up.b32 %o, %i0, 3, 0, -1;", WARP[np.where(LANE >= 3, LANE - 3, LANE)]),
        (
            "shfl.sync.down.b32 %o|%p0, %i0, 3, 0x1807, -1; @!%p0 mov.u32 %o, 7;",
            np.where(LANE % 8 + 3 < 8, WARP + 3, 7),
        ),
        ("shfl.sync.idx.b32 %o, %i0, 9, 0x181f, -1;", WARP[LANE // 8 * 8 + 1]),
        ("setp.gt.u32 %p0, %i0, 129; vote.sync.ballot.b32 %o, %p0, -1;", np.full(32, 0xC0000000)),
        ("and.b32 %t0, %i0, 1; match.any.sync.b32 %o, %t0, -1;", np.where(LANE % 2, 0xAAAAAAAA, 0x55555555)),
        ("redux.sync.max.u32 %o, %i0, -1;", np.full(32, 131)),
        ("activemask.b32 %o;", np.full(32, 0xFFFFFFFF)),
    ],
    ids=["bfly", "up", "down in segments", "idx in segments", "ballot", "match", "redux", "activemask"],
)
def test_exchange_in_a_warp(body: str, want: np.ndarray) -> None:
    np.testing.assert_array_equal(run_snippet(body, [WARP], np.uint32), want)
