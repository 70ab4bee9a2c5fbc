"""Puts fused modules into a model: one module's forward at a time, its children first."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from resnet_fused.backends import Precision
from resnet_fused.fusion.matching import Matcher, Unit
from resnet_fused.fusion.rows import Rows, join
from resnet_fused.fusion.tracing import CannotTrace, Reader, is_inlined, trace
from resnet_fused.fusion.wrapped_conv import fuse_wrapped, is_wrapped
from resnet_fused.modules.blocks import Block
from resnet_fused.modules.folding import NotFoldable, hooks_of
from resnet_fused.modules.fused import FusedModule
from resnet_fused.ops.common import memory_format

_NO_TAIL = "what follows the batch norm is a function or shared, and the module keeps its own forward"


class Fuser:
    """Walks over a model and replaces what can be fused. `rows` has one row for each convolution."""

    def __init__(self, model: nn.Module, precision: Precision, backend: str) -> None:
        self.precision, self.backend = precision, backend
        self.rows = Rows(model)
        self.shared_modules, self.shared_parameters = _shared(model)
        weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
        # With a channels_last weight, stock's results are channels_last whatever the input is.
        self.channels_last = any(not w.is_meta and memory_format(w) == torch.channels_last for w in weights)

    def fuse(self, module: nn.Module, path: str = "", root: bool = True, inside: bool = False) -> nn.Module:
        """The module with everything in it fused that can be; the same object unless its forward had to be replaced.

        Args:
            path: of the module in the model.
            root: whether it is the model itself, which keeps its class where possible.
            inside: whether an enclosing module was traced, which then takes care of the result's memory format.
        """
        if isinstance(module, FusedModule) or not any(_has_filter(m) for m in module.modules()):
            return module
        if id(module) in self.shared_modules:
            self.rows.explain(module, path, "its module is used in several places")
            return module
        if is_wrapped(module):
            return self._fuse_wrapped(module, path)
        if isinstance(module, nn.Conv2d):
            return module  # a part of what the module that calls it computes
        if isinstance(module, Block):
            return self._fuse_own_block(module, path)
        try:
            children = self._called_whole(module, path, trace(module))
            traced = True
        except CannotTrace as reason:
            self.rows.explain(module, path, str(reason), direct=True)
            children = [name for name, _ in module.named_children()]
            traced = False
        for name in children:
            child = module.get_submodule(name)
            replaced = self.fuse(child, join(path, name), False, inside or traced)
            if replaced is not child:
                _set_submodule(module, name, replaced)
        if not traced:
            return module
        result = self._fuse_forward(module, path, root)
        if not inside and not self.channels_last and any(isinstance(m, FusedModule) for m in result.modules()):
            result.register_forward_hook(_restore_memory_format)
        return result

    def _fuse_wrapped(self, module: nn.Module, path: str) -> nn.Module:
        try:
            fused = fuse_wrapped(module, self.precision, self.backend)
        except NotFoldable as reason:
            self.rows.explain(module, path, str(reason))
            return module
        self.rows.mark(path, "conv2d_bn_relu" if fused.relu else "conv2d_bn", path, "")
        return fused

    def _fuse_own_block(self, block: Block, path: str) -> nn.Module:
        """The library's own block, whose forward chooses between its modes and can't be traced."""
        try:
            hooks = hooks_of(block)
            if hooks is not None:
                raise NotFoldable(f"the block has {hooks}")
            fused = block.fused(self.precision, self.backend)
        except NotFoldable as reason:
            self.rows.explain(block, path, str(reason))
            return block
        for name, module in block.named_modules():
            if isinstance(module, nn.Conv2d):
                self.rows.mark(join(path, name), fused.op, path, "")
        return fused

    def _called_whole(self, module: nn.Module, path: str, graph: fx.Graph) -> list[str]:
        """Paths of the modules that forward calls as a whole: those, and no others, may be changed inside."""
        calls = list(dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "call_module"))
        whole = []
        for name in calls:
            inner = [other for other in calls if other.startswith(f"{name}.")]
            if inner:
                reason = f"forward also calls a part of its module by itself ({inner[0]})"
                self.rows.explain(module.get_submodule(name), join(path, name), reason)
            else:
                whole.append(name)
        return whole

    def _fuse_forward(self, module: nn.Module, path: str, root: bool) -> nn.Module:
        """Fuses what the module's own forward computes, its children being done."""
        reader = Reader(module, trace(module))
        matcher = Matcher(reader, self.shared_parameters, self.precision, self.backend)
        for name, reason in matcher.reasons.items():
            self.rows.note(join(path, name), reason)
        units = [unit for unit in matcher.units if unit.changes]
        if not units:
            return _guard_format(module, reader)
        hooked = hooks_of(module)
        if hooked is None:
            whole = matcher.block()
            if whole is not None:
                block, in_order = whole
                for unit in in_order:
                    self.rows.mark(join(path, unit.name), block.op, path, unit.note)
                return block
            if not is_inlined(module) and _is_whole(reader, units):
                self.rows.mark(join(path, units[0].name), units[0].op, path, units[0].note)
                return units[0].finish()
            function_tails = not root and not is_inlined(module) and not all(_swappable(reader, u, units) for u in units)
            if function_tails or any(unit.add is not None for unit in units):
                return self._rewrite(module, path, reader, units)
        return _guard_format(self._swap(module, path, reader, units, hooked), reader)

    def _swap(self, module: nn.Module, path: str, reader: Reader, units: list[Unit], hooked: str | None) -> nn.Module:
        """Replaces convolutions by fused modules and what they cover by identities; the module keeps its class and forward."""
        for unit in units:
            if unit.add is not None:
                unit.drop_tail(f"the module has {hooked}, so its own forward stays")
        # Leaving the tail of one unit may make a ReLU that it shared with another impossible to swap: until nothing changes.
        while unswappable := [unit for unit in units if not _swappable(reader, unit, units)]:
            for unit in unswappable:
                if len(unit.covered) > (1 if unit.was_fused else 2):
                    unit.drop_tail(_NO_TAIL)
                else:
                    units.remove(unit)
                    self.rows.note(join(path, unit.name), "its batch norm is shared, or called by a function")
        for unit in units:
            if unit.changes:
                for node in unit.covered[1:]:
                    _set_submodule(module, str(node.target), nn.Identity())
                _set_submodule(module, unit.name, unit.finish())
            self.rows.mark(join(path, unit.name), unit.op, join(path, unit.name), unit.note)
        return module

    def _rewrite(self, module: nn.Module, path: str, reader: Reader, units: list[Unit]) -> nn.Module:
        """The module as a GraphModule, with each unit as one call of its fused module."""
        graph = reader.graph
        result = fx.GraphModule(module, graph, type(module).__name__)
        replaced: dict[fx.Node, fx.Node] = {}
        for number, unit in enumerate(units):
            name = unit.name or f"fused_{number}"
            _set_submodule(result, name, unit.finish())
            arguments = [unit.input]
            if unit.residual is not None:
                arguments.append(replaced.get(unit.residual, unit.residual))
            # Without a residual the input is read where the convolution read it; with one, where the sum did.
            with graph.inserting_after(unit.conv if unit.residual is None else unit.last):
                node = graph.call_module(name, tuple(arguments))
            unit.last.replace_all_uses_with(node)
            replaced[unit.last] = node
            self.rows.mark(join(path, unit.name), unit.op, join(path, name), unit.note)
        dead = {node for unit in units for node in unit.covered}
        for node in reversed(list(graph.nodes)):
            if not node.users and (node in dead or reader.is_identity(node)):
                graph.erase_node(node)
        graph.lint()
        result.recompile()
        result.delete_all_unused_submodules()
        result.train(module.training)
        return _guard_format(result, Reader(result, graph))


