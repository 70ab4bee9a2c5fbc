"""Memory of results: what is kept for the next call, and what goes back to the system."""

from __future__ import annotations

import functools
import gc

import pytest
import torch
from support.fast_paths import needs_kept_memory

pytestmark = needs_kept_memory

MIB = 2**20
CYCLES, LONGEST = 256, 1024  # of csrc/cpu/recent_need.h
SPARE = 65 * 1024  # blocks are of whole 64 KiB


@pytest.fixture(autouse=True)
def _empty_pool() -> None:
    gc.collect()  # what other tests left must not come back meanwhile
    torch.ops.resnet_fused_cpu.release_activations()


@functools.cache
def like(mib: int) -> torch.Tensor:
    return torch.empty(1, mib, 512, 512)


def result(mib: int) -> torch.Tensor:
    return torch.ops.resnet_fused_cpu.empty_activations(like(mib))


def call(mib: int) -> None:
    """A call of a model that needs that much at once, in two results."""
    first = result(mib // 2)
    second = result(mib - mib // 2)
    del first, second


def kept() -> int:
    return torch.ops.resnet_fused_cpu.kept_activations()


def test_what_every_call_needs_is_kept():
    call(8)
    call(8)
    assert kept() >= 8 * MIB
    places = {result(4).data_ptr() for _ in range(20)}
    assert len(places) == 1


def test_what_one_call_among_others_needs_is_not_kept():
    for _ in range(3):
        call(4)
    call(64)
    assert kept() <= 4.5 * MIB + SPARE
    call(4)
    assert 4 * MIB <= kept() <= 4.5 * MIB + SPARE


def test_what_a_single_call_needs_is_not_kept():
    call(64)
    assert kept() == 0


def test_what_other_calls_needed_is_kept_for_some_time():
    for _ in range(20):
        call(64)
        call(4)
        assert kept() >= 4 * MIB
    assert kept() >= 64 * MIB
    for _ in range(CYCLES):
        call(4)
    assert kept() <= 4.5 * MIB + SPARE


def test_while_a_result_is_held_old_needs_are_forgotten_too():
    held = result(2)
    call(64)
    assert kept() >= 64 * MIB
    for _ in range(LONGEST):
        call(4)
    assert held.untyped_storage().nbytes() + kept() <= (2 + 4) * 1.125 * MIB + SPARE
    for _ in range(LONGEST):
        call(4)
    assert kept() >= 4 * MIB


def test_release():
    call(8)
    call(8)
    before = kept()
    assert before > 0
    assert torch.ops.resnet_fused_cpu.release_activations() == before
    assert kept() == 0
    call(8)
    assert kept() == 0
