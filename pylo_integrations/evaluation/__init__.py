"""Evaluation: learned optimizers, as they come, against tuned ones on tasks that no theta of ours was trained on."""

from pylo_integrations.evaluation.baselines import BASELINES, USUAL, available_baselines, is_available
from pylo_integrations.evaluation.contenders import SCHEDULES, Setting, parse_contenders
from pylo_integrations.evaluation.plan import RUNS, evaluate
from pylo_integrations.evaluation.report import write_report
from pylo_integrations.evaluation.results import Results
from pylo_integrations.evaluation.runs import Record, Run, RunsError, RunsFile, train
from pylo_integrations.evaluation.tasks import SUITES, TASKS, HeldOutTask, find_task
from pylo_integrations.metatrain import DataError

__all__ = [
    "BASELINES",
    "RUNS",
    "SCHEDULES",
    "SUITES",
    "TASKS",
    "USUAL",
    "DataError",
    "HeldOutTask",
    "Record",
    "Results",
    "Run",
    "RunsError",
    "RunsFile",
    "Setting",
    "available_baselines",
    "evaluate",
    "find_task",
    "is_available",
    "parse_contenders",
    "train",
    "write_report",
]
