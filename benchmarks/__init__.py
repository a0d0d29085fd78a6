"""What memory and time invertible stacks take, by InvZoo and by everybody else: `python -m benchmarks`."""

import warnings

__all__: list[str] = []

# The peers are older than today's torch, which warns about them.
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", category=DeprecationWarning)
warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
warnings.filterwarnings("ignore", message="Inputs to the softmax are not scaled down")
