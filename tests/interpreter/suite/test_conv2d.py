"""conv2d_bn, conv2d_bn_relu and conv2d_bn_add_relu on the Triton kernels: values, edges and what goes in."""

import dataclasses
import threading

import pytest
import torch
from support.tolerances import relative_error
from support.triton_problems import Case, check, fused, stock

from resnet_fused import backends
from resnet_fused.backends import Problem
from resnet_fused.backends.problem import Types
from resnet_fused.backends.triton import configs, conv2d, launch
from resnet_fused.backends.triton.configs import Chip, Plan
from resnet_fused.backends.triton.prepare import module_of

P1, F16, BF16 = (1, 1), torch.float16, torch.bfloat16
CPU_CHIP = Chip.of(torch.device("cpu"))
RAGGED = Case("ragged in every dimension", (2, 72, 7, 11), 50, (3, 3), padding=P1)

CASES = {
    "taps": Case("the 3×3 of a block", (2, 64, 8, 8), 64, (3, 3), padding=P1),
    "taps-f16": Case("float16", (2, 64, 8, 8), 64, (3, 3), padding=P1, dtype=F16),
    "taps-bf16": Case("bfloat16", (1, 64, 8, 8), 64, (3, 3), padding=P1, dtype=BF16),
    "ragged": RAGGED,
    "no-residual": RAGGED.with_(op="conv2d_bn_relu", why="the first convolution of a block"),
    "no-relu": RAGGED.with_(op="conv2d_bn", why="a projection shortcut"),
    "stride": Case("the first 3×3 of a stage", (1, 64, 9, 8), 32, (3, 3), (2, 2), P1),
    "dilation": Case("replace_stride_with_dilation", (1, 48, 9, 9), 32, (3, 3), padding=(2, 2), dilation=(2, 2)),
    "uneven": Case("height and width differ everywhere", (1, 36, 9, 7), 20, (3, 5), (2, 1), (0, 3), (1, 2)),
    "even-kernel": Case("a kernel without a middle", (1, 32, 6, 6), 32, (2, 2), (2, 2)),
    "pointwise": Case("the 1×1 of a bottleneck", (2, 64, 7, 7), 128, (1, 1), dtype=F16),
    "pointwise-ragged": Case("channels that fill no step", (2, 20, 5, 5), 36, (1, 1)),
    "pointwise-stride": Case("a projection shortcut", (2, 32, 7, 8), 64, (1, 1), (2, 2), op="conv2d_bn"),
    "pointwise-padding": Case("1×1 whose border is bias alone", (1, 32, 4, 4), 32, (1, 1), padding=P1),
    "stem": Case("the 7×7 on three channels", (1, 3, 19, 18), 64, (7, 7), (2, 2), (3, 3), op="conv2d_bn_relu", dtype=F16),
    "pairs": Case("the stem on a width that lets pixels go in pairs", (1, 3, 13, 12), 64, (7, 7), (2, 2), (3, 3)),
    "pairs-f16": Case("three tiles", (2, 3, 18, 20), 40, (7, 7), (2, 2), (3, 3), op="conv2d_bn_relu", dtype=F16),
    "pairs-bf16": Case("bfloat16", (1, 3, 9, 8), 16, (7, 7), (2, 2), (3, 3), op="conv2d_bn", dtype=BF16),
    "pairs-deep": Case("the first of three 3×3", (1, 3, 9, 8), 32, (3, 3), (2, 2), P1, op="conv2d_bn_relu", dtype=F16),
    "pairs-uneven": Case("height and width differ everywhere", (1, 1, 9, 8), 20, (3, 5), (1, 2), (2, 1), (2, 1)),
    "one-channel": Case("grey images", (2, 1, 9, 9), 16, (3, 3), padding=P1),
    "grouped": Case("ResNeXt's 32×4d", (1, 128, 5, 5), 128, (3, 3), padding=P1, groups=32),
    "grouped-wide": Case("groups that walk by taps", (1, 128, 5, 5), 64, (3, 3), padding=P1, groups=2),
    "grouped-pointwise": Case("1×1 in groups", (1, 64, 5, 5), 32, (1, 1), groups=4),
    "depthwise": Case("one channel a group", (1, 24, 6, 6), 24, (3, 3), padding=P1, groups=24),
    "one-pixel": Case("the end of a network on small images", (1, 64, 1, 1), 64, (3, 3), padding=P1),
    "batch-one": Case("a single small image", (1, 64, 7, 7), 128, (3, 3), padding=P1, dtype=F16),
}


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_is_as_exact_as_stock(case):
    tensors = case.tensors()
    y = fused(case, *tensors)
    check(case, y, tensors)
    # With one channel x is in both formats, and the weight's decides.
    assert y.is_contiguous(memory_format=torch.channels_last) or case.shape[1] == 1