def _is_whole(reader: Reader, units: list[Unit]) -> bool:
    """Whether a graph is one unit, from its input to its output."""
    rest = [n for n in reader.graph.nodes if n.op not in ("placeholder", "output", "get_attr") and not reader.is_identity(n)]
    return len(units) == 1 and set(rest) == set(units[0].covered) and units[0].residual is None


def _swappable(reader: Reader, unit: Unit, units: list[Unit]) -> bool:
    """Whether all that the unit covers is calls of modules that only units call."""
    covered: dict[str, int] = {}
    for node in (node for other in units for node in other.covered):
        covered[str(node.target)] = covered.get(str(node.target), 0) + 1
    return all(
        node.op == "call_module" and covered[str(node.target)] == reader.calls[str(node.target)] for node in unit.covered
    )


def _guard_format(module: nn.Module, reader: Reader) -> nn.Module:
    """Makes contiguous what flows into operations that depend on the memory format, which fusing would change."""
    if any(isinstance(m, FusedModule) for m in module.modules()):
        for name in reader.format_sensitive_sources():
            module.get_submodule(name).register_forward_hook(_make_contiguous)
    return module


def _make_contiguous(module: nn.Module, args: tuple[object, ...], output: object) -> object:
    return output.contiguous() if isinstance(output, Tensor) else output


def _restore_memory_format(module: nn.Module, args: tuple[object, ...], output: object) -> object:
    """Gives results the memory format that stock's would have: contiguous, unless an input is channels_last."""
    if any(isinstance(x, Tensor) and x.dim() == 4 and memory_format(x) == torch.channels_last for x in args):
        return output
    return torch.utils._pytree.tree_map_only(Tensor, lambda y: y.contiguous() if y.dim() == 4 else y, output)


def _set_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def _has_filter(module: nn.Module) -> bool:
    """Whether a module holds a 4-d weight of its own, for nn.Conv2d's forward or for F.conv2d."""
    return any(p is not None and p.dim() == 4 for p in module._parameters.values())


def _shared(model: nn.Module) -> tuple[set[int], set[int]]:
    """Ids of the modules, and of the parameters, that stand in more than one place of the model."""
    paths: dict[int, int] = {}
    owners: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        paths[id(module)] = paths.get(id(module), 0) + 1
        if paths[id(module)] == 1:
            for parameter in module._parameters.values():
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {key for key, n in paths.items() if n > 1}, {key for key, n in owners.items() if n > 1}
