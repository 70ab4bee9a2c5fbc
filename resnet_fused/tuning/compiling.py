"""Compiles candidates before they are measured, in processes of their own: one of Triton's compiles for a second or two.

A process leaves what it compiled in Triton's cache on disk, where this one finds it. What a process failed to compile is
compiled, and its error told, where it is measured.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

import torch

from resnet_fused import config
from resnet_fused.backends import ConvParameters, Problem
from resnet_fused.tuning.candidates import prepare

Candidate = tuple[Problem, str]
# By -c and standard input: multiprocessing would run a user's script again where it has no `if __name__ == "__main__"`.
PROGRAM = "from resnet_fused.tuning import compiling; compiling.work()"
# A process takes some seconds to start, and memory on the GPU: fewer candidates aren't worth it, and more of them not either.
_FEWEST, _MOST_PROCESSES = 8, 12


def compile_ahead(candidates: Sequence[Candidate], show: Callable[[str], object]) -> None:
    """Compiles candidates (problems with their names) in as many processes as there are pairs of cores.

    Args:
        show: is told how far it is, and how long the rest takes about.
    """
    count = min((os.cpu_count() or 1) // 2, _MOST_PROCESSES, len(candidates) // (_FEWEST // 2))
    if count < 2 or len(candidates) < _FEWEST:
        return
    start = time.monotonic()
    done, lock = 0, threading.Lock()

    def follow(process: subprocess.Popen[bytes], own: Sequence[Candidate]) -> None:
        nonlocal done
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(pickle.dumps(own))
            process.stdin.close()
        except BrokenPipeError:  # it ended before it began
            return
        for _ in process.stdout:
            with lock:
                done += 1
                rest = (time.monotonic() - start) / done * (len(candidates) - done)
                show(f"compiling {done} of {len(candidates)} candidates, about {rest:.0f} s left")

    show(f"compiling {len(candidates)} candidates in {count} processes")
    command, environment = [sys.executable, "-c", PROGRAM], config.environment_of_child()
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment) for _ in range(count)
    ]
    try:
        # In turns, since the candidates of a problem take about the same time.
        threads = [threading.Thread(target=follow, args=(process, candidates[i::count])) for i, process in enumerate(processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for process in processes:
            process.kill()
            process.wait()


def work() -> None:
    """What a process does: compiles the candidates that come by standard input, and prints a line after each."""
    torch.set_num_threads(1)
    out = sys.stdout
    sys.stdout = sys.stderr  # a compiler's own words are no progress
    for problem, name in pickle.load(sys.stdin.buffer):
        try:
            prepare(problem, _zeros(problem), name)
        except Exception as error:  # it is tried again, and its error told, where it is measured
            print(f"{name} of {problem}: {error}")
        out.write("done\n")
        out.flush()


def _zeros(problem: Problem) -> ConvParameters:
    weights = [
        torch.zeros(
            (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel),
            dtype=problem.types.weight,
            device=problem.device,
        )
        for conv in problem.convs
    ]
    return ConvParameters(weights, [weight.new_zeros(weight.shape[0]) for weight in weights])
