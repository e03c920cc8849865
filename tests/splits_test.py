"""Names of published corpora and evaluation sets, and which split they say."""

import hypothesis
import pytest
from hypothesis import strategies as st

from basemt_jax.corpora import splits

_SPELLED = """
  en de hr cs fr zh ch cn ru es fi et lv lt ro hi kk tr gu vi bn ja is uk ar
  eng deu fra eng_Latn deu_Latn en_XX cs_CZ zh_CN af_ZA zu af
"""
CODES = _SPELLED.split()

# As the files are called on OPUS, on the task pages of WMT and IWSLT, and in
# the archives of FLORES, NTREX, TICO-19 and others.
TRAIN = """
  Europarl.en-hr.en
  OPUS/Europarl/v8/moses/en-hr.txt.zip.files/Europarl.en-hr.hr
  latest/moses/CCMatrix.en-hr.en
  europarl-v7.cs-en.cs
  training/europarl-v7.cs-en.en
  training-parallel-nc-v13/news-commentary-v13.cs-en.cs
  news-commentary-v14.kk-en.tsv.gz
  commoncrawl.ru-en.ru
  giga-fren.release2.fixed.fr
  undoc.2000.fr-en.en
  UNv1.0.en-zh.zh
  MultiUN.en-zh.en
  casia2015/casia2015_ch.txt
  neu2017/NEU_cn.txt
  datum2015/Datum2015_en.txt
  1mcorpus/corpus.en_ru.1m.en
  wikititles-v1.gu-en.tsv.gz
  WikiMatrix.v1.en-cs.langid.tsv.gz
  hindencorp0.1.gz
  data-plaintext-format.0/00train.gz
  rapid2016.lt-en.lt
  dcep.lv-en.lv
  leta.lv
  books.lv-en.v1/farewell.lv
  en-ro.tmx.gz
  SETIMES.en-hr.en
  ParaCrawl.en-hr.hr
  en-de.bicleaner07.tmx.gz
  OpenSubtitles.en-hr.en
  Tatoeba.en-hr.en
  QED.en-hr.en
  TED2020.en-hr.en
  TED2013.en-de.en
  NeuLab-TedTalks.en-hr.en
  GNOME.en-hr.en
  KDE4.en-hr.hr
  Ubuntu.en-hr.en
  PHP.en-cs.en
  Tanzil.en-bn.en
  bible-uedin.en-hr.en
  bible_NewTestament.en-hr.en
  OldTestament.en-de.en
  JRC-Acquis.en-cs.cs
  DGT.en-hr.en
  EMEA.en-cs.en
  ECB.en-de.en
  EUbookshop.en-fr.en
  EUconst.en-fi.en
  ELITR-ECA.en-hr.en
  GlobalVoices.en-fr.en
  MaCoCu.en-hr.en
  HPLT.en-hr.hr
  NLLB.en-hr.en
  XLEnt.en-hr.en
  LinguaTools-WikiTitles.en-hr.en
  Mozilla-I10n.en-hr.en
  MDN_Web_Docs.en-fr.en
  tldr-pages.en-fr.fr
  SciELO.en-es.en
  wikimedia.en-hr.en
  StanfordNLP-NMT.en-de.en
  JParaCrawl/en-ja.bicleaner05.txt
  data/orig/kyoto-train.ja
  IWSLT17/train.tags.en-de.en
  iwslt14.tokenized.de-en/train.de
  wmt14_en_de/train.en
  opus-100-corpus/v1.0/supervised/af-en/opus.af-en-train.af
  raw/train.af_ZA-en_XX.af_ZA
  ELRC-403-Development_Funds.en-hr.en
  ELRC-2029-Rural_Development_Programme.en-hr.en
  ELRC-EU_Devices.en-hr.en
  ELRC-2922-Medical_Devices.en-hr.en
  TestimonyCorpus.en-hr.en
  testimonies.en-de.en
  Testing_Guidelines.en-hr.en
  validated-web.en-hr.en
  CrossValidated.en-de.en
  invalid-lines-removed.en-hr.en
  developers.en-fr.en
  developer.android.en-fr.en
  devices.en-hr.en
  devanagari-corpus.en-hi.hi
  Evaluation_Reports.en-hr.en
  MedievalTexts.en-fr.en
  retrieval.en-de.en
  carnival.en-hr.en
  latestNews.en-hr.en
  LATEST-NEWS.en-hr.en
  protest-songs.en-hr.en
  contest.en-hr.en
  Attestations.en-fr.en
  tests/train.en-hr.en
  trainings.en-hr.en
"""
VALIDATION = """
  dev.en-hr.en
  dev.en-hr.tsv.gz
  en-hr.dev.tsv
  en-de.dev-00000-of-00002.tsv
  dev/newsdev2014.hi
  newsdev2019-kken-src.kk.sgm
  newsdev2017-lven-ref.en.sgm
  newsdiscussdev2015-fren-src.fr.sgm
  newssyscomb2009.en
  nc-dev2007.en
  dev2006.fr
  IWSLT17.TED.dev2010.en-de.en.xml
  IWSLT14.TEDX.dev2012.de-en.de.xml
  flores200_dataset/dev/eng_Latn.dev
  flores101_dataset/dev/deu.dev
  FLORES-200.dev.en-hr.en
  tico19-testset/dev/dev.en-fr.tsv
  UNv1.0.devset.en
  kyoto-dev.en
  kyoto-tune.ja
  opus.en-zu-dev.zu
  raw/valid.cs_CZ-en_XX.cs_CZ
  val.en-hr.en
  Valid.en-hr.en
  validation.en-hr.jsonl
  en-de.validation.tsv
  mtnt/valid/valid.en-fr.tsv
  khresmoi-summary-dev.en
  MUST-C/en-de/data/dev/txt/dev.de
  Devset.en-hr.en
  TEDdev.en-hr.en
  europarl_DEV.en-hr.en
  devel.en-fi.fi
  development.en-hr.en
  development/x.en-hr.en
  wmt19-dev/x.en-hr.en
"""
TEST = """
  newstest2014-enhr-ref.hr.sgm
  newstest2013-src.es.sgm
  sgm/newstest2019-fien-src.fi.sgm
  newstestB2016-enfi-ref.fi.sgm
  newsdiscusstest2015-enfr-src.en.sgm
  NewsTest2014.en-hr.en
  NEWSTEST-2014.en-hr.en
  news-test2008.en
  dev/newstest2012.cs
  wmttest2022.en-de.en
  generaltest2023.de-en.src.de
  generaltest2024.en-is.ref.refA.is
  florestest2021.en-de.de
  nc-devtest2007.en
  nc-test2007.de
  devtest2006.en
  test2007.fr
  test-full/x.en-hr.en
  IWSLT17.TED.tst2015.en-de.de.xml
  iwslt/tst2013.en
  tst-COMMON/txt/tst-COMMON.de
  flores200_dataset/devtest/deu_Latn.devtest
  FLORES-101.en-hr.en
  flores.en-hr.tsv
  NTREX-128/newstest2019-ref.deu.txt
  NTREX/newstest2019-src.eng.txt
  ntrex-128.en-hr.en
  tico-19.en-fr.en
  tico19-testset/test/test.en-fr.tsv
  TICO-19/all.en-hr.tmx
  WMT-News.cs-en.cs
  tatoeba-test-v2021-08-07.eng-deu.txt
  Tatoeba-test.en-hr.en
  UNv1.0.testset.en
  kyoto-test.ja
  opus.en-hr-test.en
  raw/test.en_XX-zh_CN.zh_CN
  en-hr.test.tsv
  test.en-hr.jsonl.gz
  tests.en-hr.en
  TESTSET.en-hr.en
  test_set.en-hr.en
  testenhr.en
  eval.en-hr.en
  evaluation.en-hr.en
  heldout.en-hr.en
  held-out.en-hr.en
  hold_out.en-hr.en
  floresv1/x.en-hr.en
  ACES-challenge-set.en-hr.en
  held_out/x.en-hr.en
  HeldOut.en-hr.en
  mtnt/test/test.en-fr.tsv
  MyTest.en-hr.en
  TEDtest.en-hr.en
"""
DOUBTFUL = """
  Test_Drive_Magazine.en-hr.en
  test-of-time.en-de.en
  dev_blog_posts.en-hr.en
  DevOps.en-hr.en
  Val_Thorens.en-fr.fr
  bibletest.en-hr.en
  mydev.en-hr.en
  train-test-split.en-hr.en
  train_dev.en-hr.en
  newsdev-newstest.en-hr.en
  Regional_development.en-hr.en
  wmt14.en-de.en
  wmt24pp.en-hr.jsonl
  IWSLT14.en-de.en
  Test_Drive.zip/x.en-hr.en
  train/Test_Drive.en-hr.en
"""
NAMES = [
  (name, split)
  for split, names in (
    (splits.TRAIN, TRAIN),
    (splits.VALIDATION, VALIDATION),
    (splits.TEST, TEST),
    (splits.DOUBTFUL, DOUBTFUL),
  )
  for name in names.split()
]


