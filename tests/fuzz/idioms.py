"""Units that are written in other ways of Python: methods, getattr, reduce, comprehensions, contexts, globals."""

from __future__ import annotations

from fuzz.units import conv_norm_act
from fuzz.writer import Writer


def method(w: Writer, v: str) -> str:
    """A unit in a method of its own."""
    name = w.number("part")
    body, w.body = w.body, []
    indent, w.indent = w.indent, 0
    reassigns, w.reassigns = w.reassigns, False
    u = conv_norm_act(w, "y")
    lines, w.body, w.indent, w.reassigns = w.body, body, indent, reassigns
    w.members.append("\n".join([f"    def {name}(self, y):", *[f"        {line}" for line in lines], f"        return {u}"]))
    kind = w.pick("method", "method", "lambda", "partial")
    if kind == "partial":
        return w.assign(f"functools.partial(self.{name}, {v})()")
    if kind == "lambda":
        return w.assign(f"(lambda y: self.{name}(y))({v})")
    return w.assign(f"self.{name}({v})")


def named_layers(w: Writer, v: str) -> str:
    """Layers by names that are put together in forward, by _modules, or by reduce."""
    layers = []
    for _ in range(2):
        layers.append(w.number("stage"))
        conv = w.conv(w.c, w.c, 1, plain=True)
        w.init.append(f"self.{layers[-1]} = nn.Sequential({conv}, {w.norm(w.c, True)}, {w.act_module()})")
    parts = ", ".join(f"self.{name}" for name in layers)
    kind = w.pick("getattr", "_modules", "reduce", "get_submodule", "comprehension")
    if kind == "reduce":
        return w.assign(f"functools.reduce(lambda y, layer: layer(y), [{parts}], {v})")
    u = w.number("u")
    if kind == "comprehension":
        w.emit(f"{u} = [layer({v}) for layer in ({parts})]")
        return w.assign(w.pick(f"sum({u})", f"{u}[0] + {u}[1]", f"torch.stack({u}).amax(0)"))
    w.emit(f"{u} = {v}")
    w.emit(f"for name in {tuple(layers)}:")
    call = {"getattr": "getattr(self, name)", "_modules": "self._modules[name]", "get_submodule": "self.get_submodule(name)"}[
        kind
    ]
    w.emit(f"    {u} = {call}({u})")
    return u


def context(w: Writer, v: str) -> str:
    """A unit in a context, or a try."""
    r = w.number("r")
    kind = w.pick(
        "with torch.no_grad():",
        "with torch.enable_grad():",
        "try:",
        "for _ in range(1):",
        "with torch.autocast('cpu', enabled=False):",
    )
    w.emit(kind)
    w.indent += 1
    reassigns, w.reassigns = w.reassigns, False
    w.emit(f"{r} = {conv_norm_act(w, v, keep=v, keeps_shape=True)}")
    w.indent, w.reassigns = w.indent - 1, reassigns
    if kind == "try:":
        w.emit("except RuntimeError:")
        w.emit(f"    {r} = {v} * 0")
    return w.assign(f"{r} + {v}") if w.chance(0.4) else r


def global_setting(w: Writer, v: str) -> str:
    """Reads globals of the Python module, which a scenario may change."""
    if w.chance(0.5):
        return w.assign(f"{v} * GAIN")
    u = conv_norm_act(w, v, act=False, keep=v, keeps_shape=True)
    return w.assign(f"F.relu({u}) if ON else {u}", v)


def odd_layer(w: Writer, v: str) -> str:
    """Layers that are next to convolutions at times and are none of ours."""
    c = w.c
    conv = f"nn.Conv2d({c}, {c}, 3, padding=1)"
    choices = [
        f"nn.ConvTranspose2d({c}, {c}, 3, padding=1)",
        "nn.LocalResponseNorm(2)",
        "nn.ZeroPad2d(1)",
        "nn.Softmax2d()",
        f"nn.Sequential(nn.BatchNorm2d({c}), nn.ReLU())",
        f"nn.Sequential(nn.ReLU(inplace=True), {conv}, nn.BatchNorm2d({c}))",
        f"nn.Sequential({conv}, nn.ReLU(), nn.BatchNorm2d({c}))",
        f"nn.Sequential(nn.Conv2d({c}, {c}, 1), {conv}, nn.BatchNorm2d({c}), nn.BatchNorm2d({c}))",
        "nn.AdaptiveAvgPool2d((4, 5))",
    ]
    text = w.rng.choice(choices)
    if "Pad2d" in text:
        w.h, w.w = w.h + 2, w.w + 2
    if "Adaptive" in text:
        w.h, w.w = 4, 5
    v = w.assign(f"{w.attr('odd', text)}({v})")
    return conv_norm_act(w, v) if w.chance(0.5) else v
