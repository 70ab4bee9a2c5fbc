"""conv2d_bn_add_relu: y = relu(conv2d(x, weight) + shift + residual), the end of a residual block."""

from __future__ import annotations

from resnet_fused.ops.conv import define

conv2d_bn_add_relu = define("conv2d_bn_add_relu", residual=True, relu=True)
