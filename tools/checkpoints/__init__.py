"""Checkpoints of full size without the real weights, what they measure, and GGUF files for comparisons."""
