"""Sites: the places where a program uses a parameter as the weight of a layer, one kind of use a file.

Each kind has a geometry with the same attributes: its :class:`Site` (and all ``sites``, where it is made of several), ``stack``, ``outs``
(features of the output), ``weight`` (the view from the parameter to the matrix or kernel of a layer), ``captured`` (what was seen, in the
axes of the core), and ``gradients`` (of the parameters, rebuilt from that).
"""

from __future__ import annotations

from typing import TypeAlias

from kfcore_jax.sites.affine import Affine, affine, with_examples
from kfcore_jax.sites.convolution import Convolution, convolution
from kfcore_jax.sites.dense import Dense, dense
from kfcore_jax.sites.gather import Gather, gather
from kfcore_jax.sites.site import Site

Geometry: TypeAlias = Dense | Convolution | Gather | Affine

__all__ = ["Affine", "Convolution", "Dense", "Gather", "Geometry", "Site", "affine", "convolution", "dense", "gather", "with_examples"]
