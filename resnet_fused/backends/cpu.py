"""Our own CPU kernels: Winograd and direct convolutions for AVX-512 and AVX2, with shift, residual and ReLU fused."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from resnet_fused.backends import Declined, Kernel, cpu_bn, cpu_plan, library, records
from resnet_fused.backends.cpu_chain import Chain, ChainKernel
from resnet_fused.backends.norm import NORM_OPS, NormKernels
from resnet_fused.backends.problem import Conv, Folded, Pool, Problem

_LIBRARY = "resnet_fused_cpu"
_CONVS = ("conv2d_bn", "conv2d_bn_relu", "conv2d_bn_add_relu")
_BLOCKS = ("basic_block", "bottleneck")
_STEM_POOL = Pool((3, 3), (2, 2), (1, 1))


def _stem_kernel(problem: Problem) -> bool:
    """Whether the stem's kernel serves the problem, a stem or its convolution alone."""
    if problem.precision != "fast" or not _is_stem(problem.convs[0]):
        return False
    return problem.pool == _STEM_POOL if problem.op == "stem" else problem.op in ("conv2d_bn", "conv2d_bn_relu")


def _is_stem(conv: Conv) -> bool:
    """Whether the stem's kernel can compute it: 7×7, stride 2, padding 3, on as few channels as images have."""
    return conv[2:] == ((7, 7), (2, 2), (3, 3), (1, 1), 1) and conv.in_channels <= 4


