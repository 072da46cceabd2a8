"""A report as a table for people, JSON for programs, and a picture of memory and time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from regionjax.chips import GIB

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Report:
  """What was measured, as plain values; bytes are per chip, FLOPs of all chips.

  Attributes:
    values: see `analysis`. Where the program doesn't fit only `memory` and what comes before it.
  """

  values: dict[str, Any]

  def __getitem__(self, key: str) -> Any:
    return self.values[key]

  @property
  def fits(self) -> bool:
    return bool(self.values["fits"])

  @property
  def title(self) -> str:
    v = self.values
    mesh = " ".join(f"{name}={size}" for name, size in v["mesh"].items() if size > 1) or "1 device"
    slices = f" x {v['topology']['slices']} slices" if v["topology"]["slices"] > 1 else ""
    return f"{v['config']} {v['program']} on {v['topology']['name']}{slices}, {mesh}"

  def write(self, path: Path) -> None:
    """Writes JSON, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(self.values, indent=2) + "\n")
    part.replace(path)

  def table(self) -> str:
    """For a terminal: a line per fact, the verdict first."""
    v = self.values
    lines = [self.title, ""]
    lines += [f"  {name:<22}{text}" for name, text in _facts(v)]
    if v.get("collectives"):
      lines += ["", *_collective_lines(v["collectives"])]
    lines += [f"\nwarning: {text}" for text in v["warnings"]]
    return "\n".join(lines)

  def with_measured(self, measured: dict[str, Any]) -> Report:
    """The same with what was measured where it ran, see `running`."""
    return Report(self.values | {"measured": measured})

  def measured_line(self) -> str:
    """What was measured, beside what the machine would take at its peak."""
    m, bound = self.values["measured"], self.values["time"]["step"]
    return (
      f"  {'measured':<22}{m['seconds']:.4g} s a step ({m['least']:.4g} to {m['most']:.4g}, "
      f"{m['runs']} runs): {m['seconds'] / bound:.2f} x the least that the peaks allow; MFU "
      f"{m['mfu']:.1%}, {m['tokens_per_second_per_chip']:.0f} tokens/s per chip; "
      f"{_gib(m['peak_bytes'])} GiB at the worst moment"
    )


def read(path: Path) -> Report | None:
  """A written report; None where there is none, or one of another release."""
  try:
    values = json.loads(path.read_text())
  except (FileNotFoundError, ValueError):
    return None
  return Report(values) if values.get("schema") == SCHEMA else None


def _facts(v: dict[str, Any]) -> list[tuple[str, str]]:
  memory, row = v["memory"], v["row"]
  verdict = "fits" if v["fits"] else "DOES NOT FIT"
  peak = f"{_gib(memory['peak'])} of {_gib(memory['usable'])} GiB" if memory["peak"] else "unknown"
  facts = [("memory per chip", f"{verdict}: {peak}")]
  parts = ", ".join(f"{k} {_gib(n)}" for k, n in memory["parts"].items())
  if "temporaries" in memory:
    parts += f", padding {_gib(memory['padding'])}"
    facts.append(("  temporaries, code", f"{_gib(memory['temporaries'])}, {_gib(memory['code'])}"))
  total = memory.get("arguments", sum(memory["parts"].values()))
  facts.append(("  arguments", f"{_gib(total)}: {parts}"))
  if v["program"] == "train":
    facts.append((
      "batch",
      f"{v['rows']} rows ({v['rows_per_chip']:g} per chip) of {row['tokens']} tokens, "
      f"{row['images']} images, {row['regions']} regions; remat {v['remat']}",
    ))  # fmt: skip
  facts.append((
    "compiled in",
    f"{v['compile_seconds']:.0f} s ({v['compile_cpu_seconds']:.0f} s of CPU), traced in "
    f"{v['trace_seconds']:.0f} s",
  ))  # fmt: skip
  facts += _work_facts(v) if "time" in v else []
  found = v["versions"]
  facts.append(("versions", ", ".join(f"{name} {text}" for name, text in found.items())))
  return facts


