"""From files to models: configs, weights, the registry of names, and downloads.

They may import pop.models, pop.system and pop.errors, and never the engine.
"""
