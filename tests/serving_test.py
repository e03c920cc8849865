"""The service: answers that belong to their questions, limits, its end."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request

import pytest
import toy
import toy_models
from playwright import sync_api

from basemt_jax import cli, evaluation, trained, translation
from basemt_jax import run as run_lib
from basemt_jax.data import languages, source_tags, vocabulary
from basemt_jax.serving import service

DIRECTIONS = ("ar-en", "en-ar", "en-de", "en-de_x_kd", "en-pt_BR")


class Backwards:
  """A model that writes texts backwards, and when it is allowed to.

  Attributes:
    calls: (beam, number of texts) of all calls.
    may_go: Whether it may.
  """

  def __init__(self, seconds=0.0):
    search = translation.SearchOptions(batch_size=16, max_source_length=64)
    self.run = types.SimpleNamespace(search=search)
    self.description = types.SimpleNamespace(directions=DIRECTIONS)
    self.pieces = vocabulary.Vocabulary.load("bytes")
    self.calls, self.may_go = [], threading.Event()
    self.may_go.set()
    self.seconds = seconds

  def tag(self, to, source=None):
    targets = {n: languages.Direction.parse(n).target for n in DIRECTIONS}
    tags = {n: source_tags.SourceTag(f"{t.tag} ") for n, t in targets.items()}
    return trained.choose_tag(tags, to, source)

  def translator(self, search):
    def translate(sources, *others):
      del others
      self.calls.append((search.beam_size, len(sources)))
      assert self.may_go.wait(20)
      time.sleep(self.seconds)
      return [
        [
          translation.Hypothesis(-float(i), tuple(ids[::-1]))
          for i in range(search.num_return)
        ]
        if ids
        else [translation.Hypothesis(0.0, ())]
        for ids in sources
      ]

    return types.SimpleNamespace(translate=translate)


@contextlib.contextmanager
def serving(model, **limits):
  """A server on a free port; gives a function (path, JSON) -> answer."""
  server = service.server(service.application(model, service.Limits(**limits)))
  socket = service.listen("127.0.0.1", 0)
  thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
  thread.start()
  address = f"http://127.0.0.1:{socket.getsockname()[1]}"
  try:
    yield types.SimpleNamespace(
      address=address, server=server, ask=lambda *a: ask(address, *a)
    )
  finally:
    server.should_exit = True
    thread.join(20)
    socket.close()
    assert not thread.is_alive()


Answer = collections.namedtuple("Answer", "status value headers")


def ask(address, path, value=None):
  """GET, or POST of JSON or of bytes."""
  data = value
  if value is not None and not isinstance(value, bytes):
    data = json.dumps(value).encode()
  request = urllib.request.Request(
    address + path, data, {"Content-Type": "application/json"}
  )
  try:
    with urllib.request.urlopen(request, timeout=30) as response:
      return Answer(response.status, response.read(), response.headers)
  except urllib.error.HTTPError as error:
    with error:
      return Answer(error.code, error.read(), error.headers)


def texts_of(answer):
  assert answer.status == 200, answer.value
  return [t["text"] for t in json.loads(answer.value)["translations"]]


def waiting_at(address):
  return json.loads(ask(address, "/health").value)["waiting"]


def detail(answer):
  return json.loads(answer.value)["detail"]


@pytest.fixture(scope="module")
def shared():
  with serving(Backwards(), beam=5) as found:
    yield found


# ------------------------------------------------------------------ answers


def test_a_text_several_and_blank_ones(shared):
  one = shared.ask("/translate", {"text": " ab  c\n", "target": "de"})
  assert texts_of(one) == ["c ba >ed2<"]
  several = shared.ask(
    "/translate", {"text": ["ab", "", " ", "é"], "target": "ar"}
  )
  assert texts_of(several) == ["ba >ra2<", "", "", ">ra2<"]
  assert texts_of(shared.ask("/translate", {"text": [], "target": "de"})) == []


def test_n_best_and_beams(shared):
  answer = shared.ask(
    "/translate", {"text": "ab", "target": "de", "beam": 4, "n_best": 3}
  )
  (found,) = json.loads(answer.value)["translations"]
  assert found["score"] == 0
  assert [other["score"] for other in found["others"]] == [-1, -2]
  assert {other["text"] for other in found["others"]} == {found["text"]}


def test_languages_have_names_and_directions(shared):
  found = json.loads(shared.ask("/languages").value)
  assert found["targets"] == {"ar": ["en"], "en": ["ar", "de", "pt_BR"]}
  by_code = {x["code"]: x for x in found["languages"]}
  assert by_code["ar"]["direction"] == "rtl"
  assert by_code["ar"]["name"] == "العربية"
  assert by_code["pt_BR"]["name"] == "português (Brasil)"
  assert by_code["pt_BR"]["direction"] == "ltr"


def test_health_and_description(shared):
  health = json.loads(shared.ask("/health").value)
  assert health == {"status": "ok", "waiting": 0}
  paths = json.loads(shared.ask("/openapi.json").value)["paths"]
  assert {"/translate", "/languages", "/health"} <= paths.keys()


def test_the_page_loads_nothing_from_elsewhere(shared):
  page = shared.ask("/")
  assert page.headers["Content-Type"].startswith("text/html")
  policy = page.headers["Content-Security-Policy"]
  assert "default-src 'none'" in policy and "http" not in policy
  assert b"http://" not in page.value and b"https://" not in page.value


# ------------------------------------------------------------------- limits

FINE = {"text": "ab", "target": "de"}


@pytest.mark.parametrize(
  "change, status, says",
  [
    ({"target": "xx"}, 422, "target 'xx': the model was not trained"),
    ({"source": "ar"}, 422, "not trained to translate from ar into it"),
    ({"beam": 6}, 422, "beam: 6 is more than 5"),
    ({"beam": 0}, 422, "beam: "),
    ({"beam": 2, "n_best": 3}, 422, "n_best: 3 is more than the beam of 2"),
    ({"n_best": 0}, 422, "n_best: "),
    ({"text": 7}, 422, "text: "),
    ({"target": None}, 422, "target: "),
    ({"beems": 2}, 422, "beems: "),
    ({"text": "a\ud800"}, 422, "text: not Unicode text"),
    ({"text": ["a", "\udc00"]}, 422, "text: not Unicode text"),
    ({"source": "\ud800"}, 422, "source: not Unicode text"),
    ({"\ud800": 1}, 422, "the request is no JSON object"),
    ({"text": ["a"] * 65}, 413, "65 texts are more than the 64"),
    ({"text": ["a", "b" * 64]}, 413, "text 2 has 71 tokens, more than the 64"),
  ],
)
def test_what_cannot_be_asked_for_is_said(change, status, says, shared):
  answer = shared.ask("/translate", {**FINE, **change})
  assert answer.status == status
  assert detail(answer).startswith(says) or says in detail(answer)
  assert "\n" not in detail(answer)


def test_a_source_that_is_needed_is_asked_for_by_its_field():
  model = Backwards()
  tags = {n: source_tags.SourceTag(f"{n} ") for n in ("en-de", "nl-de")}
  model.tag = functools.partial(trained.choose_tag, tags)
  with serving(model) as service:
    answer = service.ask("/translate", FINE)
    assert answer.status == 422
    assert detail(answer).endswith("say which it is: en, nl (source)")
    answer = service.ask("/translate", {**FINE, "source": "nl"})
    assert texts_of(answer)[0].endswith("ed-ln")


def test_long_requests_and_no_json(shared):
  long = shared.ask("/translate", b" " * (2**20 + 1))
  assert long.status == 413 and "longer than 1048576" in detail(long)
  for data in (b"{", b"text=a", b"[1]", b""):
    answer = shared.ask("/translate", data)
    assert answer.status == 422 and "is no JSON object" in detail(answer)
  assert shared.ask("/translate").status == 405
  assert shared.ask("/elsewhere").status == 404


def test_more_than_may_wait_is_told_to_come_back():
  model = Backwards()
  model.may_go.clear()
  with (
    serving(model, waiting=4) as service_,
    concurrent.futures.ThreadPoolExecutor(8) as clients,
  ):
    first = clients.submit(service_.ask, "/translate", FINE)
    while not model.calls:
      time.sleep(0.01)
    waiting = [
      clients.submit(
        service_.ask, "/translate", {"text": [str(i)] * 2, "target": "de"}
      )
      for i in range(2)
    ]
    while waiting_at(service_.address) < 4:
      time.sleep(0.01)
    refused = service_.ask("/translate", FINE)
    assert refused.status == 429 and refused.headers["Retry-After"] == "1"
    assert "more than 4 texts wait" in detail(refused)
    model.may_go.set()
    assert texts_of(first.result()) == ["ba >ed2<"]
    assert [texts_of(w.result()) for w in waiting] == [
      [f"{i} >ed2<"] * 2 for i in range(2)
    ]
    assert texts_of(service_.ask("/translate", FINE)) == ["ba >ed2<"]


def test_an_error_of_the_model_is_told_and_others_go_on():
  model = Backwards()
  original = model.translator

  def translator(search):
    if search.beam_size == 2:
      raise ValueError("the scores are not finite")
    return original(search)

  model.translator = translator
  with serving(model) as service_:
    failed = service_.ask("/translate", {**FINE, "beam": 2})
    assert failed.status == 500
    assert detail(failed) == "the scores are not finite"
    assert texts_of(service_.ask("/translate", FINE)) == ["ba >ed2<"]


# ---------------------------------------------------------- many, and the end


def test_many_clients_get_their_own_answers():
  model = Backwards(seconds=0.005)

  def client(number):
    found = []
    for i in range(4):
      texts = [f"{number} {i} {j}" for j in range(1 + (number + i) % 3)]
      target, beam = ("de", "ar")[number % 2], 1 + number % 2
      answer = service_.ask(
        "/translate", {"text": texts, "target": target, "beam": beam}
      )
      found.append(
        texts_of(answer) == [f"<2{target}> {text}"[::-1] for text in texts]
      )
    return found

  with (
    serving(model) as service_,
    concurrent.futures.ThreadPoolExecutor(64) as clients,
  ):
    found = list(clients.map(client, range(64)))
  assert len(found) == 64 and all(all(own) for own in found)
  asked = sum(1 + (n + i) % 3 for n in range(64) for i in range(4))
  assert sum(size for _, size in model.calls) == asked
  # Gathered, and no more than a batch holds.
  assert len(model.calls) < 64 * 4 / 2
  assert max(size for _, size in model.calls) <= 16


def test_what_was_asked_before_the_end_is_answered():
  model = Backwards()
  model.may_go.clear()
  with concurrent.futures.ThreadPoolExecutor(8) as clients:
    with serving(model) as service_:
      asked = [
        clients.submit(
          service_.ask, "/translate", {"text": str(i), "target": "de"}
        )
        for i in range(8)
      ]
      # Those that came first may share the batch that is held up.
      until = time.monotonic() + 15
      while (
        sum(size for _, size in model.calls) + waiting_at(service_.address) < 8
      ):
        assert time.monotonic() < until
        time.sleep(0.01)
      service_.server.should_exit = True
      time.sleep(0.2)
      model.may_go.set()
    assert [texts_of(a.result()) for a in asked] == [
      [f"{i} >ed2<"] for i in range(8)
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """A sparse model's directory, and a dense one exported for CTranslate2."""
  folder = tmp_path_factory.mktemp("models")
  store = toy.write_store(folder / "store")
  toy_models.write_model(folder / "sparse", store, toy.SPARSE)
  toy_models.write_model(folder / "dense", store)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run_lib.Run, "mesh", lambda self: toy.mesh())
    arguments = [f"--model_dir={folder}/dense", f"--to={folder}/exported"]
    assert cli.main(["export", *arguments]) == 0
  return folder