def _work_facts(v: dict[str, Any]) -> list[tuple[str, str]]:
  flops, time = v["flops"], v["time"]
  facts = [
    ("model FLOPs", f"{flops['model']:.4g} a step"),
    (
      "hardware FLOPs",
      f"{flops['hardware']:.4g}: {flops['hardware_over_model']:.3f} x the model's, "
      f"{flops['hardware_over_jaxpr']:.3f} x the traced program's",
    ),
    ("HBM traffic", f"{v['hbm_bytes'] / 1e9:.1f} GB per chip"),
    (
      "seconds at peak",
      f"compute {time['compute']:.4g}, HBM {time['hbm']:.4g}, links {time['ici']:.4g}, "
      f"network {time['dcn']:.4g}",
    ),
    (
      "step",
      f"{time['step']:.4g} s with everything overlapped, {time['serial']:.4g} s with nothing; "
      f"bound by {time['bottleneck']}",
    ),
    ("MFU", f"{v['mfu']:.1%} at most, {v['mfu_serial']:.1%} without overlap"),
    ("tokens/s per chip", f"{v['tokens_per_second_per_chip']:.0f} at most"),
  ]
  if time["compiler"]:  # only a TPU's says
    facts.append(("compiler's estimate", f"{time['compiler']:.4g} s without communication"))
  if v["fsdp"]:
    f = v["fsdp"]
    facts.append((
      "parameters",
      f"gathered {f['gathers_mean']:.2f} times a step, at most {f['gathers_most']:.2f} "
      f"({f['gathers_most_of'] or 'none'}); gradients reduced {f['reductions_mean']:.2f} times",
    ))  # fmt: skip
  return facts


def _collective_lines(rows: list[dict[str, Any]]) -> list[str]:
  head = (
    f"  {'collective':<22}{'over':<14}{'runs':>8}{'GB':>10}{'GB sent':>10}{'ICI s':>9}{'DCN s':>9}"
  )
  lines = [head]
  for r in rows:
    lines.append(
      f"  {r['kind']:<22}{r['axes']:<14}{r['times']:>8.0f}{r['bytes'] / 1e9:>10.2f}"
      f"{r['traffic'] / 1e9:>10.2f}{r['ici_seconds']:>9.4f}{r['dcn_seconds']:>9.4f}"
    )
  return lines


def _gib(count: float) -> str:
  return f"{count / GIB:.2f}"


_COLOURS = ("#3b6ea8", "#8fb4dc", "#6a9a58", "#d9b44a", "#c06c4b", "#7d5a9b", "#9a9a9a", "#d0d0d0")


def picture(report: Report, path: Path) -> None:
  """Two charts: what fills a chip's memory, and what a step's time would be spent on.

  Args:
    report: of a program that fits or not.
    path: of a PNG.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  v = report.values
  figure = Figure(figsize=(8, 3.8), layout="constrained")
  FigureCanvasAgg(figure)
  upper, lower = figure.subplots(2, 1)
  _draw_memory(upper, v["memory"])
  if "time" in v:
    _draw_time(lower, v["time"], v["mfu"])
  else:
    lower.set_axis_off()
  for axes in (upper, lower):
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
  verdict = "" if v["fits"] else ": DOES NOT FIT"
  figure.suptitle(f"{report.title}{verdict}", fontsize=10)
  figure.savefig(path, dpi=150)


def _draw_memory(axes: Any, memory: dict[str, Any]) -> None:
  """One stacked bar; of a program that doesn't fit, what isn't known in parts is one."""
  parts = dict(memory["parts"])
  parts |= {name: memory[name] for name in ("temporaries", "code", "padding") if name in memory}
  rest = memory["peak"] - sum(parts.values())
  if rest > 0.005 * memory["peak"]:
    parts["outputs" if "temporaries" in memory else "temporaries and code"] = rest
  left = 0.0
  for (name, count), colour in zip(parts.items(), _COLOURS):
    size = count / GIB
    axes.barh([0], [size], left=left, color=colour, height=0.6, label=f"{name} {size:.2f}")
    left += size
  usable = memory["usable"] / GIB
  axes.axvline(usable, color="black", lw=1)
  axes.annotate(f"usable {usable:.2f} ", (usable, 0.4), fontsize=8, ha="right")
  axes.set_ylim(-0.5, 1.1)
  axes.set_yticks([])
  axes.set_xlabel(f"GiB per chip, {left:.2f} at the peak", fontsize=8)
  axes.legend(fontsize=7, ncols=4, frameon=False, loc="upper left")


def _draw_time(axes: Any, t: dict[str, Any], mfu: float) -> None:
  """A bar for each part of the machine, and the step that they allow."""
  parts = {
    "compute": t["compute"], "HBM": t["hbm"], "chip": t["kernels"], "links": t["ici"],
    "network": t["dcn"],
  }  # fmt: skip
  parts = {name: seconds for name, seconds in parts.items() if seconds > 0}
  colours = dict(zip(("compute", "HBM", "chip", "links", "network"), _COLOURS))
  bars = axes.barh(
    list(parts), list(parts.values()), color=[colours[name] for name in parts], height=0.6
  )
  axes.bar_label(bars, labels=[f" {seconds:.3g}" for seconds in parts.values()], fontsize=8)
  axes.invert_yaxis()
  axes.axvline(t["step"], color="black", lw=1)
  axes.set_xlim(0, 1.1 * max(t["step"], *parts.values()))
  axes.set_xlabel(
    f"seconds at peak; chip: compute or HBM, kernel by kernel; line: the step with everything "
    f"overlapped, MFU {mfu:.1%}",
    fontsize=8,
  )
