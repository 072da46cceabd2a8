"""How fast regionjax is beside PyTorch on this machine.

  python launch/benchmark.py [--only roi_align,vit,decoder,region_module,training,input]
      [--json FILE] [--torchvision-python PATH] [--rounds N] [--full] [--photos FOLDER]
      [--compiled FILE]

Each case runs ours and theirs in turn, N rounds after a warm-up, and reports medians, their ratio
(theirs / ours), and the quartiles of the ratio in a round: what else the machine does then hits
both, and a wide spread says that it did. PyTorch runs in a process of its own
(`benchmark_torch.py`): this environment's, or for the cases that need torchvision the one whose
interpreter `--torchvision-python` names. What is not installed is said and skipped. float32
unless a case says otherwise, random weights of the same sizes, all cores; where jax has a GPU,
both run on it, ours as jax chooses, theirs in eager mode. `--full` takes the region module at
GPT4RoI's published size (2 TFLOP an image) instead of a quarter of its width, and as `decoder` a 7B
in bfloat16. `training` is a step of a small region VLM (see `benchmark_training.py`), in float32
and in bfloat16, and prints where its time goes. `input` is the input pipeline on one core (see
`benchmark_input.py`), in CPU seconds; with `--compiled`, a file that `regionjax compile --json`
wrote, it says how many cores feed that pod.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmark_input import input_cases, photographs, print_demand
from benchmark_profile import print_profile, profile
from benchmark_training import training_cases

from regionjax.config import DecoderConfig, ModelConfig, RegionConfig, VisionConfig
from regionjax.infer import programs
from regionjax.infer.batching import Prompt, pad_prompts
from regionjax.infer.programs import PromptArrays
from regionjax.infer.sampling import row_keys
from regionjax.models.params import model_for, param_shapes, unstack_layers
from regionjax.models.region_encoders import make_region_encoder
from regionjax.models.region_lm import ImageFeatures
from regionjax.models.vit import VisionTransformer
from regionjax.ops.roi_align import roi_align
from regionjax.train.state import cast

Step = Callable[[], Any]
ROI_SHAPES = ((16, 1024), (112, 256), (128, 1024))  # cells per side, channels
ROI_BINS, ROI_RATIO = 14, 2


class TorchWorker:
  """A PyTorch process that builds and times one case at a time."""

  def __init__(self, python: str):
    script = Path(__file__).with_name("benchmark_torch.py")
    self.process = subprocess.Popen(
      [python, str(script), "cuda" if jax.default_backend() == "gpu" else "cpu"],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def ask(self, **request: Any) -> dict:
    assert self.process.stdin and self.process.stdout
    try:
      self.process.stdin.write(json.dumps(request) + "\n")
      self.process.stdin.flush()
      line = self.process.stdout.readline()
    except BrokenPipeError:
      line = ""
    if not line:  # the process is gone: most often torch itself is missing
      return dict(absent=f"torch does not run in {self.process.args[0]}")
    return json.loads(line)

  def close(self) -> None:
    with contextlib.suppress(BrokenPipeError):  # it may be gone already
      self.process.stdin.close()
    self.process.wait()


def random_boxes(count: int) -> np.ndarray:
  """Boxes [count, 4] with sides from 5 to 65 % of the image, clipped to it."""
  rng = np.random.default_rng(1)
  centre, size = rng.random((count, 2)), rng.random((count, 2)) * 0.6 + 0.05
  corners = np.concatenate([centre - size / 2, centre + size / 2], axis=1)
  return np.clip(corners, 0, 1).astype(np.float32)


def random_like(shapes: Any) -> Any:
  """Parameters of the given shapes and types: time does not depend on their values."""
  leaves, tree = jax.tree.flatten(shapes)
  draw = jax.jit(
    lambda key, s: (0.02 * jax.random.normal(key, s.shape)).astype(s.dtype), static_argnums=1
  )
  keys = jax.random.split(jax.random.key(0), len(leaves))
  return tree.unflatten([draw(key, s) for key, s in zip(keys, leaves)])


def count(params: Any) -> int:
  return sum(x.size for x in jax.tree.leaves(params))


def roi_align_cases():
  """RoIAlign, forward and with its gradient, on the sizes that GPT4RoI's levels have."""
  boxes = random_boxes(16)
  run = lambda x: roi_align(  # noqa: E731
    x, jnp.asarray(boxes)[None], output_size=ROI_BINS, sampling_ratio=ROI_RATIO
  )
  for side, channels in ROI_SHAPES:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, side, side, channels), dtype=np.float32))
    ones = jnp.ones((1, 16, ROI_BINS, ROI_BINS, channels))

    def forward_backward(x, ones):
      out, transpose = jax.vjp(run, x)
      return out, transpose(ones)

    steps = dict(
      forward=bind(run, x),
      forward_backward=bind(forward_backward, x, ones),
    )
    sizes = dict(side=side, channels=channels, boxes=boxes.tolist(), bins=ROI_BINS, ratio=ROI_RATIO)
    facts = dict(mean_abs=float(jnp.abs(run(x)).mean()))
    yield f"{side}x{side}x{channels}, 16 boxes", sizes, steps, facts


