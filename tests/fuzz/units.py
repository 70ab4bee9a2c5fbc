"""The units that random modules are chains of: each writes lines that take a variable to the next one."""

from __future__ import annotations

from collections.abc import Callable

from fuzz.writer import Writer

Unit = Callable[[Writer, str], str]


def conv_norm_act(w: Writer, v: str, act: bool = True, keep: str = "", keeps_shape: bool = False) -> str:
    """Convolution, norm and activation as attributes, in one expression or in several, with F or in a small module."""
    cout = w.c if keeps_shape or w.chance(0.5) else w.pick(4, 6, 8, 16)
    stride = 1 if keeps_shape or min(w.h, w.w) < 5 or w.chance(0.8) else 2
    cin, plain = w.c, w.chance(0.6)
    spelling = w.weighted([(5, "nested"), (5, "lines"), (2, "module"), (3, "sequential"), (1, "functional"), (1, "no_norm")])
    conv = w.conv(cin, cout, stride, plain or spelling == "functional")
    w.c = cout
    if spelling == "functional":
        conv = w.attr("conv", f"nn.Conv2d({cin}, {cout}, 3, padding=1)")
        bn = w.attr("bn", f"nn.BatchNorm2d({cout})")
        size = f"stride={stride}, padding=1"
        v = w.assign(f"F.conv2d({v}, {conv}.weight, {w.pick(f'{conv}.bias', 'None')}, {size})", keep)
        v = w.assign(
            f"F.batch_norm({v}, {bn}.running_mean, {bn}.running_var, {bn}.weight, {bn}.bias, {bn}.training, 0.1, {bn}.eps)",
            keep,
        )
        return w.act(v, keep) if act else v
    norm = w.norm(cout, plain)
    if spelling == "module":
        module = w.attr("unit", f"{w.use('ConvNorm')}({conv}, {norm}{', ' + w.act_module() if act else ''})")
        return w.assign(f"{module}({v})", keep)
    if spelling == "sequential":
        layers = [conv, norm, *([w.act_module()] if act else [])]
        return w.assign(f"{w.attr('seq', sequential(w, layers))}({v})", keep)
    if spelling == "no_norm":
        v = w.assign(f"{w.attr('conv', conv)}({v})", keep)
        return w.act(v, keep) if act else v
    conv, norm = w.attr("conv", conv), w.attr("bn", norm)
    if spelling == "nested":
        v = w.assign(f"{norm}({conv}({v}))", keep)
    else:
        v = w.assign(f"{conv}({v})", keep)
        v = w.assign(f"{norm}({v})", keep)
    return w.act(v, keep) if act else v


def sequential(w: Writer, layers: list[str]) -> str:
    if w.chance(0.25):
        names = ["conv", "norm", "act"] if len(layers) <= 3 else [f"layer{i}" for i in range(len(layers))]
        pairs = ", ".join(f'("{name}", {layer})' for name, layer in zip(names, layers, strict=False))
        return f"nn.Sequential(collections.OrderedDict([{pairs}]))"
    if len(layers) == 3 and w.chance(0.2):
        return f"nn.Sequential(nn.Sequential({layers[0]}, {layers[1]}), {layers[2]})"
    return f"nn.Sequential({', '.join(layers)})"


def residual(w: Writer, v: str) -> str:
    """A residual block written out in forward."""
    identity, c = v, w.c
    if w.reassigns:
        identity = w.number("identity")
        w.emit(f"{identity} = {v}")
    if w.chance(0.3):  # a projection
        stride = 2 if min(w.h, w.w) >= 5 and w.chance(0.4) else 1
        cout = w.pick(4, 8, 16)
        size = w.h, w.w
        main = w.attr("conv", w.conv(c, cout, stride, plain=True, kernel=3))
        after, (w.h, w.w) = (w.h, w.w), size
        shortcut = w.attr("downsample", f"nn.Sequential({w.conv(c, cout, stride, plain=True, kernel=1)}, {w.norm(cout, True)})")
        w.h, w.w = after
        w.c = cout
        u = w.act(w.assign(f"{w.attr('bn', w.norm(cout, True))}({main}({v}))", identity), identity)
        u = conv_norm_act(w, u, act=False, keep=identity, keeps_shape=True)
        shortcut_first = w.chance(0.5)
        if shortcut_first:
            w.emit(f"{w.number('short')} = {shortcut}({identity})")
            identity = f"short{w._counts['short']}"
        else:
            identity = f"{shortcut}({identity})"
    else:
        u = v
        for _ in range(w.pick(0, 1, 1, 2)):
            u = conv_norm_act(w, u, keep=identity, keeps_shape=True)
        u = conv_norm_act(w, u, act=False, keep=identity, keeps_shape=True)
    u = w.join(u, identity)
    return w.act(u) if w.chance(0.85) else u


