"""Image and geometry metrics."""
