"""Which part of every parameter and activation lies on which device of a mesh.

  partition.shardings(config.model, tree, mesh)   NamedSharding for each leaf of a tree of
                                                  parameters, of its optimiser state, or both
  partition.constrain(x, "batch", None, "tensor") where an activation lies; nothing without a mesh

Modules declare no shardings. `tables` says by ordered regexes on parameter paths how each one is
split, `shardings` applies that to trees, `activations` is what the models call.
"""

from regionjax.partition.activations import constrain, row_shards
from regionjax.partition.shardings import dump, gathered, pad_vocabulary, shardings, specs
from regionjax.partition.tables import Rule, Split, match, rules

__all__ = [
  "Rule", "Split", "constrain", "dump", "gathered", "match", "pad_vocabulary", "row_shards",
  "rules", "shardings", "specs",
]  # fmt: skip