def block_text(w: Writer) -> str:
    """The text that makes one residual block, with its sizes counted."""
    kind = w.weighted(
        [
            (6, "Basic"),
            (5, "Bottle"),
            (3, "TimmBasic"),
            (2, "rf.BasicBlock"),
            (2, "rf.Bottleneck"),
            (1, "PreAct"),
            (1, "ScaledBasic"),
            (1, "WrappedBasic"),
        ]
    )
    bottle = kind in ("Bottle", "rf.Bottleneck")
    planes = w.c if w.chance(0.5) else w.pick(4, 8)
    if bottle:
        planes = w.c // 4 if w.c % 4 == 0 and w.c >= 16 and w.chance(0.6) else w.pick(2, 4)
    cout = planes * 4 if bottle else planes
    stride = 2 if min(w.h, w.w) >= 5 and w.chance(0.2) else 1
    if stride == 2:
        w.h, w.w = (w.h - 1) // 2 + 1, (w.w - 1) // 2 + 1
    parts = [str(w.c), str(planes)]
    if stride != 1:
        parts.append(f"stride={stride}")
    projects = stride != 1 or cout != w.c
    if projects and not (kind.startswith("rf.") and w.chance(0.5)):
        norm = w.norm(cout, plain=w.chance(0.8))
        layers = [f"nn.Conv2d({w.c}, {cout}, 1, stride={stride}, bias=False)", norm]
        if stride == 2 and w.chance(0.25):  # ResNet-D
            layers = ["nn.AvgPool2d(2, 2, ceil_mode=True)", f"nn.Conv2d({w.c}, {cout}, 1, bias=False)", norm]
        if kind.startswith("rf.") and len(layers) == 3:
            layers = [f"nn.Conv2d({w.c}, {cout}, 1, stride={stride}, bias=False)", norm]
        parts.append(f"downsample=nn.Sequential({', '.join(layers)})")
    if kind == "Bottle" and planes % 2 == 0 and w.chance(0.2):
        parts.append("groups=2")
    if kind in ("Basic", "Bottle") and w.chance(0.1):
        parts.append(f"norm={w.use('FrozenBatchNorm2d')}")
    if kind == "TimmBasic":
        if w.chance(0.25):
            parts.append(f"se={w.use('SE')}({cout})")
        if w.chance(0.25):
            parts.append(f"drop_path={w.use('DropPath')}(0.3)")
    w.c = cout
    return f"{kind if kind.startswith('rf.') else w.use(kind)}({', '.join(parts)})"


def block(w: Writer, v: str) -> str:
    return w.assign(f"{w.attr('block', block_text(w))}({v})")


def stage(w: Writer, v: str) -> str:
    """Several blocks in a Sequential, called whole, in a loop, by index or in slices."""
    layers = [block_text(w) for _ in range(w.pick(2, 2, 3))]
    layer = w.attr("layer", f"nn.Sequential({', '.join(layers)})")
    return call_sequence(w, v, layer, len(layers), tap=True)


def call_sequence(w: Writer, v: str, seq: str, n: int, tap: bool = False) -> str:
    """Calls a Sequential in one of many ways; `tap` allows to keep what is between its layers."""
    way = w.weighted([(8, "whole"), (2, "loop"), (2, "slices"), (1, "index"), (1, "children"), (1, "taps" if tap else "loop")])
    if way == "slices" and n >= 2:
        cut = w.rng.randrange(1, n)
        u = w.assign(f"{seq}[:{cut}]({v})")
        if w.chance(0.3):
            w.taps.append(name := w.number("tap"))
            w.emit(f"{name} = {u}")
        return w.assign(f"{seq}[{cut}:]({u})")
    if way == "index":
        for i in range(n):
            v = w.assign(f"{seq}[{i}]({v})")
        return v
    if way == "whole" or way == "slices":
        return w.assign(f"{seq}({v})")
    u = w.number("u")
    w.emit(f"{u} = {v}")
    if way == "taps":
        w.taps.append(taps := w.number("taps"))
        w.emit(f"{taps} = []")
        w.emit(f"for layer in {seq}:")
        w.emit(f"    {u} = layer({u})")
        w.emit(f"    {taps}.append({u})")
        return u
    loop = {"loop": f"for layer in {seq}:", "children": f"for _, layer in {seq}.named_children():"}[way]
    w.emit(loop)
    w.emit(f"    {u} = layer({u})")
    return u


