"""Curvature for every array framework: KFAC and its relatives, once, over the Python array API."""

from kfcore._version import __version__

# methods
from kfcore.curvature import EKFAC, FOOF, KFAC, MAC, SMAC, Cost, Diagonal, Eva, Gradient, Method, Needs
from kfcore.damping import Damping, LevenbergMarquardt
from kfcore.eigenbasis import Eigh, Tracked

# models: layers, and the losses as the Fisher matrix sees them
from kfcore.layers import Bias, Conv, Embedding, Linear, Norm
from kfcore.losses import MSE, BCEWithLogits, CrossEntropy, CustomLoss, Loss, fisher_vectors
from kfcore.model import Model

# optimizers: on plain arrays, and what adapters drive
from kfcore.arrays import Optimizer, Recorder
from kfcore.operators import BlockOperator
from kfcore.optimizer import ModelOptimizer, OptimizerState
from kfcore.diagnostics import measures
from kfcore.preconditioner import Block, Preconditioner, PreconditionerState, blocks_of
from kfcore.report import Report
from kfcore.quadratic import Control, Objective, QuadraticModel
from kfcore.stepsize import StepSize, StepState

# derivatives of networks, and losses made of them, by modules of their own
from kfcore import taylor as taylor
from kfcore import pinn as pinn

# saving
from kfcore.checkpoint import CheckpointError, load, load_state, save, save_state

# array libraries: hooks by which one does better than the portable reference
from kfcore._array import primitives, register_cond, register_kernel, to_numpy

__all__ = [
    "EKFAC",
    "FOOF",
    "KFAC",
    "MAC",
    "MSE",
    "SMAC",
    "BCEWithLogits",
    "Bias",
    "Block",
    "BlockOperator",
    "CheckpointError",
    "Control",
    "Conv",
    "Cost",
    "CrossEntropy",
    "CustomLoss",
    "Damping",
    "Diagonal",
    "Eigh",
    "Embedding",
    "Eva",
    "Gradient",
    "LevenbergMarquardt",
    "Linear",
    "Loss",
    "Method",
    "Model",
    "ModelOptimizer",
    "Needs",
    "Norm",
    "Objective",
    "Optimizer",
    "OptimizerState",
    "Preconditioner",
    "PreconditionerState",
    "QuadraticModel",
    "Recorder",
    "Report",
    "StepSize",
    "StepState",
    "Tracked",
    "__version__",
    "blocks_of",
    "fisher_vectors",
    "load",
    "load_state",
    "measures",
    "primitives",
    "register_cond",
    "register_kernel",
    "save",
    "save_state",
    "to_numpy",
]