def _stem_weights(weight: Tensor) -> Tensor:
    """Weights of the stem's kernel, [panel][36 points][4·in_channels][panel]: G g Gᵀ of the 4×4 taps of each phase.

    Row kh of the 7×7 filter is tap a of phase p, where kh + 1 = 2a + p; likewise for columns. G holds the powers of the
    interpolation points (csrc/cpu/winograd_transforms.h).
    """
    out_channels, in_channels = weight.shape[:2]
    taps = torch.nn.functional.pad(weight.detach().double(), (1, 0, 1, 0)).view(out_channels, in_channels, 4, 2, 4, 2)
    points = taps.new_tensor([0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5)])
    g = torch.cat([torch.stack([points**power for power in range(4)], 1), points.new_tensor([[0, 0, 0, 1]])])
    transformed = torch.einsum("ocapbq,ia,jb->oijpqc", taps, g, g).reshape(out_channels, 36, 4 * in_channels)
    panel = torch.ops.resnet_fused_cpu.panel()
    panels = -(-out_channels // panel)
    padded = transformed.new_zeros(panels * panel, 36, 4 * in_channels)
    padded[:out_channels] = transformed
    return padded.view(panels, panel, 36, 4 * in_channels).permute(0, 2, 3, 1).float().contiguous()


def _padded_shift(shift: Tensor) -> Tensor:
    """The shift as the kernels read it: float32, with zeros up to whole panels."""
    panel = torch.ops.resnet_fused_cpu.panel()
    padded = shift.new_zeros(-(-shift.numel() // panel) * panel, dtype=torch.float32)
    padded[: shift.numel()] = shift.detach()
    return padded


def _packed(folded: Folded, conv: Conv, dtype: torch.dtype, winograd: bool) -> tuple[Tensor, Tensor]:
    """Weights of one convolution as its kernel takes them, and padded shift, made once for all problems that use them."""
    transformed = winograd and cpu_plan.keeps_transformed(conv)

    def pack() -> tuple[Tensor, Tensor]:
        (weight,), (shift,) = folded.tensors()
        weight = torch.ops.resnet_fused_cpu.pack(weight.detach().contiguous(memory_format=torch.channels_last), winograd)
        if transformed:
            weight = torch.ops.resnet_fused_cpu.transform(weight, conv.in_channels, conv.out_channels, conv.stride[0])
        return weight, _padded_shift(shift)

    return folded.pack(("cpu", winograd, transformed), pack)


def _bfloat16_unsupported(problem: Problem) -> str | None:
    """Why the problem can't be served in bfloat16; None if it can."""
    if problem.op not in _BLOCKS and (_stem_kernel(problem) or cpu_plan.winograd(problem) is not None):
        return None
    return _direct_bfloat16_unsupported(problem)


def _direct_bfloat16_unsupported(problem: Problem) -> str | None:
    """Why not every convolution of the problem can be summed directly in bfloat16; None if it can."""
    if not torch.ops.resnet_fused_cpu.avx512_bf16():
        return "without AVX512_BF16 it serves bfloat16 only by Winograd: 3×3 convolutions of stride, padding and dilation 1"
    for conv in problem.convs:
        if conv.in_channels % 2 != 0:
            return f"in bfloat16 it needs an even number of input channels, not {conv.in_channels}"
    return None


class CPU:
    """Compiled kernels of csrc/cpu for CPU tensors."""

    name = "cpu"

    @functools.cache  # noqa: B019 — one instance lives as long as the process
    def unavailable(self) -> str | None:
        reason = library.load(_LIBRARY)
        if reason is None and torch.ops.resnet_fused_cpu.isa() == 0:
            return "this CPU has neither AVX-512 nor AVX2 with FMA; use the backend 'onednn'"
        return reason

    def unsupported(self, problem: Problem) -> str | None:
        if problem.device.type != "cpu":
            return f"it serves CPU tensors, not {problem.device.type}"
        if problem.op in NORM_OPS:
            return cpu_bn.unsupported(problem)
        if problem.op not in (*_CONVS, *_BLOCKS, "stem"):
            return f"it has no kernel for {problem.op}"
        if problem.dtype not in (torch.float32, torch.bfloat16):
            return f"it serves float32 and bfloat16, not {problem.dtype}"
        if 0 in (*problem.shape, *problem.output_shape()):
            return "the input or the result is empty"
        for conv in problem.convs:
            if conv.groups != 1:
                return f"it serves convolutions of one group, not {conv.groups}"
        if problem.op == "stem" and not _stem_kernel(problem):
            return "as a whole it serves, by Winograd, a 7×7 convolution of stride 2 on up to 4 channels with a 3×3 pool"
        if problem.op in _BLOCKS:
            if not cpu_plan.block_serves(problem):
                return "as a whole it serves blocks of stride 1 whose 3×3 layers have padding and dilation 1"
            if problem.precision == "exact":
                return "as a whole it serves blocks by Winograd only, which precision='exact' forbids"
        return _bfloat16_unsupported(problem) if problem.dtype == torch.bfloat16 else None

    def wins(self, problem: Problem) -> bool:
        if problem.op in NORM_OPS:
            return True
        # Without Winograd we are level with oneDNN at best.
        if problem.precision == "exact":
            return False
        # oneDNN uses AMX, at many times the rate of our instructions.
        if problem.dtype == torch.bfloat16 and torch.ops.resnet_fused_cpu.amx_bf16():
            return False
        if problem.op in _BLOCKS:
            return cpu_plan.block_wins(problem)
        return problem.op == "stem" or cpu_plan.conv_wins(problem)

    def variants(self, problem: Problem) -> list[str]:
        """Names of the plans worth a measurement, which `prepare` takes; empty without a choice."""
        found = self._plans(problem)
        return [*found] if len(found) > 1 else []

    def _plans(self, problem: Problem) -> dict[str, list[int]]:
        if problem.op not in (*_CONVS, *_BLOCKS) or _stem_kernel(problem):
            return {}
        direct = problem.dtype == torch.float32 or _direct_bfloat16_unsupported(problem) is None
        return cpu_plan.plans(problem, direct)

    def prepare(self, problem: Problem, folded: Folded, variant: str | None = None) -> Kernel:
        """The kernel for the problem, by the plan of that name, else by the recorded one, else by the rules' choice."""
        plans, name = self._plans(problem), variant or records.variant(problem, self.name)
        plan = plans[name] if name in plans else next(iter(plans.values()), [])
        if problem.op in _BLOCKS:
            run = self._block(problem, folded, plan)
        elif _stem_kernel(problem):
            run = self._stem(problem, folded)
        else:
            run = self._conv(problem, folded, plan)
        if problem.memory_format == torch.channels_last:
            return run
        return lambda x, residual: run(x, residual).contiguous()

    def _conv(self, problem: Problem, folded: Folded, plan: list[int]) -> Kernel:
        (conv,) = problem.convs
        weight, shift = _packed(folded, conv, problem.dtype, winograd=bool(plan))
        geometry = [*conv.kernel, *conv.stride, *conv.padding, *conv.dilation]
        relu, out_channels = problem.op != "conv2d_bn", conv.out_channels

        def record(chain: Chain, x: int, residual: int | None) -> int:
            if problem.op != "conv2d_bn_add_relu":
                residual = None
            return chain.conv(x, residual, weight, shift, out_channels, geometry, relu, plan)

        return ChainKernel(problem.shape, problem.dtype, record)

    def _stem(self, problem: Problem, folded: Folded) -> Kernel:
        def pack() -> tuple[Tensor, Tensor]:
            (weight,), (shift,) = folded.tensors()
            return _stem_weights(weight), _padded_shift(shift)

        weights, shift = folded.pack(("cpu", "stem"), pack)
        out_channels, pool, relu = problem.convs[0].out_channels, problem.pool is not None, problem.op != "conv2d_bn"
        run = torch.ops.resnet_fused_cpu.stem.default

        def kernel(x: Tensor, residual: Tensor | None) -> Tensor:
            y = run(x, weights, shift, out_channels, pool, relu)
            if y is None:
                raise Declined
            return y

        return kernel

    def _block(self, problem: Problem, folded: Folded, plan: list[int]) -> Kernel:
        # By part, so that a block composed of its layers finds what was packed.
        packed = [
            _packed(folded.part(i), conv, problem.dtype, winograd=not conv.pointwise) for i, conv in enumerate(problem.convs)
        ]
        weights, shifts = [weight for weight, _ in packed], [shift for _, shift in packed]
        channels = [conv.out_channels for conv in problem.main_path]

        def record(chain: Chain, x: int, residual: int | None) -> int:
            return chain.block(x, weights, shifts, channels, plan)

        return ChainKernel(problem.shape, problem.dtype, record)

    def norm(self) -> NormKernels:
        return cpu_bn.CPUNorm()
