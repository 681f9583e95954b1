"""Pictures of what runs logged: ``pylo plot``.

Reads ``metrics.csv`` of Lightning's ``CSVLogger`` and ``trainer_state.json`` of the Hugging Face Trainer; draws the
losses of all runs in a folder and, where a run logged telemetry, the optimizer's update ratio and what it decided.
"""

from pylo_integrations.plot.curves import Band, plot_bands, plot_curves
from pylo_integrations.plot.errors import PlotError
from pylo_integrations.plot.logs import RunLog, Series, read_runs
from pylo_integrations.plot.runs import draw, plot

__all__ = ["Band", "PlotError", "RunLog", "Series", "draw", "plot", "plot_bands", "plot_curves", "read_runs"]
