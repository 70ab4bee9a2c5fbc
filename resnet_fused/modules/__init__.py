"""Drop-in blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resnet_fused.modules.drop_ins import BasicBlock, Bottleneck

__all__ = ["BasicBlock", "Bottleneck"]


if not TYPE_CHECKING:  # so that type checkers know which names there are

    def __getattr__(name: str) -> Any:
        if name in ("BasicBlock", "Bottleneck"):
            from resnet_fused.modules import drop_ins

            return getattr(drop_ins, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
