"""Learned optimizers in the Hugging Face ``Trainer``.

Three ways to choose one by its catalogue name:

* :class:`Trainer` accepts ``optimizers="name"``; so does any other trainer class after :func:`with_learned_optimizer`.
  Nothing is patched.
* After :func:`install`, the stock ``transformers.Trainer`` and its subclasses accept
  ``TrainingArguments(optim="name")``, from Python, YAML, JSON or the command line.

All of them read ``TrainingArguments.optim_args`` (:func:`parse_optim_args`), keep the Trainer's choice of what decays,
and tell the optimizer what the Trainer's bare ``optimizer.step()`` does not: the loss and the length of the run.

Written against transformers 5.24 and accelerate 1.15. The trainer classes use documented methods only; what
:func:`install` needs beyond them, it checks.
"""

from pylo_integrations.hf.optimizer import Schedule
from pylo_integrations.hf.options import parse_optim_args
from pylo_integrations.hf.stock import install, uninstall
from pylo_integrations.hf.trainer import LearnedOptimizerMixin, Trainer, with_learned_optimizer

__all__ = [
    "LearnedOptimizerMixin",
    "Schedule",
    "Trainer",
    "install",
    "parse_optim_args",
    "uninstall",
    "with_learned_optimizer",
]
