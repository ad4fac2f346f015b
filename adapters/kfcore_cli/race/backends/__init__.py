"""Backends: one module each, exposing ``backend``."""
