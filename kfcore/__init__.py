"""Curvature for every array framework: KFAC and its relatives, once, over the Python array API.

Grouped by purpose; see the documentation for the guide to each.
"""

# methods
# arrays: hooks by which a library does better than the portable reference
from kfcore._array import primitives, register_cond, register_kernel, to_numpy
from kfcore._version import __version__

# saving
from kfcore.checkpoint import CheckpointError, load, save
from kfcore.curvature import KFAC, Cost, Diagonal, Method, Needs
from kfcore.damping import Damping

# models
from kfcore.layers import Bias, Linear

# losses: labels drawn from the model, square roots of output Hessians
from kfcore.losses import MSE, BCEWithLogits, CrossEntropy, CustomLoss, Loss, fisher_vectors
from kfcore.model import Model

# optimizers
from kfcore.optimizer import ModelOptimizer, Optimizer, OptimizerState, Recorder
from kfcore.preconditioner import Block, Preconditioner, PreconditionerState, blocks_of
from kfcore.report import Report
from kfcore.stepsize import StepSize, StepState

__all__ = [
    "KFAC",
    "MSE",
    "BCEWithLogits",
    "Bias",
    "Block",
    "CheckpointError",
    "Cost",
    "CrossEntropy",
    "CustomLoss",
    "Damping",
    "Diagonal",
    "Linear",
    "Loss",
    "Method",
    "Model",
    "ModelOptimizer",
    "Needs",
    "Optimizer",
    "OptimizerState",
    "Preconditioner",
    "PreconditionerState",
    "Recorder",
    "Report",
    "StepSize",
    "StepState",
    "__version__",
    "blocks_of",
    "fisher_vectors",
    "load",
    "primitives",
    "register_cond",
    "register_kernel",
    "save",
    "to_numpy",
]
