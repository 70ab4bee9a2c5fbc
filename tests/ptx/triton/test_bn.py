"""Batch norm's Triton kernels, compiled ahead of time for every chip: registers, spills, and 16-byte accesses."""

import pytest
import torch
from support.triton_aot import CHIPS, instructions, opcodes, ptxas, spilled_registers, target

from resnet_fused.backends.triton import batch_norm_kernels as bn

F16, EPS = torch.float16, 1e-5


def launches():
    """Every kernel at a layer of ResNet-50, with all of its tensors."""
    p = bn.plan(32, 256, 56, 56, F16, True)
    return {
        "statistics": bn.statistics(p, F16)[0],
        "statistics-combine": bn.statistics(p, F16)[1],
        "apply": bn.apply(p, F16, True, True, True, EPS, True),
        "backward-reduce": bn.backward_reduce(p, F16, True, True, EPS)[0],
        "backward-reduce-combine": bn.backward_reduce(p, F16, True, True, EPS)[1],
        "backward-apply": bn.backward_apply(p, F16, True, True, True, True, EPS, p.rows),
    }


@pytest.mark.parametrize("arch", CHIPS)
def test_compiles_without_spills(arch):
    """The large kernels on every chip; those that combine partial results are the same everywhere."""
    for name in ("statistics", "apply", "backward-reduce", "backward-apply"):
        compiled = launches()[name].compile(target(arch))
        if isinstance(arch, str):
            assert spilled_registers(compiled) == 0
        else:
            assert ptxas(compiled, arch).spilled_bytes == 0


@pytest.mark.parametrize("name", ["statistics-combine", "backward-reduce-combine"])
def test_small_kernels_compile(name):
    assert ptxas(launches()[name].compile(target(80)), 80).spilled_bytes == 0


@pytest.mark.parametrize("name", ["statistics", "apply", "backward-reduce", "backward-apply"])
def test_channels_last_activations_move_16_bytes_at_a_time(name):
    compiled = launches()[name].compile(target(80))
    accesses = opcodes(instructions(compiled.asm["ptx"]))
    tensors = {"statistics": (1, 0), "apply": (2, 1), "backward-reduce": (3, 1), "backward-apply": (3, 2)}[name]
    loads, stores = accesses.get("ld.global.v4.b32", 0), accesses.get("st.global.v4.b32", 0)
    assert loads >= tensors[0], accesses
    assert stores >= tensors[1], accesses
