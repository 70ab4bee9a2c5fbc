"""Units that decide by sizes and types, compute with parameters by themselves, and see images as signals or videos."""

from __future__ import annotations

from fuzz.units import conv_norm_act
from fuzz.writer import Writer


def by_size(w: Writer, v: str) -> str:
    """Something that is done for some sizes only, or as often as a size says. Height and width stay."""
    kind = w.pick("if", "if", "batch", "loop", "resize", "arithmetic")
    r = w.number("r")
    if kind == "resize":
        w.emit(f"h, w = {v}.shape[-2:]")
        w.emit(f"{r} = F.interpolate({v}, size=(max(h, 4) + h % 2, max(w, 4)), mode='nearest')")
        w.emit(f"{r} = F.adaptive_avg_pool2d({r}, (h, w))" if w.chance(0.5) else f"{r} = {r}[..., :h, :w]")
        return conv_norm_act(w, r)
    if kind == "loop":
        what = w.pick(f"[t * 2 for t in {v}]", f"[{v}[i] * 0.5 for i in range({v}.size(0))]")
        return conv_norm_act(w, w.assign(f"torch.stack({what})", v))
    if kind == "arithmetic":
        scale = w.pick("math.sqrt(n)", "1.0 / max(n, 2)", "float(n // 2)", "(0.5 if n % 2 else 2.0)")
        w.emit(f"n = {w.pick(f'{v}.shape[-1]', f'{v}.numel()', f'{v}.size(0)', f'len({v})', f'{v}.dim()')}")
        return w.assign(f"{v} * {scale}")
    test = {"if": w.pick(f"{v}.shape[-1] > {w.rng.randrange(3, 12)}", f"{v}.size(2) % 2"), "batch": f"len({v}) == 1"}[kind]
    w.emit(f"if {test}:")
    w.indent += 1
    reassigns, w.reassigns = w.reassigns, False
    w.emit(f"{r} = {conv_norm_act(w, v, keep=v, keeps_shape=True)}")
    w.indent, w.reassigns = w.indent - 1, reassigns
    w.emit("else:")
    w.emit(f"    {r} = {w.pick(f'{v} * 2', v, f'F.relu({v})')}")
    return conv_norm_act(w, r) if w.chance(0.5) else r


def by_type(w: Writer, v: str) -> str:
    """Takes a tensor or a list of them."""
    u = w.number("u")
    made = conv_norm_act(w, v, keep=v, keeps_shape=True)
    given = w.pick(v, f"[{v}, {made}]", f"({v},)")
    w.emit(f"{u} = {given}")
    test = w.pick("isinstance({u}, Tensor)", "not isinstance({u}, (list, tuple))", "torch.is_tensor({u})").format(u=u)
    w.emit(f"{u} = [{u}] if {test} else {u}")
    u = w.assign(w.pick(f"torch.stack(list({u})).sum(0)", f"sum({u})", f"{u}[-1]"))
    return conv_norm_act(w, u)


def own_arithmetic(w: Writer, v: str) -> str:
    """Computes with parameters by itself: scales, and weights of convolutions."""
    c = w.c
    kind = w.pick("scale", "scale", "weight", "weight", "shared", "made")
    if kind == "scale":
        gain = w.attr("gain", f"nn.Parameter(torch.rand({c}))")
        text = w.pick(
            "{v} * {g}.reshape(1, -1, 1, 1)", "{v}.mul({g}[None, :, None, None].sigmoid())", "{v} + {g}.view(-1, 1, 1) * 2",
            "{v} / (1 + {g}.sum())", "{v} * {g}.softmax(0).max()",
        )  # fmt: skip
        return w.assign(text.format(v=v, g=gain))
    if kind == "made":
        return w.assign(
            f"{v} * {w.pick(f'torch.linspace(0.5, 1, {c})', f'torch.ones({c})', f'torch.arange({c})')}.view(1, -1, 1, 1)"
        )
    kernel = w.attr("kernel", f"nn.Parameter(torch.randn({c}, {c}, 3, 3))")
    weight = w.pick(
        "{k} * 0.1", "{k} / {k}.norm()", "({k} - {k}.mean((1, 2, 3), keepdim=True)).mul(0.1)", "F.normalize({k}, dim=0)"
    )
    if kind == "shared":
        w.emit(f"weight = {weight.format(k=kernel)}")
        if w.chance(0.3):
            w.emit("weight.mul_(0.5)")
        v = w.assign(f"F.conv2d({v}, weight, padding=1)")
        return w.assign(f"F.conv2d({v}, weight, padding=1)") if w.chance(0.5) else w.act(v)
    v = w.assign(f"F.conv2d({v}, {weight.format(k=kernel)}, padding=1)")
    v = w.assign(f"{w.attr('bn', w.norm(c, True))}({v})") if w.chance(0.6) else v
    return w.act(v) if w.chance(0.7) else v


