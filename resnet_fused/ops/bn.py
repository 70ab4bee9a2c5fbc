"""bn: y = (x − mean) · weight / sqrt(var + eps) + bias, batch norm by itself (projection shortcuts)."""

from __future__ import annotations

from resnet_fused.ops.norm import define

bn = define("bn", residual=False, relu=False)
