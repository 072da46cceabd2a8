"""From a published checkpoint to a release: what it becomes is known before anything is read.

`arrange` reads configurations, names and shapes, and raises with everything that is wrong;
`write` then passes the tensors through one by one. Which name becomes which parameter stands in
`weights.families`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from regionjax.config import (
  GPT4ROI_TOKENS,
  Config,
  ConfigError,
  DataConfig,
  DecoderConfig,
  ModelConfig,
  PromptConfig,
  RegionConfig,
  VisionConfig,
)
from regionjax.models.region_lm import vision_depth
from regionjax.tokenizer import Tokenizer, load_tokenizer
from regionjax.weights import leaves as lazy
from regionjax.weights import release
from regionjax.weights.delta import apply_delta, is_delta
from regionjax.weights.families import clip, gguf, gpt4roi, llama, llava
from regionjax.weights.leaves import Leaf
from regionjax.weights.sources import open_weights
from regionjax.weights.table import Plan, Table
from regionjax.weights.tensors import Tensor, TensorSource, WeightsError
from regionjax.weights.writer import Progress

# A tokenizer may have fewer entries than the tables have rows, which are often padded to a round
# number (LLaVA-1.5: 32,002 of 32,064); by more than this share it is another model's.
MOST_UNUSED_ROWS = 0.01
# Marks in a published chat template, and our template that writes the same.
CHAT_MARKS = (
  ("named SmolLM", "smollm2"), ("<|im_start|>", "chatml"), ("<|start_header_id|>", "llama3"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
  """What a source doesn't say itself.

  Attributes:
    base: the LLaMA that a GPT4RoI delta is a difference to.
    clip: the vision tower that a GPT4RoI goes with.
    template: of the prompt; '' takes it from the source's chat template.
    vocab_multiple: rows of the token tables are padded to a multiple of it, for sharding.
  """

  base: pathlib.Path | None = None
  clip: pathlib.Path | None = None
  template: str = ""
  vocab_multiple: int = 1


@dataclasses.dataclass(frozen=True)
class Converted:
  """Tensors of one source on their way through one table."""

  table: Table
  source: TensorSource
  plan: Plan


@dataclasses.dataclass(frozen=True)
class Arranged:
  """A conversion that will work.

  Attributes:
    family: one of FAMILIES.
    where: the source, for people.
    config: of the release.
    parts: of the model ('vision', 'connector', ...) that the source has.
    steps: where the parameters come from.
    tokenizer: None for a vision tower.
  """

  family: str
  where: str
  config: Config
  parts: tuple[str, ...]
  steps: tuple[Converted, ...]
  tokenizer: Tokenizer | None

  @property
  def leaves(self) -> dict[str, Leaf]:
    """Our parameters by path."""
    return {path: leaf for step in self.steps for path, leaf in step.plan.leaves.items()}

  @property
  def spare(self) -> dict[str, Tensor]:
    """Published tensors that the model does not use, by published name."""
    return {key: tensor for step in self.steps for key, tensor in step.plan.spare.items()}

  @property
  def ignored(self) -> list[str]:
    return [name for step in self.steps for name in step.plan.ignored]


def arrange(family: str, source: str | os.PathLike, options: Options | None = None) -> Arranged:
  """Reads what a source is, and checks that all of it can be converted.

  Args:
    family: one of FAMILIES.
    source: a folder as Hugging Face publishes it, or a .gguf file.
    options: see `Options`.

  Raises:
    WeightsError: files are missing or damaged; the configuration describes another computation;
      tensors are missing, unexpected or misshapen (all are listed); a delta without its base, or a
      base with something that is none; a tokenizer of another size.
    TokenizerError: the tokenizer's files cannot be used.
  """
  if family not in FAMILIES:
    raise WeightsError(f"family {family!r}: expected one of {', '.join(FAMILIES)}")
  options = options or Options()
  for name in ("base", "clip"):
    if getattr(options, name) is not None and family != "gpt4roi":
      raise WeightsError(f"--{name} is for GPT4RoI's checkpoints; {family} takes none")
  arranged = FAMILIES[family](pathlib.Path(source), options)
  if arranged.tokenizer is not None:
    _check_size(arranged.tokenizer, arranged.config.model.decoder, arranged.where)
    _check_prompt(arranged)
  return arranged


def write(
  arranged: Arranged,
  folder: str | os.PathLike,
  *,
  dtype: str = "keep",
  command: str = "",
  progress: Progress | None = None,
) -> pathlib.Path:
  """Writes the release; it appears at its place when it is complete.

  Args:
    arranged: what `arrange` gave.
    folder: destination. It must not exist, be empty, or hold a release.
    dtype: 'keep' the source's, or a key of `release.DTYPES`.
    command: what was typed, for the card.
    progress: see `write_safetensors`.

  Returns:
    The folder.

  Raises:
    ReleaseError: the destination holds something else, or the dtype is unknown.
    WeightsError: NaN or infinity in a tensor (named), or a full disk; nothing is left behind.
  """
  leaves = arranged.leaves
  if dtype != "keep":
    leaves = lazy.cast(leaves, release.as_dtype(dtype))
  return release.write_leaves(
    folder,
    leaves,
    release.make_payload(arranged.config, parts=arranged.parts),
    tokenizer=arranged.tokenizer,
    card=write_card(arranged, leaves, command=command),
    spare={key: lazy.as_leaf(tensor) for key, tensor in arranged.spare.items()},
    progress=progress,
  )


def write_card(arranged: Arranged, leaves: Mapping[str, Leaf], *, command: str) -> str:
  """The model card of a converted release."""
  count = sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in leaves.values())
  dtypes = sorted({leaf.dtype.name for leaf in leaves.values()})
  lines = [
    f"# {arranged.config.name}",
    "",
    f"Converted by regionjax from `{arranged.where}` ({arranged.family}): {count:,} parameters "
    f"({', '.join(arranged.parts)}) in {', '.join(dtypes)}. Its licence is the source's.",
  ]
  if command:
    lines += ["", "```bash", command, "```"]
  if arranged.spare:
    lines += [
      "",
      f"{len(arranged.spare)} published tensors that this model does not read are kept in "
      f"`{release.SPARE}` for the way back (`regionjax convert --to-hf`).",
    ]
  return "\n".join(lines) + "\n"


def _clip(source: pathlib.Path, options: Options) -> Arranged:
  vision = clip.config_from_hf(_json(source, "config.json"), preprocessor=_preprocessor(source))
  # No decoder belongs to it; the smallest one stands in the configuration.
  model = ModelConfig(
    "clip", vision, region=RegionConfig(kind="none"), decoder=DecoderConfig.tiny(),
    compute_dtype="float32",
  )  # fmt: skip
  step = _convert(clip.table(vision), open_weights(source), model, ("vision",))
  config = Config("clip", _computing(model, [step]), data=DataConfig(resize="hf"))
  return Arranged("hf-clip", step.source.where, config, ("vision",), (step,), None)


def _llama(source: pathlib.Path, options: Options) -> Arranged:
  decoder = llama.config_from_hf(
    _json(source, "config.json"), vocab_multiple=options.vocab_multiple
  )
  tokenizer = load_tokenizer(source)
  return _decoder(
    "hf-llama", source, open_weights(source), decoder, tokenizer,
    template=options.template or choose_template(_chat_template(source)),
  )  # fmt: skip


def _gguf(source: pathlib.Path, options: Options) -> Arranged:
  from regionjax.weights.gguf_file import open_gguf
  from regionjax.weights.gguf_tokenizer import read_tokenizer

  opened = open_gguf(source)
  decoder = gguf.config_from_gguf(opened, vocab_multiple=options.vocab_multiple)
  tokenizer = Tokenizer(read_tokenizer(opened.fields))
  return _decoder(
    "gguf", source, gguf.as_hf(opened), decoder, tokenizer,
    template=options.template
    or choose_template(opened.fields.take("tokenizer.chat_template", str, "")),
  )  # fmt: skip


def _decoder(
  family: str,
  source: pathlib.Path,
  tensors: TensorSource,
  decoder: DecoderConfig,
  tokenizer: Tokenizer,
  *,
  template: str,
) -> Arranged:
  # No vision tower belongs to it; the smallest one stands in the configuration.
  model = ModelConfig(
    source.stem, VisionConfig.tiny(), region=RegionConfig(kind="none"), decoder=decoder
  )
  step = _convert(llama.table(decoder), tensors, model, ("decoder",))
  prompt = PromptConfig(template=template, tokenizer=str(source))
  data = DataConfig(tokens_per_row=decoder.max_length)
  config = Config(model.name, _computing(model, [step]), prompt, data)
  return Arranged(family, tensors.where, config, ("decoder",), (step,), tokenizer)


def _llava(source: pathlib.Path, options: Options) -> Arranged:
  hf = _json(source, "config.json")
  model = llava.config_from_hf(
    hf, preprocessor=_preprocessor(source), vocab_multiple=options.vocab_multiple
  )
  tokenizer = load_tokenizer(source)
  expected = llava.image_token(hf)
  if tokenizer.image_slot_id != expected:
    raise WeightsError(
      f"{source}: config.json says that token {expected} stands for an image, the tokenizer's "
      f"<image> has id {tokenizer.image_slot_id}; tokenizer and model are not of one release"
    )
  step = _convert(llava.table(model), open_weights(source), model, release.PARTS)
  # LLaVA-1.5 was trained with boxes as shares with two decimals, bare in the text.
  prompt = PromptConfig(
    template=options.template or "vicuna_v1", tokenizer=str(source), mention="slot",
    coordinates="unit2", coordinate_marks="none", image_prefix="{image:0}\n",
  )  # fmt: skip
  data = DataConfig(resize="hf", tokens_per_row=model.decoder.max_length)
  config = Config(source.name, _computing(model, [step]), prompt, data)
  parts = ("vision", "connector", "decoder")
  return Arranged("hf-llava", step.source.where, config, parts, (step,), tokenizer)


def _gpt4roi(source: pathlib.Path, options: Options) -> Arranged:
  if options.clip is None:
    raise WeightsError(
      f"{source}: GPT4RoI's checkpoints come without their vision tower; download stock CLIP "
      "(openai/clip-vit-large-patch14) and give its folder: --clip FOLDER"
    )
  tower = _clip(options.clip, Options())
  tensors = _whole_gpt4roi(source, options.base)
  model = gpt4roi.config_from_hf(
    _json(source, "config.json"),
    vision=tower.config.model.vision,
    tensors=tensors,
    vocab_multiple=options.vocab_multiple,
  )
  tokenizer = load_tokenizer(source, GPT4ROI_TOKENS)
  _check_tokens(tokenizer, model.decoder, source)
  depth = vision_depth(model)
  vision = clip.table(model.vision, depth=depth)
  steps = (
    _convert(vision, tower.steps[0].source, model, ("vision",)),
    _convert(gpt4roi.table(model), tensors, model, gpt4roi.PARTS),
  )
  config = dataclasses.replace(
    Config.gpt4roi_7b(str(source)), name=source.name, model=_computing(model, steps)
  )
  if options.template:
    config = dataclasses.replace(
      config, prompt=dataclasses.replace(config.prompt, template=options.template)
    )
  return Arranged("gpt4roi", tensors.where, config, release.PARTS, steps, tokenizer)


# Family -> what reads it.
FAMILIES: dict[str, Callable[[pathlib.Path, Options], Arranged]] = {
  "hf-clip": _clip, "hf-llama": _llama, "hf-llava": _llava, "gpt4roi": _gpt4roi, "gguf": _gguf,
}  # fmt: skip


def choose_template(chat_template: str) -> str:
  """Our template for a published chat template; without a mark that is known, Vicuna's."""
  return next((name for mark, name in CHAT_MARKS if mark in chat_template), "vicuna_v1")


