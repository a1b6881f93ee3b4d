"""The method: plans, refit projections, the naive reference, the cost model. May import pop.models and pop.system."""
