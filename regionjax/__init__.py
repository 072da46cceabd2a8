"""regionjax: region-level multimodal chat in JAX.

  import regionjax
  chat = regionjax.load()  # the small checkpoint that ships with the package
  box = regionjax.Region.box(40, 30, 90, 80, size=(128, 128))
  print(chat.ask("photo.png", "What is <region1>?", regions=[box]).text)

The names below are imported when first used: `import regionjax` alone loads neither jax nor PIL, so
`regionjax --help` is quick and a data process pays for no accelerator.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
  "Answer": "regionjax.infer.chat",
  "Example": "regionjax.data.schema",
  "Region": "regionjax.regions",
  "RegionChat": "regionjax.infer.chat",
  "from_hub": "regionjax.weights.hub",
  "load": "regionjax.infer.chat",
  "roi_align": "regionjax.ops.roi_align",
}
__all__ = [
  "Answer", "Example", "Region", "RegionChat", "__version__", "from_hub", "load", "roi_align",
]  # fmt: skip

if TYPE_CHECKING:
  from regionjax.data.schema import Example
  from regionjax.infer.chat import Answer, RegionChat, load
  from regionjax.ops.roi_align import roi_align
  from regionjax.regions import Region
  from regionjax.weights.hub import from_hub


def __getattr__(name: str) -> Any:
  if name not in _HOMES:
    raise AttributeError(f"module 'regionjax' has no attribute {name!r}")
  value = getattr(importlib.import_module(_HOMES[name]), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted(set(globals()) | set(__all__))
