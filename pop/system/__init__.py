"""What the operating system offers. Imported by everything, and imports pop.errors only."""
