"""The entry of a ResNet: a 7×7 convolution of stride 2 on images, with ReLU and max-pool."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.backends import ConvParameters, Declined, Implementation, Kernel, Pool
from resnet_fused.backends.cpu.frozen import FrozenSteps
from resnet_fused.backends.cpu.packing import padded_bias
from resnet_fused.backends.freezing import freezing
from resnet_fused.backends.implementation import in_its_format
from resnet_fused.backends.problem import Activation, Conv, Kind, Problem

_POOL = Pool((3, 3), (2, 2), (1, 1))


class Stem(Implementation):
    """F(3×3, 4×4) on the four phases of the input, with the pool or without; csrc/cpu/stem.h."""

    name = "stem"
    kinds = frozenset({Kind.CONVOLUTION})

    def why_not(self, problem: Problem) -> str | None:
        epilogue = problem.epilogue
        if not _is_stem(problem.conv) or epilogue.residual or not epilogue.bias:
            return "it serves a 7×7 convolution of stride 2 and padding 3 on up to 4 channels, with a bias and no residual"
        if problem.precision != "fast":
            return "it serves stems by Winograd only, which precision='direct' forbids"
        if problem.dtype == torch.float16 and not epilogue.relu and epilogue.activation is not Activation.NONE:
            # Its functions see results before these are stored: SiLU of what float16 makes -infinity would be 0, not NaN.
            return f"in float16 it serves ReLU or no function, not {epilogue.activation.value}"
        if epilogue.pool is not None and (epilogue.pool != _POOL or not epilogue.relu):
            return "it serves a max-pool of 3×3, stride 2 and padding 1 after ReLU"
        return None

    def prepare(self, problem: Problem, parameters: ConvParameters, plan_name: str | None) -> Kernel:
        def pack() -> tuple[Tensor, Tensor]:
            (weight,), (bias,) = parameters.tensors()
            return _transformed(weight), padded_bias(bias)

        weights, bias = parameters.pack(("cpu", "stem"), pack)
        out_channels, epilogue = problem.conv.out_channels, problem.epilogue
        how = epilogue.pool is not None, epilogue.activation.value, epilogue.slope
        run = torch.ops.resnet_fused_cpu.stem.default

        def kernel(x: Tensor, residual: Tensor | None) -> Tensor:
            if freezing():
                return FrozenSteps().stem(x, weights, bias, out_channels, epilogue, parameters)
            y = run(x, weights, bias, out_channels, *how)
            if y is None:
                raise Declined
            return y

        return in_its_format(kernel, problem)


def _is_stem(conv: Conv) -> bool:
    """Whether the kernel can compute it: 7×7, stride 2, padding 3, on as few channels as images have."""
    return conv[2:] == ((7, 7), (2, 2), (3, 3), (1, 1), 1) and conv.in_channels <= 4


def _transformed(weight: Tensor) -> Tensor:
    """Weights of the kernel, [panel][36 points][4·in_channels][panel]: G g Gᵀ of the 4×4 taps of each phase.

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
