"""The engine under `torch.compile`."""
