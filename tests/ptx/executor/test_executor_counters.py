"""Counts of layouts whose answer is known: bank conflicts, sectors, compulsory bytes, instructions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import ptx_executor as px
import pytest


@pytest.mark.parametrize(("layout", "ways"), [("plain", 32), ("padded", 1), ("swizzled", 1)])
def test_transpose_bank_conflicts(cuda: Callable[..., px.Module], memory: px.Memory, layout: str, ways: int) -> None:
    """Columns of an unpadded 32 x 32 float tile lie in one bank; a padded or swizzled one spreads them over all."""
    x = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    y = memory.empty(x.nbytes)
    counters = cuda("layouts.cu").launch(f"transpose_{layout}", (2, 2), (32, 8), [memory.upload(x), y, 64], memory=memory)
    np.testing.assert_array_equal(memory.download(y, np.float32, (64, 64)), x.T)
    rows = 64 * 64 // 32
    assert (counters.of("shared_store").units, counters.of("shared_store").ideal) == (rows, rows)
    assert (counters.of("shared_load").units, counters.of("shared_load").ideal) == (ways * rows, rows)
    assert counters.shared_factor == (ways + 1) / 2
    for kind in ("global_load", "global_store"):
        assert (counters.of(kind).units, counters.of(kind).ideal) == (4 * rows, 4 * rows)
    assert (counters.bytes_read, counters.bytes_written) == (x.nbytes, x.nbytes)
    assert counters.barriers == 4
    worst = counters.worst(1)
    assert [entry.kind for _, entry in worst] == ([] if ways == 1 else ["shared_load"])


@pytest.mark.parametrize(("layout", "ways"), [("plain", 8), ("padded", 1), ("swizzled", 1)])
def test_ldmatrix_bank_conflicts(cuda: Callable[..., px.Module], memory: px.Memory, layout: str, ways: int) -> None:
    """Rows 128 bytes apart put the 8 rows of a matrix in the same 4 banks: 8 wavefronts for a matrix where 1 would do."""
    x = np.arange(32 * 64, dtype=np.uint16).reshape(32, 64)
    y = memory.empty(x.nbytes)
    counters = cuda("layouts.cu").launch(f"ldmatrix_{layout}", 1, 32, [memory.upload(x), y], memory=memory)
    fragments = memory.download(y, np.uint16, (8, 4, 32, 2))  # chunk, matrix, lane, half
    want = x.reshape(4, 8, 8, 4, 2).transpose(2, 0, 1, 3, 4).reshape(8, 4, 32, 2)
    np.testing.assert_array_equal(fragments, want)
    assert (counters.of("ldmatrix").requests, counters.of("ldmatrix").ideal) == (8, 32)
    assert counters.of("ldmatrix").units == 32 * ways


@pytest.mark.parametrize(
    ("kernel", "stride", "wavefronts", "ideal"),
    [
        ("read4", 4, 1, 1),
        ("read4", 0, 1, 1),
        ("read4", 8, 2, 1),
        ("read4", 64, 16, 1),
        ("read4", 128, 32, 1),
        ("read4", 132, 1, 1),
        ("read2", 2, 1, 1),
        ("read2", 128, 32, 1),
        ("read8", 8, 2, 2),
        ("read8", 16, 4, 2),
        ("read16", 16, 4, 4),
        ("read16", 32, 8, 4),
        ("read16", 0, 4, 4),
        ("read16", 144, 4, 4),
        ("read16", 128, 32, 4),
    ],
)
def test_wavefronts_of_strided_reads(
    cuda: Callable[..., px.Module], memory: px.Memory, kernel: str, stride: int, wavefronts: int, ideal: int
) -> None:
    """A warp at once up to 4 bytes a lane, half a warp for 8, a quarter for 16; lanes of one word share it."""
    y = memory.empty(512)
    traffic = cuda("layouts.cu").launch(kernel, 1, 32, [y, stride], memory=memory).of("shared_load")
    assert (traffic.requests, traffic.units, traffic.ideal) == (1, wavefronts, ideal)


@pytest.mark.parametrize(
    ("kernel", "stride", "offset", "sectors", "ideal"),
    [
        ("copy4", 4, 0, 4, 4),
        ("copy4", 4, 16, 5, 4),
        ("copy4", 0, 0, 1, 0.125),
        ("copy4", 8, 0, 8, 4),
        ("copy4", 256, 0, 32, 4),
        ("copy8", 8, 0, 8, 8),
        ("copy16", 16, 0, 16, 16),
        ("copy16", 64, 0, 32, 16),
    ],
)
def test_sectors_of_strided_loads(
    cuda: Callable[..., px.Module], memory: px.Memory, kernel: str, stride: int, offset: int, sectors: int, ideal: float
) -> None:
    x, y = memory.upload(np.zeros(16384, np.uint8)), memory.empty(1024)
    counters = cuda("layouts.cu").launch(kernel, 2, 32, [x, y, stride, offset], memory=memory)
    size = int(kernel[4:])
    load = counters.of("global_load")
    assert (load.requests, load.bytes, load.units, load.ideal) == (2, 64 * size, 2 * sectors, 2 * ideal)
    assert counters.bytes_read == (64 * size if stride else size)
    assert counters.of("global_store").factor == 1


@pytest.mark.parametrize("n", [1024, 900, 514, 0])
def test_async_copy_counts_only_what_it_reads(cuda: Callable[..., px.Module], memory: px.Memory, n: int) -> None:
    """The bytes past the end are zeros, and are not read: memory holds only n floats, so to read more would be a fault."""
    x = np.arange(1, n + 1, dtype=np.float32)
    y = memory.empty(4096)
    counters = cuda("layouts.cu").launch("async_copy", 1, 128, [memory.upload(x), y, n], memory=memory)
    np.testing.assert_array_equal(memory.download(y, np.float32, 1024), np.pad(x, (0, 1024 - n)))
    copied = counters.of("cp_async_global")
    assert counters.bytes_read == copied.bytes == 4 * n
    assert copied.ideal == n / 8
    assert copied.units == -(-n // 8)
    assert (counters.of("cp_async_shared").units, counters.of("cp_async_shared").ideal) == (32, 32)


def test_instruction_counts_follow_the_loop_of_each_lane() -> None:
    """A lane runs the loop as often as its number says; the warp as often as its last lane does."""
    text = """.version 8.0
    .target sm_80
    .address_size 64
    .visible .entry loop() {
    .reg .pred %p<2>; .reg .b32 %r<3>; .reg .f32 %f<2>;
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, 0;
    A: add.u32 %r1, %r1, 1;
    setp.le.u32 %p0, %r1, %r0;
    @%p0 bra A;
    setp.lt.u32 %p1, %r0, 8;
    @%p1 fma.rn.f32 %f0, 0f3F800000, 0f3F800000, 0f3F800000;
    ret; }"""
    counters = px.Module(text).launch("loop", 1, 64, [])
    assert counters.opcodes["add.u32"] == 32 + 64
    assert counters.thread_instructions["integer"] == sum(range(1, 65))
    assert (counters.warp_instructions["fp32"], counters.thread_instructions["fp32"]) == (2, 8)
    assert counters.flops["fp32"] == 16


def test_class_of_every_count_is_printed() -> None:
    memory = px.Memory()
    x = memory.upload(np.zeros(32, np.float32))
    text = """.version 8.0
    .target sm_80
    .address_size 64
    .visible .entry touch(.param .u64 x) { .reg .b64 %d<3>; .reg .b32 %r<2>;
    ld.param.u64 %d0, [x]; mov.u32 %r0, %tid.x; mul.wide.u32 %d1, %r0, 4; add.s64 %d2, %d0, %d1;
    ld.global.u32 %r1, [%d2]; st.global.u32 [%d2], %r1; ret; }"""
    summary = px.Module(text).launch("touch", 1, 32, [x], memory=memory).summary()
    assert "global_load: 1 requests, 128 bytes, 4 sectors, ideal 4, factor 1.000" in summary
    assert "distinct global bytes: read 128, written 128" in summary
