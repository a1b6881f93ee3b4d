"""From files to models: configs, weights, GGUF files, the registry of names, and downloads.

These modules may import pop.models, pop.files, pop.progress and pop.errors, and never the engine.
"""
