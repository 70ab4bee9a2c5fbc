"""Units that aren't layers: reshaping, branches, side effects, settings read in forward, changes in place."""

from __future__ import annotations

from fuzz.units import conv_norm_act, residual
from fuzz.writer import Writer


def reshaping(w: Writer, v: str) -> str:
    """Rearranges, cuts and puts together; channels, height and width are counted."""
    c, h, size = w.c, w.h, f"{v}.size(0), {v}.size(1), {v}.size(2), {v}.size(3)"
    kinds = ["views", "permute", "double", "flatten", "pad", "contiguous", "unbind", "t"]
    if c % 2 == 0:
        kinds += ["chunk", "split", "shuffle", "glu", "half"]
    if min(w.h, w.w) >= 6:
        kinds += ["crop", "strided", "pool", "avg"]
    if max(w.h, w.w) <= 12:
        kinds += ["up"]
    kind = w.rng.choice(kinds)
    if kind == "views":
        return w.assign(f"{v}.view({v}.size(0), -1).view({size})")
    if kind == "permute":
        return w.assign(f"{v}.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2)")
    if kind == "flatten":
        return w.assign(f"torch.flatten({v}, 2).reshape({v}.shape)")
    if kind == "contiguous":
        return w.assign(w.pick(f"{v}.contiguous()", f"{v}.contiguous(memory_format=torch.channels_last)", f"{v}.clone()"))
    if kind == "unbind":
        return w.assign(f"torch.stack({v}.unbind(0))")
    if kind == "t":
        w.h, w.w = w.w, w.h
        return w.assign(w.pick(f"{v}.transpose(2, 3)", f"{v}.mT"))
    if kind == "pad":
        w.h, w.w = w.h + 2, w.w + 1
        return w.assign(f"F.pad({v}, (1, 0, 1, 1))")
    if kind == "double":
        if c > 16:
            return v
        w.c = 2 * c
        return w.assign(w.pick(f"torch.cat([{v}, {v}], 1)", f"torch.cat(({v}, -{v}), dim=1)"))
    if kind == "chunk":
        a, b = w.number("a"), w.number("b")
        w.emit(f"{a}, {b} = {w.pick(f'{v}.chunk(2, 1)', f'torch.chunk({v}, 2, dim=1)', f'{v}.split({c // 2}, 1)')}")
        return w.assign(w.pick(f"torch.cat([{b}, {a}], 1)", f"torch.cat([{a}, {a} + {b}], 1)"))
    if kind == "split":
        w.c = c // 2
        return w.assign(f"{v}[:, :{c // 2}] + {v}[:, {c // 2}:]")
    if kind == "half":
        w.c = c // 2
        return w.assign(w.pick(f"{v}[:, :{c // 2}]", f"{v}[:, ::2]", f"{v}.narrow(1, 0, {c // 2})"))
    if kind == "shuffle":
        return w.assign(
            f"{v}.view({v}.size(0), 2, {c // 2}, {v}.size(2), {v}.size(3)).transpose(1, 2).contiguous().view({size})"
            if w.chance(0.5)
            else f"F.channel_shuffle({v}, 2)"
        )
    if kind == "glu":
        w.c = c // 2
        return w.assign(f"F.glu({v}, 1)")
    if kind == "crop":
        w.h, w.w = w.h - 2, w.w - 1
        return w.assign(f"{v}[:, :, 1:-1, 1:]")
    if kind == "strided":
        w.h, w.w = (h + 1) // 2, (w.w + 1) // 2
        return w.assign(f"{v}[:, :, ::2, ::2]")
    if kind == "pool":
        w.h, w.w = (w.h - 1) // 2 + 1, (w.w - 1) // 2 + 1
        return w.assign(f"F.max_pool2d({v}, 3, 2, 1)")
    if kind == "avg":
        w.h, w.w = w.h // 2, w.w // 2
        return w.assign(f"{w.attr('pool', 'nn.AvgPool2d(2)')}({v})")
    w.h, w.w = 2 * w.h, 2 * w.w
    return w.assign(
        f"F.interpolate({v}, scale_factor=2)" if w.chance(0.6) else f"{w.attr('up', 'nn.Upsample(scale_factor=2)')}({v})"
    )


