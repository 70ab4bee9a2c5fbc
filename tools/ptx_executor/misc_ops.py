"""Instructions that order memory or pass time; memory is seen at once here, so a fence only matters to the checks.

Source: PTX ISA, "membar, fence", "nanosleep", "Miscellaneous Instructions".
"""

from __future__ import annotations

from .decode import Action, instruction
from .machine import Machine, Selection
from .syntax import Instruction


@instruction("membar", "fence")
def _fence(machine: Machine, ins: Instruction) -> Action:
    return machine.spaces["global"].order


@instruction("nanosleep", "brkpt", "pmevent")
def _pause(machine: Machine, ins: Instruction) -> Action:
    def run(selection: Selection) -> None:
        """Time passes."""

    return run
