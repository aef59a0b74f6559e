"""Pruning: find units that are dead, and cut them out of a model and its optimizer; DemP does so while it trains."""

from torsion.prune._cut import compact
from torsion.prune._schedule import schedule
from torsion.prune._window import live_units
from torsion.prune.demp import DemP

__all__ = ["DemP", "compact", "live_units", "schedule"]
