"""How the CPU kernels cut up a convolution or a block: cost rules, fitted to whole models (docs/cpu-kernels.md).

What they count (products, transforms, tiles, units of work) is so on every CPU. The numbers that they compare the counts with
were fitted on one, FITTED_ON, with AVX-512 and two threads, to ResNets on images of 224×224 at batch 1 and 8: its caches, and
the time that oneDNN takes instead. Elsewhere, with AVX2 alone or with many threads they are a guess: `rf.tune` measures, and
`resnet-fused info` says so.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from resnet_fused.backends.problem import Block, Conv, Problem
from resnet_fused.backends.processor import processor

FITTED_ON = "Zen 5"  # Processor.microarchitecture
_AVX512 = 2  # of Isa in csrc/cpu/isa.h


class WinogradPlan(NamedTuple):
    """The numbers that resnet_fused_cpu::chain_conv takes as `plan`.

    Attributes:
        output_tile: m of the m×m results of a tile: 2 or 4 for stride 1, 5 for stride 2.
        tiles: tiles that go through the stages together.
        panels: panels of output channels multiplied before their output transform (only where work is split over tiles).
        channel_chunk: input channels whose weights are transformed at once (only where work is split over panels).
        by_panels: whether the work is split over output channels, and not over tiles.
    """

    output_tile: int
    tiles: int
    panels: int
    channel_chunk: int
    by_panels: bool


class BlockPlan(NamedTuple):
    """The numbers that resnet_fused_cpu::chain_block takes as `plan`.

    Attributes:
        strip: rows of Winograd tiles that go through the block together.
        parts: parts of an image that are separate units of work.
        panels: panels of output channels multiplied before their output transform.
    """

    strip: int
    parts: int
    panels: int


def _tiles(height: int, width: int, m: int) -> int:
    """Tiles of m×m pixels that cover an image."""
    return -(-height // m) * -(-width // m)


def _products(height: int, width: int) -> int:
    """Products for each pair of channels of an image by F(4×4, 3×3), whose tiles may be a row or a column short.

    6 points a line of a tile, 5 for a short one: csrc/cpu/winograd_grid.h.
    """

    def points(size: int) -> int:
        tiles = -(-size // 4)
        return 6 * tiles - min(tiles, 4 * tiles - size)

    return points(height) * points(width)


def in_pairs(dtype: torch.dtype | None) -> bool:
    """Whether direct sums multiply pairs of channels, at twice the rate of float32 arithmetic, in which all else computes."""
    return dtype == torch.bfloat16 and bool(torch.ops.resnet_fused_cpu.avx512_bf16())


def _unit_stride(conv: Conv) -> bool:
    return conv[2:] == ((3, 3), (1, 1), (1, 1), (1, 1), 1)


def _stride_2(conv: Conv) -> bool:
    return conv[2:] == ((3, 3), (2, 2), (1, 1), (1, 1), 1) and conv.in_channels % 16 == 0


def keeps_transformed(conv: Conv) -> bool:
    """Whether a 3×3 convolution keeps its weights transformed, which takes four times their memory.

    That is little where layers are narrow; in wide ones reading them takes as long as making them again.
    """
    return _unit_stride(conv) and conv.in_channels * conv.out_channels <= 128 * 128


def _by_panels(tiles: int, size: int, dtype: torch.dtype) -> WinogradPlan:
    """The plan of F(4×4, 3×3) that splits the work over output channels, `size` tiles at a time."""
    # A chunk's taps are read once for each row of points: those of 16 float32 channels, or of 32 of 16 bits, stay in L1
    # until then. With more tiles than that the transform counts for less than how often sums are put down and taken up again.
    narrow = 16 if dtype == torch.float32 else 32
    return WinogradPlan(4, min(tiles, size), 1, narrow if tiles <= narrow else 32, True)


def winograd(problem: Problem) -> WinogradPlan | None:
    """The plan for a problem of one convolution; None where Winograd can't serve it, or where the direct sum is cheaper."""
    if problem.precision != "fast":
        return None
    conv = problem.conv
    n, _, h, w = problem.shape
    if _unit_stride(conv):
        tiles = n * _tiles(h, w, 4)
        half = problem.dtype != torch.float32
        # In products for each pair of channels, against 9 a pixel, which bfloat16 takes two at a time. The transform of a
        # weight counts as 250; for up to four tiles it is done in registers, from 16 bits with a conversion at each use.
        transform = 0 if keeps_transformed(conv) else 250 if tiles > 4 else 100 if half else 60
        if n * _products(h, w) + transform > (4.5 if in_pairs(problem.dtype) else 9) * n * h * w:
            return None
        if keeps_transformed(conv):
            plan = WinogradPlan(4, 14 if conv.in_channels <= 64 else 28, 8, 64, False)
        else:
            plan = _by_panels(tiles, 64, problem.types.source)
        return _divided(plan, conv, tiles, problem.types.source)
    # Sums of pairs run at twice the rate of float32 arithmetic: more than Winograd of stride 2 saves.
    if _stride_2(conv) and not in_pairs(problem.dtype):
        h, w = conv.output_size(h, w)
        tiles = n * _tiles(h, w, 5)
        # The transforms of wide layers' weights, or of any layer's for few tiles, take longer than the products saved.
        if conv.in_channels * conv.out_channels <= 128 * 128 and tiles >= 96:
            return _divided(WinogradPlan(5, 16, 4, 64, False), conv, tiles, problem.types.source)
    return None


