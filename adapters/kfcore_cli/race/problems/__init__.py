"""Problems: one module each, exposing ``problem``."""
