"""How fast `pop` is, against the limit of its shapes, the machine, and other libraries: `python -m tools.bench`."""