def _whole_gpt4roi(source: pathlib.Path, base: pathlib.Path | None) -> TensorSource:
  """The merged checkpoint, or delta and base as if they were one."""
  tensors = open_weights(source)
  if base is None and is_delta(tensors):
    raise WeightsError(
      f"{tensors.where} is a delta: its tensors are differences to LLaMA-7B, which must be added. "
      "Give that model's folder (Hugging Face layout): --base FOLDER"
    )
  return tensors if base is None else apply_delta(open_weights(base), tensors)


def _convert(
  table: Table, source: TensorSource, model: ModelConfig, parts: tuple[str, ...]
) -> Converted:
  return Converted(table, source, table.plan(source, release.part_shapes(model, parts)))


def _computing(model: ModelConfig, steps: Any) -> ModelConfig:
  """Computes in float32 what is stored in float32, and in bfloat16 what isn't."""
  leaves = [leaf for step in steps for leaf in step.plan.leaves.values()]
  full = all(leaf.dtype == np.float32 for leaf in leaves)
  return dataclasses.replace(model, compute_dtype="float32" if full else "bfloat16")


def _check_size(tokenizer: Tokenizer, decoder: DecoderConfig, where: str) -> None:
  size, rows = tokenizer.vocab_size, decoder.vocab_size
  if size > rows or size < rows * (1 - MOST_UNUSED_ROWS):
    raise WeightsError(
      f"{where}: the tokenizer has {size:,} entries and the model's token table {rows:,} rows; "
      "they are not of one model. Put the tokenizer files that belong to these weights beside them"
    )


