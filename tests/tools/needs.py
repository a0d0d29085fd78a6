"""Which tests need which tools; the extra ``tools`` in pyproject.toml installs them all."""

from importlib.util import find_spec

__all__ = ["MISSING", "NEEDS"]

NEEDS = {
    "test_accelerate.py": ("accelerate",),
    "test_lightning.py": ("lightning",),
    "test_onnx.py": ("onnx", "onnxscript", "onnxruntime"),
    "test_safetensors.py": ("safetensors",),
    "test_transformers.py": ("transformers", "accelerate"),
}

MISSING = {
    file: missing for file, tools in NEEDS.items() if (missing := [tool for tool in tools if find_spec(tool) is None])
}
