"""Languages and directions: every spelling of a code, and one value for it."""

import itertools

import hypothesis
import pytest
from hypothesis import strategies as st

from basemt_jax.data import languages
from basemt_jax.data.languages import Direction, Language

# How they are kept, and the standard tag that BCP-47 has for them.
CODES = {
  "en": "en",
  "de": "de",
  "pt_BR": "pt-BR",
  "zh_Hant": "zh-Hant",
  "es_419": "es-419",
  "eng_Latn": "en",
  "zho_Hans": "zh-Hans",
  "cmn_Hans": "zh-Hans",
  "sr_Latn": "sr-Latn",
  "arb_Arab": "ar",
  "deu": "de",
  "yue_Hant_HK": "yue-Hant-HK",
  "ca_valencia": "ca-valencia",
  "en_XX": "en-XX",
  "kmr_Latn": "ku-Latn",
}


@st.composite
def spellings(draw):
  """A code, and it in another case and with other separators."""
  code = draw(st.sampled_from(sorted(CODES)))
  spelled = [draw(st.sampled_from([c.lower(), c.upper()])) for c in code]
  spelled = [draw(st.sampled_from("-_")) if c == "_" else c for c in spelled]
  return code, "".join(spelled)


@hypothesis.given(spellings())
def test_every_spelling_is_one_value(spelled):
  code, other = spelled
  language = Language.parse(other)
  assert language == code and hash(language) == hash(code)
  assert language.standard == CODES[code]
  assert language.base == CODES[code].split("-")[0]
  assert language.tag == f"<2{code}>"
  assert language.doubt is None


@pytest.mark.parametrize(
  "wrong",
  [
    "",
    "e",
    "english",
    "klingon",
    "en_EN",
    "zh_Hanx",
    "train",
    "a1",
    "en-",
    "d e",
    "<2de>",
    "en--US",
    "pt_BR_",
    "v1",
    "de_2019",
    "en-corpus",
  ],
)
def test_what_is_no_code(wrong):
  with pytest.raises(ValueError, match="is not a language code"):
    Language.parse(wrong)


def test_codes_of_countries_and_unknown_ones_are_doubted():
  for code, standard in (
    ("cn", "zh"),
    ("jp", "ja"),
    ("cz", "cs"),
    ("gr", "el"),
  ):
    language = Language.parse(code)
    assert language == code and language.standard == standard
    assert f"it is taken for '{standard}'" in language.doubt
  assert Language.parse("cn_Hant").standard == "zh-Hant"
  assert Language.parse("xx").doubt == "'xx' is not a known language"


@pytest.mark.parametrize(
  "code, script",
  [
    ("de", "Latn"),
    ("zh_TW", "Hant"),
    ("cn", "Hans"),
    ("ja", "Jpan"),
    ("th", "Thai"),
    ("lao_Laoo", "Laoo"),
    ("ur", "Arab"),
    ("xx", "Latn"),
  ],
)
def test_script(code, script):
  assert Language.parse(code).script == script


@pytest.mark.parametrize(
  "code, wanted, fits",
  [
    ("en_US", "en", True),
    ("eng_Latn", "en", True),
    ("pt_BR", "pt", True),
    ("pt", "pt_BR", True),
    ("pt", "pt_PT", False),
    ("pt_PT", "pt_BR", False),
    ("zh_TW", "zh_Hant", True),
    ("zh", "zh_Hant", False),
    ("sr_Latn", "sr", True),
    ("sr", "sr_Latn", False),
    ("de", "en", False),
  ],
)
def test_text_in_one_language_is_text_in_another(code, wanted, fits):
  assert Language.parse(code).fits(wanted) is fits


def test_matching_prefers_the_nearest():
  known = ["pt-PT", "pt-BR", "eng_Latn", "x-default", "zh-Hant", "zh-CN"]
  assert languages.matching("pt_br", known) == ["pt-BR"]
  assert languages.matching("en", known) == ["eng_Latn"]
  assert languages.matching("pt", known) == ["pt-PT", "pt-BR"]
  assert languages.matching("zh_TW", known) == ["zh-Hant"]
  assert languages.matching("es-419", ["es", "en"]) == ["es"]
  assert languages.matching("zh-Hant", ["zh", "en"]) == []
  assert languages.matching("fr", known) == []


@hypothesis.given(spellings(), spellings(), st.sampled_from(["-", "__"]))
def test_directions_go_round(first, second, joint):
  (source, a), (target, b) = first, second
  direction = Direction(Language.parse(source), Language.parse(target))
  assert str(direction) == f"{source}-{target}"
  assert Direction.parse(str(direction)) == direction == (source, target)
  assert Direction.of_task(direction.task("x.y")) == direction
  a, b = a.replace("-", "_"), b.replace("-", "_")
  assert Direction.parse(f"{a}{joint}{b}") == direction


@pytest.mark.parametrize(
  "spelled, direction",
  [
    ("en_de", "en-de"),
    ("en-zh-Hans", "en-zh_Hans"),
    ("zh-Hans-sr-Latn", "zh_Hans-sr_Latn"),
    ("eng_Latn_deu_Latn", "eng_Latn-deu_Latn"),
    ("en_pt_br", "en-pt_BR"),
    ("pt_br_en", "pt_BR-en"),
    ("en_zh_tw", "en-zh_TW"),
    ("en-es-419", "en-es_419"),
    ("en_fr_CA", "en-fr_CA"),
    ("en_FR_ca", "en_FR-ca"),
    ("pt-BR_en", "pt_BR-en"),
    ("en_cn", "en-cn"),
    ("aa-xx", "aa-xx"),
  ],
)
def test_directions_without_a_plain_joint(spelled, direction):
  assert str(Direction.parse(spelled)) == direction


