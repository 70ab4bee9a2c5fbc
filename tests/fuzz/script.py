"""Makes a random scenario for a model: steps of Python text that are run on each side with the names of `Driver`."""

from __future__ import annotations

import random

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fuzz.choices import CALLS, CHANGES, FORMS, FUSE_OPTIONS, HOOKS, MODES, REPLACE
from fuzz.grammar import Program


class ScriptWriter:
    """Knows the paths of a model's modules and writes steps about them."""

    def __init__(self, rng: random.Random, program: Program, model: nn.Module) -> None:
        self.rng, self.program = rng, program
        named = dict(model.named_modules())
        self.all = list(named)
        self.convs = [n for n, m in named.items() if isinstance(m, nn.Conv2d)]
        self.norms = [n for n, m in named.items() if isinstance(m, _BatchNorm)]
        self.relus = [n for n, m in named.items() if isinstance(m, nn.ReLU)]
        self.linears = [n for n, m in named.items() if isinstance(m, nn.Linear)]
        self.sequences = [n for n, m in named.items() if type(m) is nn.Sequential and n]
        self.drops = [n for n, m in named.items() if type(m).__name__.startswith("Drop")]
        self.convs_with_bias = [n for n in self.convs if named[n].bias is not None]
        self.affine = [n for n in self.norms if named[n].weight is not None]
        self.tracked = [n for n in self.norms if named[n].running_var is not None]
        self.parents = [n for n, m in named.items() if n and any(isinstance(c, nn.Conv2d) for c in m.modules())]
        self.globals = [n for n in ("GAIN", "ON") if program.source.count(n) > 1]
        self.inputs = 0

    def pick(self, choices: list[str]) -> str:
        return self.rng.choice(choices)

    def weighted(self, choices: list[tuple[int, str]]) -> str:
        return self.rng.choices([c for _, c in choices], [w for w, _ in choices])[0]

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def at(self, paths: list[str]) -> str:
        path = self.pick(paths)
        return f"at(m, {path!r})" if path else "m"

    # Calls

    def image(self, form: str | None = None) -> str:
        self.inputs += 1
        form = form or self.weighted(FORMS)
        parts = [str(self.rng.choice([1, 1, 1, 2, 3] if not self.chance(0.02) else [0]))]
        if form != "plain":
            parts.append(repr(form))
        if self.chance(0.12):
            least = 1 if self.chance(0.15) else 5
            parts.append(f"h={self.rng.randrange(least, 18)}, w={self.rng.randrange(least, 18)}")
        return f"image({', '.join(parts)}, k={self.inputs})"

    def arguments(self, form: str | None = None) -> str:
        parts = [self.image(form)]
        if self.chance(0.06):
            parts[0] = f"x={parts[0]}"
        if self.program.inputs == 2 and self.chance(0.97):
            parts.append(f"{'other=' if parts[0].startswith('x=') else ''}{parts[0].removeprefix('x=')}")
        parts += [f"{name}={value}" for name, value in self.program.options if self.chance(0.4)]
        if self.chance(0.15 if self.program.variadic else 0.01):
            parts.insert(1 if not parts[0].startswith("x=") else 0, "2.0")
        if self.chance(0.15 if self.program.variadic else 0.01):
            parts.append("unknown=1")
        return ", ".join(sorted(parts, key=lambda p: p.split("(")[0].find("=") > 0))

    def call(self) -> str:
        kind = self.weighted(CALLS)
        if kind == "grads":
            form = self.weighted([(4, "requires_grad"), (1, "plain"), (1, "channels_last"), (1, "nonleaf")])
            return f"x = {self.image(form)}\ngrads(m, {self.filled('x')})"
        if kind == "train":
            return (
                f"optimizer = torch.optim.SGD(m.parameters(), 0.05)\nm.train()\n"
                f"grads(m, {self.filled(self.image('plain').replace('image(1', 'image(2'))}, keep=True)\noptimizer.step()\n"
                f"optimizer.zero_grad()\nm.eval()\nwith torch.no_grad():\n    call(m, {self.arguments('plain')})"
            )
        mode = self.weighted(MODES)
        if kind == "threads" and self.program.inputs == 1:
            images = ", ".join(self.image(self.pick(["plain", "channels_last"])) for _ in range(self.rng.choice([2, 3])))
            return f"threads(m, {images}{', no_grad=False' if self.chance(0.2) else ''})"
        lines = [f"call(m, {self.arguments()})"]
        if kind == "twice":
            lines = [f"x = {self.image('plain')}", *[f"call(m, {self.filled('x')})"] * self.rng.choice([2, 3])]
        elif kind == "again":  # a result may not be overwritten by the next call
            lines = [f"y = call(m, {self.arguments('plain')})", f"call(m, {self.arguments()})", "record('y', y)"]
        elif kind == "inside":
            lines = [self.inside()]
        elif kind == "transform":
            return self.transform()
        elif kind == "functional":
            lines = [f"call(functional(m, {self.inputs + 50}), {self.arguments('plain')})"]
        elif kind == "mc" and self.drops:
            drop = self.at(self.drops)
            lines = [f"{drop}.train()", f"call(m, {self.arguments('plain')})", f"{drop}.eval()"]
        if not mode:
            return "\n".join(lines)
        return "\n".join([mode, *[f"    {line}" for line in lines]])

    def inside(self) -> str:
        """Calls a method or a child by itself, or children in another order of things."""
        choices = [f"call(m.forward, {self.arguments('plain')})"]
        choices += [f"call(nn.Sequential(*list(m.children())[:{self.rng.randrange(1, 6)}]), {self.image()})"] * 2
        if "_forward_impl" in self.program.source and not self.program.root:
            choices += [f"call(m._forward_impl, {self.arguments('plain')})"] * 2
        if self.parents:
            child = self.at(self.parents)
            image = self.image(self.pick(["plain", "plain", "channels_last", "requires_grad"]))
            choices += [f"call({child}, {image.removesuffix(')')}, c=channels({child})))"] * 5
        return self.pick(choices)

    def transform(self) -> str:
        """Calls through a transform of torch.func, a trace or a checkpoint."""
        x = self.image("plain")
        total = "lambda x: sum(t.sum() for t in torch.utils._pytree.tree_leaves(m(x)) if isinstance(t, torch.Tensor))"
        return self.pick(
            [
                f"with torch.no_grad():\n    call(torch.func.vmap(m), torch.stack([{x}] * 2))",
                f"call(torch.func.grad({total}), {x})",
                f"call(torch.func.jvp, m, ({x},), ({x},))",
                f"with torch.no_grad():\n    x = {x}\n    call(torch.jit.trace(m, x, check_trace=False), x)",
                f"with torch.no_grad():\n    call(torch.fx.symbolic_trace(m), {x})",
                f"grads(lambda x: torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False), {self.image('requires_grad')})",
                f"call(torch.func.functional_call, m, dict(m.named_parameters()), ({x},))",
            ]
        )

    def filled(self, x: str) -> str:
        """Positional arguments from one image."""
        return ", ".join([x] * self.program.inputs)

    # Changes

    def hook(self) -> str:
        where = self.weighted([(3, "conv"), (2, "norm"), (2, "relu"), (2, "any"), (1, "root"), (1, "linear"), (1, "seq")])
        paths = {
            "conv": self.convs,
            "norm": self.norms,
            "relu": self.relus,
            "linear": self.linears,
            "seq": self.sequences,
            "root": [""],
        }.get(where, self.all)
        return f"keep({self.at(paths or self.all)}.{self.weighted(HOOKS)})"

    def setting(self) -> str:
        """Sets an attribute that forward or a layer reads."""
        root = f"at(m, {self.program.root!r})" if self.program.root else "m"
        choices = [f"{root}.{name} = {self.pick(['0.25', '3.0', '1', '-1.0'])}" for name in self.program.floats] * 3
        choices += [f"{root}.{name} = not {root}.{name}" for name in self.program.flags] * 3
        for name in self.globals:
            choices += ["g.GAIN = 0.5" if name == "GAIN" else "g.ON = not g.ON"] * 4
        if "class ScaledBasic" in self.program.source:
            choices += ["g.ScaledBasic.scale = 2.0"] * 3
        if "class Basic" in self.program.source:
            choices += ["g.Basic.forward = lambda self, x: self.bn2(self.conv2(self.bn1(self.conv1(x))))"]
        if self.convs:
            conv = self.at(self.convs)
            choices += [
                f"{conv}.stride = (2, 2)",
                f"{conv}.padding = (1, 1)",
                f"{conv}.dilation = (2, 2)",
                f"{conv}.note = 'x'",
            ]
        if self.norms:
            norm = self.at(self.norms)
            choices += [f"{norm}.eps = {self.pick(['0.1', '1e-2', '0.0'])}", f"{norm}.momentum = 0.5", f"{norm}.eps = 0.5"]
        if self.relus:
            relu = self.at(self.relus)
            choices += [f"{relu}.inplace = not {relu}.inplace"]
        return self.pick(choices or ["m.note = 'x'"])

    def values(self) -> str:
        """Changes parameters or buffers."""
        k = self.rng.randrange(100, 200)
        choices = [f"m.load_state_dict(randomized(m, {k}))"] * 3
        choices += [f"m.load_state_dict(randomized(m, {k}), assign=True)", "m.load_state_dict({'no': torch.ones(1)})"]
        for paths, name in (
            (self.convs, "weight"),
            (self.convs_with_bias, "bias"),
            (self.affine, "weight"),
            (self.affine, "bias"),
        ):
            if not paths:
                continue
            p = f"{self.at(paths)}.{name}"
            new = f"fresh({p}, {k})"
            choices += [
                f"with torch.no_grad():\n    {p}.mul_(0.5)",
                f"{p}.data.mul_(0.5)",
                f"{p}.data = {new}",
                f"with torch.no_grad():\n    {p}.copy_({new})",
                f"{p} = nn.Parameter({new})" if p.startswith("at") else "",
                f"with torch.no_grad():\n    {p}[0] = 0",
                f"with torch.inference_mode():\n    {p}.mul_(0.5)",
                f"{p}.data.numpy()[...] = 0.5",
                f"torch.nn.init.constant_({p}, 0.1)",
            ]
        if self.convs:
            conv = self.at(self.convs)
            choices += [
                f"{conv}.bias = None",
                f"{conv}.weight.data = {conv}.weight.data.contiguous(memory_format=torch.channels_last)",
            ]
        if self.tracked:
            norm = self.at(self.tracked)
            choices += [
                f"{norm}.running_mean.add_(0.5)",
                f"{norm}.running_var = {norm}.running_var * 2",
                f"{norm}.running_var[0] = 4.0",
                f"{norm}.running_var.data.mul_(3.0)",
                f"{norm}.reset_running_stats()",
                f"{norm}.running_mean = None\n{norm}.running_var = None",
            ]
        choices.append(
            "v = torch.nn.utils.parameters_to_vector(m.parameters()).detach()\n"
            "torch.nn.utils.vector_to_parameters(v * 0.5, m.parameters())"
        )
        return self.pick([c for c in choices if c])

    def mode(self) -> str:
        m = self.at(self.all)
        return self.pick(
            [
                "m.train()",
                "m.eval()",
                f"{m}.train()",
                f"{m}.eval()",
                f"{self.at(self.norms or self.all)}.train()",
                "m.train(); m.eval()",
            ]
        )

    def structure(self) -> str:
        """Replaces, adds or takes away modules."""
        choices = []
        for path in self.relus:
            parent, _, name = path.rpartition(".")
            owner = f"at(m, {parent!r})" if parent else "m"
            choices.append(
                f"setattr({owner}, {name!r}, nn.{self.pick(['GELU()', 'Identity()', 'ReLU()', 'ReLU6(inplace=True)'])})"
            )
        for paths, text in (
            (self.linears, "nn.Linear({o}.in_features, 3).to({o}.weight.dtype)"),
            (self.convs, "copy.deepcopy({o})"),
            (self.norms, "nn.BatchNorm2d({o}.num_features).to(DTYPE).eval()"),
            (self.norms, "nn.Identity()"),
            (self.convs, "nn.Sequential({o}, nn.Identity())"),
        ):
            if paths:
                parent, _, name = self.pick(paths).rpartition(".")
                owner = f"at(m, {parent!r})" if parent else "m"
                new = text.format(o=f"getattr({owner}, {name!r})")
                choices.append(REPLACE.format(new=new, owner=owner, name=name))
        if self.sequences:
            seq = self.at(self.sequences)
            choices += [f"{seq}.append(nn.ReLU())", f"del {seq}[-1]", f"{seq}[0], {seq}[-1] = {seq}[-1], {seq}[0]"]
        return self.pick(choices or ["m.extra = nn.Identity()"])

    def reparametrize(self) -> str:
        conv = self.at(self.convs or self.all)
        return self.pick(
            [
                f"prune.l1_unstructured({conv}, 'weight', 0.4)",
                f"prune.ln_structured({conv}, 'weight', 0.3, n=2, dim=0)",
                f"prune.l1_unstructured({conv}, 'weight', 0.4)\nprune.remove({conv}, 'weight')",
                f"parametrizations.weight_norm({conv})",
                f"parametrize.register_parametrization({conv}, 'weight', Halved())",
                f"nn.utils.weight_norm({conv})",
                f"nn.utils.weight_norm({conv})\nnn.utils.remove_weight_norm({conv})",
            ]
        )

    def copying(self) -> str:
        choices = ["m = copy.deepcopy(m)", "m = copy.deepcopy(m)", "m = copy.copy(m)"]
        if self.program.picklable:
            choices += ["m = pickle.loads(pickle.dumps(m))"] * 2
        return self.pick(choices)

    def conversion(self) -> str:
        return self.pick(
            [
                "m = m.to(memory_format=torch.channels_last)",
                "m = cast(m, torch.bfloat16)\nm = cast(m, torch.float32)",
                "m = cast(m, torch.float64)",
                "m.requires_grad_(False)",
                "m.requires_grad_(False)",
                f"{self.at(self.all)}.requires_grad_(False)",
                "m.requires_grad_(True)",
                "m.apply(lambda module: None)",
                "m.zero_grad()",
                "m = fuse(m)",
                "for h in handles: h.remove()",
            ]
        )

    def method(self) -> str:
        """Changes what a module's forward is, after fusing."""
        m = self.at([*self.convs, *self.relus, *self.sequences] or self.all)
        return self.pick(
            [
                f"{m}.forward = types.MethodType(lambda self, x: type(self).forward(self, x) * 0.5, {m})",
                f"{m}.forward = (lambda f: lambda *a, **k: f(*a, **k) * 2)({m}.forward)",
                "keep(nn.modules.module.register_module_forward_hook(g.see))",
            ]
        )

    def change(self) -> str:
        kind = self.weighted(CHANGES)
        return str(getattr(self, kind)())


