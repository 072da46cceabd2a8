import json

import pytest

from regionjax.config import (
  Config,
  ConfigError,
  ConnectorConfig,
  DecoderConfig,
  ModelConfig,
  VisionConfig,
  from_dict,
  to_dict,
)
from regionjax.config_files import (
  apply_overrides,
  difference,
  flatten,
  load_config,
  parse_arg,
  read_config,
  write_config,
)

TINY = "configs/tiny.py"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch, request):
  monkeypatch.chdir(request.config.rootpath)


def test_tiny_is_the_preset():
  config = load_config(TINY)
  assert config.model == ModelConfig.tiny()
  assert load_config(f"{TINY}:region=text").model == ModelConfig.tiny("text")


def test_a_config_survives_json(tmp_path):
  config = load_config(f"{TINY}:scale=2,region=pyramid+text", ["--data.sources.0.args.turns=1"])
  assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config
  write_config(tmp_path / "config.json", config)
  assert read_config(tmp_path / "config.json") == config


@pytest.mark.parametrize("region", ["none", "text", "pool", "pyramid", "pool+text", "pyramid+text"])
@pytest.mark.parametrize("scale", [0.25, 0.5, 2, 4])
def test_the_family_of_sizes_is_sound(scale, region):
  model = load_config(f"{TINY}:scale={scale},region={region}").model
  vision, decoder, encoder = model.vision, model.decoder, model.region
  assert vision.width % vision.heads == 0
  assert decoder.head_dim % 2 == 0
  assert decoder.width == decoder.heads * decoder.head_dim
  assert 0.8 < decoder.width / (ModelConfig.tiny().decoder.width * scale) < 1.25
  if encoder.features:
    assert max(encoder.layers) <= vision.layers
  if encoder.features == "pyramid":
    assert encoder.width % encoder.groups == 0


def test_parameters_grow_with_scale():
  from regionjax.models.params import count_params

  counts = [
    sum(count_params(load_config(f"{TINY}:scale={s}").model).values()) for s in (0.25, 0.5, 1, 2)
  ]
  assert counts == sorted(counts) and counts[-1] > 8 * counts[0]


@pytest.mark.parametrize(
  "override, key, value",
  [
    ("--train.steps=20", "train.steps", 20),
    ("--train.steps=2e4", "train.steps", 20000),
    ("--train.learning_rate=3e-4", "train.learning_rate", 3e-4),
    (
      "--train.trainable=regions/.*,connector/.*",
      "train.trainable",
      ["regions/.*", "connector/.*"],
    ),
    ("--model.scan_layers=false", "model.scan_layers", False),
    ("--model.vision.image_size=(64, 96)", "model.vision.image_size", [64, 96]),
    ("--model.vision.image_size=64", "model.vision.image_size", 64),
    ("--model.vision.mean=[0.1,0.2,0.3]", "model.vision.mean", [0.1, 0.2, 0.3]),
    ("--train.init_from=a=b", "train.init_from", "a=b"),
    ("--name=x", "name", "x"),
    ("--data.sources.0.weight=2", "data.sources.0.weight", 2.0),
    ("--data.sources.0.args.turns=1", "data.sources.0.args.turns", 1),
    ("--data.sources.0.args.split=test", "data.sources.0.args.split", "test"),
    ("--data.sources.0.args.tasks=['name']", "data.sources.0.args.tasks", ["name"]),
  ],
)
def test_overrides(override, key, value):
  assert flatten(to_dict(load_config(TINY, [override])))[key] == value


@pytest.mark.parametrize(
  "override, message",
  [
    ("--train.stepz=2", r"'train.stepz'; did you mean train.steps"),
    ("--trian.steps=2", r"did you mean train.steps"),
    ("--xyzzy=2", r"known: name, model, prompt, data, train"),
    ("--train=3", "train is a group of settings; set one of its keys: steps"),
    ("--train.steps=many", "expected int, got 'many'"),
    ("--train.steps=1.5", "expected int, got '1.5'"),
    ("--train.learning_rate=fast", "expected float, got 'fast'"),
    ("--model.scan_layers=maybe", "expected true or false"),
    ("--train.steps.more=1", "'steps' is one value, not a group"),
    ("--data.sources.7.name=x", "expected an index below 1, got '7'"),
    ("--data.sources.0.args.a.b=1", "'a' has no parts"),
    ("--model.region.kind=circle", "expected one of none, text, pool"),
    ("--model.vision.image_size=big", "is none of"),
    ("train.steps", "expected --key=value"),
  ],
)
def test_bad_overrides(override, message):
  with pytest.raises(ConfigError, match=message):
    load_config(TINY, [override])


@pytest.mark.parametrize(
  "spec, message",
  [
    ("configs/tinny.py", "no config file 'configs/tinny.py'; configs/ holds .*tiny.py"),
    ("nowhere/tiny.py", "no config file 'nowhere/tiny.py'"),
    ("configs/tiny.py:scale", "expected key=value"),
    ("configs/tiny.py:scle=2", "did you mean scale"),
    ("configs/tiny.py:scale=big", "expected float, got 'big'"),
    ("configs/tiny.py:scale=-1", "expected a factor between"),
    ("regionjax/config/run.py", "has no get_config"),
  ],
)
def test_bad_config_files(spec, message):
  with pytest.raises(ConfigError, match=message):
    load_config(spec)


def test_unknown_keys_of_a_dict_are_named():
  with pytest.raises(ConfigError, match=r"'train.stepz'; did you mean steps"):
    from_dict(Config, {"train": {"stepz": 3}})


def test_heads_must_share_what_they_split():
  with pytest.raises(ConfigError, match=r"vision.width=100 .* vision.heads=16"):
    VisionConfig(width=100)
  with pytest.raises(ConfigError, match=r"decoder.heads=32 .* decoder.kv_heads=5"):
    DecoderConfig(kv_heads=5)
  with pytest.raises(ConfigError, match="head_dim=15"):
    DecoderConfig(head_dim=15)


def test_stem_and_merge_must_fit_the_patches():
  with pytest.raises(ConfigError, match=r"2 times, to patches of 4 pixels.*patch_size=8"):
    VisionConfig(patch_size=8, stem=(8, 16))
  with pytest.raises(ConfigError, match=r"connector.merge=3.*\(16x16"):
    ModelConfig(connector=ConnectorConfig(merge=3))
  model = ModelConfig(connector=ConnectorConfig(merge=2))
  assert (ModelConfig().image_tokens, model.image_tokens) == (256, 64)


def test_parse_arg_keeps_the_defaults_types():
  options = parse_arg("b=2,a=x", {"a": "y", "b": 1.0, "c": 3})
  assert (options.a, options.b, options.c) == ("x", 2.0, 3)
  assert isinstance(options.b, float)


def test_difference_names_dotted_keys():
  config = Config()
  other = apply_overrides(config, ["--train.steps=7", "--data.sources.0.args.turns=1"])
  assert difference(config, other) == {
    "train.steps": (config.train.steps, 7),
    "data.sources.0.args.turns": (None, 1),
  }
  assert difference(config, config) == {}


def test_a_broken_config_json_is_named(tmp_path):
  (tmp_path / "config.json").write_text('{"name": ')
  with pytest.raises(ConfigError, match="is not a config in JSON"):
    read_config(tmp_path / "config.json")
