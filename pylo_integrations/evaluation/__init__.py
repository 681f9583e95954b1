"""Evaluation: learned optimizers, as they come, against tuned ones on tasks that no theta of ours was trained on."""

from pylo_integrations.evaluation.contenders import BASELINES, SCHEDULES, Setting, parse_contenders
from pylo_integrations.evaluation.plan import RUNS, evaluate
from pylo_integrations.evaluation.report import write_report
from pylo_integrations.evaluation.results import Results
from pylo_integrations.evaluation.runs import Record, Run, RunsError, RunsFile, train
from pylo_integrations.evaluation.tasks import TASKS, HeldOutTask, find_task
from pylo_integrations.metatrain import DataError

__all__ = [
    "BASELINES",
    "RUNS",
    "SCHEDULES",
    "TASKS",
    "DataError",
    "HeldOutTask",
    "Record",
    "Results",
    "Run",
    "RunsError",
    "RunsFile",
    "Setting",
    "evaluate",
    "find_task",
    "parse_contenders",
    "train",
    "write_report",
]
