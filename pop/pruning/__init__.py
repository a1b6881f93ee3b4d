"""The method: plans, corrections, the naive reference, the cost model.

May import pop.models, pop.errors and pop.system.
"""
