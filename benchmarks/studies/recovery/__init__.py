"""How much accuracy recovery brings back, against other tools and smaller networks, on real checkpoints and images."""
