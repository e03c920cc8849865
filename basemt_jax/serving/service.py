"""The HTTP service of one model: translations, languages, health, a page.

What it takes and gives is in its OpenAPI description, `/openapi.json`. Every
refusal is `{"detail": "one sentence"}` with a status of 4xx: 413 for what is
too long, 422 for what cannot be asked for, 429 while too much waits.
"""

import contextlib
import dataclasses
import functools
import importlib.resources
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Annotated, Any, Protocol

import fastapi
import pydantic
import pydantic_core
import uvicorn
from fastapi import exceptions, responses

from basemt_jax import evaluation, ranges, trained, translation
from basemt_jax.data import languages, normalisation, source_tags
from basemt_jax.serving import batching


class Model(Protocol):
  """What is served: `trained.Trained`, or an export, loaded."""

  @property
  def run(self) -> Any:
    """Its `search` is how to translate where a request does not say."""

  @property
  def description(self) -> Any:
    """Its `directions` are what the model was trained for."""

  @property
  def pieces(self) -> Any:
    """The vocabulary."""

  def translator(self, search: translation.SearchOptions) -> Any:
    """What translates lists of token ids."""

  def tag(self, to: str, source: str | None = None) -> source_tags.SourceTag:
    """What asks for a language."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a request may ask for."""

  texts: ranges.Count = 64  # of one request
  beam: ranges.Count = 8  # hypotheses that are searched side by side
  # texts, of all requests, that wait for others to be translated
  waiting: ranges.Count = 1024
  body: ranges.Count = 2**20  # bytes of a request


class Request(pydantic.BaseModel):
  """What to translate."""

  model_config = pydantic.ConfigDict(extra="forbid")

  text: Annotated[
    str | list[str],
    pydantic.Field(
      description="A sentence, or several. Line breaks in one count as spaces."
    ),
  ]
  target: Annotated[str, pydantic.Field(description="Code of the language.")]
  source: Annotated[
    str | None,
    pydantic.Field(
      description="Language of the text; needed only where the model was told "
      "it in training."
    ),
  ] = None
  beam: Annotated[
    int | None,
    pydantic.Field(ge=1, description="Beam size; 1 is greedy search."),
  ] = None
  n_best: Annotated[
    int, pydantic.Field(ge=1, description="Hypotheses of each text.")
  ] = 1

  @pydantic.field_validator("text", "target", "source")
  @classmethod
  def _is_text(cls, value: str | list[str] | None) -> str | list[str] | None:
    """JSON can spell half a character, which no encoding can write."""
    try:
      "".join(value or ()).encode()
    except UnicodeEncodeError as error:
      raise pydantic_core.PydanticCustomError(
        "text", "not Unicode text: half of a surrogate pair stands alone"
      ) from error
    return value


class Hypothesis(pydantic.BaseModel):
  """A translation and its score, a length-normalised log-probability."""

  text: str
  score: float


class Translation(Hypothesis):
  """The best translation of a text, and the next best ones if asked for."""

  others: list[Hypothesis] = []


class Response(pydantic.BaseModel):
  """Translations in the order of the texts."""

  translations: list[Translation]


class Language(pydantic.BaseModel):
  """A language the model knows."""

  code: str
  name: Annotated[str, pydantic.Field(description="In the language itself.")]
  direction: Annotated[str, pydantic.Field(description="'ltr' or 'rtl'.")]


class Languages(pydantic.BaseModel):
  """Languages, and into which ones each can be translated."""

  languages: list[Language]
  targets: dict[str, list[str]]


class Health(pydantic.BaseModel):
  """That the service runs, and how much waits."""

  status: str
  waiting: int


