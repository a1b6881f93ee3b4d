"""Files to models: configs, weights, downloads. May import: pop.models."""
