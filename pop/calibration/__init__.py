"""Calibration and importance: what improves or chooses a plan for a loaded model.

May import everything but pop.cli. Only pop.cli and pop/__init__.py import it.
"""
