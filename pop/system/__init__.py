"""What the operating system offers: files that appear whole, progress bars, free memory. May import pop.errors."""
