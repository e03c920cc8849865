"""Several processes on this machine train as one, and end together."""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import kill_test
import numpy as np
import pytest
import simulated
import toy

from basemt_jax import checkpointing, cli, heating, sampling
from basemt_jax.data import batches, row_store

ROOT = pathlib.Path(__file__).parent.parent
STEPS, DENSE_STEPS = 12, 4
CONFIG = f"""{kill_test.CONFIG}
TRAIN_STEPS = {STEPS}
DENSE_STEPS = {DENSE_STEPS}
BATCH_SIZE = 16
EVAL_STEPS = 4
SAVE_STEPS = 4
LOG_STEPS = 1
BLEU_STEPS = 8
run.Run.bleu_sentences = 2
"""
# For a store without anything to evaluate on: compiled in seconds. Long enough
# for a signal to come in time.
SHORT = f"""
FEED_FORWARD = 'dense'
TRAIN_STEPS = 10000
HEATING_STEPS = {STEPS}
SAVE_STEPS = 50
"""
# Sums over devices are rounded in another order than on one device.
TOLERANCE = 1e-5
HEARTBEAT = 10
AGAIN = "start all processes again: training goes on from its last checkpoint"


class Group:
  """The processes of one command: `basemt ARGUMENTS`, or a script."""

  def __init__(self, directory, count, devices=1):
    self.directory, self.count, self.devices = directory, count, devices
    directory.mkdir(parents=True, exist_ok=True)
    self.environment = {
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": simulated.xla_flags(devices),
      "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
    }

  @contextlib.contextmanager
  def started(self, *command, of_each=()):
    """Processes of `python COMMAND`; killed at the end if they still are."""
    with socket.create_server(("localhost", 0)) as server:
      port = server.getsockname()[1]
    self.processes = []
    try:
      for i in range(self.count):
        joining = [
          f"--coordinator_address=localhost:{port}",
          f"--num_processes={self.count}",
          f"--process_id={i}",
          f"--heartbeat_timeout={HEARTBEAT}",
        ]
        with (
          open(self.directory / f"output_{i}", "w") as output,
          open(self.directory / f"errors_{i}", "w") as errors,
        ):
          self.processes.append(
            subprocess.Popen(
              [
                sys.executable,
                *command,
                *(joining if self.count > 1 else []),
                *(of_each[i] if of_each else []),
              ],
              env=self.environment,
              stdout=output,
              stderr=errors,
            )
          )
      yield self.processes
    finally:
      for process in self.processes:
        process.kill()
        process.wait()

  def output(self, i=0):
    return (self.directory / f"output_{i}").read_text()

  def errors(self, i=0):
    return (self.directory / f"errors_{i}").read_text()

  def wait_for(self, pattern, i=0):
    while not re.search(pattern, self.errors(i)):
      assert self.processes[i].poll() is None, self.errors(i)
      time.sleep(0.02)

  def ends(self, but=()):
    """Exit codes of all, or of all but some, and the seconds until the last."""
    start = time.monotonic()
    codes = [p.wait() for i, p in enumerate(self.processes) if i not in but]
    return codes, time.monotonic() - start

  def run(self, *command, of_each=()):
    """Runs to the end; what the first process wrote to standard output."""
    with self.started(*command, of_each=of_each):
      codes, _ = self.ends()
    assert codes == [0] * self.count, "".join(
      map(self.errors, range(self.count))
    )
    return self.output()

  def sentence(self, i):
    """The last line of a process that died, once its watch has written it."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
      lines = [x for x in self.errors(i).splitlines() if "basemt: error" in x]
      if lines:
        return lines[-1]
      time.sleep(0.05)
    raise AssertionError(self.errors(i))


class Training:
  """`basemt train` into one directory, by any number of processes."""

  def __init__(self, directory, store, extra=""):
    self.directory, self._runs = directory, 0
    self.model_dir = directory / "run"
    directory.mkdir(parents=True, exist_ok=True)
    self.gin = directory / "run.gin"
    self.gin.write_text(
      f"{CONFIG}{extra}MODEL_DIR = '{self.model_dir}'\n"
      f"run.Run.store_dir = '{store}'\n"
    )

  def group(self, count, devices=1):
    self._runs += 1
    return Group(self.directory / f"log_{self._runs}", count, devices)

  def command(self, name="train", *arguments):
    return (
      *("-m", "basemt_jax.cli", name, f"--gin_file={self.gin}"),
      *arguments,
    )

  def finish(self, count=1, devices=1, *arguments):
    """Trains to the end; the group, for what it wrote."""
    group = self.group(count, devices)
    group.run(*self.command("train", *arguments))
    return group

  def metrics(self, name="loss"):
    """The last value of every step; a step may have been trained twice."""
    found = {}
    for line in (self.model_dir / "metrics.jsonl").read_text().splitlines():
      scalars = json.loads(line)
      if name in scalars:
        found[scalars["step"]] = scalars[name]
    return found

  def position(self):
    """Of the data, in the last checkpoint."""
    with checkpointing.Checkpoints(
      self.model_dir, read_only=True
    ) as checkpoints:
      return checkpoints.position(STEPS)["data"]


def assert_same_training(left, right):
  """Two runs that differ in devices only have the same data and losses."""
  assert left.position() == right.position()
  assert list(left.metrics()) == list(range(1, STEPS + 1))
  for name in ("loss", "dev/loss", "temperature"):
    a, b = left.metrics(name), right.metrics(name)
    assert a.keys() == b.keys()
    np.testing.assert_allclose(
      list(a.values()), list(b.values()), rtol=TOLERANCE
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  return toy.write_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory):
  """A run of one process on one device."""
  training = Training(tmp_path_factory.mktemp("alone"), store)
  training.finish()
  return training


# ------------------------------------------------------------ the data

BATCHES = """
import hashlib, sys
import jax
import numpy as np
from jax.experimental import multihost_utils
import multi_process_test, toy
from basemt_jax import partitioning, processes
from basemt_jax.data import row_store

