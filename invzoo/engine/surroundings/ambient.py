"""What decides how and where operators work: autocast, the default device, streams, inference mode."""

import contextlib
from collections.abc import Collection, Iterable, Iterator

import torch

from .._torch import any_autocast, default_device
from .devices import elsewhere, on_streams, streams_of

__all__ = ["Ambient"]


class Ambient:
    """The contexts that a call runs in."""

    __slots__ = ("_autocast", "_cast", "_device", "_streams")

    def __init__(self, devices: Collection[torch.device]):
        self._streams = streams_of(devices) if devices else []
        self._device = default_device()
        self._cast = any_autocast()
        seen = self._cast or devices
        self._autocast = _autocast_state({"cpu", *(d.type for d in devices)}) if seen else _NO_AUTOCAST

    def intact(self) -> bool:
        """Whether operators work now as they did in the call."""
        if self._cast or any_autocast() or torch.is_inference_mode_enabled():
            return False
        return self._device == default_device() and not elsewhere(self._streams)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Let operators work as they did in the call, and such that a replay can record them."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(on_streams(self._streams))
            if self._device != default_device():
                stack.enter_context(self._device)
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())  # which the above has ended
            for device, enabled, dtype in self._autocast:
                if enabled or torch.is_autocast_enabled(device):
                    # A cache would hold the cast weights for as long as autocast around backward lasts.
                    stack.enter_context(torch.autocast(device, dtype, enabled, cache_enabled=False))
            yield


def _autocast_state(types: Iterable[str]) -> list[tuple[str, bool, torch.dtype]]:
    available = (t for t in types if torch.amp.is_autocast_available(t))
    return [(t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in available]


_NO_AUTOCAST = [("cpu", False, torch.bfloat16)]
