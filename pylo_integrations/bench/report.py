"""What was found: printed as it comes and, for those who want it, with where and how in a file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import pylo_integrations


class Report:
    """What was found, printed as it comes, and where and how, for those who want it in a file.

    Args:
        method: What the numbers mean, by name.
        device: Where they come from.
    """

    def __init__(self, method: Mapping[str, str], device: str = "cpu") -> None:
        self._content: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(["pylo", *sys.argv[1:]]),
            "machine": describe_machine(device),
            "method": dict(method),
            "load_average": {"before": _load_average()},
        }
        self.results: list[Mapping[str, Any]] = []

    def add(self, records: Sequence[Mapping[str, Any]], table: str) -> None:
        """Keep JSON-serialisable records, and print them as a table."""
        self.results += records
        print(table, end="\n\n", flush=True)

    def write(self, path: Path | None) -> None:
        """Write all records to ``path``, if there is one."""
        self._content["load_average"]["after"] = _load_average()
        if path:
            path.write_text(json.dumps({**self._content, "results": self.results}, indent=2) + "\n")
            print(f"written to {path}")


def _load_average() -> list[float] | None:
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def describe_machine(device: str) -> dict[str, Any]:
    """Hardware and versions, as far as they can be told."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = models[0] if models else processor
    machine: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": processor,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pylo_integrations": pylo_integrations.__version__,
    }
    if device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine
