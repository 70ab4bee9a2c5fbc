"""conv2d_bn: y = conv2d(x, weight) + shift, a convolution with the batch norm folded into it."""

from __future__ import annotations

from resnet_fused.ops.conv import define

conv2d_bn = define("conv2d_bn", residual=False, relu=False)
