import pytest
from mesh_cases import eight_heads

from regionjax.aot import analysis, programs, topology


@pytest.mark.cuda
def test_decoding_on_eight_gpus_that_are_not_there(chips):
  machine = topology.parse("h100:8")
  program = programs.decode(eight_heads(), chips("h100:8", data=1, tensor=8), rows=2, length=64)
  kept = []
  found = analysis.measure(program, machine, keep=kept)
  assert found.fits
  # With one query a row, attention's products are sums of elementwise ones, which aren't counted.
  assert 0.7 < found["flops"]["hardware_over_jaxpr"] <= 1 + analysis.TOLERANCE
  assert any(row["axes"] == "tensor" for row in found["collectives"])
  # The kernels of gate and up are not copied side by side to be multiplied at once.
  model = program.config.model.decoder
  assert f"[{model.width},{2 * model.mlp_width // 8}]" not in kept[0].as_text()
