"""Source text that generated modules are put together from: imports, hook functions, and classes of common blocks.

A generated module gets only the classes that it uses, so that what is printed for a failure is short.
"""

from __future__ import annotations

HEAD = """
import collections
import dataclasses
import functools
import math
import operator
import types
import typing

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused as rf

LOG = []
COUNTS = {"calls": 0}
SEEN = []
GAIN = 1.0
ON = True
"""

# Hook functions stand in the generated module, so that a model with hooks can be pickled. What they see goes into SEEN.
HOOKS = """
def shapes(value):
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), str(value.dtype)
    if isinstance(value, (tuple, list)):
        return tuple(shapes(v) for v in value)
    if isinstance(value, dict):
        return {k: shapes(v) for k, v in value.items()}
    return type(value).__name__


def see(module, args, out):
    SEEN.append(("see", type(module).__name__, shapes(args), shapes(out)))


def see_pre(module, args):
    SEEN.append(("pre", type(module).__name__, shapes(args)))


def see_kwargs(module, args, kwargs, out):
    SEEN.append(("kwargs", type(module).__name__, shapes(args), shapes(kwargs), shapes(out)))


def see_backward(module, grad_in, grad_out):
    SEEN.append(("backward", type(module).__name__, shapes(grad_in), shapes(grad_out)))


def doubles(module, args, out):
    SEEN.append("doubles")
    return out * 2 if isinstance(out, Tensor) else out


def doubles_in_place(module, args, out):
    if isinstance(out, Tensor):
        out.mul_(2)


class Tagged(Tensor):
    pass


def halves_pre(module, args):
    SEEN.append("halves")
    return (args[0] * 0.5, *args[1:]) if args and isinstance(args[0], Tensor) else None
"""

# name: (source, names of other classes that it uses)
CLASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "FrozenBatchNorm2d": (
        """
class FrozenBatchNorm2d(nn.Module):
    def __init__(self, n, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(n))
        self.register_buffer("bias", torch.zeros(n))
        self.register_buffer("running_mean", torch.zeros(n))
        self.register_buffer("running_var", torch.ones(n))

    def forward(self, x):
        w = self.weight.reshape(1, -1, 1, 1)
        b = self.bias.reshape(1, -1, 1, 1)
        rv = self.running_var.reshape(1, -1, 1, 1)
        rm = self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (rv + self.eps).rsqrt()
        bias = b - rm * scale
        return x * scale + bias
""",
        (),
    ),
    "PlainConv": (
        """
class PlainConv(nn.Conv2d):
    pass
""",
        (),
    ),
    "WSConv": (
        """
class WSConv(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)
""",
        (),
    ),
    "SameConv": (
        """
class SameConv(nn.Conv2d):
    def amount(self, size, i):
        if isinstance(size, Tensor):
            size = int(size)
        reach = self.dilation[i] * (self.kernel_size[i] - 1) + 1
        return max((math.ceil(size / self.stride[i]) - 1) * self.stride[i] + reach - size, 0)

    def forward(self, x):
        h, w = x.size()[-2:]
        down, right = self.amount(h, 0), self.amount(w, 1)
        x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
""",
        (),
    ),
    "NormAct": (
        """
class NormAct(nn.BatchNorm2d):
    def __init__(self, n, act=True):
        super().__init__(n)
        self.act = nn.ReLU(inplace=True) if act else nn.Identity()

    def forward(self, x):
        return self.act(super().forward(x))
""",
        (),
    ),
    "ConvNorm": (
        """
class ConvNorm(nn.Module):
    def __init__(self, conv, norm, act=None):
        super().__init__()
        self.conv = conv
        self.norm = norm
        self.act = act if act is not None else nn.Identity()

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))
""",
        (),
    ),
    "Basic": (
        """
class Basic(nn.Module):
    expansion = 1

    def __init__(self, cin, planes, stride=1, downsample=None, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, planes, 3, stride, 1, bias=False)
        self.bn1 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = norm(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out
""",
        (),
    ),
    "ScaledBasic": (
        """
class ScaledBasic(Basic):
    scale = 0.5

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) * self.scale
        return F.relu(out + identity)
""",
        ("Basic",),
    ),
    "WrappedBasic": (
        """
class WrappedBasic(Basic):
    def forward(self, x):
        y = super().forward(x)
        return y if self.stride > 1 else y + x.mean()
""",
        ("Basic",),
    ),
    "Bottle": (
        """
class Bottle(nn.Module):
    expansion = 4

    def __init__(self, cin, planes, stride=1, downsample=None, groups=1, dilation=1, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, planes, 1, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, dilation, dilation, groups, bias=False)
        self.bn2 = norm(planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = norm(planes * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)
""",
        (),
    ),
    "TimmBasic": (
        """
class TimmBasic(nn.Module):
    def __init__(self, cin, planes, stride=1, downsample=None, se=None, drop_path=None):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.drop_block = nn.Identity()
        self.act1 = nn.ReLU(inplace=True)
        self.aa = nn.Identity()
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.se = se
        self.act2 = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.drop_block(x)
        x = self.act1(x)
        x = self.aa(x)
        x = self.conv2(x)
        x = self.bn2(x)
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        x = self.act2(x)
        return x
""",
        (),
    ),
    "PreAct": (
        """
class PreAct(nn.Module):
    def __init__(self, cin, planes, stride=1, downsample=None):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(cin)
        self.conv1 = nn.Conv2d(cin, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.downsample = downsample

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + shortcut
""",
        (),
    ),
    "SE": (
        """
class SE(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1 = nn.Conv2d(c, max(c // 2, 1), 1)
        self.fc2 = nn.Conv2d(max(c // 2, 1), c, 1)

    def forward(self, x):
        s = x.mean((2, 3), keepdim=True)
        return x * self.fc2(F.relu(self.fc1(s), inplace=True)).sigmoid()
""",
        (),
    ),
    "DropPath": (
        """
class DropPath(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        return x * torch.empty(x.shape[0], 1, 1, 1).bernoulli_(1 - self.p).to(x.dtype)
""",
        (),
    ),
    "Parts": (
        """
class Parts(nn.Module):
    def __init__(self, c, conv, norm):
        super().__init__()
        self.conv1 = conv
        self.bn1 = norm
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)

    def forward(self, x):
        return self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
""",
        (),
    ),
    "Out": (
        """
@dataclasses.dataclass
class Out:
    out: Tensor
    taps: typing.Any = None
""",
        (),
    ),
    "Pair": (
        """
Pair = collections.namedtuple("Pair", ["out", "taps"])
""",
        (),
    ),
}


def with_classes(names: set[str]) -> str:
    """The source of the named classes and of those that they use, in an order that defines before it uses."""
    order: list[str] = []

    def add(name: str) -> None:
        if name not in order:
            for other in CLASSES[name][1]:
                add(other)
            order.append(name)

    for name in sorted(names):
        add(name)
    return "\n".join(CLASSES[name][0] for name in order)
