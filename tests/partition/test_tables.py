"""The partition tables: strict, as committed, followed by optimiser states."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from regionjax import partition
from regionjax.config import (
  REGION_KINDS,
  ConfigError,
  ConnectorConfig,
  DecoderConfig,
  LoraConfig,
  ModelConfig,
)
from regionjax.mesh import AXES
from regionjax.models.params import param_shapes
from regionjax.train.state import flatten_paths

GOLDEN = Path(__file__).parents[1] / "golden" / "partition"
PRESETS = ("gpt4roi_7b", "gpt4roi_13b", "chatspot_7b", "tiny")


def mesh_of(data=1, fsdp=1, tensor=1):
  return AbstractMesh((data, fsdp, tensor), AXES)


def spec_of(config, path, **sizes):
  shardings = partition.shardings(config, param_shapes(config), mesh_of(**sizes))
  return flatten_paths(shardings)[path].spec


@pytest.mark.parametrize("name", PRESETS)
def test_the_tables_are_those_committed(name):
  path = GOLDEN / f"{name}.txt"
  assert partition.dump(getattr(ModelConfig, name)()) == path.read_text(), (
    f"another split, or other parameters, than in {path}. If that is meant, and a run that holds "
    "more on each device or moves more between them too, write "
    f"regionjax.partition.dump(ModelConfig.{name}()) there"
  )


@pytest.mark.parametrize("region", REGION_KINDS)
@pytest.mark.parametrize("connector", ["linear", "mlp"])
def test_every_model_has_a_table(region, connector):
  """`dump` raises where a parameter has no rule or a rule no parameter."""
  model = dataclasses.replace(ModelConfig.tiny(region), connector=ConnectorConfig(connector))
  lines = partition.dump(model).splitlines()
  assert len(lines) == len(jax.tree.leaves(param_shapes(model)))


def test_low_rank_updates_lie_as_their_maps_do():
  decoder = DecoderConfig.tiny(heads=8, kv_heads=2, lora=LoraConfig(4, targets="q|k|down"))
  model = dataclasses.replace(ModelConfig.tiny("text"), decoder=decoder)
  at = "decoder/layers/{}/{}".format
  sizes = dict(fsdp=4, tensor=2)
  assert spec_of(model, at("q", "kernel"), **sizes) == PartitionSpec(None, "fsdp", "tensor")
  assert spec_of(model, at("q", "lora_a"), **sizes) == PartitionSpec(None, "fsdp", None)
  assert spec_of(model, at("q", "lora_b"), **sizes) == PartitionSpec(None, None, "tensor")
  assert spec_of(model, at("down", "lora_a"), **sizes) == PartitionSpec(None, "tensor", None)
  assert spec_of(model, at("down", "lora_b"), **sizes) == PartitionSpec(None, None, "fsdp")


def test_parameters_without_a_rule_and_rules_without_one_are_named():
  rules = [partition.Rule("a/.*", ()), partition.Rule("b/x", ()), partition.Rule("a/y", ())]
  with pytest.raises(ValueError, match=r"(?s)no rule for c.*no parameter for 'b/x'.*'a/y'"):
    partition.match(rules, ["a/y", "c"])


def test_heads_are_not_cut():
  model = dataclasses.replace(
    ModelConfig.tiny("text"), decoder=DecoderConfig.tiny(heads=6, kv_heads=2, head_dim=32)
  )
  # 6 * 32 channels divide by 4; 6 heads don't.
  with pytest.raises(ConfigError, match=r"tensor=4 can't split model.decoder.heads \(6\).*2, 3, 6"):
    partition.shardings(model, {"decoder": param_shapes(model)["decoder"]}, mesh_of(tensor=4))


def test_key_heads_that_the_devices_cannot_share_are_on_all_of_them():
  model = dataclasses.replace(
    ModelConfig.tiny("text"), decoder=DecoderConfig.tiny(heads=8, kv_heads=2)
  )
  decoder = param_shapes(model)["decoder"]
  found = flatten_paths(partition.shardings(model, {"decoder": decoder}, mesh_of(tensor=8)))
  assert found["decoder/layers/k/kernel"].spec == PartitionSpec(None, None, None)
  assert found["decoder/layers/q/kernel"].spec == PartitionSpec(None, None, "tensor")


def test_a_vocabulary_that_does_not_divide_says_how_to_pad_it():
  model = ModelConfig.chatspot_7b()
  with pytest.raises(ConfigError, match="vocab_multiple"):
    partition.shardings(model, param_shapes(model), mesh_of(tensor=8))
  padded = partition.pad_vocabulary(model, mesh_of(tensor=8))
  assert padded.decoder.padded_vocab == 32008 and padded.decoder.vocab_size == 32006
  partition.shardings(padded, param_shapes(padded), mesh_of(tensor=8))


def test_an_optimiser_follows_the_parameters():
  model = ModelConfig.tiny()
  params = param_shapes(model)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
  state = jax.eval_shape(optimizer.init, params)
  of_state = partition.shardings(model, {"opt_state": state}, mesh_of(fsdp=8))["opt_state"]
  of_params = partition.shardings(model, params, mesh_of(fsdp=8))
  assert of_state[1].mu == of_params == of_state[1].nu
  assert of_state[1].count.spec == PartitionSpec()
  assert any("fsdp" in sharding.spec for sharding in jax.tree.leaves(of_params))


def test_layers_one_by_one_lie_as_when_stacked():
  model = ModelConfig.tiny()
  one = {"decoder": {"layers_2": {"down": {"kernel": jax.ShapeDtypeStruct((384, 160), "float32")}}}}
  found = flatten_paths(partition.shardings(model, one, mesh_of(fsdp=8)))
  assert found["decoder/layers_2/down/kernel"].spec == PartitionSpec(None, "fsdp")


def test_a_leaf_that_is_no_parameter_is_refused():
  with pytest.raises(ValueError, match="'heads/kernel' doesn't end in the path of a parameter"):
    partition.shardings(ModelConfig.tiny(), {"heads": {"kernel": np.zeros((2, 2))}}, mesh_of())


@pytest.mark.parametrize("sizes", [dict(fsdp=64), dict(fsdp=256), dict(fsdp=16, tensor=4)])
def test_what_is_large_is_split(sizes):
  """A device of 64 holds a 64th of GPT4RoI, the pyramid included, and little on top of it."""
  model = partition.pad_vocabulary(ModelConfig.gpt4roi_7b(), mesh_of(**sizes))
  params = param_shapes(model)
  shardings = partition.shardings(model, params, mesh_of(**sizes))
  held = jax.tree.map(lambda x, s: np.prod(s.shard_shape(x.shape)), params, shardings)
  whole = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params))
  devices = np.prod(list(sizes.values()))
  assert sum(jax.tree.leaves(held)) < whole / devices + 1e6