INPUTS = {
    "contiguous": lambda t: t.contiguous(),
    "expanded": lambda t: t[:1].expand_as(t),
    "every-other": lambda t: torch.stack((t, t), 4).reshape(*t.shape[:3], -1)[..., ::2],
    "misaligned": lambda t: (
        torch.cat((t.new_zeros(1), t.permute(0, 2, 3, 1).reshape(-1)))[1:]
        .reshape(t.permute(0, 2, 3, 1).shape)
        .permute(0, 3, 1, 2)
    ),
}


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in INPUTS.items()])
def test_takes_any_strides_and_alignment(change):
    x, weight, bias, residual = RAGGED.tensors()
    tensors = change(x), weight, bias, change(residual)
    check(RAGGED, fused(RAGGED, *tensors), tensors)


def test_contiguous_tensors_give_a_contiguous_result():
    x, weight, bias, residual = (t.contiguous() for t in RAGGED.tensors())
    y = fused(RAGGED, x, weight, bias, residual)
    assert y.is_contiguous()
    check(RAGGED, y, (x, weight, bias, residual))


def test_residual_may_be_the_input_and_neither_is_changed():
    case = Case("an identity block", (1, 32, 5, 5), 32, (3, 3), padding=P1)
    x, weight, bias, _ = case.tensors()
    before = x.clone()
    y = fused(case, x, weight, bias, x)
    check(case, y, (before, weight, bias, before))
    assert torch.equal(x, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=["nan", "inf", "minus-inf"])
@pytest.mark.parametrize("name", ["taps", "pointwise", "stem", "pairs-f16"])
def test_nan_and_inf_go_where_stock_has_them(name, value):
    case = CASES[name]
    x, weight, bias, residual = case.tensors()
    # Where a pair of pixels ends and where one begins, so that one of the two has it and the other one hasn't.
    x[0, 1, 2, 4] = x[-1, 2, -1, 1] = value
    residual[0, 0, 1, 1] = value
    y, expected = fused(case, x, weight, bias, residual), stock(case, x, weight, bias, residual)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


@pytest.mark.parametrize("splits", [1, 4])
def test_a_sum_beyond_float16_is_inf_as_in_stock(splits):
    case = Case("70,000 − 10,000 is finite, and stock has Inf", (1, 1024, 2, 2), 16, (1, 1), dtype=F16)
    x, weight, bias, residual = case.tensors()
    x, weight, bias = x.fill_(8.0), weight.fill_(8.0), bias.fill_(4464.0)
    weight[1] = -8.0
    weight[2, 0] = float("nan")
    weight[3] = 7.0
    residual = residual.fill_(-10_000.0)
    plan = Plan(configs.HALF[-3], configs.POINTWISE, 64, splits)
    y = torch.empty_like(residual)
    packed = conv2d.pack(weight, case.problem.convs[0], plan)
    conv2d.bind(case.problem, plan, CPU_CHIP, False)(x, packed, bias, residual, y)
    expected = stock(case, x, weight, bias, residual)
    assert expected[0, 0].isinf().all()
    torch.testing.assert_close(y, expected, equal_nan=True)


TILES = [
    pytest.param(dtype, tf32, tile.name, id=f"{kind}-{tile.name}")
    for kind, dtype, tf32 in (("half", F16, False), ("tf32", torch.float32, True), ("ieee", torch.float32, False))
    for tile in (Plan(tile, configs.TAPS, tile.k) for tile in configs.table(dtype, CPU_CHIP, tf32))
]


@pytest.mark.parametrize(("dtype", "tf32", "variant"), TILES)
def test_every_tile_gives_the_same_result(dtype, tf32, variant, float32_precision, monkeypatch):
    float32_precision("tf32" if tf32 else "ieee")
    case = RAGGED.with_(dtype=dtype)
    backend, tensors = backends.get("triton"), case.tensors()
    used, bind = [], conv2d.bind
    monkeypatch.setattr(conv2d, "bind", lambda *args: used.append(args[1].name) or bind(*args))
    y = backend.prepare(case.problem, case.folded(), variant)(tensors[0], tensors[3])
    assert used == [variant]
    check(case, y, tensors)


@pytest.mark.parametrize("splits", [2, 4, 8])
def test_a_split_reduction_gives_the_same_result(splits):
    # 17 steps of 64 channels: no number of splits divides them.
    case = Case("a long reduction over few pixels", (1, 1060, 3, 3), 40, (1, 1), dtype=F16)
    tile = next(tile for tile in configs.HALF if (tile.m, tile.n) == (32, 64))
    plan = Plan(tile, configs.POINTWISE, tile.k, splits)
    x, weight, bias, residual = tensors = case.tensors()
    y = torch.empty_like(residual)
    packed = conv2d.pack(weight, case.problem.convs[0], plan)
    conv2d.bind(case.problem, plan, CPU_CHIP, False)(x, packed, bias, residual, y)
    check(case, y, tensors)


