"""Recovery methods."""
