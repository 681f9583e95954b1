"""What a step of a learned optimizer costs: measured, simulated and counted, beside AdamW and on many ranks.

Only optimizers run: parameters have the shapes of a model, gradients are random and constant. ``pylo bench`` is this
package's command line.
"""

from pylo_integrations.bench.contenders import BASELINES, DTYPES, Setting, make_contender
from pylo_integrations.bench.measure import in_fresh_process, measure_memory, peak_growth, sample_step_seconds
from pylo_integrations.bench.shapes import SHAPES, ParamShape
from pylo_integrations.bench.steps import format_table, run_bench

__all__ = [
    "BASELINES",
    "DTYPES",
    "SHAPES",
    "ParamShape",
    "Setting",
    "format_table",
    "in_fresh_process",
    "make_contender",
    "measure_memory",
    "peak_growth",
    "run_bench",
    "sample_step_seconds",
]
