"""The depthwise convolution compiled for every chip, and its sm_80 code run instruction by instruction on the CPU."""

from __future__ import annotations

import dataclasses

import ptx_executor as px
import pytest
import torch
import torch.nn.functional as F
from support.tolerances import assert_as_good_as_stock
from support.triton_aot import CHIPS, Arch, instructions, opcodes, problem, ptxas, spilled_registers, target

from resnet_fused.backends.problem import Problem
from resnet_fused.backends.triton import conv2d_depthwise
from resnet_fused.backends.triton.conv2d_depthwise import STRIPS, Strip

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def depthwise(size: int, stride: int = 1, dtype: torch.dtype = F16, channels: int = 96, side: int = 28) -> Problem:
    return problem("conv2d_bn_add_relu", (8, channels, side, side), channels, size, stride, dtype, channels)


def strip(rows: int, columns: int) -> Strip:
    return next(strip for strip in STRIPS if (strip.rows, strip.columns) == (rows, columns))


# The ends of the table on every chip, and what comes nearest to the limits: 16-bit types, which have most channels a thread.
COMPILED = [
    *(pytest.param(arch, depthwise(3), strip(1, 4), False, id=f"{arch}-3x3") for arch in CHIPS),
    *(pytest.param(arch, depthwise(3, 2), strip(2, 2), False, id=f"{arch}-3x3-stride-2x2") for arch in (75, 80, 90, 100)),
    *(pytest.param(arch, depthwise(3), strip(1, 1), False, id=f"{arch}-3x3-one-pixel") for arch in (80, 90)),
    *(pytest.param(arch, depthwise(3, dtype=F32), strip(2, 2), False, id=f"{arch}-3x3-f32") for arch in (80, 90)),
    *(pytest.param(arch, depthwise(5), strip(1, 4), False, id=f"{arch}-5x5") for arch in (80, 90)),
    *(pytest.param(arch, depthwise(5, 2, BF16), strip(1, 2), False, id=f"{arch}-5x5-stride-bf16") for arch in (80, 90)),
    *(pytest.param(arch, depthwise(7), strip(1, 4), False, id=f"{arch}-7x7") for arch in (80, 90)),
    *(pytest.param(arch, depthwise(3), strip(1, 4), True, id=f"{arch}-3x3-wide") for arch in (80, 90)),
    *(pytest.param(arch, depthwise(5, dtype=F32), strip(1, 4), True, id=f"{arch}-5x5-wide") for arch in (80, 90)),
]


@pytest.mark.parametrize(("arch", "posed", "chosen", "wide"), COMPILED)
def test_moves_16_bytes_at_a_time_without_spills(arch: Arch, posed: Problem, chosen: Strip, wide: bool) -> None:
    assert chosen.fits_registers(posed.conv, wide)
    launch = conv2d_depthwise.launch(posed, chosen)
    compiled = dataclasses.replace(launch, constants={**launch.constants, "WIDE": wide}).compile(target(arch))
    if isinstance(arch, str):
        assert spilled_registers(compiled) == 0
        return
    assert ptxas(compiled, arch).spilled_bytes == 0
    assert compiled.metadata.shared == 0
    accesses = opcodes(instructions(compiled.asm["ptx"]))
    assert {name for name in accesses if "global" in name} == {"ld.global.v4.b32", "st.global.v4.b32"}
    # A filter of more than nine taps is a loop over its rows; what follows it is the bias and the residual.
    turns = 1 if launch.constants["UNROLLED"] else posed.conv.kernel[0]
    pixels = chosen.rows * chosen.columns
    assert (accesses["ld.global.v4.b32"] - 1 - pixels) * turns + 1 + 2 * pixels == chosen.accesses(posed.conv, True)
    assert accesses["st.global.v4.b32"] == pixels


@dataclasses.dataclass(frozen=True)
class Run:
    """One problem on one strip; `why` says what it is there for, `sectors` what its reading may take, × the ideal."""

    why: str
    shape: tuple[int, int, int, int]
    size: int
    chosen: Strip
    stride: int = 1
    dtype: torch.dtype = F16
    sectors: float = 1.0


RUNS = {
    "row": Run("four columns", (1, 64, 8, 8), 3, strip(1, 4)),
    "square": Run("two rows and columns", (1, 64, 6, 6), 3, strip(2, 2)),
    "square-stride": Run("the first of a stage, bfloat16", (1, 64, 8, 8), 3, strip(2, 2), 2, BF16),
    "pixel": Run("small images", (1, 64, 7, 7), 3, strip(1, 1)),
    "loop": Run("5×5", (1, 64, 8, 8), 5, strip(1, 4)),
    "float32": Run("float32", (1, 32, 9, 9), 5, strip(1, 2), 2, F32),
    # Pixels of 48 bytes: every other one starts in the middle of a sector.
    "ragged": Run("strips over borders, programs that end in a pixel", (2, 24, 5, 7), 3, strip(2, 2), sectors=1.35),
    # Pixels of 38 bytes, read by elements.
    "elements": Run("channels that nothing divides", (1, 19, 3, 5), 3, strip(1, 2), sectors=1.85),
}


@pytest.mark.parametrize("run", [pytest.param(run, id=name) for name, run in RUNS.items()])
def test_executed(run: Run) -> None:
    c = run.shape[1]
    posed = problem("conv2d_bn_add_relu", run.shape, c, run.size, run.stride, run.dtype, c)
    generator = torch.Generator().manual_seed(11)
    shapes = run.shape, posed.output_shape(), (c, 1, run.size, run.size), (c,)
    x, residual, weight, bias = (torch.randn(shape, generator=generator).to(run.dtype) for shape in shapes)
    weight /= run.size
    y = torch.empty(posed.output_shape(), dtype=run.dtype, memory_format=torch.channels_last)
    pixels = [t.permute(0, 2, 3, 1).contiguous() for t in (x, residual)]
    launch = conv2d_depthwise.launch(posed, run.chosen)
    arguments = [pixels[0], conv2d_depthwise.pack(weight), bias, pixels[1], px.Output(y.permute(0, 2, 3, 1))]
    counters = px.launch_triton(launch.compile(target(80)), launch.grid, [*arguments, *launch.scalars])

    def stock(*tensors: torch.Tensor) -> torch.Tensor:
        image, filters, added, sums = tensors
        return (F.conv2d(image, filters, added, posed.conv.stride, posed.conv.padding, groups=c) + sums).relu()

    given = x, weight, bias, residual
    assert_as_good_as_stock(y, stock(*given), stock(*(t.double() for t in given)))
    assert counters.global_factor <= run.sectors
    # What lies outside of the image isn't asked for.
    elements = 16 // run.dtype.itemsize if c % 8 == 0 else 1
    lanes = launch.grid[0] * run.chosen.block(run.dtype) // elements
    assert counters.of("global_load").bytes < lanes * run.chosen.accesses(posed.conv, True) * elements * run.dtype.itemsize
