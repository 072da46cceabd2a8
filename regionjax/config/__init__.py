"""Frozen dataclasses that say everything about a run, and the way into them from a ConfigDict.

`configs/*.py` return an `ml_collections.ConfigDict` (so that any field can be overridden on the
command line); `from_dict` turns it into the dataclasses of this package and refuses unknown keys,
naming the nearest known ones. Nothing past that boundary sees a ConfigDict.
"""

from regionjax.config.errors import ConfigError
from regionjax.config.model import (
  DECODER_MAPS,
  REGION_KINDS,
  ConnectorConfig,
  DecoderConfig,
  LoraConfig,
  ModelConfig,
  RegionConfig,
  RopeScaling,
  VisionConfig,
)
from regionjax.config.reading import from_dict, to_dict
from regionjax.config.run import (
  CHATSPOT_TOKENS,
  GPT4ROI_TOKENS,
  Config,
  DataConfig,
  MeshConfig,
  PromptConfig,
  SourceConfig,
  TrainConfig,
)

__all__ = [
  "CHATSPOT_TOKENS", "DECODER_MAPS", "GPT4ROI_TOKENS", "REGION_KINDS", "Config", "ConfigError",
  "ConnectorConfig", "DataConfig", "DecoderConfig", "LoraConfig", "MeshConfig", "ModelConfig",
  "PromptConfig", "RegionConfig", "RopeScaling", "SourceConfig", "TrainConfig", "VisionConfig",
  "from_dict", "to_dict",
]  # fmt: skip