def test_a_sparse_model_is_served_as_translate_translates(models, monkeypatch):
  monkeypatch.setattr(run_lib.Run, "mesh", lambda self: toy.mesh())
  model = trained.load(models / "sparse")
  search = translation.SearchOptions(
    max_source_length=32, max_target_length=6, batch_size=8
  )
  model = dataclasses.replace(
    model, run=dataclasses.replace(model.run, search=search)
  )
  texts = [f"no {i}" for i in range(10)]
  expected = evaluation.translate_texts(
    model.translator(), model.pieces, texts, model.tag("de")
  )
  with (
    serving(model) as service_,
    concurrent.futures.ThreadPoolExecutor(10) as clients,
  ):
    service.warm_up(model)
    questions = [{"text": text, "target": "de"} for text in texts]
    answers = clients.map(lambda q: service_.ask("/translate", q), questions)
    found = [texts_of(answer) for answer in answers]
  assert found == [[nbest[0][1]] for nbest in expected]


def test_the_command_ends_when_told_having_answered(models):
  """SIGTERM comes while requests wait."""
  process = subprocess.Popen(
    [
      *(sys.executable, "-m", "basemt_jax.cli", "serve", "--port=0"),
      f"--model_dir={models}/exported",
      "--gin.translation.SearchOptions.batch_size=4",
      "--gin.translation.SearchOptions.max_target_length=60",
    ],
    stdout=subprocess.PIPE,
    text=True,
    env={
      **os.environ,
      "PYTHONPATH": os.pathsep.join(sys.path),
      "OMP_NUM_THREADS": "1",
    },
  )
  with process, concurrent.futures.ThreadPoolExecutor(16) as clients:
    try:
      line = process.stdout.readline()
      assert line.startswith(f"serving {models}/exported on http://127.0.0.1:")
      address = line.split()[-1]
      question = {"text": ["a long text " * 9] * 4, "target": "de"}
      asked = [
        clients.submit(ask, address, "/translate", question) for _ in range(16)
      ]
      # All have come: one batch is translated, the others wait or are done.
      until = time.monotonic() + 20
      while sum(4 for a in asked if a.done()) + waiting_at(address) < 4 * 15:
        assert time.monotonic() < until
      assert not all(a.done() for a in asked)
      process.terminate()
      answers = [texts_of(a.result()) for a in asked]
      assert process.wait(20) == 0
    finally:
      process.kill()
  assert [len(texts) for texts in answers] == [4] * 16
  assert len({tuple(texts) for texts in answers}) == 1


