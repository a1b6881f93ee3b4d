"""The method: plans, corrections, the naive reference, the cost model. May import pop.models and pop.system."""
