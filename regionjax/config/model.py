"""What a model is: sizes and kinds of its parts, and the published ones as presets."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from regionjax.config.errors import ConfigError

REGION_KINDS = ("none", "text", "pool", "pyramid", "pool+text", "pyramid+text")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """A CLIP-style vision transformer. Sizes in pixels, widths in channels."""

  image_size: int | tuple[int, int] = 224  # pixels; an int is square, a pair is (height, width)
  patch_size: int = 14
  width: int = 1024
  layers: int = 24
  heads: int = 16
  mlp_width: int = 4096
  activation: str = "quick_gelu"  # quick_gelu | gelu | relu
  eps: float = 1e-5
  select_layer: int = -2  # hidden state that becomes the image tokens (0 = after pre-layernorm)
  mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
  std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
  # Channels of a convolutional stem (3x3, stride 2, ReLU each; 2^len must be the patch size) before
  # the patches' linear map; () is CLIP. Early convolutions see shapes after far fewer steps.
  stem: tuple[int, ...] = ()

  def __post_init__(self) -> None:
    if self.width % self.heads:
      raise ConfigError(
        f"vision.width={self.width} can't be split into vision.heads={self.heads}; make it a "
        "multiple"
      )
    if self.stem and 2 ** len(self.stem) != self.patch_size:
      raise ConfigError(
        f"vision.stem={self.stem} halves the image {len(self.stem)} times, to patches of "
        f"{2 ** len(self.stem)} pixels, but vision.patch_size={self.patch_size}"
      )

  @property
  def image_hw(self) -> tuple[int, int]:
    s = self.image_size
    return (s, s) if isinstance(s, int) else (int(s[0]), int(s[1]))

  @property
  def grid(self) -> tuple[int, int]:
    """Patches per column and per row, (h, w)."""
    h, w = self.image_hw
    return h // self.patch_size, w // self.patch_size

  @property
  def tokens(self) -> int:
    """Patch tokens of one image, class token not counted."""
    h, w = self.grid
    return h * w

  @property
  def blocks_used(self) -> int:
    """Blocks that run: those after `select_layer` are never needed."""
    return self.select_layer if self.select_layer >= 0 else self.layers + 1 + self.select_layer

  @classmethod
  def clip_vit_l14(cls, **kw: Any) -> VisionConfig:
    return cls(**kw)

  @classmethod
  def tiny(cls, **kw: Any) -> VisionConfig:
    defaults: dict[str, Any] = dict(
      image_size=128, patch_size=8, width=128, layers=1, heads=2, mlp_width=384,
      activation="relu", select_layer=-1, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25),
      stem=(16, 32, 96),
    )  # fmt: skip
    return cls(**(defaults | kw))


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
  """From the vision encoder's channels to the decoder's."""

  kind: str = "linear"  # linear | mlp (two layers, GELU between: LLaVA-1.5)
  # Each merge x merge square of patches becomes one image token, channels side by side (the "pixel
  # shuffle" of InternVL). The published models keep every patch.
  merge: int = 1


@dataclasses.dataclass(frozen=True)
class RegionConfig:
  """How a region enters the language model.

  `kind` is one of REGION_KINDS. `pool` and `pyramid` fill one slot token per region with features;
  `text` writes the region's coordinates into the prompt; `a+text` does both; `none` does neither
  (the region is only named).
  """

  kind: str = "pyramid"
  layers: tuple[int, ...] = (14, 17, 20, 23)  # hidden states read, shallowest first
  width: int = 1024  # channels of the maps (pyramid) or of the hidden layer (pool)
  output_size: int = 14  # RoIAlign bins per side
  sampling_ratio: int = 2
  upsample: tuple[int, ...] = (8, 4, 2, 1)  # pyramid: grid multiple of each level
  rounds: int = 5  # pyramid: scale-shuffle rounds
  groups: int = 64  # pyramid: GroupNorm groups
  position_width: int = 256  # hidden width of the position MLP
  token_width: int = 1024  # pyramid: width after flatten_linear
  # pool: side of the square around a point that its bins read, share of the image's sides. A point
  # has no extent, so what it stands on has to be read from around it; 0 reads the point alone.
  point_window: float = 0.0

  @classmethod
  def tiny(cls, kind: str = "pool") -> RegionConfig:
    if kind.startswith("pyramid"):
      return cls(
        kind=kind, layers=(0, 0, 1, 1), width=48, output_size=4, upsample=(2, 1, 1, 1),
        rounds=2, groups=8, position_width=64, token_width=128,
      )  # fmt: skip
    return cls(
      kind=kind, layers=(1,), width=192, output_size=5, position_width=64, point_window=0.3
    )

  @property
  def features(self) -> str | None:
    """'pool', 'pyramid' or None: what fills the region slot."""
    head = self.kind.split("+")[0]
    return head if head in ("pool", "pyramid") else None

  @property
  def text(self) -> bool:
    """Whether coordinates are written into the prompt."""
    return self.kind.endswith("text")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies were stretched to reach further than they were first trained for.

  'linear' divides all of them by `factor` (position interpolation). 'llama3' (LLaMA 3.1 and later)
  divides those by `factor` whose wavelength exceeds `original_max_length / low_freq_factor`, keeps
  those below `original_max_length / high_freq_factor`, and goes from one to the other in between;
  its last three numbers mean nothing to 'linear'.
  """

  kind: str = "llama3"  # llama3 | linear
  factor: float = 8.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_length: int = 8192  # tokens that it was first trained for

  def __post_init__(self) -> None:
    if self.kind not in ("llama3", "linear"):
      raise ConfigError(f"rope_scaling.kind={self.kind!r}: expected llama3 or linear")
    if self.factor <= 0:
      raise ConfigError(f"rope_scaling.factor={self.factor}: expected a positive number")
    if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
      raise ConfigError(
        f"rope_scaling: low_freq_factor={self.low_freq_factor} must be positive and below "
        f"high_freq_factor={self.high_freq_factor}"
      )
    if self.original_max_length < 1:
      raise ConfigError(
        f"rope_scaling.original_max_length={self.original_max_length}: expected at least 1 token"
      )