def test_refusals_of_the_command(models, monkeypatch, capsys):
  arguments = ["serve", f"--model_dir={models}/exported"]
  with service.listen("127.0.0.1", 0) as taken:
    port = taken.getsockname()[1]
    assert cli.main([*arguments, f"--port={port}"]) == 1
  assert f"cannot listen on port {port}" in capsys.readouterr().err
  assert cli.main([*arguments, "--max_texts=0"]) == 1
  assert "--max_texts is 0" in capsys.readouterr().err
  for name in ("basemt_jax.serving.service", "basemt_jax.serving"):
    monkeypatch.delitem(sys.modules, name, raising=False)
  monkeypatch.setitem(sys.modules, "fastapi", None)
  assert cli.main(arguments) == 1
  assert "pip install 'basemt_jax[serve]'" in capsys.readouterr().err


# ----------------------------------------------------------------- the page

CHROMIUM = next(
  filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))),
  None,
)


@pytest.fixture(scope="module")
def browser():
  if CHROMIUM is None:
    pytest.skip("no Chromium is installed")
  with sync_api.sync_playwright() as playwright:
    found = playwright.chromium.launch(executable_path=CHROMIUM)
    yield found
    found.close()


@pytest.fixture
def page(shared, browser):
  context = browser.new_context(
    permissions=["clipboard-read", "clipboard-write"], locale="en"
  )
  page = context.new_page()
  errors = []
  page.on("pageerror", lambda error: errors.append(error))
  page.goto(shared.address)
  page.wait_for_function("document.getElementById('target').options.length")
  yield page
  context.close()
  assert not errors


