"""What a matcher finds: convolutions and passes, each with what is fused into it, and groups that are computed together."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from resnet_fused.backends import Activation, Conv, Epilogue, Pool, Step
from resnet_fused.backends.problem import MORE, RESIDUAL, Affine, Pointwise, X, label, residual_block
from resnet_fused.fusion.layers import Convolution, Norm


@dataclass(eq=False)
class Match:
    """Something with all that is fused into it.

    Attributes:
        name: its name in the report; of a pass, a name for the matcher.
        covered: nodes whose work it does, in order.
        norm: where its batch norm's tensors are, if it has one.
        add, residual: the sum's node and the operand that is not this match, if a sum is fused.
        activation, slope: the function that follows.
        renews: whether the sum or the function makes a tensor of its own in stock, and doesn't overwrite the one before.
        pool: the max-pool that follows, if it can be fused into a stem.
        note: why no more than this was fused, for the report.
    """

    name: str
    covered: list[fx.Node]
    norm: Norm | None = field(default=None, kw_only=True)
    add: fx.Node | None = field(default=None, kw_only=True)
    residual: fx.Node | None = field(default=None, kw_only=True)
    activation: Activation = field(default=Activation.NONE, kw_only=True)
    slope: float = field(default=0.0, kw_only=True)
    renews: bool = field(default=False, kw_only=True)
    pool: Pool | None = field(default=None, kw_only=True)
    note: str = field(default="", kw_only=True)

    @property
    def first(self) -> fx.Node:
        return self.covered[0]

    @property
    def last(self) -> fx.Node:
        return self.covered[-1]

    @property
    def operation(self) -> Conv | Affine | Pointwise:
        raise NotImplementedError

    @property
    def input(self) -> fx.Node:
        raise NotImplementedError

    @property
    def more(self) -> list[fx.Node]:
        """What it reads beside its input and the residual."""
        return []

    @property
    def epilogue(self) -> Epilogue:
        return Epilogue(self.residual is not None, self.activation, self.pool, slope=self.slope)


@dataclass(eq=False)
class ConvMatch(Match):
    """One convolution.

    Attributes:
        layer: where its tensors are.
    """

    layer: Convolution

    @property
    def conv(self) -> fx.Node:
        return self.first

    @property
    def scaled(self) -> list[fx.Node]:
        """The convolution and its batch norm."""
        return self.covered[: 1 if self.norm is None else 2]

    @property
    def operation(self) -> Conv:
        return self.layer.conv

    @property
    def input(self) -> fx.Node:
        source = self.conv.args[0]
        assert isinstance(source, fx.Node)
        return source


@dataclass(eq=False)
class PassMatch(Match):
    """A gate, or a batch norm that follows no convolution.

    Attributes:
        sources: its input; of a batch norm that a concatenation precedes, all that is concatenated.
        gate: what the input is multiplied by.
    """

    sources: list[fx.Node]
    gate: fx.Node | None = None

    @property
    def operation(self) -> Affine | Pointwise:
        # How many channels each source has, a call tells.
        return Affine((0,) * len(self.sources)) if self.norm is not None else Pointwise.IDENTITY

    @property
    def input(self) -> fx.Node:
        return self.sources[0]

    @property
    def more(self) -> list[fx.Node]:
        return [*self.sources[1:], *([] if self.gate is None else [self.gate])]

    @property
    def epilogue(self) -> Epilogue:
        return super().epilogue._replace(gate=self.gate is not None)


@dataclass
class Group:
    """Matches that are computed together: one, or those of a residual block, in the order of the computation.

    Attributes:
        matches: one match, or the convolutions of a block, of which a projection shortcut comes first.
        reads: numbers of the values that each of them reads, as a problem's steps have them.
    """

    matches: list[Match]
    reads: list[tuple[int, ...]]

    @classmethod
    def of(cls, match: Match) -> Group:
        """One match."""
        more = range(MORE, MORE + len(match.more))
        return cls([match], [(X, *more) if match.residual is None else (X, RESIDUAL, *more)])

    @classmethod
    def of_block(cls, main: list[ConvMatch], shortcut: ConvMatch | None) -> Group:
        """A residual block."""
        steps = residual_block([match.layer.conv for match in main], None if shortcut is None else shortcut.layer.conv)
        return cls([*main] if shortcut is None else [shortcut, *main], [step.reads for step in steps])

    @property
    def convolutions(self) -> list[ConvMatch]:
        return [match for match in self.matches if isinstance(match, ConvMatch)]

    @property
    def steps(self) -> tuple[Step, ...]:
        """As a problem has them."""
        return tuple(
            Step(match.operation, match.epilogue, reads) for match, reads in zip(self.matches, self.reads, strict=True)
        )

    @property
    def residual(self) -> fx.Node | None:
        """The second value that it reads."""
        return next((u.residual for u, reads in zip(self.matches, self.reads, strict=True) if RESIDUAL in reads), None)

    @property
    def inputs(self) -> list[fx.Node]:
        """The values that it reads, in the order in which a step has them."""
        return [self.input, *([] if self.residual is None else [self.residual]), *self.matches[0].more]

    @property
    def label(self) -> str:
        """What it computes, for the report, which says whether there is a batch norm."""
        last = self.matches[-1]
        found = label(self.steps)
        return found.replace("_bn", "") if isinstance(last, ConvMatch) and last.norm is None else found

    @property
    def last(self) -> fx.Node:
        return self.matches[-1].last

    @property
    def input(self) -> fx.Node:
        return self.matches[0].input

    @property
    def position(self) -> fx.Node:
        """The node in whose place the op stands: where a residual is read, or where its own work begins."""
        return self.last if len(self.matches) > 1 or self.matches[0].residual is not None else self.matches[0].first
