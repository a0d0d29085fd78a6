"""Shapes of a layer's outputs, found without computing them."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor
from torch.func import functional_call

from .engine import map_tensors, tuple_of
from .module import InvertibleModule

__all__ = ["output_shapes"]


@torch.no_grad()
def output_shapes(layer: InvertibleModule, shape: Sequence[int], side: dict[str, Any]) -> list[Size]:
    """Return the shapes that the outputs have for an input of ``shape``, by a run on the meta device in eval mode."""
    tensors = itertools.chain(layer.named_parameters(), layer.named_buffers())
    state = {name: tensor.to("meta") for name, tensor in tensors}
    dtype = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), None)
    training = [(module, module.training) for module in layer.modules()]
    layer.eval()
    try:
        x = torch.empty(*shape, device="meta", dtype=dtype)
        outputs = functional_call(layer, state, (x,), map_tensors(_to_meta, side))
    finally:
        for module, flag in training:
            module.training = flag
    return [y.shape for y in tuple_of(outputs)]


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")
