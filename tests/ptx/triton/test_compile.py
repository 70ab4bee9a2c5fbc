"""Every entry of the tile table, compiled ahead of time for every chip that it is meant for."""

import itertools
import re

import pytest
import torch
from support.triton_aot import (
    CHIPS,
    compile_conv,
    instructions,
    main_loop,
    opcodes,
    overwritten,
    plan,
    problem,
    ptxas,
    spilled_registers,
    target,
)

from resnet_fused.backends.triton import configs, conv2d, elementwise

MATRIX_INSTRUCTION = {
    "fma": "fma.rn.f32",
    "mma.sync": "mma.sync.aligned.m16n8k",
    "wgmma": "wgmma.mma_async.sync.aligned",
    "tcgen05": "tcgen05.mma",
    "mfma": "v_mfma_f32",
}
F16, F32 = torch.float16, torch.float32
KINDS = {"half": (F16, False), "tf32": (F32, True), "ieee": (F32, False)}


def entries(archs, kinds):
    """(arch, kind, tile) of the table's entries that a chip has the shared memory for, each once."""
    for arch, kind in itertools.product(archs, kinds):
        dtype, tf32 = KINDS[kind]
        for tile in configs.table(dtype, CHIPS[arch], tf32):
            if tile.shared_bytes(CHIPS[arch], dtype.itemsize) <= CHIPS[arch].shared_limit:
                name = f"{arch}-{kind}-{tile.m}x{tile.n}x{tile.k}"
                yield pytest.param(arch, kind, tile, id=name)


# 8.6, 8.9 and 12.0 get the instructions of 8.0 and have less shared memory: see the next test.
@pytest.mark.parametrize(
    ("arch", "kind", "tile"),
    [*entries([75, 80, 90, 100], ["half"]), *entries([80, 90, 100], ["tf32"]), *entries([80], ["ieee"])],
)
def test_entry_has_the_right_instructions_and_no_spills(arch, kind, tile):
    chip, dtype = CHIPS[arch], KINDS[kind][0]
    op = "conv2d_bn_add_relu" if tile.fits_registers(chip, configs.TAPS, True) else "conv2d_bn_relu"
    conv = problem(op, (8, 256, 28, 28), 256, 3, dtype=dtype)
    compiled = compile_conv(conv, plan(tile, conv), arch, kind == "tf32")
    loop = main_loop(compiled.asm["ptx"])

    assert compiled.metadata.shared <= chip.shared_limit
    assert ptxas(compiled, arch).spilled_bytes == 0
    # wgmma and tcgen05 take 64 rows at least.
    unit = "fma" if kind == "ieee" else chip.unit
    if tile.m < 64 and unit in ("wgmma", "tcgen05"):
        unit = "mma.sync"
    assert any(MATRIX_INSTRUCTION[unit] in line for line in loop)
    assert not any(re.search(r"\b(div|rem)\.", line) for line in loop)
    wide = opcodes(instructions(compiled.asm["ptx"]))
    if arch == 75:
        assert {name for name in opcodes(loop) if "global" in name} == {"ld.global.v4.b32"}
    else:
        copies = [line for line in loop if "shared.global" in line]
        assert copies
        assert not any("ld.global" in line for line in loop)
        assert all("cp.async.cg.shared.global" in line and ", 0x10" in line for line in copies)
    assert wide["st.global.v4.b32"] > 0
    assert not any(name.startswith("st.global") and "v4.b32" not in name for name in wide)


