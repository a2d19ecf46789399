"""Criteria, one per module of the same name, registered by `surgery.criterion`; see `surgery.registry.CRITERIA`."""
