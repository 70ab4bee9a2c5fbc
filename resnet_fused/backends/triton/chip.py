"""What the choice among tiles needs to know of a GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Chip:
    """What the choice depends on.

    Attributes:
        vendor: "cuda" or "hip".
        capability: compute capability as major · 10 + minor (CUDA); the gfx number (HIP).
        multiprocessors: number of SMs or compute units.
        shared_limit: shared memory that one program may use, in bytes.
    """

    vendor: str
    capability: int
    multiprocessors: int
    shared_limit: int

    @property
    def unit(self) -> str:
        """What Triton multiplies matrices with on this chip: "wgmma", "tcgen05", "mma.sync", "mfma"; "fma" on 7.5."""
        if self.vendor == "hip":
            return "mfma"
        if self.capability < 80:
            return "fma"
        return {9: "wgmma", 10: "tcgen05"}.get(self.capability // 10, "mma.sync")

    def precision(self, tf32: bool) -> str:
        """What tl.dot is to multiply float32 in, "ieee" or, if `tf32` allows it and there are such units, "tf32"."""
        return "tf32" if tf32 and self.unit not in ("fma", "mfma") else "ieee"

    @classmethod
    @functools.cache
    def of(cls, device: torch.device) -> Chip:
        """The chip of a device; for the interpreter, which runs one program at a time, an A100 of one SM."""
        if device.type == "cpu":
            return cls("cuda", 80, 1, 163 << 10)
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip is not None:
            number = int(properties.gcnArchName.split(":")[0].removeprefix("gfx"), 16)
            return cls("hip", number, properties.multi_processor_count, properties.shared_memory_per_block)
        capability = properties.major * 10 + properties.minor
        shared_limit = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        return cls("cuda", capability, properties.multi_processor_count, shared_limit)
