"""Merged groups compiled for every chip with a matrix unit, and their sm_80 code run instruction by instruction on the CPU."""

from __future__ import annotations

import dataclasses
import itertools
import re

import ptx_executor as px
import pytest
import torch
import torch.nn.functional as F
from support.tolerances import assert_as_good_as_stock
from support.triton_aot import CHIPS, Arch, instructions, loops, opcodes, overwritten, problem, ptxas, spilled_registers, target

from resnet_fused.backends.problem import Problem
from resnet_fused.backends.tf32 import to_tf32
from resnet_fused.backends.triton import conv2d_grouped
from resnet_fused.backends.triton.conv2d_grouped import Tile

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
TILES = {
    4: (Tile(128, 4, 16, 64, True), Tile(128, 8, 32, 32, False)),
    8: (Tile(64, 4, 32, 32, False), Tile(64, 2, 16, 64, True)),
    16: (Tile(128, 1, 16, 64, True),),
    24: (Tile(128, 1, 32, 32, False),),
    32: (Tile(128, 1, 32, 32, False),),
    64: (Tile(128, 1, 64, 64, False),),
}
# Every tile on the chips of which the others have instructions, the widest type, and 64-bit offsets.
COMPILED = [
    *((arch, c, tile, F16, False) for arch in (80, 90) for c in TILES for tile in TILES[c]),
    *((arch, 4, TILES[4][1], F16, False) for arch in (86, 89, 100, 120, "gfx942")),
    *((arch, c, TILES[c][-1], F32, False) for arch in (80, 90) for c in (4, 64)),
    *((arch, 4, tile, F16, True) for arch in (80, 90) for tile in TILES[4]),
]


def grouped(c: int, groups: int = 16, side: int = 28, images: int = 8, stride: int = 1, dtype: torch.dtype = F16) -> Problem:
    return problem("conv2d_bn_add_relu", (images, c * groups, side, side), c * groups, 3, stride, dtype, groups)


@pytest.mark.parametrize(
    ("arch", "c", "tile", "dtype", "wide"),
    [pytest.param(*given, id=f"{given[0]}-{given[1]}-{given[2].name}-{given[3]}{'-wide' * given[4]}") for given in COMPILED],
)
def test_compiles_without_spills(arch: Arch, c: int, tile: Tile, dtype: torch.dtype, wide: bool) -> None:
    chip = CHIPS[arch]
    launch = conv2d_grouped.launch(grouped(c, dtype=dtype), tile, chip, dtype == F32)
    compiled = dataclasses.replace(launch, constants={**launch.constants, "WIDE": wide}).compile(target(arch))
    assert compiled.metadata.shared <= chip.shared_limit
    if isinstance(arch, str):
        assert spilled_registers(compiled) == 0
        assert "v_mfma_f32" in compiled.asm["amdgcn"]
        return
    ptx = compiled.asm["ptx"]
    assert ptxas(compiled, arch).spilled_bytes == 0
    stores = {name for name in opcodes(instructions(ptx)) if name.startswith("st.global")}
    assert stores == {"st.global.v4.b32"}

    multiplying = [loop for loop in loops(ptx) if any("mma" in line for line in loop)]
    assert not any(re.search(r"\b(div|rem)\.", line) for loop in multiplying for line in loop)
    # The first walk copies asynchronously; a second one, group by group, is there where groups are merged.
    first = [loop for loop in multiplying if any("cp.async" in line for line in loop)]
    assert first
    assert len(multiplying) > len(first) or tile.merged == 1
    assert not any("ld.global" in line for loop in first for line in loop)
    copied = {int(size, 16) for loop in first for line in loop for size in re.findall(r"shared\.global.*, (0x\w+), %", line)}
    assert copied == {16}
    if arch == 90:
        assert not any(overwritten(loop) for loop in multiplying)


@pytest.mark.parametrize("arch", [arch for arch in CHIPS if arch != 75], ids=str)
def test_there_are_tiles_for_everything_and_all_fit_the_chip(arch: Arch) -> None:
    chip = CHIPS[arch]
    for c, dtype in itertools.product((4, 8, 12, 16, 24, 32, 48, 56, 64), (F16, F32)):
        posed = grouped(c, dtype=dtype)
        assert conv2d_grouped.why_not(posed, chip, True) is None
        tiles = conv2d_grouped.plans(posed, chip)
        assert tiles
        assert len({tile.name for tile in tiles}) == len(tiles)
        assert all(tile.shared_bytes(chip, dtype.itemsize) <= chip.shared_limit for tile in tiles)


def test_offsets_have_64_bits_where_a_tensor_needs_them() -> None:
    few, many = (grouped(4, 16, 32, images) for images in (2**15 - 1, 2**15))
    tile = TILES[4][0]
    for posed, bits in ((few, "32"), (many, "64")):
        code = conv2d_grouped.launch(posed, tile, CHIPS[80], False).compile(target(80)).asm["ttir"]
        shape = f"{tile.m}x{tile.n}"  # of the residual and the result
        assert set(re.findall(rf"tt\.addptr .*tensor<{shape}x!tt\.ptr<f16>>, tensor<{shape}xi(\d+)>", code)) == {bits}


