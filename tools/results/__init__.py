"""Results of tools.evaluate and tools.bench in one place, and how to add others."""