def application(model: Model, limits: Limits | None = None) -> fastapi.FastAPI:
  """The service, for any ASGI server."""
  limits = limits or Limits()
  translator = _Translator(model, limits)

  @contextlib.asynccontextmanager
  async def running(app: fastapi.FastAPI) -> AsyncIterator[None]:
    del app
    async with translator.batcher.running():
      yield

  app = fastapi.FastAPI(
    title="basemt", docs_url=None, redoc_url=None, lifespan=running
  )
  app.add_middleware(_BodyLimit, most=limits.body)
  app.add_exception_handler(exceptions.RequestValidationError, _one_sentence)

  @app.post("/translate")
  async def translate(request: Request) -> Response:
    """Translates a sentence or several."""
    return Response(translations=await translator(request))

  known = _languages(model.description.directions)

  @app.get("/languages")
  async def languages() -> Languages:
    """What can be translated into what."""
    return known

  @app.get("/health")
  async def health() -> Health:
    """Whether it runs."""
    return Health(status="ok", waiting=translator.batcher.waiting)

  @app.get("/", response_class=responses.HTMLResponse)
  async def page() -> responses.HTMLResponse:
    """The page for people."""
    return responses.HTMLResponse(_page(), headers=_PAGE_HEADERS)

  return app


# The page loads nothing from elsewhere.
_PAGE_HEADERS = {
  "Content-Security-Policy": "default-src 'none'; connect-src 'self'; "
  "style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
  "frame-ancestors 'none'"
}


@functools.cache
def _page() -> str:
  file = importlib.resources.files("basemt_jax.serving") / "page.html"
  return file.read_text("utf-8")


# ------------------------------------------------------------- translating


class _Translator:
  """Requests to translations."""

  def __init__(self, model: Model, limits: Limits):
    self._model, self._limits = model, limits
    self._search: translation.SearchOptions = model.run.search
    self._searching = functools.lru_cache(maxsize=None)(self._searching_with)
    self.batcher = batching.Batcher(
      self._translate, self._search.batch_size, limits.waiting
    )

  async def __call__(self, request: Request) -> list[Translation]:
    """The translations of a request.

    Raises:
      HTTPException: It asks for too much, or for what there is not.
    """
    texts = [request.text] if isinstance(request.text, str) else request.text
    beam = request.beam or max(self._search.beam_size, request.n_best)
    self._check(texts, beam, request.n_best)
    sources = self._tagged(texts, request)
    try:
      found = await self.batcher.translate((beam, request.n_best), sources)
    except batching.QueueFullError:
      raise fastapi.HTTPException(
        429,
        f"more than {self._limits.waiting} texts wait to be translated; try "
        "again later",
        {"Retry-After": "1"},
      ) from None
    except ValueError as error:  # Of the model: its scores are not finite.
      raise fastapi.HTTPException(500, str(error)) from error
    return [
      Translation(
        text=best[1],
        score=best[0],
        others=[Hypothesis(text=text, score=score) for score, text in others],
      )
      for best, *others in found
    ]

  def _check(self, texts: Sequence[str], beam: int, n_best: int) -> None:
    limits = self._limits
    if len(texts) > limits.texts:
      raise fastapi.HTTPException(
        413,
        f"{len(texts)} texts are more than the {limits.texts} that a request "
        "may have: send several",
      )
    if beam > limits.beam:
      raise fastapi.HTTPException(
        422, f"beam: {beam} is more than {limits.beam}, the largest here"
      )
    if n_best > beam:
      raise fastapi.HTTPException(
        422, f"n_best: {n_best} is more than the beam of {beam} finds"
      )

  def _tagged(self, texts: Sequence[str], request: Request) -> list[str]:
    """The texts as the model reads them; blank ones stay blank."""
    try:
      tag = self._model.tag(request.target, request.source)
    except trained.UnknownTagError as error:
      field = " (source)" if isinstance(error, trained.NoSourceError) else ""
      raise fastapi.HTTPException(
        422, f"target {request.target!r}: {error}{field}"
      ) from error
    tagged = [
      tag(text) if text else "" for text in map(normalisation.normalise, texts)
    ]
    most = self._search.max_source_length
    for number, text in enumerate(tagged, 1):
      length = len(self._model.pieces.encode(text)) + 1
      if length > most:
        raise fastapi.HTTPException(
          413,
          f"text {number} has {length} tokens, more than the {most} that are "
          "read: send its sentences one by one",
        )
    return tagged

  def _translate(
    self, search: tuple[int, int], sources: Sequence[str]
  ) -> list[list[tuple[float, str]]]:
    """Hypotheses (score, text) of each source; in the batcher's thread."""
    return evaluation.translate_texts(
      self._searching(*search), self._model.pieces, sources
    )

  def _searching_with(self, beam: int, n_best: int) -> Any:
    return self._model.translator(
      dataclasses.replace(self._search, beam_size=beam, num_return=n_best)
    )


