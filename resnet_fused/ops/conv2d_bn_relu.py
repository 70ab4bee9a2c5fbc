"""conv2d_bn_relu: y = relu(conv2d(x, weight) + shift)."""

from __future__ import annotations

from resnet_fused.ops.conv import define

conv2d_bn_relu = define("conv2d_bn_relu", residual=False, relu=True)
