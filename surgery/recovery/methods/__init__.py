"""Recovery methods, one a module of the same name."""
