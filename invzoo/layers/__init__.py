"""The layers, one folder for each family, and what they are made of.

What several families share:

- `elementwise`: functions of each value; `elementwise_map`: maps of each value by parameters, own or conditioned
- `maps`: the maps, and how those without a formula are inverted
- `conditioned`: layers with a conditioner
- `_checks`: errors of one form
"""

from einops import rearrange
from torch import empty, nn

__all__ = ()  # each layer is in its family

# einops notes a backend for each class of tensor when it first sees one, which torch.export calls a side effect.
for _tensor in (empty(0, device="meta"), nn.Parameter(empty(0, device="meta"))):
    rearrange(_tensor, "a -> a")