flags = dict(a.lstrip("-").split("=") for a in sys.argv[1:])
jax.distributed.initialize(
  flags["coordinator_address"],
  int(flags["num_processes"]),
  int(flags["process_id"]),
)
def say(text):
  print(f"said: {text}", flush=True)
store = row_store.RowStore(flags["store"])
first, second = np.asarray(jax.devices()).reshape(2, 4)
assert first[0].process_index != second[0].process_index
zipped = np.stack([first, second], axis=1).reshape(-1)
for expert, model, devices in (
  (1, 1, [*first, *second]),
  (4, 1, [*second, *first]),
  (2, 1, [*first[:2], *second, *first[2:]]),  # Rows are not side by side.
  (2, 2, zipped),  # Both processes hold all rows.
):
  mesh = partitioning.make_mesh(expert, model, devices)
  rows = multi_process_test.reader(
    store, host_rows=partitioning.host_rows(mesh, 16)
  )
  say(
    multi_process_test.digest(
      multihost_utils.process_allgather(
        partitioning.put_batch(next(rows), mesh), tiled=True
      )
      for _ in range(3)
    )
  )
for check in (
  lambda: processes.check_same("the text", "same"),
  lambda: processes.check_shared(flags["directory"]),
  lambda: processes.check_same("the text", flags["process_id"]),
  lambda: processes.check_shared(flags["directory"] + flags["process_id"]),
):
  try:
    check()
    say("fine")
  except ValueError as error:
    say(error)
