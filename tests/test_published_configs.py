"""The configs of the published systems: what each stage trains, and that no file is opened."""

from pathlib import Path

import pytest

from regionjax.config import Config, ConfigError
from regionjax.config_files import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
GPT4ROI = {"stage1": {"regions"}, "stage2": {"regions", "connector", "decoder"}}
CHATSPOT = {"stage1": {"connector"}, "stage2": {"connector", "decoder"}}


@pytest.mark.parametrize(
  "name, preset, stages",
  [
    ("gpt4roi_7b", Config.gpt4roi_7b, GPT4ROI),
    ("gpt4roi_13b", Config.gpt4roi_13b, GPT4ROI),
    ("chatspot_7b", Config.chatspot_7b, CHATSPOT),
  ],
)
def test_stages(name, preset, stages, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)  # nothing that the config names is here
  for stage, parts in stages.items():
    config = load_config(f"{CONFIGS}/{name}.py:{stage},rows=256,tokenizer=llama")
    assert config.name == f"{name}_{stage}"
    assert config.prompt == preset("llama").prompt
    assert config.model.decoder == preset("llama").model.decoder
    assert {pattern.split("/")[0] for pattern in config.train.trainable} == parts
    assert (config.data.rows, config.data.tokens_per_row) == (256, 2048)
    assert (config.data.images_per_row, config.data.regions_per_row) == (7, 56)
    assert 0 < config.train.warmup_steps < config.train.steps
    assert load_config(f"{CONFIGS}/{name}.py:{stage}").data.rows == 128


def test_published_rates():
  one, two = (load_config(f"{CONFIGS}/gpt4roi_7b.py:{stage}").train for stage in GPT4ROI)
  assert (one.learning_rate, one.weight_decay) == (2e-5, 0.01)
  assert (two.learning_rate, two.weight_decay, two.beta2) == (2e-5, 0.0, 0.999)
  one, two = (load_config(f"{CONFIGS}/chatspot_7b.py:{stage}").train for stage in CHATSPOT)
  assert (one.learning_rate, two.learning_rate) == (2e-3, 2e-5)


def test_wrong_arguments():
  with pytest.raises(ConfigError, match="'stage3': expected stage1 or stage2"):
    load_config(f"{CONFIGS}/gpt4roi_7b.py:stage3")
  with pytest.raises(ConfigError, match="unknown config argument 'row'"):
    load_config(f"{CONFIGS}/gpt4roi_7b.py:stage1,row=3")
