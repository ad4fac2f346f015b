"""Curvature approximations, one a file, all with the verbs of :class:`kfcore.curvature.base.Method` in the same order."""

from kfcore.curvature.base import Cost, Method, Needs
from kfcore.curvature.diagonal import Diagonal, DiagonalState
from kfcore.curvature.ekfac import EKFAC, EKFACState
from kfcore.curvature.eva import Eva
from kfcore.curvature.foof import FOOF
from kfcore.curvature.gradient import Gradient, GradientState
from kfcore.curvature.kfac import KFAC, KFACState
from kfcore.curvature.mac import MAC
from kfcore.curvature.rank_one import RankOneState
from kfcore.curvature.smac import SMAC

__all__ = [
    "EKFAC",
    "FOOF",
    "KFAC",
    "MAC",
    "SMAC",
    "Cost",
    "Diagonal",
    "DiagonalState",
    "EKFACState",
    "Eva",
    "Gradient",
    "GradientState",
    "KFACState",
    "Method",
    "Needs",
    "RankOneState",
]
