"""What a run writes for people to read: a CSV file, and TensorBoard's if it is installed."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pylo_integrations.files import write_whole


class RunLog:
    """Rows of numbers, one for some iterations; those after ``iteration`` are dropped from what is there.

    Args:
        path: The CSV file; TensorBoard's folder is beside it.
        columns: Of the file, ``step`` among them.
        iteration: Of the checkpoint that the run goes on from.
        begun: Whether it goes on from one; else nothing is kept.
    """

    def __init__(self, path: Path, columns: Sequence[str], iteration: int, begun: bool) -> None:
        self._path, self._columns = path, list(columns)
        rows = list[dict[str, str]]()
        if path.exists() and begun:
            with path.open(newline="", encoding="utf-8") as file:
                read = list(csv.DictReader(file))
            # A kill may have cut the last row short.
            whole = [row for row in read if None not in row.values() and row["step"].isdigit()]
            rows = [row for row in whole if int(row["step"]) <= iteration]

        def write(temporary: Path) -> None:
            with temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self._columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)

        write_whole(path, write)
        self._tensorboard: Any = None
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            return
        self._tensorboard = SummaryWriter(str(path.parent / "tensorboard"), purge_step=iteration + 1)

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row."""
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)
        if self._tensorboard is not None:
            for name, value in row.items():
                if name != "step":
                    self._tensorboard.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Flush what TensorBoard's writer holds back."""
        if self._tensorboard is not None:
            self._tensorboard.close()
