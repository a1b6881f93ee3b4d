"""What the operating system offers: files that appear whole, progress bars, free memory. May import pop.errors."""

__version__ = "0.1.0"  # of pop
