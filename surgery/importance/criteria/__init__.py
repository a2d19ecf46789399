"""Criteria, registered by `surgery.criterion`; see `surgery.registry.CRITERIA`."""