# The decoder's linear maps, by the name of their parameters: attention, then the gated MLP.
DECODER_MAPS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank updates of the decoder's linear maps (LoRA, arXiv 2106.09685).

  A targeted map x @ W becomes x @ W + x @ A @ B * alpha / rank. A starts random and B at zero, so
  that training starts from the model without them.
  """

  rank: int = 0  # columns of A and rows of B; 0: no updates
  alpha: float = 16.0
  targets: str = "|".join(DECODER_MAPS)  # regex on a map's whole name, e.g. 'q|v'

  def __post_init__(self) -> None:
    if self.rank < 0:
      raise ConfigError(f"decoder.lora.rank={self.rank}: expected 1 or more, or 0 for no LoRA")
    if not 0 < self.alpha < float("inf"):
      raise ConfigError(f"decoder.lora.alpha={self.alpha}: expected a positive number, e.g. 16")
    try:
      named = [name for name in DECODER_MAPS if re.fullmatch(self.targets, name)]
    except re.error as error:
      raise ConfigError(f"decoder.lora.targets={self.targets!r} is not a regex ({error})") from None
    if not named:
      raise ConfigError(
        f"decoder.lora.targets={self.targets!r} matches none of {', '.join(DECODER_MAPS)}; name "
        "maps as in 'q|v'"
      )

  @property
  def scale(self) -> float:
    """alpha / rank; 0 without LoRA."""
    return self.alpha / self.rank if self.rank else 0.0

  def adapts(self, name: str) -> bool:
    """Whether `name` is a map (one of DECODER_MAPS) that has an update."""
    targeted = name in DECODER_MAPS and re.fullmatch(self.targets, name) is not None
    return self.rank > 0 and targeted


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """A LLaMA-family decoder."""

  vocab_size: int = 32006  # rows that mean something; see vocab_multiple
  vocab_multiple: int = 1  # rows are padded to this multiple and their logits masked
  width: int = 4096
  layers: int = 32
  heads: int = 32
  kv_heads: int = 32
  head_dim: int = 128
  mlp_width: int = 11008
  activation: str = "silu"  # silu | gelu | relu, inside the gated MLP
  rope_base: float = 10000.0
  rope_scaling: RopeScaling | None = None
  eps: float = 1e-6
  tie_embeddings: bool = False
  max_length: int = 2048
  lora: LoraConfig = LoraConfig()

  def __post_init__(self) -> None:
    if self.heads % self.kv_heads:
      raise ConfigError(
        f"decoder.heads={self.heads} can't share decoder.kv_heads={self.kv_heads}; make it "
        "a multiple"
      )
    if self.head_dim % 2:
      raise ConfigError(f"decoder.head_dim={self.head_dim}: RoPE turns pairs; make it even")

  @property
  def padded_vocab(self) -> int:
    return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

  @classmethod
  def llama_7b(cls, **kw: Any) -> DecoderConfig:
    return cls(**kw)

  @classmethod
  def llama_13b(cls, **kw: Any) -> DecoderConfig:
    return cls(**(dict(width=5120, layers=40, heads=40, kv_heads=40, mlp_width=13824) | kw))

  @classmethod
  def tiny(cls, **kw: Any) -> DecoderConfig:
    defaults: dict[str, Any] = dict(
      vocab_size=1024, width=160, layers=3, heads=5, kv_heads=5, head_dim=32, mlp_width=384,
      activation="relu", rope_base=100.0, tie_embeddings=True, max_length=512,
    )  # fmt: skip
    return cls(**(defaults | kw))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  name: str = "gpt4roi_7b"
  vision: VisionConfig = VisionConfig()
  connector: ConnectorConfig = ConnectorConfig()
  region: RegionConfig = RegionConfig()
  decoder: DecoderConfig = DecoderConfig()
  compute_dtype: str = "bfloat16"
  # none | full | dots | attention | qkv | mlp: what each layer saves for its backward pass; the
  # rest is computed again. Bytes are those of a token and a layer of the 7B decoder in bfloat16 (d
  # channels, n query and k key heads of h, f hidden channels); attention weights are never saved.
  #   none       everything but gathered kernels, which are gathered again: all layers' together
  #              would be the whole model on every device
  #   full       its input: 2d, 8 KiB. A whole forward pass is computed again
  #   attention  and attention's result and softmax statistics: 2nh + 4n more, 16 KiB in all. With
  #              a TPU's kernel (`ops.attention.splash`) attention's forward pass runs once; the XLA
  #              form needs its weights and so computes it again all the same
  #   qkv        and q, k, v after rotary positions: 2h(n + 2k) more, 40 KiB
  #   mlp        and the output map's, gate's and up's products: 2d + 4f more, 91 KiB. No product of
  #              weights is computed again, only norms and other elementwise work
  #   dots       the results of weight matmuls: as mlp without attention's, 83 KiB
  # Each byte of a level spares the same work (2d FLOPs per element), so the next one pays wherever
  # it fits. In the vision transformer, where it is trained, the same names mean the same.
  remat: str = "none"
  scan_layers: bool = True

  def __post_init__(self) -> None:
    if self.region.kind not in REGION_KINDS:
      raise ConfigError(
        f"region.kind={self.region.kind!r}: expected one of {', '.join(REGION_KINDS)}"
      )
    grid, merge = self.vision.grid, self.connector.merge
    if merge < 1 or any(side % merge for side in grid):
      raise ConfigError(
        f"connector.merge={merge}: expected a divisor of both sides of the grid of patches "
        f"({grid[0]}x{grid[1]}: vision.image_size / vision.patch_size)"
      )

  @property
  def image_tokens(self) -> int:
    """Decoder tokens of one image."""
    return self.vision.tokens // self.connector.merge**2

  def flops_per_example(
    self,
    *,
    tokens: float,
    images: float,
    regions: float,
    region_images: float | None = None,
    training: bool = True,
    trainable: tuple[str, ...] | None = None,
  ) -> float:
    """Model FLOPs of one example; see `regionjax.flops.flops_per_example`."""
    from regionjax import flops  # only this method needs the models

    return flops.flops_per_example(
      self, tokens=tokens, images=images, regions=regions, region_images=region_images,
      training=training, trainable=trainable,
    )  # fmt: skip

  @classmethod
  def gpt4roi_7b(cls) -> ModelConfig:
    return cls(name="gpt4roi_7b")

  @classmethod
  def gpt4roi_13b(cls) -> ModelConfig:
    return cls(name="gpt4roi_13b", decoder=DecoderConfig.llama_13b())

  @classmethod
  def chatspot_7b(cls) -> ModelConfig:
    return cls(name="chatspot_7b", region=RegionConfig(kind="text"))

  @classmethod
  def tiny(cls, region: str = "pool") -> ModelConfig:
    """The preset that two CPU cores train from scratch; `configs/tiny.py` trains it."""
    return cls(
      name="tiny",
      vision=VisionConfig.tiny(),
      connector=ConnectorConfig("linear", merge=2),
      region=RegionConfig.tiny(region),
      decoder=DecoderConfig.tiny(),
      compute_dtype="float32",
    )