def long_sequential(w: Writer, v: str) -> str:
    """Convolutions, norms and activations in a row in one Sequential."""
    layers: list[str] = []
    for _ in range(w.pick(1, 2, 3)):
        cin = w.c
        cout = w.pick(w.c, 4, 8)
        plain = w.chance(0.6)
        layers.append(w.conv(cin, cout, 2 if min(w.h, w.w) >= 5 and w.chance(0.15) else 1, plain))
        w.c = cout
        layers += [w.norm(cout, plain)] if w.chance(0.9) else []
        layers += [w.act_module()] if w.chance(0.85) else []
        if w.chance(0.1):
            layers.append("nn.Dropout(0.3)")
        if w.chance(0.06):
            layers.append("nn.Identity()")
    if min(w.h, w.w) >= 5 and w.chance(0.15):
        layers.append("nn.MaxPool2d(2)")
        w.h, w.w = w.h // 2, w.w // 2
    return call_sequence(w, v, w.attr("seq", sequential(w, layers)), len(layers), tap=True)


def module_list(w: Writer, v: str) -> str:
    """A loop over a ModuleList or ModuleDict, with a residual or not, and maybe a list of the results."""
    n = w.pick(2, 3)
    items = []
    for _ in range(n):
        conv, norm = w.conv(w.c, w.c, 1, plain=True), w.norm(w.c, True)
        items.append(f"nn.Sequential({conv}, {norm}{', ' + w.act_module() if w.chance(0.7) else ''})")
    if w.chance(0.3):
        members = ", ".join(f"{name!r}: {item}" for name, item in zip("abc", items, strict=False))
        parts = w.attr("parts", f"nn.ModuleDict({{{members}}})")
        loop = f"for layer in {parts}.values():"
    else:
        parts = w.attr("parts", f"nn.ModuleList([{', '.join(items)}])")
        loop = w.pick(f"for layer in {parts}:", f"for layer in {parts}:", f"for i, layer in enumerate({parts}):")
    u = w.number("u")
    taps = ""
    if w.chance(0.4):
        w.taps.append(taps := w.number("taps"))
        w.emit(f"{taps} = []")
    w.emit(f"{u} = {v}")
    w.emit(loop)
    step = w.pick(f"{u} = layer({u})", f"{u} = {u} + layer({u})", f"{u} = F.relu(layer({u}) + {u})")
    if "enumerate" in loop and w.chance(0.5):
        w.emit("    if i == 1:")
        w.emit(f"        {u} = {u} * 0.5")
    w.emit(f"    {step}")
    if taps:
        w.emit(f"    {taps}.append({u})")
    return u


def parts_of_child(w: Writer, v: str) -> str:
    """Calls layers of a child by themselves, some of them, and maybe the child too."""
    c = w.c
    child = w.attr("net", f"{w.use('Parts')}({c}, {w.conv(c, c, 1, w.chance(0.7))}, {w.norm(c, w.chance(0.7))})")
    if w.chance(0.2):
        v = w.assign(f"{child}({v})")
        w.taps.append(name := w.number("tap"))
        w.emit(f"{name} = {v}")
    n = w.number("n")
    w.emit(f"{n} = {child}")
    u = w.assign(f"{n}.act({n}.bn1({n}.conv1({v})))" if w.chance(0.7) else f"F.relu({n}.bn1({n}.conv1({v})))")
    if w.chance(0.6):
        u = w.assign(f"{n}.bn2({n}.conv2({u}))")
    return w.assign(f"{n}({u})") if w.chance(0.2) else u


def reuse(w: Writer, v: str) -> str:
    """One module twice, under one name or two, or two convolutions with one weight."""
    kind = w.pick("twice", "alias", "tied", "conv_twice")
    c = w.c
    made = f"nn.Sequential({w.conv(c, c, 1, True)}, {w.norm(c, True)}, {w.act_module()})"
    if kind == "twice":
        unit = w.attr("unit", made)
        v = w.assign(f"{unit}({v})")
        return w.assign(f"{unit}({v})")
    if kind == "alias":
        unit = w.attr("unit", made)
        other = w.attr("alias", unit)
        v = w.assign(f"{unit}({v})")
        return w.assign(f"{other}({v})")
    if kind == "tied":
        a = w.attr("conv", f"nn.Conv2d({c}, {c}, 3, padding=1)")
        b = w.attr("conv", f"nn.Conv2d({c}, {c}, 3, padding=1)")
        w.init.append(f"{b}.weight = {a}.weight")
        v = w.act(w.assign(f"{w.attr('bn', w.norm(c, True))}({a}({v}))"))
        return w.act(w.assign(f"{w.attr('bn', w.norm(c, True))}({b}({v}))"))
    conv = w.attr("conv", w.conv(c, c, 1, True))
    v = w.act(w.assign(f"{w.attr('bn', w.norm(c, True))}({conv}({v}))"))
    return w.act(w.assign(f"{w.attr('bn', w.norm(c, True))}({conv}({v}))"))
