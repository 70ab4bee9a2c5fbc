"""The errors of the executor: each names the kernel, the PTX line, the instruction and, where there is one, the
thread."""

from __future__ import annotations


class PtxError(Exception):
    """Base class of every error the executor raises."""


class PtxSyntaxError(PtxError):
    """PTX text that cannot be parsed."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(f"PTX line {line}: {message}")
        self.line = line


class UnsupportedInstruction(PtxError):
    """An instruction, or a form of one, that the executor does not know."""

    def __init__(self, kernel: str, line: int, instruction: str, reason: str = "unknown instruction") -> None:
        super().__init__(f"{reason}: kernel {kernel}, PTX line {line}: {instruction}")
        self.kernel, self.line, self.instruction = kernel, line, instruction


class KernelFault(PtxError):
    """A kernel did what it must not do.

    Attributes: ``kind`` (one of ``KINDS``), ``kernel``, ``line`` (of the PTX text), ``source`` ("file:line" where the
    PTX carries .loc, else ""), ``instruction``, ``block`` and ``thread`` (x, y, z, or None where no single thread is
    at fault).
    """

    KINDS = (
        "out-of-bounds", "misaligned", "uninitialised-shared", "uninitialised-global", "uninitialised-local",
        "shared-race", "global-race", "async-not-waited", "divergent-barrier", "deadlock", "member-mask",
        "write-to-constant", "trap", "endless-loop",
    )  # fmt: skip

    def __init__(
        self,
        kind: str,
        kernel: str,
        line: int,
        instruction: str,
        message: str,
        *,
        source: str = "",
        block: tuple[int, int, int] | None = None,
        thread: tuple[int, int, int] | None = None,
    ) -> None:
        where = f"block {block}, thread {thread}: " if block is not None else ""
        at = f" ({source})" if source else ""
        super().__init__(f"[{kind}] kernel {kernel}, PTX line {line}{at}: {instruction}\n    {where}{message}")
        self.kind, self.kernel, self.line, self.source, self.instruction = kind, kernel, line, source, instruction
        self.block, self.thread, self.message = block, thread, message
