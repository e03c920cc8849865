"""`basemt compile`: what a training step costs, without running it."""

import argparse
import os
import pathlib

from basemt_jax.commands import configuration, flags

SUMMARY = (
  "Compile a run's training step ahead of time, and report what it costs."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of this command."""
  parser.add_argument(
    "--topology",
    metavar="NAME",
    help="TPU slice that need not be here, such as v5e:16x16, v5p:4x4x8 or "
    "v4:4x4x8; default: the devices at hand",
  )
  parser.add_argument(
    "--phase", choices=("sparse", "dense"), default="sparse", help="of the run"
  )
  parser.add_argument(
    "--vocab_size",
    type=int,
    help="with this the mixture need not exist; default: the vocabulary's",
  )
  parser.add_argument(
    "--directions", type=int, default=30, help="used with --vocab_size"
  )
  parser.add_argument(
    "--json", metavar="FILE", type=flags.path, help="the report for programs"
  )


def run(options: argparse.Namespace) -> int:
  """Runs the command."""
  import json

  if options.topology:
    # Whatever accelerator this host has. Before JAX is loaded.
    os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["TF_CPP_MIN_LOG_LEVEL"] = "1"  # Warnings go into the report.
  macros = {}
  if options.vocab_size:
    macros = {"MODEL_DIR": "unused", "MIXTURE_OR_TASK_NAME": "unused"}
  run = configuration.configured(options, None, **macros)
  from basemt_jax import run as run_lib
  from basemt_jax.compilation import ahead_of_time
  from basemt_jax.inspection import compile_report, tables

  devices = None
  if options.topology:
    devices = ahead_of_time.topology_devices(options.topology)
  program = run_lib.program(
    run, devices, options.phase, options.vocab_size, options.directions
  )
  report = ahead_of_time.report(
    program, run.batch_size, run.task_feature_lengths, options.topology
  )
  console = tables.terminal()
  for table in compile_report.tables_of(report):
    tables.show(table, console)
  if options.json:
    pathlib.Path(options.json).write_text(
      json.dumps(compile_report.to_json(report), indent=1) + "\n",
      encoding="utf-8",
    )
  return 0 if report.memory.fits else 1
