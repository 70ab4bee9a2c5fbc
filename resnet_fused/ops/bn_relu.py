"""bn_relu: y = relu((x − mean) · weight / sqrt(var + eps) + bias)."""

from __future__ import annotations

from resnet_fused.ops.norm import define

bn_relu = define("bn_relu", residual=False, relu=True)