def branch(w: Writer, v: str) -> str:
    """A unit under a condition on a setting, a shape, a value, the mode or an argument."""
    kinds = ["flag", "shape", "value", "training", "batch", "grad", "bound"]
    kind = w.rng.choice(kinds)
    condition = {
        "flag": "",
        "shape": f"{v}.shape[-1] > {w.w - 1}" if w.chance(0.5) else f"{v}.shape[2] % 2 == {w.h % 2}",
        "value": w.pick(f"{v}.mean() > 0", f"{v}.max() > 0.5", f"bool(({v} > 0).any())"),
        "training": "not self.training",
        "batch": f"{v}.size(0) > 1",
        "grad": w.pick(f"not {v}.requires_grad", "torch.is_grad_enabled()"),
        "bound": f"isinstance({v}, Tensor) and {v}.dim() == 4",
    }[kind]
    if kind == "flag":
        condition = w.flag_attr() if w.chance(0.7) else f"{w.float_attr()} > 0.7"
    r = w.number("r")
    if w.chance(0.3):
        w.emit(f"{r} = {v}")
        w.emit(f"if {condition}:")
        other = False
    else:
        w.emit(f"if {condition}:")
        other = True
    w.indent += 1
    taps = list(w.taps)  # a value of one branch isn't there in the other
    saved, w.reassigns = w.reassigns, False
    u = conv_norm_act(w, v, keep=v, keeps_shape=True) if w.chance(0.7) else f"{v} * 0.5"
    w.emit(f"{r} = {u}")
    w.indent -= 1
    if other:
        w.emit("else:")
        w.emit(f"    {r} = {w.pick(v, f'F.relu({v})')}")
    w.reassigns, w.taps = saved, taps
    return r


def option(w: Writer, v: str) -> str:
    """A keyword argument of forward and what it changes."""
    kind = w.pick("mask", "factor", "early", "skip")
    if any(name == kind for name, _, _ in w.options):
        return v
    if kind == "mask":
        w.options.append(("mask", "None", "torch.tensor([[[[0.5]]]], dtype=DTYPE)"))
        if w.chance(0.5):
            w.emit("if mask is not None:")
            w.emit(f"    {v} = {v} * mask")
            return v
        return w.assign(f"{v} if mask is None else {v} * mask")
    if kind == "factor":
        w.options.append(("factor", "1.0", "0.25"))
        return w.assign(f"{v} * factor")
    if kind == "early":
        w.options.append(("early", "False", "True"))
        w.emit("if early:")
        w.emit(f"    return {v}")
        return v
    w.options.append(("skip", "None", "torch.ones(1, 1, 1, 1, dtype=DTYPE)"))
    u = conv_norm_act(w, v, act=False, keep=v, keeps_shape=True)
    w.emit("if skip is not None:")
    w.emit(f"    {u} += skip")
    return w.act(u)


def side_effect(w: Writer, v: str) -> str:
    """Forward leaves something behind: in a list, a dict, an attribute, a global, a buffer."""
    w.stateful = True
    kind = w.pick("append", "global", "count", "last", "dict", "buffer", "counts", "kept", "setdefault")
    if kind == "append":
        w.emit(f"{w.attr('log', '[]')}.append(tuple({v}.shape))")
    elif kind == "kept":
        w.emit(f"{w.attr('kept', '[]')}.append({v})")
    elif kind == "global":
        w.emit(f"LOG.append({w.pick(f'tuple({v}.shape)', f'{v}.stride()', f'{v}')})")
    elif kind == "count":
        w.emit(f"{w.attr('calls', '0')} += 1")
    elif kind == "last":
        w.emit(f"{w.attr('last', 'None')} = {w.pick(v, f'{v}.detach()', f'tuple({v}.shape)')}")
    elif kind == "dict":
        name = w.attr("seen", "{}")
        w.emit(f"{name}[tuple({v}.shape)] = {name}.get(tuple({v}.shape), 0) + 1")
    elif kind == "setdefault":
        w.emit(f"{w.attr('cache', '{}')}.setdefault('first', tuple({v}.shape))")
    elif kind == "counts":
        w.emit('COUNTS["calls"] += 1')
    else:
        name = w.number("count")
        w.init.append(f'self.register_buffer("{name}", torch.zeros(()))')
        w.emit(f"self.{name} += 1")
    return v


