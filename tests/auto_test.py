"""What the recipe `auto` chooses, for any text and machine."""

import dataclasses

import hypothesis
import pytest
from hypothesis import strategies as st

pytest.importorskip("seqio")

from tasks import auto

TEXTS = st.builds(
  auto.Text,
  pairs=st.integers(1, 40).flatmap(
    lambda n: st.lists(st.integers(50, 10**7), min_size=n, max_size=n).map(
      lambda counts: {f"en-{i}": count for i, count in enumerate(counts)}
    )
  ),
  characters=st.floats(2, 400),
  longest=st.floats(1, 1000),
  dense=st.floats(0, 1),
  alphabet=st.integers(20, 5000),
)
MACHINES = st.builds(
  auto.Machine,
  name=st.just("a machine"),
  flops=st.floats(1e9, 1e16),
  is_cpu=st.booleans(),
  devices=st.sampled_from([1, 2, 8]),
)


@hypothesis.given(text=TEXTS, machine=MACHINES, minutes=st.floats(1, 10_000))
def test_a_choice_can_be_trained_and_keeps_to_the_time(text, machine, minutes):
  choice = auto.choose(text, machine, minutes)
  assert choice.num_heads * choice.head_dim == choice.emb_dim
  assert choice.batch_size % (16 * machine.devices) == 0  # Rows of a group.
  assert set(choice.expert_blocks) <= set(range(choice.num_layers))
  assert choice.vocab_size > text.alphabet + 256 + len(text.pairs)
  assert 0 < choice.warmup_steps < choice.train_steps
  assert 0 < choice.eval_steps <= choice.train_steps
  assert choice.minutes <= 1.001 * minutes and choice.epochs <= 30.001
  if machine.is_cpu or len(text.pairs) < 8:
    assert choice.feed_forward == "dense"
  assert all(auto.told(text, machine, choice))


@hypothesis.given(text=TEXTS, machine=MACHINES, minutes=st.floats(1, 1000))
def test_more_time_and_more_text_take_no_smaller_network(
  text, machine, minutes
):
  parameters = [
    auto.choose(text, machine, factor * minutes).emb_dim for factor in (1, 3, 9)
  ]
  assert parameters == sorted(parameters)
  twice = dataclasses.replace(
    text, pairs={name: 2 * n for name, n in text.pairs.items()}
  )
  more = auto.choose(twice, machine, 1e6)
  assert more.emb_dim >= auto.choose(text, machine, 1e6).emb_dim


def test_text_is_measured_by_hand(tmp_path):
  (tmp_path / "en-de.train.tsv").write_text("ab\tABC\n" * 3, encoding="utf-8")
  (tmp_path / "en-zh.train.tsv").write_text("ab\t\u4f60\n", encoding="utf-8")
  text = auto.Text.of_folder(str(tmp_path))
  assert text.pairs == {"en-de": 3, "de-en": 3, "en-zh": 1, "zh-en": 1}
  assert text.characters == pytest.approx((3 * 5 + 3) / 4)
  assert (text.longest, text.alphabet) == (3, 6)
  assert text.dense == pytest.approx(1 / 18)
