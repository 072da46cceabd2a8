"""LLaMA-1's sentencepiece model, made of its published pieces."""

import lzma
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2

PIECES = Path(__file__).parent / "data" / "llama1_vocab.txt.xz"
UNKNOWN, CONTROL, NORMAL, BYTE = 2, 3, 1, 6


def llama_model(**normaliser) -> sentencepiece_model_pb2.ModelProto:
  """Scores fall with the id, as in every sentencepiece BPE."""
  text = lzma.decompress(PIECES.read_bytes()).decode()
  model = sentencepiece_model_pb2.ModelProto()
  for i, piece in enumerate(text.split("\n")):
    kind = UNKNOWN if i == 0 else CONTROL if i < 3 else BYTE if i < 259 else NORMAL
    model.pieces.add(piece=piece, score=min(0, 259 - i), type=kind)
  model.trainer_spec.model_type = model.trainer_spec.BPE
  model.trainer_spec.byte_fallback = True
  model.normalizer_spec.name = "identity"
  model.normalizer_spec.remove_extra_whitespaces = False
  for key, value in normaliser.items():
    setattr(model.normalizer_spec, key, value)
  return model
