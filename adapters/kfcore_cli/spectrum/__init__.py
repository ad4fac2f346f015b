"""The ``spectrum`` command: what the curvature in a checkpoint looks like."""