def test_the_page_translates_by_keyboard_alone(page):
  assert page.evaluate("document.activeElement.id") == "text"
  page.get_by_label("From").select_option("en")
  page.get_by_label("To", exact=True).select_option("de")
  page.keyboard.press("Tab")
  page.locator("#text").focus()
  page.keyboard.type("one")
  page.keyboard.press("Enter")
  page.keyboard.type("two")
  page.keyboard.press("Control+Enter")
  result = page.get_by_label("Translation")
  sync_api.expect(result).to_have_value("eno >ed2<\nowt >ed2<")
  page.get_by_role("button", name="Copy").press("Enter")
  sync_api.expect(page.locator("#status")).to_have_text("Copied")
  copied = page.evaluate("navigator.clipboard.readText()")
  assert copied == "eno >ed2<\nowt >ed2<"


def test_right_to_left_text_runs_that_way(page):
  page.get_by_label("From").select_option("en")
  page.get_by_label("To", exact=True).select_option("ar")
  text, result = page.locator("#text"), page.locator("#result")
  assert result.get_attribute("dir") == "rtl"
  assert result.get_attribute("lang") == "ar"
  assert text.get_attribute("dir") == "ltr"
  page.get_by_role("button", name="Swap").click()
  assert page.get_by_label("From").input_value() == "ar"
  assert page.get_by_label("To", exact=True).input_value() == "en"
  assert text.get_attribute("dir") == "rtl"


def test_what_the_service_refuses_is_shown(page):
  page.get_by_label("From").select_option("en")
  page.locator("#text").fill("a" * 100)
  page.get_by_role("button", name="Translate").click()
  status = page.locator("#status")
  sync_api.expect(status).to_contain_text("more than the 64 that are read")
  sync_api.expect(status).to_have_class("wrong")
