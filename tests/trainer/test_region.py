"""A plan's region: autocast by its base, and FP32 products as it says unless somebody else does."""

import pytest
import torch

from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.trainer import region as region_module
from deepseek_mp.trainer.region import Region

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("base", "dtype"), [("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16), ("block", torch.bfloat16)]
)
def test_a_region_is_the_plans_base(base, dtype):
    region = Region(PrecisionPlan.of(base), CPU, search=False)
    with region.flags(), region.autocast(cache=True):
        assert torch.is_autocast_enabled("cpu") == (dtype is not None)
        assert dtype is None or torch.get_autocast_dtype("cpu") == dtype
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("base", "fp32", "said"), [("bf16", None, "ieee"), ("tf32", None, "tf32"), ("bf16", "tf32", "tf32")]
)
@pytest.mark.parametrize("search", [True, False])
def test_fp32_products_are_as_the_plan_says_or_the_caller(base, fp32, said, search, monkeypatch):
    asked = []
    monkeypatch.setattr(region_module.backends, "math_mode", lambda device, **how: asked.append((device, how)))
    Region(PrecisionPlan.of(base), CPU, search=search, fp32=fp32).flags()
    assert asked == [(CPU, {"fp32": said, "search": search})]
