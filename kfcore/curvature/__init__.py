"""Curvature approximations, one a file, all with the verbs of :class:`kfcore.curvature.base.Method` in the same order."""

from kfcore.curvature.base import Cost, Method, Needs
from kfcore.curvature.diagonal import Diagonal, DiagonalState
from kfcore.curvature.kfac import KFAC, KFACState

__all__ = ["KFAC", "Cost", "Diagonal", "DiagonalState", "KFACState", "Method", "Needs"]
