"""Log-determinants: one number per sample, in at least float32."""

import pytest
import torch
from torch.testing import assert_close

import invzoo as iz


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_log_slopes_are_summed_in_at_least_float32(dtype):
    values = torch.full((2, 4096), 0.01, dtype=dtype)
    total = iz.sum_per_sample(iz.Identity(), values)
    assert_close(total, values.to(torch.promote_types(dtype, torch.float32)).sum(1), rtol=1e-6, atol=0)
