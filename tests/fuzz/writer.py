"""Writes a random module line by line: its layers, their random spellings, and the sizes of what flows through it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

ACTIVATIONS = (
    "nn.SiLU()",
    "nn.GELU()",
    "nn.LeakyReLU(0.1)",
    "nn.ReLU6()",
    "nn.Hardswish()",
    "nn.Sigmoid()",
    "nn.PReLU()",
    "nn.ELU(inplace=True)",
)


class Writer:
    """What has been written of a module so far: lines of `__init__` and of `forward`, and what they use.

    Attributes:
        c, h, w: channels, height and width of the current value in `forward`.
        taps: names of earlier values that are still to be had.
    """

    def __init__(self, rng: random.Random, c: int, h: int, w: int) -> None:
        self.rng = rng
        self.c, self.h, self.w = c, h, w
        self.init: list[str] = []
        self.body: list[str] = []
        self.classes: set[str] = set()
        self.floats: list[str] = []
        self.flags: list[str] = []
        self.options: list[tuple[str, str, str]] = []  # keyword arguments of forward: name, default, a value to pass
        self.taps: list[str] = []
        self.members: list[str] = []  # methods beside __init__ and forward
        self.stateful = False  # forward changes something, so that calls from several threads have no one result
        self.picklable = True
        self.root = ""
        self.indent = 0
        self.reassigns = rng.random() < 0.5  # `x = …; x = …`, or a name for each value
        self.relu_shared: str | None = None
        self._counts: dict[str, int] = {}

    # Text

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def pick(self, *choices: T) -> T:
        return self.rng.choice(choices)

    def weighted(self, choices: Sequence[tuple[float, T]]) -> T:
        return self.rng.choices([c for _, c in choices], [w for w, _ in choices])[0]

    def number(self, kind: str) -> str:
        self._counts[kind] = self._counts.get(kind, 0) + 1
        return f"{kind}{self._counts[kind]}"

    def attr(self, kind: str, value: str) -> str:
        """A new attribute of the module; returns `self.name`."""
        name = f"self.{self.number(kind)}"
        self.init.append(f"{name} = {value}")
        return name

    def emit(self, line: str) -> None:
        self.body.append("    " * self.indent + line)

    def assign(self, expression: str, keep: str = "") -> str:
        """Assigns an expression to the next variable; never to `keep`, which is used later."""
        name = "x" if self.reassigns and keep != "x" else self.number("h")
        self.emit(f"{name} = {expression}")
        return name

    def use(self, name: str) -> str:
        self.classes.add(name)
        return name

    # Layers, as text of an expression that makes them

    def resize(self, k: tuple[int, int], stride: int, pad: tuple[int, int], dilation: int) -> None:
        self.h = (self.h + 2 * pad[0] - dilation * (k[0] - 1) - 1) // stride + 1
        self.w = (self.w + 2 * pad[1] - dilation * (k[1] - 1) - 1) // stride + 1

    def conv(self, cin: int, cout: int, stride: int = 1, plain: bool = False, kernel: int | None = None) -> str:
        """A convolution that keeps height and width, but for its stride."""
        small = min(self.h, self.w) < 4
        kh = kw = kernel or self.weighted([(6, 3), (3, 1), (1, 5), (1, 7)] if not small else [(1, 1), (1, 3)])
        dilation = 1
        if not plain and kernel is None:
            if self.chance(0.06):
                kh, kw = self.pick((1, 3), (3, 1), (1, 5))
            if self.chance(0.08) and not small:
                dilation = 2
        pad = (dilation * (kh - 1) // 2, dilation * (kw - 1) // 2)
        size = str(kh) if kh == kw else f"({kh}, {kw})"
        parts = [str(cin), str(cout), size]
        if stride != 1:
            parts.append(f"stride={stride}")
        same = stride == 1 and not plain and self.chance(0.08)
        if same:
            parts.append('padding="same"')
        elif pad != (0, 0):
            parts.append(f"padding={pad[0] if pad[0] == pad[1] else pad}")
        if dilation != 1:
            parts.append(f"dilation={dilation}")
        groups = [g for g in range(2, min(cin, cout) + 1) if cin % g == 0 and cout % g == 0]
        if groups and not plain and self.chance(0.15):
            parts.append(f"groups={self.rng.choice(groups)}")
        if max(pad) and not plain and max(pad) < min(self.h, self.w) and self.chance(0.07):
            parts.append(f"padding_mode={self.pick('reflect', 'replicate', 'circular')!r}")
        if self.chance(0.7 if plain else 0.5):
            parts.append("bias=False")
        self.resize((kh, kw), stride, pad, dilation)
        kind = "nn.Conv2d"
        if not plain and self.chance(0.08):
            kind = self.use(self.pick("PlainConv", "PlainConv", "WSConv", "SameConv"))
        return f"{kind}({', '.join(parts)})"

    def norm(self, c: int, plain: bool = False) -> str:
        kind = (
            "bn"
            if plain
            else self.weighted([(80, "bn"), (6, "frozen"), (4, "sync"), (3, "none"), (3, "act"), (2, "group"), (1, "in")])
        )
        if kind == "frozen":
            return f"{self.use('FrozenBatchNorm2d')}({c})"
        if kind == "sync":
            return f"nn.SyncBatchNorm({c})"
        if kind == "none":
            return "nn.Identity()"
        if kind == "act":
            return f"{self.use('NormAct')}({c}{self.pick('', ', act=False')})"
        if kind == "group":
            return f"nn.GroupNorm(1, {c})"
        if kind == "in":
            return f"nn.InstanceNorm2d({c}, affine=True)"
        parts = [str(c)]
        if self.chance(0.2):
            parts.append(f"eps={self.pick(1e-3, 1e-2, 1e-6)}")
        if not plain and self.chance(0.06):
            parts.append("affine=False")
        if not plain and self.chance(0.03):
            parts.append("track_running_stats=False")
        if self.chance(0.1):
            parts.append(f"momentum={self.pick(0.3, None)}")
        return f"nn.BatchNorm2d({', '.join(parts)})"

    def act_module(self) -> str:
        if self.chance(0.12):
            return self.rng.choice(ACTIVATIONS)
        return self.pick("nn.ReLU()", "nn.ReLU(inplace=True)")

    def act(self, v: str, keep: str = "", other: bool = True) -> str:
        """Applies an activation, in one of many spellings."""
        kind = self.weighted(
            [(6, "module"), (4, "shared"), (3, "F"), (2, "F_inplace"), (1, "method_"), (2, "torch"), (1, "other")]
        )
        if kind == "other" and other:
            return self.assign(f"{self.attr('act', self.rng.choice(ACTIVATIONS))}({v})", keep)
        if kind == "module":
            return self.assign(f"{self.attr('act', self.pick('nn.ReLU()', 'nn.ReLU(inplace=True)'))}({v})", keep)
        if kind == "shared":
            if self.relu_shared is None:
                self.relu_shared = self.attr("relu", self.pick("nn.ReLU()", "nn.ReLU(inplace=True)"))
            return self.assign(f"{self.relu_shared}({v})", keep)
        if kind == "F":
            return self.assign(f"F.relu({v})", keep)
        if kind == "F_inplace":
            return self.assign(f"F.relu({v}, inplace=True)", keep)
        if kind == "method_":
            if self.chance(0.5):
                self.emit(f"{v}.relu_()")
                return v
            return self.assign(f"{self.pick(f'{v}.relu_()', f'F.relu_({v})', f'torch.relu_({v})')}", keep)
        return self.assign(self.pick(f"torch.relu({v})", f"{v}.relu()", f"{v}.clamp_min(0)", f"{v}.clamp(min=0)"), keep)

    def join(self, a: str, b: str, plain: bool = False) -> str:
        """Adds the residual b to a. Broadcasting forms are among those that aren't plain."""
        kind = self.weighted(
            [
                (6, "{a} + {b}"),
                (6, "+="),
                (3, "{b} + {a}"),
                (2, "torch.add({a}, {b})"),
                (1, "torch.add({b}, {a})"),
                (2, "add_"),
                (1, "{a}.add_({b})"),
                (1, "{a}.add({b})"),
                (1, "operator.add({a}, {b})"),
                (1, "operator.iadd({a}, {b})"),
                (1, "torch.add({a}, {b}, alpha=0.5)"),
                (1, "{a} * {scale} + {b}"),
            ]
        )
        if not plain and self.chance(0.15):
            kind = self.pick(
                "{a} + {b}.mean((2, 3), keepdim=True)",
                "{a} + {b} * {gate}",
                "{a} + {gate}",
                "{a} + {b}[:1]",
                "{a} - {b}",
                "torch.stack([{a}, {b}]).sum(0)",
                "sum([{a}, {b}])",
                "{a}.add_({b}, alpha=0.5)",
            )
        if kind == "+=":
            self.emit(f"{a} += {b}")
            return a
        if kind == "add_":
            self.emit(f"{a}.add_({b})")
            return a
        scale = self.float_attr() if "{scale}" in kind else ""
        gate = self.attr("gate", f"nn.Parameter(torch.rand(1, {self.c}, 1, 1))") if "{gate}" in kind else ""
        return self.assign(kind.format(a=a, b=b, scale=scale, gate=gate), b)

    def float_attr(self) -> str:
        name = self.attr("scale", self.pick("0.5", "2.0", "1.0", "1"))
        self.floats.append(name.removeprefix("self."))
        return name

    def flag_attr(self) -> str:
        name = self.attr("flag", self.pick("True", "False", "True"))
        self.flags.append(name.removeprefix("self."))
        return name
