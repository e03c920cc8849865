"""`basemt compile`: what a training step costs, without running it."""

import argparse
import dataclasses
import os
import sys
from typing import Any

from basemt_jax import files
from basemt_jax.commands import configuration, flags

SUMMARY = (
  "Compile a run's training step ahead of time, and report what it costs."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of this command."""
  flags.modules(parser)
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
    "--meshes",
    metavar="8x32x1,...",
    help="compile on these meshes, data x expert x model, or on 'all' that the "
    "sizes allow, a minute or two each; the report is on the fastest that "
    "fits, with the best three compared. Default: the recipe's",
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
  """Compiles the step on the meshes asked for; 1 if it does not fit, else 0."""
  if options.json:
    files.check_writable(options.json)
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

  def program_on(expert: int, model: int) -> Any:
    return run_lib.program(
      dataclasses.replace(run, expert_devices=expert, model_devices=model),
      devices,
      options.phase,
      options.vocab_size,
      options.directions,
    )

  def report_on(program: Any) -> Any:
    return ahead_of_time.report(
      program, run.batch_size, run.task_feature_lengths, options.topology
    )

  program = program_on(run.expert_devices, run.model_devices)
  compared: list[tables.Table] = []
  if options.meshes:
    meshes = _meshes(options.meshes, program, run.batch_size)
    reports = []
    for i, mesh in enumerate(meshes):
      print(f"{i + 1} of {len(meshes)}: {mesh}", file=sys.stderr)
      reports.append(report_on(program_on(*mesh[1:])))
    reports = ahead_of_time.best_first(reports)
    compared = [compile_report.mesh_table(reports[:3])]
    report = reports[0]
  else:
    report = report_on(program)
  console = tables.terminal()
  for table in [*compared, *compile_report.tables_of(report)]:
    tables.show(table, console)
  if options.json:
    files.write_json(options.json, dataclasses.asdict(report))
  return 0 if report.memory.fits else 1


def _meshes(text: str, program: Any, rows: int) -> list[tuple[int, int, int]]:
  """The meshes asked for, of those that the network and the batch allow."""
  from basemt_jax.compilation import ahead_of_time

  possible = ahead_of_time.possible_meshes(
    program.model.config, rows, program.mesh.size
  )
  if text == "all":
    return possible
  named = {"x".join(map(str, mesh)): mesh for mesh in possible}
  wrong = [name for name in text.split(",") if name not in named]
  if wrong:
    raise configuration.UsageError(
      f"--meshes: {wrong[0]} is not data x expert x model of "
      f"{program.mesh.size} devices, or does not divide the batch of {rows} "
      f"rows, the experts or the widths; there are {', '.join(named)}"
    )
  return [named[name] for name in text.split(",")]
