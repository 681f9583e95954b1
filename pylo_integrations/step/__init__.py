"""The parts of a step: its plan, its stages, what ranks agree on, and how parameters are written."""