def _divided(plan: WinogradPlan, conv: Conv, tiles: int, dtype: torch.dtype) -> WinogradPlan:
    """The plan, or for more threads than it has even work for, one that cuts the tiles finer or shares out the panels.

    What a thread takes for its units is counted in products for a tile and a pair of channels, of which there are 36 (of stride
    2 121). Where panels are shared out, each thread transforms its tiles for itself.
    """
    threads = torch.get_num_threads()
    units = -(-tiles // plan.tiles) * (_panels(conv) if plan.by_panels else 1)
    if units >= 0.95 * threads * -(-units // threads):
        return plan
    products, transform = (121, 250) if plan.output_tile == 5 else (36, 100)
    weights = 0 if keeps_transformed(conv) or plan.output_tile == 5 else 250

    def longest(blocks: int, by_panels: bool) -> float:
        each, panels = max(-(-tiles // blocks), _FULL_RATE), _panels(conv) if by_panels else 1
        shares = -(-blocks * panels // threads)
        multiplied = each * conv.in_channels * products + conv.in_channels * (weights if by_panels else 0)
        of_unit = conv.out_channels / panels * multiplied
        return shares * of_unit + -(-shares // panels) * each * conv.in_channels * transform

    fewest = -(-tiles // plan.tiles)
    orders = (False, True) if plan.output_tile == 4 and keeps_transformed(conv) else (plan.by_panels,)
    cuts = ((blocks, by_panels) for by_panels in orders for blocks in range(fewest, max(tiles // _FULL_RATE, fewest) + 1))
    blocks, by_panels = min(cuts, key=lambda cut: longest(*cut))
    each = -(-tiles // blocks)
    return _by_panels(tiles, each, dtype) if by_panels else plan._replace(tiles=each)


# Tiles from which on the register tile multiplies at its full rate.
_FULL_RATE = 4


def _panels(conv: Conv) -> int:
    return -(-conv.out_channels // int(torch.ops.resnet_fused_cpu.panel()))


def _other_winograd_plans(problem: Problem) -> list[WinogradPlan]:
    """Plans that may be faster than the one of `winograd`, where Winograd can serve a convolution."""
    conv = problem.conv
    n, _, h, w = problem.shape
    if problem.precision != "fast":
        return []
    if _unit_stride(conv):
        tiles = n * _tiles(h, w, 4)
        by_tiles = [WinogradPlan(4, min(tiles, size), 8, 64, False) for size in (8, 14, 28)]
        return by_tiles + [_by_panels(tiles, size, problem.types.source) for size in (32, 64, 128)]
    if _stride_2(conv) and not in_pairs(problem.dtype):
        height, width = conv.output_size(h, w)
        tiles = n * _tiles(height, width, 5)
        return [WinogradPlan(5, min(tiles, 16), 4, 64, False), WinogradPlan(5, min(tiles, 72), 1, 64, True)]
    return []


def winograd_plans(problem: Problem) -> dict[str, list[int]]:
    """Names and numbers of the plans that are worth a measurement, the rule's first; none where Winograd can't serve it."""
    by_rule = winograd(problem)
    found = [*([] if by_rule is None else [by_rule]), *_other_winograd_plans(problem)]
    return {_name(each): [*map(int, each)] for each in found}


def fitted() -> bool:
    """Whether this is the CPU that the rules were fitted on, with the instruction set that they were fitted for."""
    return processor().microarchitecture == FITTED_ON and torch.ops.resnet_fused_cpu.isa() == _AVX512


def block_plans(problem: Problem) -> dict[str, list[int]]:
    """Names and numbers of the plans that are worth a measurement, the rule's first; the others change one number each."""
    strip, parts, panels = by_rule = block(problem)
    rows = -(-problem.shape[2] // 4)
    strips = [BlockPlan(other, parts, panels) for other in (1, 2, 4) if other <= rows]
    cuts = [BlockPlan(strip, other, panels) for other in (1, 2 * parts, rows) if other <= rows]
    found = [by_rule, *strips, *cuts, BlockPlan(strip, parts, 2 * panels)]
    return {f"strip{p.strip}-parts{p.parts}-panels{p.panels}": [*p] for p in found}


def _name(plan: WinogradPlan) -> str:
    split = "by-panels" if plan.by_panels else f"by-tiles-panels{plan.panels}"
    return f"winograd{plan.output_tile}-tiles{plan.tiles}-chunk{plan.channel_chunk}-{split}"


def whole_block_is_possible(block: Block) -> bool:
    """Whether a block can be computed as a whole: stride 1, its 3×3 layers by Winograd, the others 1×1."""
    convs = block.main
    if block.shortcut is not None and not _plain_pointwise(block.shortcut):
        return False
    if len(convs) == 2:
        return all(map(_unit_stride, convs))
    return len(convs) == 3 and _plain_pointwise(convs[0]) and _unit_stride(convs[1]) and _plain_pointwise(convs[2])


def _plain_pointwise(conv: Conv) -> bool:
    return conv.pointwise and conv.stride == (1, 1) and conv.groups == 1


def block(problem: Problem) -> BlockPlan:
    """The plan for a block that `whole_block_is_possible`."""
    n, _, h, w = problem.shape
    strip = 1 if w > 52 else 2
    # Four units a thread let it finish evenly, but every seam of two parts costs rows that are computed twice.
    parts = min(-(-4 * torch.get_num_threads() // max(n, 1)), 1 + h // (8 * strip))
    return BlockPlan(strip, max(parts, 1), 2)


def block_preferred(problem: Problem) -> bool:
    """Whether the block as a whole was measured to beat its layers one by one, inside of whole models on two cores.

    A batch must give every thread enough strips; on images of 4×4 pixels and less most of a
    tile is padding, and wide layers' weights don't stay in the cache from strip to strip.
    """
    n, _, h, w = problem.shape
    units, threads = n * block(problem).parts, torch.get_num_threads()
    if units < 0.85 * threads * -(-units // threads):
        return False  # single layers divide more finely
    found = problem.block()
    assert found is not None
    width, tiles = found.main[0].out_channels, _tiles(h, w, 4)
    if len(found.main) == 2:
        return n >= 8 and tiles >= 4 and width <= 128
    return n >= 2 and n * tiles >= 96 and width <= 128


# Products that one accumulator of the direct sum adds up. Its rounding error grows with them: at 25,088 (VGG's first classifier
# layer as a convolution) it was five times that of stock's kernels, and oneDNN's packed ones had half of it.
_LONGEST_SUM = 20480


def conv_preferred(problem: Problem) -> bool:
    """Whether a convolution was measured to be at least level with oneDNN's."""
    conv = problem.conv
    if problem.dtype == torch.float16:
        return True  # where stock multiplies it by instructions, the backend isn't preferred at all
    if problem.dtype == torch.bfloat16:
        if not in_pairs(torch.bfloat16):
            return True  # oneDNN has no such products either, or emulates them
        if conv.groups == 1 and conv.in_channels % 2 != 0 and winograd(problem) is None:
            return False  # of an odd number of channels there are no pairs
    if conv.groups != 1:
        return groups_preferred(conv, problem.types.source)
    if conv.in_channels * math.prod(conv.kernel) > _LONGEST_SUM and winograd(problem) is None:
        return False
    # Without Winograd we are level with oneDNN at best.
    if problem.precision != "fast":
        return False
    # oneDNN skips what a dilated filter reads beside the image.
    if set(conv.dilation) != {1}:
        return False
    n, _, h, w = problem.shape
    # Below a thousand pixels what counts is how long a call takes at all, and oneDNN's takes twice as long.
    if conv.kernel != (3, 3) or n * h * w < 1024:
        return True
    # With fewer channels the transforms outweigh the products.
    return conv.in_channels >= 32


def groups_preferred(conv: Conv, dtype: torch.dtype) -> bool:
    """Whether a convolution of several groups was measured to be faster than oneDNN's.

    On Zen 5, and there without AVX-512 against oneDNN without it (docs/cpu-measurements.md).
    """
    avx512 = torch.ops.resnet_fused_cpu.isa() == _AVX512
    inside, outside = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    if inside != outside:
        return False
    # oneDNN multiplies bfloat16 in pairs, which pays where a group has more than a few channels.
    if dtype == torch.bfloat16:
        widest = 4 if conv.stride == (1, 1) else 1
    elif avx512:
        widest = 32 if conv.stride == (1, 1) else 24
    else:
        widest = 8
    return inside <= widest
