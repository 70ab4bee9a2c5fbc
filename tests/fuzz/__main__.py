"""Runs many trials over several processes: `python tests/fuzz --trials 2000 --seed 1 --jobs 2`."""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))  # for `fuzz`, when this folder is run as a script
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != FOLDER]

os.environ.setdefault("RESNET_FUSED_LOG", "ERROR")  # rf.fuse warns of batch norms in training mode, of which there are many
PROGRESS_SECONDS = 5.0
# What is summed over trials, and what it is called.
NAMES = {
    "convs": "convolutions",
    "fused": "convolutions fused",
    "calls": "calls",
    "rounded": "calls with other rounding than stock's",
    "failed_calls": "calls that raise in stock",
    "coincidence": "differences of numbers that other inputs don't show, or that stock has from itself",
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__)
    p.add_argument("--trials", type=int, default=300)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--start", type=int, default=0, help="number of the first trial")
    p.add_argument("--jobs", type=int, default=2)
    p.add_argument("--only", type=int, help="run this one trial, in this process, and print it whatever comes of it")
    p.set_defaults(against="fused")
    p.add_argument(
        "--self", action="store_const", const="stock", dest="against", help="stock against itself: tests the harness"
    )
    p.add_argument(
        "--noisy", action="store_const", const="noisy", dest="against", help="stock with rounding errors: tests the tolerance"
    )
    p.add_argument("--ignore", default="", help="kinds of differences to leave out, such as stride,alias")
    p.add_argument("--show", type=int, default=20, help="print this many failing trials in full")
    p.add_argument("--shrink", action="store_true", help="with --only: make the failing trial smaller before it is printed")
    p.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return p


def worker(options: argparse.Namespace) -> None:
    """Runs every jobs-th trial and prints a line of JSON before and after each."""
    from fuzz.trial import run_trial, single_thread

    faulthandler.enable()
    single_thread()
    ignored = frozenset(filter(None, options.ignore.split(",")))
    for number in range(options.start + options.worker, options.start + options.trials, options.jobs):
        print(json.dumps({"begin": number}), flush=True)
        try:
            trial = run_trial(options.seed, number, options.against, ignored)
        except Exception:
            import traceback

            result = {"kinds": ["harness"], "text": f"trial {number}\n{traceback.format_exc()}"}
        else:
            result = {
                "kinds": sorted({d.kind for d in trial.differences}),
                "text": str(trial) if trial.differences else "",
                "convs": trial.convs,
                "fused": trial.fused,
                "calls": trial.calls,
                "failed_calls": trial.failed_calls,
                "rounded": trial.rounded,
                "coincidence": trial.coincidence,
            }
        print(json.dumps({"end": number, **result}), flush=True)


def follow(options: argparse.Namespace, index: int, results: queue.Queue[dict]) -> None:
    """Keeps one worker going; one that dies is a failure of the trial it was at, and the next goes on after it."""
    start, last = options.start, options.start + options.trials
    while start + index < last:
        command = [sys.executable, str(FOLDER), "--worker", str(index), "--jobs", str(options.jobs), "--start", str(start)]
        command += ["--trials", str(last - start), "--seed", str(options.seed), "--ignore", options.ignore]
        command += {"stock": ["--self"], "noisy": ["--noisy"]}.get(options.against, [])
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stderr is not None
        errors: list[str] = []
        reader = threading.Thread(target=lambda p=process, e=errors: e.extend(p.stderr), daemon=True)
        reader.start()
        current = None
        for line in process.stdout:
            if not line.startswith("{"):
                continue
            message = json.loads(line)
            if "begin" in message:
                current = message["begin"]
            else:
                current = None
                results.put(message)
        process.wait()
        reader.join()
        if process.returncode == 0:
            break
        if current is None:
            results.put({"end": -1, "kinds": ["harness"], "text": "".join(errors[-30:])})
            break
        text = f"trial {current}: the process ended with {process.returncode}\n{''.join(errors[-40:])}"
        results.put({"end": current, "kinds": ["crash"], "text": text})
        start = current - index + options.jobs
    results.put({"finished": index})


def main() -> int:
    options = parser().parse_args()
    if options.worker is not None:
        worker(options)
        return 0
    if options.only is not None:
        from fuzz.trial import run_trial, single_thread

        single_thread()
        trial = run_trial(options.seed, options.only, options.against, frozenset(filter(None, options.ignore.split(","))))
        if options.shrink and trial.differences:
            from fuzz.shrink import shrink

            trial = shrink(trial, options.against, frozenset(filter(None, options.ignore.split(","))))
        print(trial)
        print(f"{trial.fused} of {trial.convs} convolutions fused; {len(trial.differences)} differences")
        return int(bool(trial.differences))
    results: queue.Queue[dict] = queue.Queue()
    for index in range(options.jobs):
        threading.Thread(target=follow, args=(options, index, results), daemon=True).start()
    began = shown = time.monotonic()
    failed: list[int] = []
    kinds: collections.Counter[str] = collections.Counter()
    sums: collections.Counter[str] = collections.Counter()
    running = options.jobs
    while running:
        try:
            message = results.get(timeout=1.0)
        except queue.Empty:
            message = None
        if message is not None and "finished" in message:
            running -= 1
        elif message is not None:
            sums["trials"] += 1
            sums["trials with a fused convolution"] += message.get("fused", 0) > 0
            for name in NAMES:
                sums[NAMES[name]] += message.get(name, 0)
            if message["kinds"]:
                failed.append(message["end"])
                kinds.update(message["kinds"])
                if len(failed) <= options.show:
                    print(message["text"], flush=True)
        if time.monotonic() - shown > PROGRESS_SECONDS:
            shown = time.monotonic()
            rate = sums["trials"] / (shown - began)
            print(
                f"[{shown - began:.0f} s] {sums['trials']} of {options.trials} trials, {rate:.1f} a second, "
                f"{len(failed)} failed, "
                f"{sums['convolutions fused']} of {sums['convolutions']} convolutions fused",
                flush=True,
            )
    print(f"seed {options.seed}: " + ", ".join(f"{count} {name}" for name, count in sums.items()))
    if failed:
        print(f"failed: {sorted(failed)}\nkinds: {dict(kinds.most_common())}")
    nothing = options.against == "fused" and not sums["convolutions fused"]
    if nothing:
        print("No convolution was fused in any trial.")
    return int(bool(failed) or nothing)


if __name__ == "__main__":
    sys.exit(main())
