"""GPT4RoI's delta rule, and what is said of a base or a delta that cannot be added."""

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from regionjax.weights.delta import apply_delta, is_delta
from regionjax.weights.leaves import from_arrays
from regionjax.weights.sources import open_weights
from regionjax.weights.tensors import WeightsError

WIDTH, ROWS = 8, 40
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
PROJECTOR = ("model.mm_projector.weight", "model.mm_projector.bias")
MODULE = "model.spi_module.roi_align.updims.weight"


def llama(rng, rows=ROWS, width=WIDTH, dtype=np.float16, scale=1.0):
  """A plain LLaMA of two layers, as arrays."""
  shapes = {TABLES[0]: (rows, width)}
  for i in range(2):
    at = f"model.layers.{i}."
    shapes |= {f"{at}self_attn.{n}_proj.weight": (width, width) for n in "qkvo"}
    shapes |= {f"{at}mlp.up_proj.weight": (12, width), f"{at}input_layernorm.weight": (width,)}
    shapes[f"{at}self_attn.rotary_emb.inv_freq"] = (2,)
  shapes |= {"model.norm.weight": (width,), TABLES[1]: (rows, width)}
  return {
    n: ((rng.normal(size=s) + ("norm" in n)) * scale).astype(dtype) for n, s in shapes.items()
  }


def checkpoint(rng, **kw):
  """A delta: small differences, six rows more, and what the base does not have."""
  arrays = llama(rng, rows=ROWS + 6, scale=0.01, **kw)
  whole = {PROJECTOR[0]: (WIDTH, 5), PROJECTOR[1]: (WIDTH,), MODULE: (WIDTH, 3)}
  return arrays | {n: rng.normal(size=s).astype(np.float16) for n, s in whole.items()}


@pytest.fixture
def pair():
  rng = np.random.default_rng(0)
  return llama(rng), checkpoint(rng)


def source(arrays, name="base"):
  return from_arrays(arrays, where=name)


def test_sum_rows_and_whole_tensors(pair, tmp_path):
  base, delta = pair
  for name, arrays in zip(("base", "delta"), pair):
    (tmp_path / name).mkdir()
    safetensors.numpy.save_file(arrays, tmp_path / name / "model.safetensors")
  with apply_delta(open_weights(tmp_path / "base"), open_weights(tmp_path / "delta")) as merged:
    assert set(merged) == {n for n in delta if "inv_freq" not in n}
    got = {name: tensor.array() for name, tensor in merged.items()}
    assert all(merged[n].shape == a.shape and a.dtype == np.float16 for n, a in got.items())
  for name in (*PROJECTOR, MODULE):
    np.testing.assert_array_equal(got[name], delta[name])
  for name in TABLES:
    np.testing.assert_array_equal(got[name][:ROWS], base[name] + delta[name][:ROWS])
    np.testing.assert_array_equal(got[name][ROWS:], delta[name][ROWS:])
  rest = set(got) - {*PROJECTOR, MODULE, *TABLES}
  assert len(rest) == 13
  for name in rest:
    np.testing.assert_array_equal(got[name], base[name] + delta[name])
    assert (got[name] != delta[name]).any()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_base_of_another_dtype_is_added_in_the_deltas(pair, dtype):
  base, delta = pair
  other = {n: a.astype(np.float32).astype(dtype) for n, a in base.items()}
  name = "model.layers.1.mlp.up_proj.weight"
  merged = apply_delta(source(other), source(delta, "delta"))[name]
  assert merged.dtype == merged.array().dtype == np.float16
  np.testing.assert_array_equal(merged.array(), other[name].astype(np.float16) + delta[name])


def test_a_delta_is_told_from_a_checkpoint(pair):
  base, delta = pair
  assert is_delta(source(delta)) and not is_delta(source(base))
  assert not is_delta(source({n: a for n, a in delta.items() if n != "model.norm.weight"}))
  merged = apply_delta(source(base), source(delta))
  assert not is_delta(merged)
  with pytest.raises(WeightsError, match=r"is no delta.*without a base"):
    apply_delta(source(base), merged)


def test_everything_that_cannot_be_added_is_listed(pair):
  base, delta = pair
  gone = [n for n in base if "layers.1." in n and "inv_freq" not in n] + ["lm_head.weight"]
  base = {n: a for n, a in base.items() if n not in gone}
  base["model.layers.0.mlp.up_proj.weight"] = np.zeros((13, WIDTH), np.float16)
  base["score.weight"] = np.zeros((2, WIDTH), np.float16)
  with pytest.raises(WeightsError) as error:
    apply_delta(source(base), source(delta, "delta"))
  message = str(error.value)
  assert message.startswith("delta is no delta to base")
  assert all(f"{name} {list(delta[name].shape)} is missing from the base" in message
             for name in gone)  # fmt: skip
  assert "mlp.up_proj.weight is [13, 8] in the base and [12, 8] in the delta" in message
  assert "score.weight [2, 8] is only in the base" in message
  assert len(message.splitlines()) == len(gone) + 4


@pytest.mark.parametrize(
  "kw, message",
  [
    (dict(width=16), r"the base is 16 wide, the delta 8.*13B"),
    (dict(rows=ROWS + 1), r"embed_tokens.weight is \[41, 8\] in the base.*not plain LLaMA"),
    (dict(rows=ROWS + 6), r"A base with 46 rows is not plain LLaMA \(Vicuna and LLaVA"),
  ],
)
def test_another_base_is_named(pair, kw, message):
  with pytest.raises(WeightsError, match=message):
    apply_delta(source(llama(np.random.default_rng(1), **kw)), source(pair[1], "delta"))


def test_files_of_something_else_are_named(pair):
  other = source({"tok_embeddings.weight": np.zeros((ROWS, WIDTH), np.float16)}, "meta.pth")
  with pytest.raises(WeightsError, match=r"meta.pth: the base has no table model.embed_tokens"):
    apply_delta(other, source(pair[1], "delta"))
