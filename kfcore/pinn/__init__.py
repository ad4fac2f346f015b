"""Curvature for physics-informed networks: losses of residuals that contain derivatives of a network, without autodiff.

What a loss is made of is in :mod:`kfcore.pinn.terms`, its Jacobian in :mod:`kfcore.pinn.linearised`, directions in
:mod:`kfcore.pinn.kronecker` (Kronecker factors) and :mod:`kfcore.pinn.samples` (exact), step lengths in :mod:`kfcore.pinn.rules`, and all
of it together in :mod:`kfcore.pinn.optimizer`.
"""

from kfcore.pinn.choice import METHODS, Choice, choose
from kfcore.pinn.kronecker import Kronecker
from kfcore.pinn.linearised import Linearised, Loss
from kfcore.pinn.optimizer import Info, Optimizer, State
from kfcore.pinn.rules import Fixed, LineSearch, Quadratic
from kfcore.pinn.samples import ConjugateGradients, SampleSpace
from kfcore.pinn.terms import LinearOperator, Nonlinear, Points, Pulled, Residual, Term

__all__ = [
    "METHODS",
    "Choice",
    "ConjugateGradients",
    "Fixed",
    "Info",
    "Kronecker",
    "LineSearch",
    "LinearOperator",
    "Linearised",
    "Loss",
    "Nonlinear",
    "Optimizer",
    "Points",
    "Pulled",
    "Quadratic",
    "Residual",
    "SampleSpace",
    "State",
    "Term",
    "choose",
]
