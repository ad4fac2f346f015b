"""kfcore for PyTorch: capture by hooks, and a real ``torch.optim.Optimizer``."""

from kfcore.checking import SelfCheck
from kfcore_torch import kernels as _kernels
from kfcore_torch.checking import self_check
from kfcore_torch.optimizer import Optimizer
from kfcore_torch.preconditioner import Preconditioner

_kernels.register()

__all__ = ["Optimizer", "Preconditioner", "SelfCheck", "self_check"]
