"""Methods: one module each, exposing ``method``."""
