"""Refit projections, virtual gates and importance scores. May import everything but pop.cli."""
