"""What was estimated for a GPU without one, beside what one measures."""