def _check_tokens(tokenizer: Tokenizer, decoder: DecoderConfig, source: pathlib.Path) -> None:
  first = decoder.vocab_size - len(GPT4ROI_TOKENS)
  wanted = {token: first + i for i, token in enumerate(GPT4ROI_TOKENS)}
  wrong = [
    f"{token} has id {tokenizer.added.get(token)}, expected {index}"
    for token, index in wanted.items()
    if tokenizer.added.get(token) != index
  ]
  if wrong:
    raise WeightsError(
      f"{source}: the tokenizer is not the one that GPT4RoI was trained with: {'; '.join(wrong)}. "
      "Use the tokenizer files of the delta's own folder"
    )


def _check_prompt(arranged: Arranged) -> None:
  from regionjax.prompt_checks import check_config

  config = arranged.config
  try:
    check_config(config.prompt, config.model, arranged.tokenizer)
  except ConfigError as error:
    raise WeightsError(f"{arranged.where}: {error}; choose with --template") from None


def _json(folder: pathlib.Path, name: str, *, optional: bool = False) -> dict[str, Any]:
  """An object of a folder's JSON file; {} if it may be absent and is."""
  path = folder / name
  if not path.is_file():
    if optional:
      return {}
    raise WeightsError(
      f"{folder}: no {name} there; expected a folder as Hugging Face publishes it (config.json, "
      "weights, tokenizer files)"
    )
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except (UnicodeDecodeError, json.JSONDecodeError) as error:
    raise WeightsError(f"{path}: not JSON ({error}); download it again") from None
  if not isinstance(values, dict):
    raise WeightsError(f"{path}: expected a JSON object, found {type(values).__name__}")
  return values


def _preprocessor(folder: pathlib.Path) -> dict[str, Any] | None:
  return _json(folder, "preprocessor_config.json", optional=True) or None


def _chat_template(folder: pathlib.Path) -> str:
  """A published chat template, from either place where transformers keeps it."""
  path = folder / "chat_template.jinja"
  if path.is_file():
    return path.read_text(encoding="utf-8")
  told = _json(folder, "tokenizer_config.json", optional=True).get("chat_template")
  return told if isinstance(told, str) else ""
