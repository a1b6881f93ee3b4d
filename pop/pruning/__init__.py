"""The method: plans, refit projections, the naive reference and the cost model. May import: pop.models."""
