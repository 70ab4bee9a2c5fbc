"""conv2d_bn_relu and conv2d_bn_add_relu on the layers of ResNets: stock, and every backend of this machine."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.shapes import BATCH, LAYERS, Layer, assert_close

import resnet_fused as rf


def _tensors(layer: Layer):
    x = torch.randn(BATCH, layer.inside, layer.size, layer.size).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(layer.out, layer.inside, layer.kernel, layer.kernel) / (layer.inside * layer.kernel**2) ** 0.5
    return x, weight.contiguous(memory_format=torch.channels_last), torch.randn(layer.out)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("variant", ["stock", *rf.available_backends()])
def test_conv2d_bn_relu(benchmark, layer: Layer, variant: str):
    x, weight, bias = _tensors(layer)
    padding = layer.kernel // 2
    want = F.conv2d(x, weight, bias, layer.stride, padding).relu_()
    benchmark.group = f"conv2d_bn_relu {layer}"
    if variant == "stock":
        benchmark(lambda: F.conv2d(x, weight, bias, layer.stride, padding).relu_())
        return
    with rf.use_backend(variant):
        try:
            got = rf.functional.conv2d_bn_relu(x, weight, bias, layer.stride, padding)
        except rf.BackendError as reason:
            pytest.skip(str(reason))
        assert_close(got, want)
        benchmark(rf.functional.conv2d_bn_relu, x, weight, bias, layer.stride, padding)


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[6]], ids=str)
@pytest.mark.parametrize("variant", ["stock", *rf.available_backends()])
def test_conv2d_bn_add_relu(benchmark, layer: Layer, variant: str):
    x, weight, bias = _tensors(layer)
    padding = layer.kernel // 2
    residual = torch.randn(BATCH, layer.out, layer.size, layer.size).contiguous(memory_format=torch.channels_last)
    want = (F.conv2d(x, weight, bias, layer.stride, padding) + residual).relu_()
    benchmark.group = f"conv2d_bn_add_relu {layer}"
    if variant == "stock":
        benchmark(lambda: F.conv2d(x, weight, bias, layer.stride, padding).add_(residual).relu_())
        return
    with rf.use_backend(variant):
        try:
            got = rf.functional.conv2d_bn_add_relu(x, weight, bias, residual, layer.stride, padding)
        except rf.BackendError as reason:
            pytest.skip(str(reason))
        assert_close(got, want)
        benchmark(rf.functional.conv2d_bn_add_relu, x, weight, bias, residual, layer.stride, padding)
