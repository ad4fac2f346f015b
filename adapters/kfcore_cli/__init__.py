"""The ``kfcore`` command."""
