"""The study's figures, the same bytes from the same logs."""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

from benchmarks.study import systems
from benchmarks.study.reading import BANDS, BASELINE, Runs

matplotlib.use("Agg")

from matplotlib import pyplot as plt

plt.rcParams["svg.hashsalt"] = "study"


def _styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
  """How each is drawn: 'base, 10,000' as 'base', but dashed."""
  palette = plt.get_cmap("tab10")
  found: dict[str, dict[str, Any]] = {}
  for label in labels:
    system, _, longer = label.partition(", ")
    if longer[:1].isdigit() and system in found:
      found[label] = {**found[system], "linestyle": "--"}
    else:
      found[label] = {"color": palette(len(found) % 10)}
  return found


def plot_losses(runs: Runs, axis: str, path: pathlib.Path) -> None:
  """Dev loss of each band against updates or seconds; seeds are averaged.

  What is named 'SYSTEM, UPDATES' after a system is a longer run of it.
  """
  figure, axes = plt.subplots(
    1, len(BANDS), figsize=(16, 4.6), layout="constrained"
  )
  styles = _styles(list(runs))
  for ax, band in zip(axes, BANDS, strict=True):
    for system, own in runs.items():
      common = functools.reduce(np.intersect1d, [r.steps for r in own])
      at = [np.isin(r.steps, common) for r in own]
      x = np.mean(
        [getattr(r, axis)[a] for r, a in zip(own, at, strict=True)], axis=0
      )
      curves = np.array([r.loss(band)[a] for r, a in zip(own, at, strict=True)])
      ax.plot(x, curves.mean(axis=0), label=system, **styles[system])
      if len(own) > 1:
        ax.fill_between(
          x,
          curves.min(axis=0),
          curves.max(axis=0),
          color=styles[system]["color"],
          alpha=0.15,
          linewidth=0,
        )
    best = np.mean([r.loss(band).min() for r in runs[BASELINE]])
    ax.axhline(best, color="black", linewidth=0.7, linestyle=":")
    low = min(r.loss(band).min() for own in runs.values() for r in own)
    ax.set_ylim(low - 0.05, low + 1.5)
    ax.set_title(f"{band} (dotted: best of {BASELINE})")
    ax.set_xlabel("updates" if axis == "steps" else "seconds of training")
    ax.grid(alpha=0.3)
  axes[0].set_ylabel("dev loss, nats per token")
  figure.legend(
    *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5
  )
  figure.savefig(path, metadata={"Date": None})
  plt.close(figure)


def plot_experts(runs: Runs, path: pathlib.Path) -> None:
  """Share of each language's tokens at each expert, by system and layer.

  Of the systems in the claim, first seeds.
  """
  shown = [
    own[0]
    for system, own in runs.items()
    if own[0].experts and systems.SYSTEMS[system].beam
  ]
  layers = sorted({layer for r in shown for layer in r.experts})
  if not shown:
    return
  figure, axes = plt.subplots(
    len(shown),
    len(layers),
    figsize=(4 * len(layers), 3.4 * len(shown)),
    squeeze=False,
    layout="constrained",
  )
  for row, one in zip(axes, shown, strict=True):
    for ax, layer in zip(row, layers, strict=True):
      languages, shares = one.experts[layer]
      image = ax.imshow(shares, aspect="auto", cmap="viridis", vmin=0)
      ax.set_yticks(range(len(languages)), languages, fontsize=7)
      ax.set_xlabel("expert", fontsize=8)
      ax.set_title(f"{one.system}\n{layer}", fontsize=8)
      figure.colorbar(image, ax=ax, label="share of tokens")
  figure.savefig(path, metadata={"Date": None})
  plt.close(figure)
