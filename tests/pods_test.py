"""The page on pods, and the recipes that it is about."""

import dataclasses
import pathlib

import jax
import pod_reports
import pytest

from basemt_jax import cli, model, train_state
from basemt_jax.commands import configuration
from basemt_jax.compilation import ahead_of_time

pytestmark = pytest.mark.usefixtures("clean_gin")

ROOT = pathlib.Path(__file__).parent.parent


def test_the_page_on_pods_shows_the_reports():
  assert (ROOT / "docs" / "pods.md").read_text() == pod_reports.pods().page()


def test_pod_recipes_fit_and_exchange_what_they_should():
  for pod in pod_reports.pods().PODS:
    report = pod_reports.pods().read(pod)
    assert report.memory.fits and report.warnings == []
    found = {(e.kind, e.axes): e.count for e in report.exchanges}
    # Four layers of experts: 16 exchanges, as in the small network above.
    assert found.pop(("all-to-all", "expert")) == 16
    assert {kind for kind, _ in found} == {"all-reduce"}


@pytest.mark.parametrize(
  "pod", pod_reports.pods().PODS, ids=lambda pod: pod.file.stem
)
def test_pod_recipes_are_what_was_compiled(pod):
  options = cli._parser().parse_args(pod.command[:2])
  options.bindings = [f"NUM_EXPERTS={pod.experts}"]
  run = configuration.configured(
    options, MODEL_DIR="none", MIXTURE_OR_TASK_NAME="no"
  )
  config = run.config_of(pod_reports.pods().VOCABULARY)
  report = pod_reports.pods().read(pod)
  assert report.topology == pod.topology and report.phase == "sparse"
  assert report.rows == run.batch_size
  assert report.target_tokens == run.batch_size * 256
  groups = report.mesh["data"] * report.mesh["expert"]
  assert report.mesh["expert"] == run.expert_devices
  assert run.batch_size % (groups * config.rows_per_group) == 0
  state, _ = jax.eval_shape(
    lambda: train_state.init_state(
      model.Transformer(dataclasses.replace(config, converted=True)),
      run.settings.transformation(),
      jax.random.key(0),
    )
  )
  count = sum(x.size for x in jax.tree.leaves(state.params))
  assert report.parameters == count
  lengths = run.task_feature_lengths
  flops = ahead_of_time.model_flops(config, run.batch_size, lengths)
  assert report.model_flops == pytest.approx(flops)