def part(w: Writer, v: str) -> str:
    """Writes into a part, or a view, of something that was just made."""
    c = w.c
    other = conv_norm_act(w, v, keep=v, keeps_shape=True)
    kind = w.pick("cat", "product", "view", "input")
    made = {
        "cat": f"torch.cat([{v}, {other}], 1)[:, :{c}]",
        "product": f"({v} * {other})[..., :]",
        "view": f"{v}.mul(2).view_as({v})",
    }
    u = w.number("u")
    w.emit(f"{u} = {made.get(kind, f'{v}[:, :]')}")
    w.emit(w.pick(f"{u} += {other}", f"{u}.add_({other})", f"{u}.mul_(0.5)", f"torch.add({u}, 1, out={u})"))
    return w.act(u) if w.chance(0.5) else u


def as_signal(w: Writer, v: str) -> str:
    """A unit of one dimension on the pixels in a row."""
    c, kernel = w.c, w.pick(1, 3, 3, 5, 4)
    bias, groups = w.pick("", ", bias=False"), f", groups={c}" if w.chance(0.15) else ""
    pad = w.pick(f", padding={kernel // 2}", ", padding='same'") if kernel % 2 else ", padding='same'"
    conv = f"nn.Conv1d({c}, {c}, {kernel}{pad}{groups}{bias})"
    layers = [conv, *([f"nn.BatchNorm1d({c})"] if w.chance(0.7) else []), *(["nn.ReLU(inplace=True)"] if w.chance(0.7) else [])]
    s = w.number("s")
    rows = w.pick(f"{v}.flatten(2)", f"{v}.flatten(2)", f"{v}.permute(0, 2, 3, 1).flatten(1, 2).transpose(1, 2)")
    w.emit(f"{s} = {rows}")
    y = f"{w.attr('row', f'nn.Sequential({chr(44).join(layers)})')}({s})"
    if w.chance(0.4):
        y = w.pick(f"F.relu({y} + {s})", f"{s} + {y}")
    return w.assign(f"{y}.reshape({v}.shape)" if w.chance(0.5) else f"({y}).unflatten(2, {v}.shape[2:])")


def as_video(w: Writer, v: str) -> str:
    """A unit of three dimensions on two or three frames."""
    c, kernel = w.c, w.pick((1, 3, 3), (3, 1, 1), (3, 3, 3), (1, 1, 1), (2, 3, 1))
    pad = tuple(k // 2 for k in kernel)
    conv = f"nn.Conv3d({c}, {c}, {kernel}, padding={pad if kernel[0] != 2 else (0, 1, 0)}{w.pick('', ', bias=False')})"
    layers = [conv, *([f"nn.BatchNorm3d({c})"] if w.chance(0.7) else []), *(["nn.ReLU()"] if w.chance(0.7) else [])]
    frames = w.number("frames")
    w.emit(f"{frames} = torch.stack([{v}, {v} * 0.5{w.pick('', f', {v} + 1')}], 2)")
    if w.chance(0.3):
        w.emit(f"{frames} = {frames}.contiguous(memory_format=torch.channels_last_3d)")
    y = f"{w.attr('clip', f'nn.Sequential({chr(44).join(layers)})')}({frames})"
    if kernel[0] != 2 and w.chance(0.4):
        y = f"F.relu({y} + {frames})"
    return w.assign(f"({y}){w.pick('.mean(2)', '.amax(2)', '[:, :, 0]', '.select(2, -1)')}")