def vit_cases():
  """CLIP's vision tower at the size of ViT-B/16, one image."""
  config = VisionConfig(
    image_size=224, patch_size=16, width=768, layers=12, heads=12, mlp_width=3072
  )
  model = VisionTransformer(config, scan_layers=False)
  images = jax.random.normal(jax.random.key(0), (1, 224, 224, 3))
  params = random_like(jax.eval_shape(model.init, jax.random.key(0), images))
  sizes = dict(image=224, patch=16, width=768, layers=12, heads=12, mlp=3072)
  steps = dict(forward=bind(model.apply, params, images))
  yield "ViT-B/16, 224 px, batch 1", sizes, steps, dict(parameters=count(params))


def decoder_cases(full: bool):
  """Greedy generation by a decoder of SmolLM2-135M's size: `infer.programs`, which `chat` runs.

  The prompt alone, and the prompt with the new tokens behind it. Ours also feeds the last token
  back, so that the next turn can follow; Hugging Face's `generate` does not. In full a LLaMA-7B in
  bfloat16, with prompts of an image's length.
  """
  if full:
    prompt, new, dtype = 512, 64, "bfloat16"
    sizes = dict(vocab=32000, width=4096, layers=32, heads=32, kv_heads=32, mlp=11008)
  else:
    prompt, new, dtype = 64, 32, "float32"
    sizes = dict(vocab=49152, width=576, layers=30, heads=9, kv_heads=3, mlp=1536)
  decoder = DecoderConfig(
    vocab_size=sizes["vocab"], width=sizes["width"], layers=sizes["layers"], heads=sizes["heads"],
    kv_heads=sizes["kv_heads"], head_dim=sizes["width"] // sizes["heads"], mlp_width=sizes["mlp"],
    tie_embeddings=not full,
  )  # fmt: skip
  sizes |= dict(prompt=prompt, new=new, dtype=dtype)
  # The text is all there is: the images' and regions' parts are as small as they come, and idle.
  config = dataclasses.replace(ModelConfig.tiny("none"), decoder=decoder, compute_dtype=dtype)
  shapes = jax.eval_shape(lambda tree: cast(unstack_layers(tree), dtype), param_shapes(config))
  params = random_like(shapes)
  for rows in (1, 8) if full else (1,):
    yield decoder_case(config, params, sizes | dict(rows=rows))


def decoder_case(config: ModelConfig, params: Any, sizes: dict) -> tuple:
  """(title, sizes, steps, facts) of so many equal prompts."""
  rows, prompt, new = (sizes[name] for name in ("rows", "prompt", "new"))
  model, dtype = model_for(config, generate=True), jnp.dtype(config.compute_dtype)
  ids = np.random.default_rng(0).integers(0, sizes["vocab"], prompt).astype(np.int32)
  arrays = pad_prompts(
    [Prompt(ids)] * rows, rows=rows, patches=config.vision.tokens, pad_id=0, region_slot_id=-1
  )
  arrays = PromptArrays(*map(jnp.asarray, arrays))
  none = jnp.array([-1], jnp.int32)  # no id stops
  beyond = jnp.array([config.decoder.padded_vocab], jnp.int32)  # nor is any banned
  one, keys = jnp.float32(1.0), row_keys(0, jnp.arange(rows))

  def prefill():
    cache = programs.new_cache(config.decoder, rows, prompt + new, dtype)
    start = programs.prefill(model, params, ImageFeatures(None, None), arrays, cache)
    return jax.block_until_ready(start)

  def generate():
    logits, cache = prefill()
    start = programs.Running(cache, logits, jnp.zeros(rows, bool), jnp.zeros(rows, jnp.int32))
    tokens, _ = programs.decode(
      model, params, start, keys, none, beyond, jnp.int32(new), one, one, steps=new, greedy=True
    )
    return np.asarray(tokens)

  if (generate() < 0).any():
    raise RuntimeError(f"decoder: fewer than {new} tokens were generated")
  parameters = count(params["decoder"])
  title = f"{parameters / 1e6:.0f}M LLaMA, {rows} x {prompt}+{new}"
  return title, sizes, dict(prefill=prefill, prefill_decode=generate), dict(parameters=parameters)