jax.distributed.shutdown()
"""


def reader(store, **rows):
  schedule = heating.linear(1, 5, STEPS)
  return batches.TrainBatches(store, sampling.Strategy(schedule), 16, 0, **rows)


def digest(some_batches):
  found = hashlib.blake2b()
  for batch in some_batches:
    for name in sorted(batch):
      found.update(name.encode())
      found.update(np.ascontiguousarray(batch[name]).tobytes())
  return found.hexdigest()


def test_global_batches_and_refusals_are_those_of_one_process(store, tmp_path):
  group = Group(tmp_path / "log", 2, devices=4)
  output = group.run(
    "-c", BATCHES, f"--store={store}", f"--directory={tmp_path / 'shared'}"
  )
  # Gloo's own lines may break off anywhere between these.
  lines = re.findall("said: (.*)", output)
  rows = reader(row_store.RowStore(store))
  assert lines[:4] == [digest(next(rows) for _ in range(3))] * 4
  assert lines[4:6] == ["fine"] * 2
  assert "the text of process 1 differs from that of process 0" in lines[6]
  assert re.search("process 1 does not see what process 0 writes", lines[7])
  assert not list((tmp_path / "shared").iterdir())


# ------------------------------------------------ one dies, others stop


def test_one_of_two_is_killed_and_the_run_goes_on_with_one(tmp_path):
  store = toy.write_store(tmp_path / "store", ["train"])
  training = Training(tmp_path, store, SHORT)
  group = training.group(2)
  with group.started(*training.command()) as processes:
    group.wait_for(r"step +60/")
    processes[1].kill()
    codes, _ = group.ends(but=[1])
  assert codes == [1]
  assert AGAIN in group.sentence(0) and AGAIN in group.sentence(1)
  # The first spoke for both.
  assert "loss" not in group.errors(1) + group.output(1)
  by_two = training.metrics()
  saved = max(toy.saved(training.model_dir))
  assert 50 <= saved < max(by_two)
  errors = training.finish(1, 1, f"--gin.TRAIN_STEPS={max(by_two)}").errors()
  assert f"going on from checkpoint_{saved}, " in errors
  # Steps that both have trained.
  by_one = training.metrics()
  assert by_one.keys() == by_two.keys()
  assert by_one != by_two
  np.testing.assert_allclose(
    list(by_one.values()), list(by_two.values()), rtol=TOLERANCE
  )


@pytest.mark.slow
def test_four_then_two_then_one(alone, store, tmp_path):
  training = Training(tmp_path, store)
  group = training.group(4)
  with group.started(*training.command()) as processes:
    group.wait_for(r"step +2/")
    processes[2].send_signal(signal.SIGTERM)
    codes, _ = group.ends()
  # All agreed on a step, and saved it.
  assert codes == [0] * 4
  assert "the same command goes on" in group.output()
  assert 2 <= max(toy.saved(training.model_dir)) < STEPS
  group = training.group(2)
  with group.started(*training.command()) as processes:
    group.wait_for(r" sparse ")
    processes[0].kill()
    codes, _ = group.ends(but=[0])
  assert codes != [0]
  assert AGAIN in group.sentence(1)
  training.finish(1)
  assert_same_training(training, alone)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_hangs_is_noticed(victim, tmp_path):
  store = toy.write_store(tmp_path / "store", ["train"])
  training = Training(tmp_path, store, SHORT)
  group = training.group(2)
  with group.started(*training.command()) as processes:
    group.wait_for(r"step +5/")
    processes[victim].send_signal(signal.SIGSTOP)
    codes, seconds = group.ends(but=[victim])
  print(f"stopped {seconds:.1f} seconds after process {victim} did", codes)
  assert codes != [0]
  assert AGAIN in group.sentence(1 - victim)


# ------------------------------------------------- experts over processes


@pytest.mark.slow
@pytest.mark.parametrize("devices, experts", [(1, 2), (4, 4)])
def test_experts_over_processes(devices, experts, alone, store, tmp_path):
  training = Training(tmp_path, store)
  flag = f"--gin.EXPERT_DEVICES={experts}"
  group = training.finish(2, devices, flag)
  assert_same_training(training, alone)

  def scores(text):
    return [x for x in text.splitlines() if re.match(r" *\w+-\w+ +\d", x)]

  # What they say at the end is what one process says of their checkpoint.
  assert len(scores(group.output())) == len(toy.DIRECTIONS)
  one = training.group(1)
  one.run(*training.command("evaluate"))
  assert scores(group.output()) == scores(one.output())
  (tmp_path / "lines").write_text("no 1\nno 22\n")
  arguments = ("--to=fr", f"--input={tmp_path / 'lines'}")
  one.run(*training.command("translate", *arguments))
  both = training.group(2, devices)
  both.run(
    *training.command(
      "translate", *arguments, flag, f"--output={tmp_path / 'translated'}"
    )
  )
  assert (tmp_path / "translated").read_text() == one.output()


@pytest.mark.slow
def test_pairs_that_two_processes_write_are_those_of_one(alone, tmp_path):
  (tmp_path / "text").write_text("".join(f"no {i} {i}\n" for i in range(150)))
  found = []
  for count in (1, 2):
    arguments = ("--from=de", "--to=en", f"--input={tmp_path / 'text'}")
    folder = tmp_path / f"by_{count}"
    command = alone.command("backtranslate", *arguments, f"--output={folder}")
    group = alone.group(count)
    group.run(*command, "--batch_size=4")  # Several small chunks.
    found.append((folder / "en_x_bt-de.train.tsv").read_bytes())
    assert "of 150 sentences" in group.output()
  assert found[0] == found[1] and found[0].count(b"\n") > 30
  # What is done is not done again.
  group.run(*command, "--batch_size=4")


@pytest.mark.slow
def test_conversion_by_two_processes(store, tmp_path):
  extra = "conversion.Options.centroids = 'activations'\nFEED_FORWARD = "
  sparse = [
    Training(tmp_path / name, store, f"{extra}'experts'\n")
    for name in ("by_one", "by_two")
  ]
  dense = Training(
    tmp_path / "dense", store, f"{extra}'dense'\nTRAIN_STEPS = 4\n"
  )
  dense.finish(2)
  for count, training in enumerate(sparse, 1):
    group = training.group(count)
    group.run(
      *training.command(
        "convert", f"--from={dense.model_dir}", f"--to={training.model_dir}"
      )
    )
    assert "checkpoint_4: converted" in group.output()
  settings = toy.settings(STEPS, dense_steps=DENSE_STEPS)
  like = toy.abstract_tree(toy.SPARSE, settings, "sparse")
  (one, position), (two, other) = (
    toy.checkpoint(x.model_dir, 4, like) for x in sparse
  )
  assert position == other
  for path, value in one.items():
    np.testing.assert_allclose(two[path], value, atol=1e-6, err_msg=path)


# ----------------------------------------------------------- what is wrong


def test_flags_that_do_not_suffice(capsys):
  assert cli.main(["train", "--num_processes=2"]) == 1
  assert (
    "--num_processes needs --coordinator_address and --process_id too"
    in capsys.readouterr().err
  )


@pytest.mark.slow
def test_processes_of_different_configuration(store, tmp_path):
  training = Training(tmp_path, store, SHORT)
  group = training.group(2)
  with group.started(
    *training.command(), of_each=[[], ["--gin.TRAIN_STEPS=13"]]
  ):
    codes, _ = group.ends()
  assert codes == [1, 1]
  for i in range(2):
    assert "the configuration of process 1 differs" in group.errors(i)


FOUND = """
import jax
from basemt_jax import processes
processes.join()
processes.check_joined()
print(jax.process_index(), jax.process_count())
"""


def slurm(rank):
  """What srun tells a process, of a job with a port of its own."""
  return {
    "SLURM_JOB_ID": str(os.getpid()),
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": str(rank),
    "SLURM_LOCALID": str(rank),
  }


def mpirun(rank):
  """What Open MPI's mpirun tells a process."""
  uri = f"{os.getpid() << 16}.0;tcp://127.0.0.1:34911"
  return {
    "OMPI_MCA_orte_hnp_uri": uri,
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": str(rank),
    "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
  }


@pytest.mark.parametrize("scheduler", [slurm, mpirun])
def test_processes_are_found_by_what_the_scheduler_says(scheduler):
  started = [
    subprocess.Popen(
      [sys.executable, "-c", FOUND],
      cwd=ROOT,
      env={**os.environ, "JAX_PLATFORMS": "cpu", **scheduler(rank)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for rank in range(2)
  ]
  for rank, process in enumerate(started):
    output, errors = process.communicate()
    assert output.split() == [str(rank), "2"], errors
