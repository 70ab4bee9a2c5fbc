"""Number formats and rounding.

Source: PTX ISA, "Floating Point Instructions" (rounding modifiers .rn .rz .rm .rp) and "Alternate Floating-Point Data
Formats".
"""

from __future__ import annotations

import numpy as np

_F64 = np.float64
ROUNDINGS = ("rn", "rz", "rm", "rp")


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits to float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(value: np.ndarray, mode: str = "rn", residual: np.ndarray | None = None) -> np.ndarray:
    """Round float64 to bfloat16 bits; ``residual`` has the sign of (exact - value) where value is itself rounded."""
    value = np.asarray(value, _F64)
    odd = _to_odd_f32(value, residual)
    bits = odd.view(np.uint32)
    nan = np.isnan(odd)
    if mode == "rn":
        rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    else:
        toward = {
            "rz": np.zeros(bits.shape, bool),
            "rm": (bits >> np.uint32(31)) == 1,
            "rp": (bits >> np.uint32(31)) == 0,
        }[mode]
        rounded = (bits + np.where(toward, np.uint32(0xFFFF), np.uint32(0))) >> np.uint32(16)
        rounded = np.where(np.isinf(odd), bits >> np.uint32(16), rounded)
    return np.where(nan, np.uint32(0x7FFF), rounded).astype(np.uint16)


def _to_odd_f32(value: np.ndarray, residual: np.ndarray | None = None) -> np.ndarray:
    """Round to float32 so that a later rounding to fewer bits is exact: truncate, and set the last bit if anything
    was lost."""
    nearest = value.astype(np.float32)
    back = nearest.astype(_F64)
    lost = back != value
    if residual is not None:
        lost = lost | (residual != 0)
    toward_zero = np.abs(back) > np.abs(value)
    bits = nearest.view(np.uint32) - toward_zero.astype(np.uint32)
    finite = np.isfinite(value)
    return (
        np.where(finite, bits | (lost & finite).astype(np.uint32), nearest.view(np.uint32)).astype(np.uint32).view(np.float32)
    )


def two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a + b as a rounded sum and its exact error (Knuth)."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    return total, np.where(np.isfinite(total), error, 0.0)


def two_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a * b as a rounded product and its error (Dekker), for float64 of moderate size."""
    split = _F64(134217729.0)
    product = a * b
    a_high = a * split - (a * split - a)
    b_high = b * split - (b * split - b)
    a_low, b_low = a - a_high, b - b_high
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, np.where(np.isfinite(error), error, 0.0)


def narrow(value: np.ndarray, residual: np.ndarray | None, dtype: type, mode: str = "rn") -> np.ndarray:
    """Round a float64, whose exact value is ``value + residual``, once to float32 or float16 (whose NaN is 0x7fff)."""
    result = _narrow(value, residual, dtype, mode)
    if dtype is np.float16 and np.isnan(value).any():
        result = np.where(np.isnan(value), np.uint16(0x7FFF), result.view(np.uint16)).view(np.float16)
    return result


def _narrow(value: np.ndarray, residual: np.ndarray | None, dtype: type, mode: str) -> np.ndarray:
    result: np.ndarray = value.astype(dtype)
    back = result.astype(_F64)
    if mode == "rn":
        if residual is None:
            return result
        # Only where value lies exactly between two results does the residual decide.
        toward: np.ndarray = np.where(value > back, np.inf, -np.inf).astype(dtype)
        other = np.nextafter(result, toward)
        half = (
            (np.abs(value - back) == np.abs(other.astype(_F64) - value))
            & (value != back)
            & (residual != 0)
            & np.isfinite(other)
        )
        wrong = half & ((residual > 0) == (other > result))
        return np.where(wrong, other, result) if wrong.any() else result
    rest = value - back if residual is None else np.where(value != back, value - back, residual)
    rest = np.where(np.isfinite(value), rest, 0.0)
    if np.isinf(back).any():  # overflow of a finite value
        rest = np.where(np.isinf(back) & np.isfinite(value), -back, rest)
    down = {"rm": rest < 0, "rp": np.zeros(rest.shape, bool), "rz": (rest < 0) & (value > 0)}[mode]
    up = {"rp": rest > 0, "rm": np.zeros(rest.shape, bool), "rz": (rest > 0) & (value < 0)}[mode]
    result = np.where(down, np.nextafter(result, dtype(-np.inf)), result)
    return np.where(up, np.nextafter(result, dtype(np.inf)), result)


def fma_f32(a: np.ndarray, b: np.ndarray, c: np.ndarray, mode: str = "rn") -> np.ndarray:
    """a * b + c of float32, rounded once."""
    product, addend = a.astype(_F64) * b, c.astype(_F64)  # the product is exact: 48 bits
    if mode != "rn":
        return narrow(*two_sum(product, addend), np.float32, mode)
    total = product + addend
    result = total.astype(np.float32)
    # The float64 sum misleads the second rounding only in the middle of two float32, or where float32 is subnormal.
    low = total.view(np.uint64) & np.uint64(0x1FFFFFFF)
    risky = np.flatnonzero((low == 0x10000000) | ((np.abs(total) < 2.0**-125) & (total != 0)))
    if risky.size:
        result[risky] = narrow(*two_sum(product[risky], addend[risky]), np.float32)
    return result


def flush(value: np.ndarray) -> np.ndarray:
    """.ftz: subnormal float32 numbers become zero of the same sign."""
    small = (np.abs(value) < np.float32(2.0**-126)) & (value != 0)
    return np.where(small, np.copysign(np.float32(0), value), value) if small.any() else value


def saturate(value: np.ndarray) -> np.ndarray:
    """.sat: clamped to [+0, 1]; NaN becomes +0."""
    return np.where(value > 0, np.minimum(value, value.dtype.type(1)), value.dtype.type(0))


def minimum(a: np.ndarray, b: np.ndarray, keep_nan: bool) -> np.ndarray:
    """min with -0 < +0; a NaN operand loses unless ``keep_nan``."""
    result = np.minimum(a, b) if keep_nan else np.fmin(a, b)
    return np.where((a == 0) & (b == 0), np.where(np.signbit(a), a, b), result)


def maximum(a: np.ndarray, b: np.ndarray, keep_nan: bool) -> np.ndarray:
    """max with +0 > -0; a NaN operand loses unless ``keep_nan``."""
    result = np.maximum(a, b) if keep_nan else np.fmax(a, b)
    return np.where((a == 0) & (b == 0), np.where(np.signbit(a), b, a), result)