def region_module_cases(full: bool):
  """GPT4RoI's region module, one image with 8 boxes."""
  region = RegionConfig() if full else RegionConfig(width=256)
  config = ModelConfig(region=region, compute_dtype="float32")
  encoder = make_region_encoder(config)
  boxes = random_boxes(8)
  key = jax.random.key(0)
  hidden = [jax.random.normal(key, (1, 1, 256, config.vision.width)) for _ in region.layers]
  zeros = jnp.zeros((1, 8), jnp.int32)
  args = (jnp.asarray(boxes)[None], zeros, zeros + 2, zeros == 0, jnp.zeros((1, 8, 256)))
  params = random_like(jax.eval_shape(encoder.init, key, hidden, *args))
  sizes = dict(
    boxes=boxes.tolist(), channels=config.vision.width, width=region.width,
    out=config.decoder.width, grid=16, upsample=region.upsample, rounds=region.rounds,
    groups=region.groups, bins=region.output_size, ratio=region.sampling_ratio,
    position=region.position_width, token=region.token_width,
  )  # fmt: skip
  steps = dict(forward=bind(encoder.apply, params, hidden, *args))
  yield f"width {region.width}, 8 boxes", sizes, steps, dict(parameters=count(params))


def bind(f: Callable, *args: Any) -> Step:
  """The jitted function on these arguments, waiting for its result."""
  jitted = jax.jit(f)
  return lambda: jax.block_until_ready(jitted(*args))


def alternate(
  ours: Step, theirs: Callable[[], float] | None, rounds: int, clock: Callable[[], float]
) -> tuple[list[float], list[float]]:
  """Seconds of ours and of theirs (nan without), `rounds` turns each, after a warm-up."""
  times: tuple[list[float], list[float]] = ([], [])
  for i in range(rounds + 1):
    start = clock()
    ours()
    seconds = clock() - start
    other = theirs() if theirs else float("nan")
    if clock is time.process_time:  # with what our threads did while the other process had its turn
      seconds = clock() - start
    if i:
      times[0].append(seconds)
      times[1].append(other)
  return times


def measure(name: str, case, worker: TorchWorker, rounds: int) -> list[dict]:
  """One row per timed step of a case."""
  title, sizes, steps, facts = case
  made = worker.ask(make=name, sizes=sizes)
  for key in ("mean_abs", "parameters"):
    # The vision towers differ by the post-layernorm that GPT4RoI's never runs.
    if key in made and key in facts and abs(made[key] / facts[key] - 1) > 1e-4:
      raise RuntimeError(f"{name} {title}: {key} is {facts[key]} here and {made[key]} in PyTorch")
  cpu = facts.get("clock") == "cpu"
  rows = []
  for step, ours in steps.items():
    theirs = None
    if step in made.get("steps", ()):
      key = "cpu_seconds" if cpu else "seconds"
      theirs = lambda step=step, key=key: worker.ask(run=step)[key]  # noqa: E731
    clock = time.process_time if cpu else time.perf_counter
    ours_s, theirs_s = alternate(ours, theirs, rounds, clock)
    row: dict[str, Any] = dict(case=name, size=title, step=step.replace("_", "+"), **facts)
    row |= dict(ours_ms=milliseconds(ours_s), ours_min_ms=milliseconds(ours_s, min))
    row |= dict(theirs_ms=None, theirs_min_ms=None, ratio=None, ratio_quartiles=None)
    if theirs:
      row |= dict(theirs_ms=milliseconds(theirs_s), theirs_min_ms=milliseconds(theirs_s, min))
      row["ratio"] = round(statistics.median(theirs_s) / statistics.median(ours_s), 2)
      low, high = np.quantile(np.divide(theirs_s, ours_s), (0.25, 0.75))
      row["ratio_quartiles"] = [round(float(low), 2), round(float(high), 2)]
    row["against"] = (
      made["against"] if theirs else "absent: " + made.get("absent", "PyTorch has none")
    )
    print(format_row(row), flush=True)
    rows.append(row)
  return rows


