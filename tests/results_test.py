"""Results of a run: its metrics, read again."""

import json

from basemt_jax.inspection import results


def test_metrics_of_a_run_that_was_killed(tmp_path):
  """Steps that were done again count once."""
  lines = [
    {"step": 2, "loss": 5.0, "target_tokens/a": 10},
    {"step": 2, "dev/loss": 4.5},
    {"step": 4, "loss": 4.0, "target_tokens/a": 20},
    {"step": 6, "loss": 3.0, "target_tokens/a": 30},
    {"step": 6, "dev/loss": 2.5},
    # Killed, and on from checkpoint_3.
    {"step": 4, "loss": 4.1, "target_tokens/a": 21},
    {"step": 4, "conversion/relative_error": 0.0},
    {"step": 5, "loss": float("nan")},
  ]
  text = "\n".join(map(json.dumps, lines)) + '\n{"step": 6, "lo'
  path = tmp_path / "metrics.jsonl"
  path.write_text(text)
  metrics = results.read_metrics(path)
  assert metrics["target_tokens/a"] == {2: 10, 4: 21}
  assert metrics["dev/loss"] == {2: 4.5}
  assert metrics["conversion/relative_error"] == {4: 0.0}
  assert set(metrics["loss"]) == {2, 4, 5} and metrics["loss"][4] == 4.1
  assert results.read_metrics(tmp_path / "none") == {}
