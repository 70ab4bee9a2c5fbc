"""Makes a random module from a seed, as source text, with what a scenario must know to call it."""

from __future__ import annotations

import random
from dataclasses import dataclass

from fuzz import decisions, idioms, tensors, units
from fuzz.prelude import HEAD, HOOKS, with_classes
from fuzz.writer import Writer

# How often each unit is taken. Most of a model is what rf.fuse is for.
UNITS: list[tuple[float, units.Unit]] = [
    (22, units.conv_norm_act),
    (22, units.residual),
    (18, units.block),
    (7, units.stage),
    (9, units.long_sequential),
    (6, units.module_list),
    (4, units.parts_of_child),
    (5, units.reuse),
    (5, tensors.reshaping),
    (4, tensors.branch),
    (3, tensors.option),
    (3, tensors.side_effect),
    (4, tensors.setting),
    (2, tensors.in_place),
    (2, tensors.gate),
    (2, tensors.dropout),
    (5, tensors.parallel),
    (3, tensors.tap),
    (4, idioms.method),
    (3, idioms.named_layers),
    (2, idioms.context),
    (3, idioms.global_setting),
    (3, idioms.odd_layer),
    (4, decisions.by_size),
    (2, decisions.by_type),
    (3, decisions.own_arithmetic),
    (2, decisions.part),
    (3, decisions.as_signal),
    (3, decisions.as_video),
]


@dataclass(frozen=True)
class Program:
    """A generated module.

    Attributes:
        source: of the Python module; `build()` returns the model.
        has_source: whether inspect.getsource is to find it.
        shape: channels, height and width of the input.
        options: keyword arguments of forward with a value to pass, as text.
        inputs: 2 if forward takes two images of that shape.
        floats, flags: attributes of the model that forward reads.
        stateful: forward changes something.
        picklable: the model can be pickled.
        variadic: forward takes *args and **kwargs.
        root: path of the module with these attributes, "" if it is the model itself.
    """

    source: str
    has_source: bool
    shape: tuple[int, int, int]
    options: tuple[tuple[str, str], ...]
    inputs: int
    floats: tuple[str, ...]
    flags: tuple[str, ...]
    stateful: bool
    picklable: bool
    variadic: bool
    root: str


def generate(rng: random.Random) -> Program:
    cin = rng.choice([3, 3, 3, 1, 4, 8, 16])
    shape = (cin, rng.randrange(5, 17), rng.randrange(5, 17))
    if rng.random() < 0.1:
        shape = (cin, rng.randrange(14, 21), rng.randrange(14, 21))
    w = Writer(rng, *shape)
    inputs = 2 if w.chance(0.06) else 1
    v = "x"
    if inputs == 2:
        v = w.assign(w.pick("x + other", "torch.cat([x, other], 1)[:, :x.size(1)]", "torch.maximum(x, other)"), "")
    v = stem(w, v)
    for _ in range(w.weighted([(4, 1), (5, 2), (3, 3), (1, 4)])):
        v = w.weighted(UNITS)(w, v)
    v = head(w, v)
    result = returned(w, v)
    variadic = w.chance(0.06)
    source = text(w, result, inputs, variadic)
    return Program(
        source=source,
        has_source=not w.chance(0.12),
        shape=shape,
        options=tuple((name, value) for name, _, value in w.options),
        inputs=inputs,
        floats=tuple(w.floats),
        flags=tuple(w.flags),
        stateful=w.stateful,
        picklable=w.picklable,
        variadic=variadic,
        root=w.root,
    )


def stem(w: Writer, v: str) -> str:
    """The first layers: to more channels, maybe with a max-pool."""
    c = w.pick(4, 6, 8, 8, 12, 16, 16, 32, 40)
    big = min(w.h, w.w) >= 12
    stride = 2 if big and w.chance(0.6) else 1
    if w.c >= 4 and w.chance(0.2):
        return v
    cin, w.c = w.c, c
    conv = w.attr("conv", w.conv(cin, c, stride, plain=True, kernel=w.pick(7, 3, 3) if min(w.h, w.w) >= 7 else 3))
    bn = w.attr("bn", w.norm(c, w.chance(0.8)))
    v = w.act(w.assign(f"{bn}({conv}({v}))"))
    if min(w.h, w.w) >= 6 and w.chance(0.4):
        pool = w.attr("maxpool", w.pick("nn.MaxPool2d(3, 2, 1)", "nn.MaxPool2d(kernel_size=3, stride=2, padding=1)"))
        v = w.assign(f"{pool}({v})" if w.chance(0.8) else f"F.max_pool2d({v}, 3, stride=2, padding=1)")
        w.h, w.w = (w.h - 1) // 2 + 1, (w.w - 1) // 2 + 1
    return v