def milliseconds(seconds: list[float], of: Callable = statistics.median) -> float:
  return round(1e3 * of(seconds), 2)


LINE = "{:<13} {:<26} {:<16} {:>9} {:>9} {:>7} {:>11}  {}"
HEADER = ("case", "size", "step", "ours ms", "theirs ms", "ratio", "quartiles", "against")


def format_row(row: dict) -> str:
  theirs = ratio = spread = "-"
  if row["theirs_ms"] is not None:
    theirs, ratio = f"{row['theirs_ms']:.1f}", f"{row['ratio']:.2f}x"
    spread = "{:.2f}-{:.2f}".format(*row["ratio_quartiles"])
  ours = f"{row['ours_ms']:.1f}"
  return LINE.format(
    row["case"], row["size"], row["step"], ours, theirs, ratio, spread, row["against"]
  )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  names = ("roi_align", "vit", "decoder", "region_module", "training", "input")
  parser.add_argument("--only", default=",".join(names), help="comma-separated cases")
  parser.add_argument("--json", type=Path, help="also write the table here")
  parser.add_argument(
    "--torchvision-python", default=sys.executable, metavar="PATH",
    help="interpreter that has torch and torchvision (roi_align, region_module, input)",
  )  # fmt: skip
  parser.add_argument("--rounds", type=int, default=9, help="turns per case (default %(default)s)")
  parser.add_argument("--full", action="store_true", help="sizes as published")
  parser.add_argument(
    "--photos", type=Path, metavar="FOLDER",
    help="JPEG files for `input` (default: scikit-learn's two of 640 x 427)",
  )  # fmt: skip
  parser.add_argument(
    "--compiled", type=Path, metavar="FILE",
    help="what `regionjax compile --json` wrote: the pod that `input` is to feed",
  )  # fmt: skip
  args = parser.parse_args(argv)
  args.only = args.only.split(",")
  unknown = set(args.only) - set(names)
  if unknown:
    parser.error(f"--only: unknown {', '.join(sorted(unknown))}; known: {', '.join(names)}")
  if args.rounds < 1:
    parser.error(f"--rounds={args.rounds}: at least 1 is needed")
  return args


def main(argv: list[str] | None = None) -> None:
  args = parse_arguments(argv)
  # The bare command compares in one environment; torchvision may need one of its own.
  pythons = dict.fromkeys(("roi_align", "region_module", "input"), args.torchvision_python)
  cases = dict(
    roi_align=roi_align_cases,
    vit=vit_cases,
    decoder=lambda: decoder_cases(args.full),
    region_module=lambda: region_module_cases(args.full),
    training=training_cases,
    input=lambda: input_cases(photographs(args.photos)),
  )
  cores, load = os.cpu_count() or 1, os.getloadavg()[0]
  if load > cores / 2:
    print(
      f"note: load average {load:.1f} on {cores} cores. Other work runs, which costs PyTorch more "
      "than us (its threads wait for each other): repeat on a quiet machine before quoting ratios."
    )
  print(LINE.format(*HEADER))
  rows = []
  for name in args.only:
    worker = TorchWorker(pythons.get(name, sys.executable))
    try:
      for case in cases[name]():
        rows += measure(name, case, worker, args.rounds)
        if name == "training" and jax.default_backend() == "cpu":
          step = case[2]["step"]
          print_profile(profile(step, step.text()))
    finally:
      worker.close()
    if name == "input":
      print_demand(rows, args.compiled)
  if args.json:
    machine = dict(
      processor=platform.processor() or platform.machine(), cores=cores, load_average=load,
      python=platform.python_version(), jax=jax.__version__, device=str(jax.devices()[0]),
    )  # fmt: skip
    args.json.write_text(json.dumps(dict(machine=machine, rounds=args.rounds, rows=rows), indent=2))


if __name__ == "__main__":
  main()
