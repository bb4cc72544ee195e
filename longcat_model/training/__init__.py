"""Training: stages as data, one loop, exact resume."""
