"""kfcore for JAX: automatic capture from the program of a loss, and optax transformations."""

from kfcore.checking import SelfCheck
from kfcore_jax import kernels as _kernels
from kfcore_jax.checking import self_check
from kfcore_jax.model import Model, trace, value_grad_and_records
from kfcore_jax.records import Records, accumulate
from kfcore_jax.tap import tap
from kfcore_jax.transform import Transformation, optimizer, scale_by_curvature

_kernels.register()

__all__ = [
    "Model",
    "Records",
    "SelfCheck",
    "Transformation",
    "accumulate",
    "optimizer",
    "scale_by_curvature",
    "self_check",
    "tap",
    "trace",
    "value_grad_and_records",
]
