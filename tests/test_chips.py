import pytest

from regionjax import chips


@pytest.mark.parametrize(
  "kind, name, peak",
  [
    ("TPU v5 lite", "v5e", 1.97e14),
    ("TPU v5", "v5p", 4.59e14),
    ("TPU v5p", "v5p", 4.59e14),
    ("TPU v6 lite", "v6e", 9.18e14),
    ("NVIDIA H100 80GB HBM3", "h100", 9.89e14),
    ("NVIDIA H100 PCIe", None, 7.56e14),
    ("TPU v4", None, 2.75e14),
    ("NVIDIA A100-SXM4-40GB", None, 3.12e14),
    ("cpu", None, None),
  ],
)
def test_chips_by_what_jax_calls_them(kind, name, peak):
  assert chips.chip_of(kind) is chips.CHIPS.get(name)
  assert chips.peak_flops_of(kind) == peak