def test_larger_tiles_where_there_is_enough_work() -> None:
    few, many = (conv2d_grouped.plans(grouped(4, 32, side, images), CHIPS[80])[0] for side, images in ((7, 1), (56, 64)))
    assert (few.m, many.m) == (64, 128)


@dataclasses.dataclass(frozen=True)
class Run:
    """One problem on one tile; `why` says what it is there for, `sectors` what its reading may take, × the ideal."""

    why: str
    posed: Problem
    tile: Tile
    sectors: float = 1.02


RUNS = {
    "4": Run("ResNeXt", grouped(4, 8, 10, 1), TILES[4][0]),
    "4-wide": Run("eight groups a bundle", grouped(4, 8, 10, 1), TILES[4][1]),
    "8": Run("two groups a bundle, by rows", grouped(8, 4, 9, 1), TILES[8][1]),
    "16": Run("nothing to merge", grouped(16, 2, 9, 1), TILES[16][0]),
    "8-bf16": Run("bfloat16", grouped(8, 4, 9, 1, dtype=BF16), TILES[8][0]),
    "8-stride": Run("the first of a stage", grouped(8, 4, 9, 2, 2), TILES[8][0]),
    # Pixels of 96 bytes, a bundle of 48: every other one starts in the middle of a sector.
    "24": Run("RegNet", grouped(24, 2, 9, 1), TILES[24][0], 1.25),
    "32": Run("ResNeSt", grouped(32, 2, 9, 1), TILES[32][0]),
    "64-tf32": Run("TF32", grouped(64, 2, 6, 1, dtype=F32), TILES[64][0]),
}


def execute(run: Run, special: float | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, px.Counters]:
    """The kernel's result, float64's and stock's, and the counters; `special` is put into one channel of a pixel."""
    conv, dtype = run.posed.conv, run.posed.types.source
    generator = torch.Generator().manual_seed(11)
    c = conv.in_channels // conv.groups
    shapes = run.posed.shape, run.posed.output_shape(), (conv.out_channels, c, 3, 3), (conv.out_channels,)
    x, residual, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    weight /= (9 * c) ** 0.5
    if special is not None:
        x[0, 1, 2, 2] = special
    if dtype == F32:  # so that a CPU's float32 is what TF32 gives
        x, weight = to_tf32(x), to_tf32(weight)
    y = torch.empty(run.posed.output_shape(), dtype=dtype, memory_format=torch.channels_last)
    pixels = [t.permute(0, 2, 3, 1).contiguous() for t in (x, residual)]
    launch = conv2d_grouped.launch(run.posed, run.tile, CHIPS[80], dtype == F32)
    packed = conv2d_grouped.pack(weight, conv, run.tile)
    arguments = [pixels[0], packed, bias, pixels[1], px.Output(y.permute(0, 2, 3, 1)), *launch.scalars]
    counters = px.launch_triton(launch.compile(target(80)), launch.grid, arguments)

    def stock(*tensors: torch.Tensor) -> torch.Tensor:
        image, filters, added, sums = tensors
        return (F.conv2d(image, filters, added, conv.stride, conv.padding, groups=conv.groups) + sums).relu()

    given = x, weight, bias, residual
    return y, stock(*(t.double() for t in given)), stock(*given), counters


@pytest.mark.parametrize("run", [pytest.param(run, id=name) for name, run in RUNS.items()])
def test_executed(run: Run) -> None:
    y, truth, stock, counters = execute(run)
    assert_as_good_as_stock(y, stock, truth)
    assert counters.global_factor <= run.sectors
    for kind in ("cp_async_shared", "ldmatrix", "shared_load"):
        assert counters.of(kind).units == counters.of(kind).ideal
    # The products of a bundle, of which one in `merged` is used at most, of whole tiles and steps.
    n, _, oh, ow = y.shape
    rows = -(-n * oh * ow // run.tile.m) * run.tile.m
    bundles, steps = run.posed.conv.groups // run.tile.merged, 3 if run.tile.by_rows else 9
    assert sum(flops for _, flops in counters.tensor.values()) == 2 * steps * rows * bundles * run.tile.n * run.tile.k


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("name", ["4", "4-wide"])
def test_a_special_value_stays_in_its_group(name: str, value: float) -> None:
    run = RUNS[name]
    y, truth, stock, counters = execute(run, value)
    assert_as_good_as_stock(y, stock, truth)
    assert stock[:, 4:].isfinite().all()
    assert not stock[:, :4].isfinite().all()
    # The walk with all groups, and then one for each; in the bundles that have no NaN there is no other.
    ordinary = sum(count for count, _ in execute(run)[3].tensor.values())
    bundles = run.posed.conv.groups // run.tile.merged
    assert sum(count for count, _ in counters.tensor.values()) * bundles == ordinary * (bundles + run.tile.merged)
