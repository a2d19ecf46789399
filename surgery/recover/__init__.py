"""Recovery: what brings a compact model's outputs back to the dense model's."""