@pytest.mark.parametrize("name", ["ragged", "stem", "pairs-f16", "pointwise-stride", "grouped"])
def test_64_bit_offsets_give_the_same_result(name):
    case = CASES[name]
    plan = configs.plans(case.problem, CPU_CHIP, False)[0]
    kernel = module_of(plan)
    main, _ = kernel.launches(case.problem, plan, CPU_CHIP, False)
    x, weight, bias, residual = tensors = case.tensors()
    if case.op != "conv2d_bn_add_relu":
        residual = None
    y = torch.empty(case.problem.output_shape(), dtype=case.dtype, memory_format=torch.channels_last)
    wide = dataclasses.replace(main, constants={**main.constants, "WIDE": True})
    wide.bind()(x, kernel.pack(weight, case.problem.convs[0], plan), bias, residual, y)
    check(case, y, tensors)


@pytest.mark.parametrize(
    ("shape", "k", "wide"),
    [((2**15, 64, 32, 32), 32, True), ((2**15 - 1, 64, 32, 32), 64, False), ((2**14, 32, 64, 64), 128, True)],
    ids=["input-of-2^31", "just-below", "output-above"],
)
def test_offsets_have_64_bits_where_a_tensor_needs_them(shape, k, wide):
    problem = Case("", shape, k, (1, 1)).problem
    plan = configs.plans(problem, CPU_CHIP, False)[0]
    assert conv2d.launches(problem, plan, CPU_CHIP, False)[0].constants["WIDE"] is wide


def test_tf32_setting_is_followed_from_call_to_call(monkeypatch, float32_precision):
    tables = []
    bind = conv2d.bind
    monkeypatch.setattr(
        conv2d, "bind", lambda *args: tables.append("tf32" if args[1].tile in configs.TF32 else "ieee") or bind(*args)
    )
    x, _, _, residual = RAGGED.tensors()
    float32_precision("ieee")
    kernel = backends.get("triton").prepare(RAGGED.problem, RAGGED.folded())
    float32_precision("tf32")
    kernel(x, residual)
    kernel(x, residual)
    assert tables == ["ieee", "tf32"]
    exact = dataclasses.replace(RAGGED.problem, precision="direct")
    backends.get("triton").prepare(exact, RAGGED.folded())(x, residual)
    assert tables[2:] == ["ieee"]


def test_weights_are_read_again_after_a_change_in_place():
    x, weight, bias, residual = RAGGED.tensors()
    fused(RAGGED, x, weight, bias, residual)
    weight.mul_(-2)
    tensors = x, weight, bias, residual
    check(RAGGED, fused(RAGGED, *tensors), tensors)


def test_threads_share_a_kernel():
    tensors = RAGGED.tensors()
    kernel = backends.get("triton").prepare(RAGGED.problem, RAGGED.folded())
    results = [None] * 4

    def work(index):
        results[index] = kernel(tensors[0], tensors[3])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for y in results:
        check(RAGGED, y, tensors)


def test_gradients_are_those_of_stock():
    case = Case("a derivative", (1, 8, 4, 4), 8, (3, 3), padding=P1)
    ours = [t.requires_grad_() for t in case.tensors()]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    fused(case, *ours).square().sum().backward()
    stock(case, *theirs).square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a.grad, b.grad.double()) < 2e-6


def test_compiles_into_one_graph(monkeypatch):
    """Through Inductor, which generates C++ for the rest, and calls the op as it is."""
    launched = []
    interpret = launch.interpret
    monkeypatch.setattr(launch, "interpret", lambda *args: launched.append(args) or interpret(*args))
    tensors = RAGGED.tensors()
    compiled = torch.compile(lambda *args: fused(RAGGED, *args) * 2, fullgraph=True)
    with torch.no_grad():
        y = compiled(*tensors)
    assert len(launched) == 1
    check(RAGGED, y / 2, tensors)


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"types": Types.of(torch.float64)}, "float32, float16 and bfloat16"), ({"shape": (0, 72, 7, 11)}, "empty")],
    ids=["float64", "batch-0"],
)
def test_says_what_it_can_not_serve(change, reason):
    problem: Problem = dataclasses.replace(RAGGED.problem, **change)
    with pytest.raises(backends.BackendError, match=reason):
        backends.resolve(problem, "triton")
    assert backends.resolve(problem, "auto").name == "reference"


def test_an_unaligned_tensor_is_copied_and_an_aligned_one_is_not():
    x = torch.zeros(65)
    assert launch.aligned(x) is x
    assert launch.aligned(x[1:]).data_ptr() % 16 == 0
