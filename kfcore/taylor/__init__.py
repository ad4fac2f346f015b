"""Derivatives of networks of dense layers, carried forward without autodiff, and what curvature needs of them.

What can be carried is in :mod:`kfcore.taylor.derivatives`, the networks it goes through in :mod:`kfcore.taylor.network` and
:mod:`kfcore.taylor.activations`, the passes in :mod:`kfcore.taylor.propagation`.
"""

from kfcore.taylor.activations import ACTIVATIONS, Activation, relu_power
from kfcore.taylor.derivatives import Derivatives, Each, Hessian, Pointwise, PointwiseDirections, Weighted, laplacian
from kfcore.taylor.jets import Columns, Jet, Trace
from kfcore.taylor.network import Sequential
from kfcore.taylor.propagation import Propagation

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Columns",
    "Derivatives",
    "Each",
    "Hessian",
    "Jet",
    "Pointwise",
    "PointwiseDirections",
    "Propagation",
    "Sequential",
    "Trace",
    "Weighted",
    "laplacian",
    "relu_power",
]
