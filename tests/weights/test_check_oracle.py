"""The oracle of a check is what transformers makes of the same files."""

import numpy as np
import pytest
import torch
from hf_folders import gguf_tensors, randomised, write_gguf, write_gguf_file, write_llava
from region_module import relative
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from regionjax.weights import check_numbers, check_oracle, convert
from regionjax.weights.check_oracle import open_gguf_decoder

SIZES = dict(
  vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
  num_key_value_heads=1, rms_norm_eps=1e-5, max_position_embeddings=20000,
)  # fmt: skip


def written(path, model, **fields):
  """A GGUF file of a model, with the metadata that llama.cpp's converter always writes."""
  c = model.config
  told = {
    "llama.block_count": c.num_hidden_layers,
    "llama.context_length": c.max_position_embeddings,
    "llama.embedding_length": c.hidden_size,
    "llama.feed_forward_length": c.intermediate_size,
    "llama.attention.head_count": c.num_attention_heads,
    "llama.attention.head_count_kv": c.num_key_value_heads,
    "llama.attention.layer_norm_rms_epsilon": c.rms_norm_eps,
    "llama.rope.freq_base": c.rope_parameters["rope_theta"],
  }
  tensors = gguf_tensors(model)
  if "divisors" in fields:
    tensors["rope_freqs.weight"] = fields.pop("divisors")
  return write_gguf_file(path, tensors, told | fields)


@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_is_read_as_by_transformers_own_loader(tmp_path, tied):
  path = write_gguf(tmp_path, tie_word_embeddings=tied)
  ours = open_gguf_decoder(path).whole()
  theirs = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
  for name, value in theirs.to_dict().items():
    if name not in ("head_dim", "dtype") and not name.endswith(("token_id", "name_or_path")):
      assert ours.config.to_dict()[name] == value, name
  assert ours.config.head_dim == 8 and ours.config.tie_word_embeddings == tied
  state = load_gguf_checkpoint(path, return_tensors=True, model_to_load=ours)["tensors"]
  assert len(state) == 2 * 9 + 3 - tied
  for name, value in state.items():
    assert torch.equal(ours.state_dict()[name], value), name


LLAMA3 = dict(
  rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
  original_max_position_embeddings=2048,
)  # fmt: skip


@pytest.mark.parametrize("kind", ["none", "linear", "llama3", "wide heads"])
def test_rotary_frequencies_of_a_gguf(tmp_path, kind):
  """transformers' own loader knows neither the divisors nor a head's width without RoPE's."""
  scaling = {"linear": dict(rope_type="linear", factor=2.5), "llama3": LLAMA3}.get(kind)
  sizes = SIZES | ({"head_dim": 24} if kind == "wide heads" else {})
  config = LlamaConfig(**sizes, rope_scaling=scaling, rope_theta=500.0)
  model = randomised(LlamaForCausalLM(config))
  fields = {}
  if kind == "linear":
    fields = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
  if kind == "wide heads":
    fields = {"llama.attention.key_length": 24}
  if kind == "llama3":
    plain = LlamaForCausalLM(LlamaConfig(**sizes, rope_theta=500.0)).model.rotary_emb.inv_freq
    fields["divisors"] = (plain / model.model.rotary_emb.inv_freq).numpy()
    assert fields["divisors"].min() == 1 and fields["divisors"].max() > 1
  ids = np.random.default_rng(0).integers(0, 61, 150).tolist()
  trace = open_gguf_decoder(written(tmp_path / "x.gguf", model, **fields)).run(ids)
  with torch.no_grad():
    want = model(torch.tensor([ids]), output_hidden_states=True)
  assert relative(trace.logits_1tv, want.logits.numpy()) < 1e-5
  assert len(trace.hidden) == 3
  for ours, theirs in zip(trace.hidden[:-1], want.hidden_states):  # the last is normed there
    assert relative(ours, theirs.numpy()) < 1e-5


def test_a_llava_in_parts_is_the_whole(tmp_path):
  """Tower, projector and decoder, each filled from the source's tensors."""
  folder = write_llava(tmp_path / "llava")
  arranged = convert.arrange("hf-llava", folder)
  whole = LlavaForConditionalGeneration.from_pretrained(folder).eval()
  images = check_numbers.draw_images(arranged.config.model.vision)
  pixels = torch.tensor(images.transpose(0, 3, 1, 2))
  hidden = check_oracle.hidden_states(check_oracle.open_tower(arranged, folder), images)
  with torch.no_grad():
    states = whole.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    features = whole.get_image_features(pixels).pooler_output
  assert len(hidden) == 4
  assert all(relative(a, b.numpy()) < 1e-6 for a, b in zip(hidden, states))
  tokens = check_oracle.image_tokens(arranged, folder, hidden)
  assert relative(tokens, torch.stack(list(features)).numpy()) < 1e-6
  ids = [5, 6, 7, 8]
  with torch.no_grad():
    want = whole(input_ids=torch.tensor([ids])).logits.numpy()
  trace = check_oracle.open_decoder(arranged, folder).run(ids)
  assert relative(trace.logits_1tv, want) < 1e-6


def test_a_tensor_that_transformers_expects_otherwise(tmp_path):
  model = randomised(LlamaForCausalLM(LlamaConfig(**SIZES)))
  path = written(tmp_path / "x.gguf", model, **{"llama.feed_forward_length": 40})
  with pytest.raises(convert.WeightsError, match=r"gate_proj.weight is \[48, 32\].*\[40, 32\]"):
    open_gguf_decoder(path).run([1, 2])
