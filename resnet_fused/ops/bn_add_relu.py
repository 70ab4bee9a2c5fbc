"""bn_add_relu: y = relu((x − mean) · weight / sqrt(var + eps) + bias + residual), the end of a residual block in training."""

from __future__ import annotations

from resnet_fused.ops.norm import define

bn_add_relu = define("bn_add_relu", residual=True, relu=True)
