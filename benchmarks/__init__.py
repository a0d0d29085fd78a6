"""What memory and time a stack of couplings takes, plain, checkpointed and invertible: `python -m benchmarks`."""

__all__: list[str] = []
