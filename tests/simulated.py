"""What tests tell XLA: simulated devices, and not to optimise what runs once.

Most of a test's time goes into compiling: a third of that into optimising
machine code, half into XLA's newer way to emit fusions. Where XLA has no other
way any more it ignores that option. What XLA says of a program is seen by
`in_own_process`.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed: pip install '.[tpu]'",
)

_QUICKLY = (
  "--xla_backend_optimization_level=0",
  "--xla_llvm_disable_expensive_passes=true",
  "--xla_cpu_parallel_codegen_split_count=1",
  "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
)


def xla_flags(devices: int) -> str:
  """`XLA_FLAGS` of a process that has so many CPU devices."""
  # Told twice, a flag would make other keys in the cache of programs.
  given = os.environ.get("XLA_FLAGS", "").split()
  count = "--xla_force_host_platform_device_count="
  own = [f for f in given if f not in _QUICKLY and not f.startswith(count)]
  return " ".join((*own, f"{count}{devices}", *_QUICKLY))


def in_own_process(code_or_flags, directory):
  """Runs the command, or code, on 8 devices; warnings are not silenced."""
  if isinstance(code_or_flags, str):
    command = ["-c", code_or_flags]
  else:
    command = ["-m", "basemt_jax.cli", "compile", *code_or_flags]
  return subprocess.run(
    [sys.executable, *command],
    cwd=ROOT,
    env={
      **{k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"},
      "XLA_FLAGS": xla_flags(devices=8),
      "TMPDIR": str(directory),
    },
    capture_output=True,
    text=True,
    check=False,
  )
