"""A race of optimizers and array libraries on real data.

A problem, a method or a backend is one file in the package of that name; :mod:`kfcore_cli.race.interfaces` says what it must hold.
"""
