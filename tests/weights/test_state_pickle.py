"""Pickles that want to run something, or are no pickles of a state dict: nothing is run."""

import builtins
import copyreg
import os
import pickle
import re
import struct

import numpy as np
import pytest
import torch
from torch_archives import Calls, archive, save

from regionjax.weights.tensors import WeightsError
from regionjax.weights.torch_file import open_torch

REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
GETATTR = b"cbuiltins\ngetattr\n"


def text(value):
  return b"V" + value.encode() + b"\n"


def call(function, *arguments):
  """The opcodes of a call; strings are arguments as they are, bytes are opcodes."""
  opcodes = [text(a) if isinstance(a, str) else a for a in arguments]
  return b"".join([function, b"(", *opcodes, b"tR"])


def attribute(value, *names):
  for name in names:
    value = call(GETATTR, value, name)
  return value


def dotted(module, name):
  """Protocol 4's STACK_GLOBAL: the name may have dots, which are walked through as attributes."""
  return text(module) + text(name) + b"\x93"


def modules_by_attributes(value):
  """From a function to the module os, by attributes of attributes."""
  namespace = call(attribute(value, "__globals__", "get"), "sys")
  return call(attribute(namespace, "modules", "get"), "os")


PROTOCOL_4 = b"\x80\x04"
# Each of them makes the file or folder `m` when it is run, which the test shows afterwards.
ATTACKS = {
  "os.system": lambda m: pickle.dumps({"w": Calls(os.system, f"touch {m}")}, 2),
  "eval": lambda m: pickle.dumps(Calls(builtins.eval, f"open({m!r}, 'w')"), 2),
  "exec, protocol 0": lambda m: pickle.dumps(Calls(builtins.exec, f"open({m!r}, 'w')"), 0),
  "eval as Python 2 has it": lambda m: call(b"c__builtin__\neval\n", f"open('{m}','w')") + b".",
  "import and getattr": lambda m: (
    call(attribute(call(b"cbuiltins\n__import__\n", "os"), "mkdir"), m) + b"."
  ),
  "getattr from an allowed name": lambda m: (
    call(attribute(modules_by_attributes(REBUILD), "mkdir"), m) + b"."
  ),
  "INST": lambda m: b"(" + text(f"touch {m}") + b"ios\nsystem\n.",
  "OBJ": lambda m: b"(cos\nsystem\n" + text(f"touch {m}") + b"o.",
  "a state that holds the call": lambda m: b"".join(
    [
      call(b"cfunctools\npartial\n", b"cbuiltins\nprint\n"),
      b"(cos\nmkdir\n(" + text(m) + b"t}Ntb)R.",
    ]
  ),
  "STACK_GLOBAL": lambda m: PROTOCOL_4 + call(dotted("os", "mkdir"), m) + b".",
  "dotted name": lambda m: PROTOCOL_4 + call(dotted("torch.serialization", "os.mkdir"), m) + b".",
  "dotted name behind an allowed one": lambda m: b"".join(
    [
      PROTOCOL_4,
      call(
        call(dotted("torch._utils", "_rebuild_tensor_v2.__builtins__.get"), "eval"),
        f"open({m!r}, 'w')",
      ),
      b".",
    ]
  ),
}


@pytest.mark.parametrize("kind", ATTACKS)
def test_attacks_are_refused_and_not_run(tmp_path, kind):
  marker = tmp_path / "marker"
  data = ATTACKS[kind](str(marker))
  path = archive(tmp_path / "a.bin", data)
  with pytest.raises(WeightsError, match="nothing of it was run") as caught:
    open_torch(path)
  assert not marker.exists()
  assert re.search(r"holds [\w.]+: this is no plain state dict; not opened", str(caught.value))
  pickle.loads(data)  # what it does to others
  assert marker.exists()


def test_the_named_function_is_in_the_message(tmp_path):
  data = pickle.dumps(Calls(os.system, "true"), 2)
  with pytest.raises(WeightsError, match=r"a\.bin holds posix\.system: this is no plain state"):
    open_torch(archive(tmp_path / "a.bin", data))
  data = PROTOCOL_4 + dotted("os", "\x1b[2J" + "a" * 200) + b"."
  with pytest.raises(WeightsError, match=r"holds 'os\.\\x1b\[2Ja{8}") as caught:
    open_torch(archive(tmp_path / "a.bin", data))
  assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
  "name", ["OrderedDict.__init__", "OrderedDict.fromkeys", "abc.sys.modules", "namedtuple"]
)
def test_names_around_the_allowed_ones(tmp_path, name):
  for data in (PROTOCOL_4 + dotted("collections", name), f"ccollections\n{name}\n".encode()):
    with pytest.raises(WeightsError, match=re.escape(f"holds collections.{name}")):
      open_torch(archive(tmp_path / "a.bin", data + b"."))


def test_an_extension_code_from_the_cache(tmp_path):
  copyreg.add_extension("os", "system", 200)
  try:
    data = b"\x80\x02\x82\xc8Vtrue\n\x85R."
    assert pickle.loads(data) == 0  # from here on, code 200 is os.system without a look-up
    with pytest.raises(WeightsError, match="uses an extension code"):
      open_torch(archive(tmp_path / "a.bin", data))
  finally:
    copyreg.remove_extension("os", "system", 200)


TAMPERING = {
  "state of a name": REBUILD + b"}Vmake\nI1\nsb.",
  "slots of a name": REBUILD + b"(N}Vmake\nI1\nstb.",
  "state of a storage": b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI1\ntQN}Vcount\nI9\ns\x86b.",
  "state of a tensor": REBUILD + b"(I0\nI0\n))tR}Voffset\nI9\nsb.",
  "new object": REBUILD + b")\x81.",
  "calls a type": b"ctorch\nFloatStorage\n)R.",
  "appends to a name": REBUILD + b"I1\na.",
  "item of a name": REBUILD + b"I1\nI1\ns.",
  "storage of another kind": b"(Vmodule\nctorch\nFloatStorage\nV0\nVcpu\nI1\ntQ.",
  "storage that is a function": b"(Vstorage\n" + REBUILD + b"V0\nVcpu\nI1\ntQ.",
  "key that is a tuple": b"(Vstorage\nctorch\nFloatStorage\n)Vcpu\nI1\ntQ.",
  "no tuple": b"Vstorage\nQ.",
  "too few arguments": REBUILD + b")R.",
  "length beyond the file": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b".",
  "unknown opcode": b"\xff.",
  "empty": b"",
  "empty stack": b".",
  "unhashable": b"}}N" + b"s.",
}


@pytest.mark.parametrize("kind", TAMPERING)
def test_tampering_is_refused(tmp_path, kind):
  with pytest.raises(WeightsError, match=r"data\.pkl is damaged or no state dict"):
    open_torch(archive(tmp_path / "a.bin", TAMPERING[kind]))
  good = open_torch(save(tmp_path / "b.bin", {"w": torch.arange(3)[1:]}))  # the table is as it was
  np.testing.assert_array_equal(good["w"].array(), [1, 2])


def test_a_memo_table_with_gaps(tmp_path):
  """Entry 2**28 would make the unpickler allocate 4 GB for the table."""
  for put in (b"r" + struct.pack("<I", 2**28), b"p268435456\n"):
    with pytest.raises(WeightsError, match="memo table has gaps"):
      open_torch(archive(tmp_path / "a.bin", b"}" + put + b"."))
