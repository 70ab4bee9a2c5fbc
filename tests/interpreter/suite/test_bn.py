"""bn, bn_relu and bn_add_relu in training on the Triton kernels: values, statistics and gradients."""

import pytest
import torch
import torch.nn.functional as F
from support.tolerances import FLOOR, assert_as_good_as_stock, relative_error

from resnet_fused import ops
from resnet_fused.backends.triton import batch_norm_kernels as bn

EPS = 1e-5
CL, NCHW = torch.channels_last, torch.contiguous_format
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# shape, dtype, memory format, mean, frozen statistics
CASES = {
    "rows": ((2, 64, 5, 5), F32, CL, 0, False),
    "rows-f16-odd-channels": ((3, 19, 3, 2), F16, CL, 0, False),
    "rows-bf16": ((2, 32, 4, 4), BF16, CL, 0, False),
    "wider-than-a-tile": ((1, 300, 3, 3), F32, CL, 0, False),
    "several-tiles-and-programs": ((2, 8, 24, 24), F32, CL, 0, False),
    "planes": ((2, 5, 7, 9), F32, NCHW, 0, False),
    "planes-of-several-programs": ((3, 2, 40, 30), F16, NCHW, 0, False),
    "mean-1000-deviations": ((2, 16, 9, 9), F32, CL, 1000, False),
    "frozen": ((2, 16, 4, 4), F32, CL, 0, True),
}


# bn differs from bn_relu in one flag, which three cases cover.
PAIRS = [(name, op) for name in CASES for op in ("bn_relu", "bn_add_relu")]
PAIRS += [(name, "bn") for name in ("rows", "planes", "frozen")]


@pytest.mark.parametrize(("name", "op"), PAIRS)
def test_training_is_as_exact_as_stock(name, op):
    shape, dtype, format, mean, frozen = CASES[name]
    x, residual, dy = ((torch.randn(shape) + m).to(dtype, memory_format=format) for m in (mean, 0, 0))
    weight, bias = torch.randn(2, shape[1]).unbind()
    statistics = (torch.randn(shape[1]), torch.rand(shape[1]) + 0.5) if frozen else (None, None)

    def leaves(wide):
        given = [x, *([residual] if op == "bn_add_relu" else []), weight, bias]
        return [t.detach().to(torch.float64 if wide else t.dtype).requires_grad_() for t in given]

    def stock(wide, mask=None):
        inputs = leaves(wide)
        fixed = [t if t is None or not wide else t.double() for t in statistics]
        y = F.batch_norm(inputs[0], *fixed, *inputs[-2:], training=not frozen, eps=EPS)
        y = y + inputs[1] if op == "bn_add_relu" else y
        if op != "bn":
            y = y.relu() if mask is None else torch.where(mask, y, torch.zeros_like(y))
        return y.detach(), torch.autograd.grad(y, inputs, dy.to(y.dtype))

    inputs = leaves(False)
    y, *taken = getattr(ops, op)(*inputs, *statistics, EPS, "")
    assert_as_good_as_stock(y.detach(), stock(False)[0], stock(True)[0])
    if not frozen:
        var, center = torch.var_mean(x.double(), (0, 2, 3), correction=0)
        assert (taken[0] - center).norm() < FLOOR[F32] * (center.abs() + var.sqrt()).norm()
        assert relative_error(taken[1], var) < FLOOR[F32]
    mask = y > 0 if op != "bn" else None
    grads = torch.autograd.grad(y, inputs, dy)
    for grad, want, truth in zip(grads, stock(False, mask)[1], stock(True, mask)[1], strict=True):
        assert_as_good_as_stock(grad, want, truth)


def test_nan_never_disappears():
    x = torch.randn(2, 6, 3, 3).contiguous(memory_format=CL)
    x[0, 2, 1, 1] = float("nan")
    y = ops.bn_relu(x, None, None, None, None, EPS, "")[0]
    assert y[:, 2].isnan().all()
    assert y[:, :2].isfinite().all()


def test_plans_cover_every_row_once():
    for shape in ((16, 64, 80, 80), (1, 3, 1, 1), (16, 2048, 5, 5), (2, 7, 13, 11)):
        for channels_last in (True, False):
            p = bn.plan(*shape, F16, channels_last)
            assert p.rows == shape[0] * shape[2] * shape[3]
            assert (p.programs - 1) * p.rows_per_program < p.rows <= p.programs * p.rows_per_program
            assert p.block_r & (p.block_r - 1) == 0