def scenario(rng: random.Random, program: Program, model: nn.Module) -> list[str]:
    """The steps for a model, which is looked at and not changed."""
    w = ScriptWriter(rng, program, model)
    steps, copies = [], True
    if w.chance(0.94):
        steps.append("m.eval()")
    if w.chance(0.25):
        steps.append("m.requires_grad_(False)")
    if w.chance(0.1):
        steps.append("m = m.to(memory_format=torch.channels_last)")
    if w.chance(0.22):
        kind = w.weighted(
            [(4, "hook"), (2, "reparametrize"), (1, "setting"), (1, "mode"), (1, "values"), (2, "conversion"), (1, "call")]
        )
        steps.append(str(getattr(w, kind)()).replace("m = fuse(m)", "m.eval()"))
        copies = kind not in ("reparametrize", "call")  # what these leave behind may be no leaf, which can't be copied
    options = w.weighted(FUSE_OPTIONS)
    fuse = f"m = fuse(m{options})"
    if w.chance(0.06):
        fuse = f"{w.pick(['with torch.no_grad():', 'with torch.inference_mode():'])}\n    {fuse}"
    if w.chance(0.03):
        fuse += "\nm = fuse(m)"
    elif "inplace" in fuse:
        fuse += "\nrecord('the same object', m is m0)"
    steps.append(f"m0 = m\n{fuse}")
    if w.chance(0.8):
        steps.append(
            f"{w.pick(['with torch.no_grad():', 'with torch.inference_mode():'])}\n    call(m, {w.arguments('plain')})"
        )
    for _ in range(rng.choice([1, 2, 2, 3, 4])):
        if w.chance(0.6):
            steps.append(w.change())
        steps.append(w.call())
    if copies and w.chance(0.1):
        steps.append(f"with torch.no_grad():\n    call(m0, {w.arguments('plain')})")
    return steps