@pytest.mark.parametrize("arch", CHIPS, ids=str)
@pytest.mark.parametrize(
    ("shape", "k", "size", "stride"),
    [
        pytest.param((8, 256, 28, 28), 256, 3, 1, id="taps"),
        pytest.param((8, 256, 28, 28), 512, 1, 2, id="pointwise"),
        pytest.param((8, 3, 224, 224), 64, 7, 2, id="stem"),
    ],
)
def test_most_promising_plan_compiles_within_the_chip(arch, shape, k, size, stride):
    conv = problem("conv2d_bn_add_relu", shape, k, size, stride)
    compiled = compile_conv(conv, configs.plans(conv, CHIPS[arch], False)[0], arch)
    assert compiled.metadata.shared <= CHIPS[arch].shared_limit
    if isinstance(arch, str):
        assert spilled_registers(compiled) == 0
        assert MATRIX_INSTRUCTION["mfma"] in compiled.asm["amdgcn"]
    else:
        assert ptxas(compiled, arch).spilled_bytes == 0


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("kind", "size"), [("half", 8), ("tf32", 16)])
def test_the_stem_is_copied_asynchronously(arch, kind, size):
    conv = problem("conv2d_bn_relu", (8, 3, 224, 224), 64, 7, 2, dtype=KINDS[kind][0])
    best = configs.plans(conv, CHIPS[arch], kind == "tf32")[0]
    loop = main_loop(compile_conv(conv, best, arch, kind == "tf32").asm["ptx"])
    assert best.walk == configs.PAIRS
    assert not any("ld.global" in line for line in loop)
    copied = {int(found[1], 16) for line in loop if (found := re.search(r"cp\.async\.c.*, (0x\w+), %", line))}
    assert copied == {size, 16}  # of the input, of the weights


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("shape", "size"), [pytest.param((2**13, 256, 32, 33), 1, id="pointwise"), pytest.param((2**15, 3, 224, 224), 7, id="stem")]
)
def test_64_bit_offsets_compile_without_spills(arch, shape, size):
    conv = problem("conv2d_bn_add_relu", shape, 256, size, 2 if size == 7 else 1)
    best = configs.plans(conv, CHIPS[arch], False)[0]
    assert conv2d.launches(conv, best, CHIPS[arch], False)[0].constants["WIDE"]
    assert ptxas(compile_conv(conv, best, arch), arch).spilled_bytes == 0


@pytest.mark.parametrize("kind", ["half", "ieee"])
def test_amd_multiplies_by_its_matrix_unit(kind):
    conv = problem("conv2d_bn_add_relu", (8, 256, 28, 28), 256, 3, dtype=KINDS[kind][0])
    compiled = compile_conv(conv, configs.plans(conv, CHIPS["gfx942"], False)[0], "gfx942")
    assert "v_mfma_f32" in compiled.asm["amdgcn"]
    assert spilled_registers(compiled) == 0


def test_split_reduction_compiles_without_spills():
    conv = problem("conv2d_bn_add_relu", (1, 512, 7, 7), 512, 3)
    best = configs.plans(conv, CHIPS[80], False)[0]
    assert best.splits > 1
    for launch in conv2d.launches(conv, best, CHIPS[80], False):
        assert ptxas(launch.compile(target(80)), 80).spilled_bytes == 0


@pytest.mark.parametrize(("arch", "kind", "tile"), [*entries([90], ["half", "tf32"])])
def test_no_register_of_a_running_wgmma_is_written(arch, kind, tile):
    for channels, size, stride in ((256, 3, 1), (256, 1, 2), (3, 7, 2)):
        conv = problem("conv2d_bn_relu", (8, channels, 56, 56), 256, size, stride, dtype=KINDS[kind][0])
        if tile.fits_registers(CHIPS[arch], configs.walk_of(conv), False):
            assert not overwritten(main_loop(compile_conv(conv, plan(tile, conv), arch, kind == "tf32").asm["ptx"]))


@pytest.mark.parametrize(
    "launch",
    [
        pytest.param(elementwise.add_relu_fwd(4096, F16), id="add_relu_fwd"),
        pytest.param(elementwise.add_relu_bwd(4096, F16), id="add_relu_bwd"),
        pytest.param(elementwise.add_relu_fwd(4096, F32), id="add_relu_fwd-f32"),
    ],
)
def test_elementwise_kernels_move_16_bytes_at_a_time(launch):
    compiled = launch.compile(target(80))
    accesses = {name for name in opcodes(instructions(compiled.asm["ptx"])) if "global" in name}
    assert accesses == {"ld.global.v4.b32", "st.global.v4.b32"}
    assert ptxas(compiled, 80).spilled_bytes == 0
