"""What can be wrong with logs and pictures."""


class PlotError(ValueError):
    """There is nothing to draw, or nothing to draw it with."""
