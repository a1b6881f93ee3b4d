"""Swaps. Each replaces parts of a finished module, or an attention function. May import: pop.engine and below."""
