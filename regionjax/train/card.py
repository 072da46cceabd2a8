"""The model card of a release: what it is, how it was made, how well it does."""

from __future__ import annotations

from typing import Any

from regionjax.config import Config
from regionjax.train.evals import SPLIT_SOURCES
from regionjax.train.progress import duration, short


def write_card(config: Config, summary: dict[str, Any], *, step: int) -> str:
  """Markdown from a run's summary (see `summary.summarize`)."""
  model, parameters = config.model, summary["parameters"]
  tokens, git = summary["tokens"], summary["git"]
  parts = ", ".join(
    f"{name} {short(count)}"
    for name, count in parameters.items()
    if name not in ("total", "trainable", "non_embedding")
  )
  commit = "not from a repository"
  if git is not None:
    commit = git["hash"] + (" with uncommitted changes" if git["changed"] else "")
  lines = [
    f"# {config.name}",
    "",
    f"A region-level multimodal chat model of regionjax: {short(parameters['total'])} parameters "
    f"({parts}), trained in {model.compute_dtype}, regions by `{model.region.kind}`, images of "
    f"{model.vision.image_hw[0]} x {model.vision.image_hw[1]} pixels.",
    "",
    "    import regionjax",
    '    chat = regionjax.load("this folder")',
    "",
    "## How it was made",
    "",
    "    " + (summary["command"] or "regionjax.train.loop.train(config, workdir)"),
    "",
    f"- data: {_sources(config)}",
    f"- {summary['steps']} steps, {short(summary['examples'])} examples, "
    f"{short(tokens['llm'])} tokens (of them {short(tokens['image'])} of images, "
    f"{short(tokens['supervised'])} supervised), {summary['flops']:.3g} FLOPs",
    f"- {duration(summary['wall_seconds'])} on {summary['device']['count']} x "
    f"{summary['device']['kind']} ({summary['device']['host_cores']} CPU cores)"
    + (", ended by its time limit: not reproducible bit by bit" if summary["time_limited"] else ""),
    f"- seeds {summary['seeds']['train']} (model) and {summary['seeds']['data']} (data); "
    f"commit {commit}",
    f"- weights of step {step}"
    + (" (the best evaluation loss)" if step != summary["steps"] else ""),
    "",
    "## How well it does",
    "",
    *_results(summary),
    "",
    "## What it is not",
    "",
    "It knows the kind of images, questions and answers that it was trained on. Its answers about "
    "anything else are guesses in the same form, and nothing in them says so.",
    "",
  ]
  return "\n".join(lines)


def _sources(config: Config) -> str:
  texts = []
  for source in config.data.sources:
    args = ", ".join(f"{k}={v!r}" for k, v in source.args.items())
    texts.append(f"`{source.name}`" + (f" ({args})" if args else ""))
  return ", ".join(texts)


def _results(summary: dict[str, Any]) -> list[str]:
  accuracy, loss = summary["accuracy"], summary["loss"]
  unseen = all(s["name"] in SPLIT_SOURCES for s in summary["config"]["data"]["sources"])
  about = "about unseen examples" if unseen else "(some about examples that it was trained on)"
  if accuracy["accuracy"] is None:
    return ["Not evaluated."]
  lines = [
    f"Teacher-forced exact match of {accuracy['answers']} answers {about}, at the last step: "
    f"**{accuracy['accuracy']:.1%}**; their loss is {loss['evaluation']:.4f} per token.",
    "",
  ]
  for title, key in (("task", "by_task"), ("reference", "by_reference")):
    lines += [f"| {title} | exact match |", "|---|---|"]
    lines += [f"| {name} | {value:.1%} |" for name, value in accuracy[key].items()]
    lines.append("")
  return lines[:-1]
