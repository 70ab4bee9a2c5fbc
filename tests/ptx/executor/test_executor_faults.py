"""Every check catches the bug planted for it, at the right thread, and says nothing of the same kernel without the bug."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import ptx_executor as px
import pytest
from support.ptx_snippet import run_snippet

X = np.arange(1, 129, dtype=np.float32)
N = 128
OUTPUT = {"reused_buffer": 256, "misaligned": 256, "overlapping_blocks": 288, "other_blocks_result": 384}
BLOCKS = {"overlapping_blocks": 2, "other_blocks_result": 2}

FAULTS = [
    ("past_the_end", "out-of-bounds", "4 bytes of global memory.*1 bytes past the end of the 512-byte allocation"),
    ("before_the_start", "out-of-bounds", "before the 512-byte allocation"),
    ("past_shared", "out-of-bounds", "at byte 512 of the block's 512 bytes of shared memory"),
    ("misaligned", "misaligned", "not a multiple of the 8 bytes"),
    ("uninitialised_shared", "uninitialised-shared", "read before anything was written there"),
    ("uninitialised_output", "uninitialised-global", "which nothing has written"),
    ("missing_barrier", "shared-race", "read, and another thread's write is not ordered"),
    ("reused_buffer", "shared-race", "written, and another thread may still read it"),
    ("two_writers", "shared-race", "several threads store different values at once"),
    ("missing_syncwarp", "shared-race", "read, and another thread's write is not ordered"),
    ("read_before_wait", "async-not-waited", "before the wait for the cp.async"),
    ("wait_for_too_few", "async-not-waited", "before the wait for the cp.async"),
    ("wait_without_barrier", "shared-race", "read, and another thread's write is not ordered"),
    ("divergent_barrier", "divergent-barrier", "only 16 of the 32 threads"),
    ("exit_before_barrier", "divergent-barrier", "only 4 of the 32 threads"),
    ("deadlock", "deadlock", "barrier 1 waits for 128 threads; 32 have come"),
    ("overlapping_blocks", "global-race", "another block reads or writes it too"),
    ("other_blocks_result", "global-race", "another block writes it in this launch"),
    ("endless", "endless-loop", "raise max_turns"),
    ("failed_assertion", "trap", "trap"),
]


def launch(module: px.Module, kernel: str, memory: px.Memory, **options: bool) -> tuple[px.Counters, int]:
    x, y = memory.upload(X), memory.empty(4 * OUTPUT.get(kernel, N))
    block = 256 if kernel == "past_the_end" else N
    return module.launch(kernel, BLOCKS.get(kernel, 1), block, [x, y, N], memory=memory, max_turns=5000, **options), y


@pytest.mark.parametrize(("kernel", "kind", "message"), FAULTS, ids=[f[0] for f in FAULTS])
def test_planted_bug_is_caught(cuda: Callable[..., px.Module], memory: px.Memory, kernel: str, kind: str, message: str) -> None:
    with pytest.raises(px.KernelFault, match=message) as caught:
        launch(cuda("faults.cu"), kernel, memory)
    fault = caught.value
    assert fault.kind == kind
    assert fault.kernel == kernel
    line = cuda("faults.cu").ptx.splitlines()[fault.line - 1]
    assert fault.instruction.split()[0] in line


@pytest.mark.parametrize("kernel", [f[0] for f in FAULTS])
def test_kernel_without_the_bug_is_clean(cuda: Callable[..., px.Module], memory: px.Memory, kernel: str) -> None:
    counters, y = launch(cuda("faults.cu", "sm_80", "-DFIXED"), kernel, memory, collect_faults=True)
    assert not counters.faults
    assert np.isfinite(memory.download(y, np.float32, 128)).all()


def test_fault_names_block_thread_and_source_line(cuda: Callable[..., px.Module], memory: px.Memory) -> None:
    x, y = memory.upload(X), memory.empty(512)
    module = cuda("faults.cu", "sm_80", "-lineinfo")
    with pytest.raises(px.KernelFault) as caught:
        module.launch("past_the_end", 3, 64, [x, y, N], memory=memory)
    assert (caught.value.block, caught.value.thread) == ((2, 0, 0), (0, 0, 0))
    source = (Path(__file__).parent / "kernels" / "faults.cu").read_text().splitlines()
    name, line = caught.value.source.split(":")
    assert name == "faults.cu"
    assert "y[i] = x[i]" in source[int(line) - 1]


def test_output_left_out_is_refused(cuda: Callable[..., px.Module], memory: px.Memory) -> None:
    counters, y = launch(cuda("faults.cu"), "unwritten_output", memory)
    assert counters.bytes_written == 508
    with pytest.raises(ValueError, match=r"4 of 512 bytes were never written \(first at \+508\)"):
        memory.download(y, np.float32, 128)


@pytest.mark.parametrize(
    ("kernel", "poisoned"),
    [
        ("uninitialised_shared", [127 - 77]),
        ("missing_barrier", range(128)),
        ("read_before_wait", range(128)),
        ("overlapping_blocks", range(128, 160)),
    ],
)
def test_undefined_results_are_poisoned(
    cuda: Callable[..., px.Module], memory: px.Memory, kernel: str, poisoned: range
) -> None:
    """Where a fault is collected and not raised, what hardware would leave to luck is NaN."""
    counters, y = launch(cuda("faults.cu"), kernel, memory, collect_faults=True)
    assert len(counters.faults) == 1
    nan = np.isnan(memory.download(y, np.float32, OUTPUT.get(kernel, N)))
    assert np.flatnonzero(nan).tolist() == list(poisoned)


def test_copies_land_at_the_wait(cuda: Callable[..., px.Module], memory: px.Memory) -> None:
    """With one wait too few the first group has landed and the second has not."""
    counters, y = launch(cuda("faults.cu"), "wait_for_too_few", memory, collect_faults=True)
    assert {f.kind for f in counters.faults} == {"async-not-waited"}
    assert np.isnan(memory.download(y, np.float32, N)).all()


def test_too_much_shared_memory_is_refused(cuda: Callable[..., px.Module], memory: px.Memory) -> None:
    x, y = memory.upload(X), memory.empty(512)
    with pytest.raises(ValueError, match="the block needs 200512 bytes, and sm_80 has 166912"):
        cuda("faults.cu").launch("past_shared", 1, 128, [x, y, N], 200_000, memory)


def test_lane_outside_of_its_member_mask() -> None:
    with pytest.raises(px.KernelFault, match="lane 0 is not in its mask 0xfffffffe") as caught:
        run_snippet("setp.eq.u32 %p0, %i0, 0; vote.sync.ballot.b32 %o, %p0, 0xfffffffe;", [np.zeros(32, np.uint32)], np.uint32)
    assert caught.value.kind == "member-mask"


def test_mask_that_waits_for_lanes_that_never_come() -> None:
    body = "mov.u32 %o, 0; setp.lt.u32 %p0, %i0, 16; @!%p0 bra L; shfl.sync.idx.b32 %o, %i0, 20, 31, -1; L:"
    with pytest.raises(px.KernelFault) as caught:
        run_snippet(body + " bar.sync 0;", [np.arange(32, dtype=np.uint32)], np.uint32)
    assert caught.value.kind in ("member-mask", "divergent-barrier")
