"""Packaging of basemt_jax: metadata, extras, and the gin files in a wheel."""

import pathlib
import shutil

import setuptools
from setuptools.command import build_py

ROOT = pathlib.Path(__file__).parent


class BuildWithGin(build_py.build_py):
  """Copies `gin/` to `basemt_jax/gin/` in the build.

  A top-level `gin` directory in site-packages belongs to gin-config, so the
  recipes travel inside the package; `cli` looks for them in either place.
  """

  def run(self):
    """Builds as usual, then copies."""
    super().run()
    if not self.editable_mode:
      shutil.copytree(
        ROOT / "gin",
        pathlib.Path(self.build_lib) / "basemt_jax" / "gin",
        dirs_exist_ok=True,
      )


setuptools.setup(
  name="basemt_jax",
  version="0.1.0",
  description=(
    "Sparse multilingual translation in JAX: BASE layers, temperature-heated "
    "sampling, dense pre-training"
  ),
  long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["basemt_jax*", "tasks"]),
  package_data={
    "tasks": ["*.model"],
    "basemt_jax.exports": ["*.md"],
    "basemt_jax.inspection": ["*.html"],
    "basemt_jax.serving": ["*.html"],
  },
  cmdclass={"build_py": BuildWithGin},
  entry_points={"console_scripts": ["basemt = basemt_jax.cli:run"]},
  install_requires=[
    "absl-py>=2.1",
    "annotated-types>=0.7",
    "babel>=2.16",
    "clu>=0.0.12",
    "filelock>=3.12",  # JAX bounds its cache of programs with it.
    "flax>=0.12,<0.13",
    "gin-config>=0.5.0",
    "jax>=0.10,<0.13",
    "langcodes>=3.4",
    "jinja2>=3.1",
    "num2words>=0.5.13",
    "numpy>=2.0",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "pydantic>=2.10",
    "regex>=2024.4.16",
    "rich>=13",
    "sacrebleu>=2.4",
    "sentencepiece>=0.2",
    "seqio>=0.0.20",
    "tensorboard",
    "tensorboardX>=2.6",
    "typing_extensions>=4.12",
    "vl-convert-python>=1.9",
    "xxhash>=3",
  ],
  extras_require={
    "beam": ["apache-beam>=2.60"],
    "export": ["ctranslate2>=4.5", "safetensors>=0.5"],
    "gpu": ["jax[cuda13]"],
    "ja": ["sacrebleu[ja]"],
    "ko": ["sacrebleu[ko]"],
    "mlflow": ["mlflow-skinny>=3"],
    "serve": ["fastapi>=0.115", "uvicorn>=0.30"],
    "study": ["matplotlib>=3.8"],
    "tpu": ["jax[tpu]"],
    "trackio": ["trackio>=0.2"],
    "wandb": ["wandb>=0.19"],
    "test": [
      "ctranslate2>=4.5",
      "fastapi>=0.115",
      "hypothesis>=6.100",
      "matplotlib>=3.8",
      "mypy>=1.14",
      "playwright>=1.40",
      "pytest>=8",
      "pytest-xdist>=3.5",
      "ruff>=0.14",
      "safetensors>=0.5",
      "scipy>=1.13",
      "uvicorn>=0.30",
    ],
  },
  classifiers=[
    "Intended Audience :: Science/Research",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
  ],
)