def test_names_of_the_field():
  assert len(NAMES) > 180
  found = {name: splits.split_of(name, CODES) for name, _ in NAMES}
  assert found == dict(NAMES)


words = st.sampled_from(
  ["news", "europarl", "bible", "Rural", "EU", "subtitles", "v7", "2014", "x"]
)
separators = st.sampled_from("-_. ")


@hypothesis.given(
  st.lists(words, min_size=1, max_size=3),
  separators,
  st.sampled_from(["test", "dev", "valid", "newstest", "flores", "eval"]),
  st.sampled_from([str.lower, str.upper, str.title]),
)
def test_a_set_at_the_end_is_known_in_every_spelling(before, by, word, case):
  """Whatever separates it, whatever stands before it, whatever its case."""
  name = by.join([*before, case(word)])
  said = splits.split_of(f"{name}.en-hr.en", CODES)
  expected = "validation" if word in ("dev", "valid") else "test"
  assert said == expected
  numbered = splits.split_of(f"folder/{name}2014-enhr-src.en.sgm", CODES)
  assert numbered == expected


@hypothesis.given(
  st.sampled_from(["test", "dev", "val", "eval", "valid"]),
  st.from_regex(r"[bcfgjkmnpqvwxz]{2}[aeiou]{2,5}", fullmatch=True),
  st.booleans(),
)
def test_words_that_go_on_are_other_words(word, rest, first):
  longer = word + rest
  name = f"{longer}-corpus" if first else f"corpus_{longer.title()}"
  assert splits.split_of(f"{name}.en-hr.en", CODES) == "train"


@hypothesis.given(st.text(max_size=30))
def test_any_name_says_something(name):
  said = splits.split_of(f"x{name}", CODES)
  assert said in ("train", "validation", "test", "doubtful")


@pytest.mark.parametrize(
  "folder, name, split",
  [
    ("test", "europarl.en-hr.en", "test"),
    ("test", "train.en-hr.en", "train"),
    ("train", "dev.en-hr.en", "validation"),
    ("dev", "Test_Drive.en-hr.en", "validation"),
    ("test/europarl", "x.en-hr.en", "test"),
    ("test/train", "x.en-hr.en", "train"),
    ("dev", "flores.en-hr.en", "validation"),
    ("flores101/dev", "x.en-hr.en", "validation"),
    ("flores101", "x.en-hr.en", "test"),
    ("training", "tico-19.en-hr.en", "test"),
    ("Development_Funds", "x.en-hr.en", "train"),
  ],
)
def test_folders_say_what_the_file_does_not(folder, name, split):
  assert splits.split_of(f"{folder}/{name}", CODES) == split
