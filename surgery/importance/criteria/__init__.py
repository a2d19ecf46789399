"""Criteria, one a module of the same name, each registered by `surgery.criterion`; see `surgery.registry.CRITERIA`."""