def setting(w: Writer, v: str) -> str:
    """Reads settings, parameters and types of other layers in forward."""
    kind = w.pick("scale", "dtype", "weight", "device", "stats", "stride", "gate", "class")
    if kind == "scale":
        return w.assign(f"{v} * {w.float_attr()}")
    if kind == "class":
        return w.assign(f"{v} * len(list(self.children()))")
    if kind == "gate":
        return w.assign(f"{v} * {w.attr('gate', f'nn.Parameter(torch.rand(1, {w.c}, 1, 1))')}")
    if kind == "stride":
        conv = w.attr("conv", w.conv(w.c, w.c, 1, True))
        u = w.act(w.assign(f"{w.attr('bn', w.norm(w.c, True))}({conv}({v}))", v), v)
        return w.assign(f"{u} * {conv}.stride[0]")
    if kind == "stats":
        bn = w.attr("bn", f"nn.BatchNorm2d({w.c})")
        conv = w.attr("conv", w.conv(w.c, w.c, 1, True))
        u = w.act(w.assign(f"{bn}({conv}({v}))", v), v)
        return w.assign(f"{u} + {bn}.weight.view(1, -1, 1, 1)")
    conv = w.attr("conv", w.conv(w.c, w.c, 1, True, kernel=3))
    bn = w.attr("bn", w.norm(w.c, True))
    if kind == "dtype":
        v = w.assign(f"{v}.to({conv}.weight.dtype)")
    elif kind == "device":
        v = w.assign(f"{v}.to({conv}.weight.device)")
    u = w.act(w.assign(f"{bn}({conv}({v}))", v), v)
    return w.assign(f"{u} + {conv}.weight.mean()") if kind == "weight" else u


def in_place(w: Writer, v: str) -> str:
    line = w.pick(
        f"{v}.mul_(0.5)", f"{v} *= 2", f"{v}.relu_()", f"{v}[:, :1] = 0", f"{v} += 1", f"{v}[:1].zero_()", f"{v}.neg_()"
    )
    w.emit(line)
    return v


def gate(w: Writer, v: str) -> str:
    """Multiplies by what pooling and a small network make of the value itself."""
    if w.chance(0.5):
        se = w.use("SE")
        return w.assign(f"{w.attr('se', f'{se}({w.c})')}({v})")
    s = w.number("s")
    w.emit(f"{s} = F.adaptive_avg_pool2d({v}, 1)")
    return w.assign(f"{v} * torch.sigmoid({w.attr('fc', f'nn.Conv2d({w.c}, {w.c}, 1)')}({s}))")


def dropout(w: Writer, v: str) -> str:
    if w.chance(0.3):
        return w.assign(f"F.dropout({v}, 0.3, self.training)")
    return w.assign(f"{w.attr('drop', w.pick('nn.Dropout(0.3)', 'nn.Dropout2d(0.3)', 'nn.Dropout(0.2, inplace=True)'))}({v})")


def parallel(w: Writer, v: str) -> str:
    """Two paths from one value, put together."""
    base = w.number("base")
    w.emit(f"{base} = {v}")
    saved, w.reassigns = w.reassigns, False
    a = conv_norm_act(w, base, act=w.chance(0.5), keep=base, keeps_shape=True)
    b = conv_norm_act(w, base, act=w.chance(0.5), keep=base, keeps_shape=True)
    w.reassigns = saved
    if w.chance(0.3) and w.c <= 16:
        w.c *= 2
        return w.assign(f"torch.cat([{a}, {b}], 1)")
    return w.act(w.join(a, b, plain=True))


def tap(w: Writer, v: str) -> str:
    w.taps.append(name := w.number("tap"))
    w.emit(f"{name} = {v}")
    return v if w.chance(0.4) else residual(w, v)