@pytest.mark.parametrize("task", ["cldr.en_de", "wmt:t2t.en_de", "en_de"])
def test_direction_is_the_end_of_a_task(task):
  assert Direction.of_task(task) == ("en", "de")


@pytest.mark.parametrize(
  "wrong", ["ende", "en-", "a-b-c", "", "wmt_t2t_ende_v003", "klingon-en"]
)
def test_what_is_no_direction(wrong):
  with pytest.raises(
    ValueError, match=f"task 'x.{wrong}': direction '{wrong}' "
  ):
    Direction.of_task(f"x.{wrong}")


def test_what_can_be_read_in_two_ways_is_asked_about():
  with pytest.raises(ValueError, match="could be en-fr_CA or en_FR-ca: write"):
    Direction.parse("en_fr_ca")


@pytest.mark.parametrize(
  "code, text",
  [
    *(
      ("th", "ภาษาไทย"),
      ("km", "ភាសាខ្មែរ"),
      ("lo", "ພາສາລາວ"),
      ("my", "မြန်မာ"),
    ),
    *(("bo", "བོད་ཡིག"), ("ii", "ꆈꌠꉙ"), ("nod", "ᨣᩤᩴᨾᩮᩬᩥᨦ")),
  ],
)
def test_scripts_without_spaces_are_known_by_text_and_by_code(code, text):
  for spelled in (code, "xx", "de"):
    assert languages.writing_of(spelled, [text]) == "unspaced"
  assert languages.writing_of(code) == "unspaced"
  assert languages.writing_of(code, ["but in Latin letters"]) == "spaced"


def test_tags_are_taken_off():
  for text in ("a <b> c", "", "<2>", "<2de", "a <2de> b"):
    assert languages.split_tag(text) == ("", text)
  assert languages.split_tag("<2pt_BR> ol\u00e1") == ("<2pt_BR>", "ol\u00e1")
  assert languages.split_tag("<2de>x") == ("<2de>", "x")


@pytest.mark.parametrize(
  "pairs, band",
  [
    (0, "low"),
    (99999, "low"),
    (100000, "mid"),
    (999999, "mid"),
    (1000000, "high"),
  ],
)
def test_bands_of_the_paper(pairs, band):
  assert languages.band(pairs) == band


def test_bands_of_others():
  thresholds = languages.BandThresholds(high=1000, low=300)
  bands = [languages.band(n, thresholds) for n in (299, 300, 999, 1000)]
  assert bands == ["low", "mid", "mid", "high"]
  with pytest.raises(ValueError, match="low 5 and high 4"):
    languages.BandThresholds(high=4, low=5)


def test_all_pairs_of_common_codes_are_read_in_one_way():
  codes = ["en", "de", "pt", "br", "fr", "ca", "zh", "sr", "in", "id", "no"]
  for a, b in itertools.permutations(codes, 2):
    assert Direction.parse(f"{a}_{b}") == (a, b)


def test_what_a_model_wrote_is_told_apart():
  direction = Direction.parse("EN-X-BT__pt-br")
  assert str(direction) == "en_x_bt-pt_BR" and direction.label == "bt"
  assert Direction.of_task(direction.task("files")) == direction
  assert direction.source.authentic == "en" and direction.source.fits("en")
  assert direction.source.standard == "en" and not direction.source.doubt
  assert Direction.parse("en-de_x_kd").target.tag == "<2de>"
  assert Direction.parse("en-de").label == ""
  labels = map(languages.label_of, ("en-de_x_kd", "en-de", "cleaned"))
  assert list(labels) == ["kd", "", ""]
  assert Language.parse("zh_Hant").labelled("kd") == "zh_Hant_x_kd"
  assert languages.matching("en", ["en_x_bt", "en"]) == ["en"]
  with pytest.raises(ValueError, match="en_x_far too long"):
    Language.parse("en").labelled("far too long")


@pytest.mark.parametrize(
  "name, expected",
  [
    ("en-pt_BR", ["en-pt_BR"]),
    ("en-pt-br", ["en-pt_BR"]),
    ("EN-pt_br", ["en-pt_BR"]),
    ("eng_Latn-por", ["en-pt_BR"]),
    ("pt-br", ["en-pt_BR", "pt_BR-en"]),
    ("por_Latn", ["en-pt_BR", "pt_BR-en"]),
    ("en", ["en-pt_BR", "en-zh_Hant", "pt_BR-en"]),
    ("zh-TW", ["en-zh_Hant", "zh_Hant-deu_Latn"]),
    ("de", ["zh_Hant-deu_Latn"]),
    ("zh-de", ["zh_Hant-deu_Latn"]),
    ("cleaned", ["cleaned"]),
    ("de-zh", []),
    ("fr", []),
    ("nonsense", []),
  ],
)
def test_a_name_means_directions_in_any_spelling(name, expected):
  directions = ["cleaned", "en-pt_BR", "en-zh_Hant", "pt_BR-en"]
  directions.append("zh_Hant-deu_Latn")
  assert sorted(languages.meant(name, directions)) == sorted(expected)
  assert languages.meant(name, []) == []


def test_labels_and_what_has_none_mean_directions_too():
  directions = ["en-de", "en_x_bt-de", "en-fr_x_kd", "fr-en"]
  assert languages.meant("bt", directions) == ["en_x_bt-de"]
  assert languages.meant("authentic", directions) == ["en-de", "fr-en"]
  assert languages.meant("fra", directions) == ["en-fr_x_kd", "fr-en"]
  assert languages.meant("en-de", directions) == ["en-de"]
