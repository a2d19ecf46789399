"""The recovery study: accuracy after recovery, compared with other tools and with smaller networks."""