# ---------------------------------------------------------------- languages

_RIGHT_TO_LEFT = frozenset(
  ("Adlm", "Arab", "Hebr", "Mand", "Nkoo", "Rohg", "Samr", "Syrc", "Thaa")
)


def _languages(directions: Sequence[str]) -> Languages:
  """Languages of people: what a model wrote is text in one of them."""
  parsed = {
    languages.Direction(d.source.authentic, d.target.authentic)
    for d in map(languages.Direction.parse, directions)
  }
  targets: dict[str, list[str]] = {}
  for source, target in sorted(parsed):
    targets.setdefault(source, []).append(target)
  found = sorted({language for pair in parsed for language in pair})
  return Languages(
    languages=[
      Language(
        code=language,
        name=_name(language),
        direction="rtl" if language.script in _RIGHT_TO_LEFT else "ltr",
      )
      for language in found
    ],
    targets=targets,
  )


def _name(language: languages.Language) -> str:
  """What speakers call it; its code where that is not known."""
  import babel

  try:
    locale = babel.Locale.parse(language.standard, sep="-")
  except (ValueError, babel.UnknownLocaleError):
    return language
  return locale.display_name or language


# ------------------------------------------------------------------ limits


async def _one_sentence(
  request: fastapi.Request, error: Exception
) -> fastapi.Response:
  """What pydantic found wrong with a request, as other errors are told."""
  del request
  assert isinstance(error, exceptions.RequestValidationError)
  found = error.errors()[0]
  detail = ": ".join([*map(str, found["loc"][1:2]), found["msg"]])
  if found["type"] == "json_invalid" or found["loc"] == ("body",):
    detail = "the request is no JSON object, sent as application/json"
  return responses.JSONResponse({"detail": detail}, 422)


class _BodyLimit:
  """ASGI middleware that reads no more of a request than is allowed."""

  def __init__(self, app: Any, most: int):
    self._app, self._most = app, most

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    """Passes on requests; a long one raises where it is read."""
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    await self._app(scope, self._counted(receive), send)

  def _counted(self, receive: Any) -> Callable[[], Awaitable[Any]]:
    size = 0

    async def counted() -> Any:
      nonlocal size
      message = await receive()
      size += len(message.get("body", b""))
      if size > self._most:
        raise fastapi.HTTPException(
          413, f"the request is longer than {self._most} bytes: send several"
        )
      return message

    return counted


# ------------------------------------------------------------------ serving


def listen(host: str, port: int) -> socket.socket:
  """A socket that takes connections; port 0 is any free one.

  Raises:
    ValueError: It cannot be had.
  """
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  try:
    return socket.create_server((host, port), family=family)
  except (OSError, OverflowError) as error:
    reason = str(getattr(error, "strerror", None) or error)
    reason = reason.partition(" (while")[0].rstrip(".")
    raise ValueError(
      f"cannot listen on port {port} of {host}: {reason}; choose another "
      "--port or --host"
    ) from error


def server(app: fastapi.FastAPI) -> uvicorn.Server:
  """A server; its `run(sockets=[...])` ends when it is told to.

  It then takes no more connections, and answers what has been asked.
  """
  return uvicorn.Server(uvicorn.Config(app, log_level="warning"))


def warm_up(model: Model) -> None:
  """Translates once, so that the first to ask does not wait for a program."""
  evaluation.translate_texts(
    model.translator(model.run.search), model.pieces, ["1"]
  )
