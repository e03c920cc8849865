"""SeqIO's cache of tasks: it is of the data that there is."""

import pytest
import seqio
import toy_corpus

from basemt_jax.data import task_cache

pytestmark = pytest.mark.usefixtures("registries")


@pytest.mark.parametrize("change", toy_corpus.CHANGES)
def test_a_cache_of_seqio_s_notices_it_too(change, tmp_path):
  def registered(extra):
    seqio.TaskRegistry.remove("corpus.en_de")
    feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
    steps = [*extra, seqio.preprocessors.tokenize]
    return seqio.TaskRegistry.add(
      "corpus.en_de",
      source=toy_corpus.source(toy_corpus.SIZES["en_de"]),
      preprocessors=[*steps, seqio.CacheDatasetPlaceholder(), toy_corpus.EOS],
      output_features={"inputs": feature, "targets": feature},
    )

  folder = task_cache.cache_task(registered([]), tmp_path)
  assert (
    task_cache.cache_task(registered([toy_corpus.same]), tmp_path) == folder
  )
  with pytest.raises(ValueError, match="was cached from other data: delete"):
    task_cache.cache_task(registered([change]), tmp_path)
