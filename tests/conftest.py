"""Test set-up: eight simulated CPU devices, strict shapes, programs kept."""

import os
import pathlib

# Before jax is imported anywhere: sharding is tested on simulated devices.
# Most of the time goes into compiling: a third of that into optimising machine
# code that runs once, half into XLA's newer way to emit fusions. Where XLA has
# no other way any more it ignores that option.
os.environ["JAX_PLATFORMS"] = os.environ.get("TEST_PLATFORM", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
  os.environ["XLA_FLAGS"] = " ".join(
    [
      os.environ.get("XLA_FLAGS", ""),
      "--xla_force_host_platform_device_count=8",
      "--xla_backend_optimization_level=0",
      "--xla_llvm_disable_expensive_passes=true",
      "--xla_cpu_parallel_codegen_split_count=1",
      "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    ]
  )
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Most tests compile what another one compiles too, in this run or the last: in
# other workers, in the processes that they start, for another assertion.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "programs"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
