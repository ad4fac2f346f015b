"""Curvature approximations, one a file, all with the verbs of :class:`kfcore.curvature.base.Method` in the same order."""

from kfcore.curvature.base import Cost, Method, Needs
from kfcore.curvature.diagonal import Diagonal, DiagonalState
from kfcore.curvature.ekfac import EKFAC, EKFACState
from kfcore.curvature.kfac import KFAC, KFACState

__all__ = ["EKFAC", "KFAC", "Cost", "Diagonal", "DiagonalState", "EKFACState", "KFACState", "Method", "Needs"]
