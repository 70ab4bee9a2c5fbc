"""What ptxas makes of the kernels: registers that allow the planned blocks, no spills, and the mix of the main loop."""

from __future__ import annotations

import functools
import re

import ptx_executor as px
import pytest
from support.emulated_cuda import SOURCES, ptx

REGISTERS = 65536  # of a multiprocessor: CUDA C++ Programming Guide, "Compute Capabilities"


def tiles() -> dict[str, tuple[int, int]]:
    """Threads of a block and blocks of a multiprocessor, by kernel, from the list of instantiations."""
    found = {}
    text = (SOURCES / "conv2d_tiles.h").read_text()
    pattern = r"X\(conv2d_fwd_(\S+), \w+, \w+, \w+, (\d+), (\d+), \d+, (\d+), (\d+), \d+, (\d+)\)"
    for name, m, n, warp_m, warp_n, blocks in re.findall(pattern, text):
        threads = 32 * (int(m) // int(warp_m)) * (int(n) // int(warp_n))
        for suffix in ("f16", "bf16"):
            found[f"conv2d_fwd_{name.replace('##SUFFIX##', suffix)}"] = threads, int(blocks)
    return found


@functools.cache
def resources(source: str, arch: str) -> dict[str, px.KernelResources]:
    return px.ptxas_info(ptx(source, arch), arch)


SOURCES_AND_GPUS = [
    ("conv2d_f16", "sm_80"),
    ("conv2d_bf16", "sm_80"),
    ("conv2d_f32", "sm_80"),
    ("conv2d_stem", "sm_80"),
    ("conv2d_stem", "sm_90"),  # where it is closest to the limit
    ("stem", "sm_80"),
    ("stem", "sm_90"),
    ("conv2d_reduce", "sm_80"),
    ("batch_norm", "sm_80"),
    ("conv2d_f16", "sm_75"),
    ("conv2d_f32", "sm_75"),
]


@pytest.mark.parametrize(("source", "arch"), SOURCES_AND_GPUS)
def test_no_spills(source: str, arch: str) -> None:
    found = resources(source, arch)
    assert found
    for kernel, used in found.items():
        assert used.spill_stores == used.spill_loads == used.stack == 0, kernel


@pytest.mark.parametrize(("source", "arch"), [entry for entry in SOURCES_AND_GPUS if entry[0][7:] in ("f16", "bf16", "f32")])
def test_registers_allow_the_planned_blocks(source: str, arch: str) -> None:
    planned, found = tiles(), resources(source, arch)
    assert set(found) <= set(planned)
    for kernel, used in found.items():
        threads, blocks = planned[kernel]
        of_a_warp = -(-used.registers * 32 // 256) * 256  # the unit of allocation
        assert of_a_warp * (threads // 32) * blocks <= REGISTERS, kernel


# Share of tensor-core instructions in the main loop: CUTLASS's at the same tile, warp tile and stages.
SHARES = {
    "conv2d_fwd_f16_128x256x32": 0.35,
    "conv2d_fwd_f16_128x128x64": 0.38,
    "conv2d_fwd_f16_128x128x32": 0.33,
    "conv2d_fwd_f16_128x64x32": 0.21,
}


@pytest.mark.parametrize("kernel", SHARES)
def test_share_of_products_in_the_main_loop(kernel: str) -> None:
    mix = machine_code("conv2d_f16", "sm_80")[kernel]
    assert mix.count("HMMA") / sum(mix.loop.values()) >= SHARES[kernel]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_stems_blocks_fit_a_multiprocessor_and_multiply_mostly(arch: str) -> None:
    for kernel, used in resources("stem", arch).items():
        assert used.registers * 64 * 6 <= REGISTERS, kernel  # six blocks of two warps, stem_tiles.h
    for kernel, mix in machine_code("stem", arch).items():
        assert mix.count("HMMA") / sum(mix.loop.values()) >= 0.22, kernel


@functools.cache
def machine_code(source: str, arch: str) -> dict[str, px.SassMix]:
    return px.sass_mix(ptx(source, arch), arch)
