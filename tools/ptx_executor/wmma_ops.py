"""wmma: matrix instructions whose fragments have no documented layout.

Ours: lane l holds, of the matrix in the order in which memory has it, the l-th of 32 equal runs. Elements sit one to a register for
accumulators, packed for operands; registers beyond those needed repeat the first ones.

Source: PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions": wmma.load, wmma.store, wmma.mma.
"""

from __future__ import annotations
