"""Instructions that order memory or pass time: nothing to do where lanes run in lockstep and memory is seen at once.

Source: PTX ISA, "membar, fence", "nanosleep", "Miscellaneous Instructions".
"""

from __future__ import annotations

from .decode import Action, instruction
from .machine import Machine, Selection
from .parser import Instruction


@instruction("membar", "fence", "nanosleep", "brkpt", "pmevent")
def _ordering(machine: Machine, ins: Instruction) -> Action:
    def run(selection: Selection) -> None:
        """Other blocks' writes are visible already."""

    return run
