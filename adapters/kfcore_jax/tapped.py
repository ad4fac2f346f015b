"""The program of a function, evaluated with taps at the sites where it uses its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kfcore_jax import program
from kfcore_jax.analysis import analyse
from kfcore_jax.evaluation import evaluate
from kfcore_jax.layout import Layout, layout
from kfcore_jax.program import Path
from kfcore_jax.sites import Geometry, Site

Function = Callable[..., Any]


class Tapped:
    """The program of a function, with taps at its sites."""

    def __init__(self, function: Function, params: Any, args: Any, has_aux: bool) -> None:
        self.params, self.args, self.has_aux = params, args, has_aux
        self.closed, self.shapes = program.trace(function, params, *args)

    def check_scalar(self) -> None:
        """Raise unless the function is a loss."""
        if self.has_aux and not (isinstance(self.shapes, tuple) and len(self.shapes) == 2):
            raise ValueError("`loss_fn` must return (loss, aux) with has_aux=True")
        value: Any = self.shapes[0] if self.has_aux else self.shapes
        if not hasattr(value, "shape") or value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            came = f"an array of shape {value.shape} and dtype {value.dtype}" if hasattr(value, "shape") else type(value).__name__
            hint = "" if self.has_aux else "; for (loss, aux) set has_aux=True"
            raise ValueError(f"`loss_fn` must return a scalar of real floating point, got {came}{hint}")

    def layout(self, how: Mapping[str, Any]) -> Layout:
        """What the program does with its parameters."""
        found = analyse(self.closed.jaxpr, jax.tree.leaves(self.params), len(jax.tree.leaves(self.args)))
        return layout(self.params, found, **how)

    def __call__(self, params: Any, sites: Mapping[Path, Site], taps: Any) -> tuple[Any, Any, Any]:
        """Value, auxiliary output and inputs of the sites."""
        args = [*jax.tree.leaves(params), *jax.tree.leaves(self.args)]
        outs, inputs = evaluate(self.closed.jaxpr, self.closed.consts, args, sites, taps)
        tree = jax.tree.unflatten(jax.tree.structure(self.shapes), outs)
        value, aux = tree if self.has_aux else (tree, None)
        return value, aux, inputs


def sites_of(uses: Mapping[str, tuple[Geometry, ...]]) -> dict[Path, Site]:
    """All sites of some uses."""
    return {site.path: site for of_layer in uses.values() for use in of_layer for site in use.sites}


def zeros(sites: Mapping[Path, Site]) -> dict[Path, jax.Array]:
    """Taps, before anything is added to them."""
    return {path: program.zeros(site.tap, site.dtype, site.varying) for path, site in sites.items()}
