"""What a pruned prefill loses and what it gains, against other methods: `python -m tools.evaluate`."""
