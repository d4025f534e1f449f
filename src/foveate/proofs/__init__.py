"""Proofs: every system's headline claim as an experiment that runs again with one command.

A proof lies in `proofs/<wing>/<slug>.py` and is a function `prove(context: ProofContext) -> Evidence`; the system's
card names it. `run` finds it by the card, runs it, and adds how long it took and on what machine.
"""

import os
import platform
import time
from dataclasses import replace
from pathlib import Path

from foveate import catalog
from foveate.errors import InputError
from foveate.proofs.evidence import Evidence, ProofContext, Row

__all__ = ["Evidence", "ProofContext", "Row", "environment", "run"]


def run(slug: str, context: ProofContext | None = None) -> Evidence:
    """Run the proof of a system.

    Args:
        slug: the system's name.
        context: where and how long; the quick proof on the CPU when None.

    Returns: what the proof returned, with `seconds`, `mode` and `environment` filled in.
    Raises: UnknownSystemError, NotBuiltError; InputError when the proof returns something else than its evidence.
    """
    card = catalog.card(slug)
    prove = card.proof_function()
    context = ProofContext() if context is None else context
    context.seed_everything()  # again, so that a proof's figures do not depend on the proofs before it
    start = time.perf_counter()
    evidence = prove(context)
    seconds = time.perf_counter() - start
    if not isinstance(evidence, Evidence):
        raise InputError(f"{card.proof} returned {type(evidence).__name__}. A proof returns foveate.proofs.Evidence.")
    if evidence.system != card.slug:
        raise InputError(f"{card.proof} returned the evidence of {evidence.system!r}, expected that of {card.slug!r}.")
    return replace(evidence, seconds=seconds, mode=context.mode, environment=environment(context.device))


def environment(device: str = "cpu") -> dict[str, str | int]:
    """Say on what machine and with what versions figures were measured."""
    import torch

    import foveate

    found: dict[str, str | int] = {
        "CPU": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "foveate": foveate.__version__,
    }
    if torch.device(device).type == "cuda":
        found["GPU"] = torch.cuda.get_device_name(device)
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