def head(w: Writer, v: str) -> str:
    """Pooling and a classifier, or nothing."""
    if w.chance(0.55):
        return v
    kind = w.pick("flatten", "view", "mean", "sequential", "squeeze")
    fc = f"nn.Linear({w.c}, 5)"
    if kind == "sequential":
        layers = ["nn.AdaptiveAvgPool2d(1)", "nn.Flatten()", *(["nn.Dropout(0.2)"] if w.chance(0.4) else []), fc]
        name = w.attr("head", f"nn.Sequential({', '.join(layers)})")
        return w.assign(f"{name}({v})")
    if kind == "mean":
        v = w.assign(w.pick(f"{v}.mean((2, 3))", f"{v}.mean([-2, -1])", f"{v}.flatten(2).mean(-1)"))
    else:
        v = w.assign(w.pick(f"{w.attr('avgpool', 'nn.AdaptiveAvgPool2d(1)')}({v})", f"F.adaptive_avg_pool2d({v}, (1, 1))"))
        v = w.assign(
            {
                "flatten": w.pick(f"torch.flatten({v}, 1)", f"{v}.flatten(1)"),
                "view": f"{v}.view({v}.size(0), -1)",
                "squeeze": f"{v}.squeeze(-1).squeeze(-1)",
            }[kind]
        )
    return w.assign(f"{w.attr('fc', fc)}({v})") if w.chance(0.8) else v


def returned(w: Writer, v: str) -> str:
    """The expression that forward returns."""
    if not w.taps and w.chance(0.8):
        return v
    taps = ", ".join(w.taps) or "None"
    kind = w.pick(
        "tuple", "list", "dict", "dataclass", "namedtuple", "none", "twice", "input", "nested", "ordered", "generator"
    )
    return {
        "tuple": f"{v}, {taps}",
        "list": f"[{v}, {taps}]",
        "dict": f'{{"out": {v}, "taps": [{taps}]}}',
        "dataclass": f"{w.use('Out')}({v}, [{taps}])",
        "namedtuple": f"{w.use('Pair')}({v}, ({taps}, None))",
        "none": f"{v}, None, {taps}",
        "twice": f"{v}, {v}, {taps}",
        "input": f"x, {v}, {taps}" if not w.reassigns else f"{v}, x",
        "nested": f'{{"a": ({v}, {{"b": [{taps}]}}), "size": {v}.shape}}',
        "ordered": f"collections.OrderedDict(out={v}, other=({taps},))",
        "generator": f"tuple(t for t in ({v}, {taps}))",
    }[kind]


def text(w: Writer, result: str, inputs: int, variadic: bool) -> str:
    """The whole source."""
    arguments = ["self", "x"] + (["other"] if inputs == 2 else [])
    arguments += [f"{name}={default}" for name, default, _ in w.options]
    if variadic:
        arguments = [*arguments[: 1 + inputs], "*args", *arguments[1 + inputs :], "**kwargs"]
        if w.chance(0.5):
            w.body.insert(0, "if args:\n            x = x * args[0]")
    forward = "\n".join(f"        {line}" for line in [*w.body, f"return {result}"])
    init = "\n".join(f"        {line}" for line in ["super().__init__()", *w.init])
    extra, build = variant(w, ", ".join(a.split("=")[0] for a in arguments[1:]))
    names = w.classes & {c for c in w.classes if f"{c}(" in init + forward or f"={c}" in init}
    members = "".join(f"{member}\n\n" for member in w.members)
    name = "forward"
    if w.chance(0.15):  # as torchvision's
        name = "_forward_impl"
        passed = [a if a.startswith("*") else a.split("=")[0] for a in arguments[1:]]
        forward += f"\n\n    def forward({', '.join(arguments)}):\n        return self._forward_impl({', '.join(passed)})"
    return (
        f"{HEAD}{HOOKS}\n{with_classes(names)}\n\nclass Model(nn.Module):\n    def __init__(self):\n{init}\n\n{members}"
        f"    def {name}({', '.join(arguments)}):\n{forward}\n{extra}\n\ndef build():\n{build}\n"
    )


def variant(w: Writer, arguments: str) -> tuple[str, str]:
    """Text of a subclass or function that changes the model, and the body of build()."""
    kind = w.weighted([(85, ""), (3, "subclass"), (3, "method"), (3, "child_method"), (3, "wrapper"), (3, "sequential")])
    if kind == "" or (kind == "sequential" and (w.options or "other" in arguments)):
        return "", "    return Model()"
    if kind == "subclass":
        extra = (
            "\n\nclass Sub(Model):\n    def forward(self, *args, **kwargs):\n        y = super().forward(*args, **kwargs)\n"
            "        return y * 2 if isinstance(y, Tensor) else y\n"
        )
        return extra, "    return Sub()"
    if kind == "method":
        w.picklable = False
        extra = "\n\ndef own_forward(self, *args, **kwargs):\n    return Model.forward(self, *args, **kwargs), 1\n"
        return extra, "    model = Model()\n    model.forward = types.MethodType(own_forward, model)\n    return model"
    if kind == "child_method":
        w.picklable = False
        extra = "\n\ndef child_forward(self, *args, **kwargs):\n    return type(self).forward(self, *args, **kwargs) * 0.5\n"
        build = (
            "    model = Model()\n"
            "    child = [model, *(m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Sequential)))][-1]\n"
            "    child.forward = types.MethodType(child_forward, child)\n    return model"
        )
        return extra, build
    if kind == "wrapper":
        w.root = "model"
        extra = (
            "\n\nclass Wrapper(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            "        self.model = Model()\n\n"
            "    def forward(self, *args, **kwargs):\n        return {'wrapped': self.model(*args, **kwargs)}\n"
        )
        return extra, "    return Wrapper()"
    w.root = "0"
    return "", "    return nn.Sequential(Model(), nn.Identity())"
