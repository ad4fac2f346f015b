"""Layer geometry: how inputs, output gradients and weights of each layer kind become matrices.

Conventions of the whole library, written once
----------------------------------------------
* Captured arrays are ``inputs [N, S, in]`` and ``output_grads [N, S, out]``: N examples, S shared positions (tokens, pixels,
  uses of a tied weight; 1 where none). Verbs allow further leading axes that stack layers of equal shape.
  Inputs of a table are ids, integers ``[N, S]``. Inputs of a normalisation are what was normalised, before scale and shift.
  Inputs of a convolution keep their spatial axes, ``[N, *spatial, in]``; its rows are the patches that its S outputs see.
* A ``mask [N, S]`` of booleans, true at the positions that are real, may come with them: all others are as if they had not been there, and
  an example without any is none.
* ``output_grads`` are gradients of the *per-example* loss, not divided by N.
* A weight is a matrix ``[out, in]``; a joint bias is its last column, and the inputs get a last feature that is 1.
  A kernel is ``[out, in x kernel]``, and with groups ``[groups, out / groups, in / groups x kernel]``: groups stack as layers do.
  A table is ``[features, num]``, the matrix of its one-hot rows. Scale and shift are one column ``[2 features, 1]`` whose input is 1.
* A factor that is diagonal (counts of tokens, mean squares) is the vector of its diagonal, see :mod:`kfcore.factors`.
* Kronecker products are row-major: ``F ~= G (x) A``, ``(G (x) A) vec(X) = vec(G X A^T)``.
* Scale: ``A`` is the mean over N and S of ``a a^T``; ``G`` the mean over N of the sum over S of ``g g^T`` (*expand*).
  With *reduce*, inputs (patches) are averaged and output gradients summed over S first.

Weight sharing follows Eschenhagen et al. 2023 (expand and reduce): expand is exact for deep linear networks whose loss keeps the
positions (language models, segmentation), reduce where the network averages positions before the loss (pooling classifiers).
"""

from kfcore.layers.base import Layer, Parameters, Sharing, check_layers
from kfcore.layers.conv import Conv
from kfcore.layers.embedding import Embedding
from kfcore.layers.linear import Bias, Linear
from kfcore.layers.norm import Norm

__all__ = ["Bias", "Conv", "Embedding", "Layer", "Linear", "Norm", "Parameters", "Sharing", "check_layers"]
