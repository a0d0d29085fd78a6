"""The layers, one file for each family, and what they are made of.

Foundations that several families share:

- `elementwise`: functions of each value; `elementwise_map`: maps of each value by parameters, own or conditioned
- `maps`, `curves`, `integrals`, `spline`, `mixture`: the maps; `roots`: how those without a formula are inverted
- `conditioned`: layers with a conditioner; `branch`: with a residual branch; `fixed_point`: how those are inverted
- `matrix_layer`: layers that multiply by a matrix; `matrix`, `orthogonal`: the matrices; `kernel_conv`: bounded kernels
- `norm`: normalisation of each sample
- `_checks`: errors of one form
"""

from einops import rearrange
from torch import empty, nn

__all__ = ()  # each layer is in its own file

# einops notes a backend for each class of tensor when it first sees one, which torch.export calls a side effect.
for _tensor in (empty(0, device="meta"), nn.Parameter(empty(0, device="meta"))):
    rearrange(_tensor, "a -> a")
