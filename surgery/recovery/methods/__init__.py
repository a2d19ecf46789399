"""Recovery methods, one per module of the same name."""
