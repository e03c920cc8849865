"""`basemt serve`: translations over HTTP, and a page."""

import argparse
import signal

from basemt_jax.commands import configuration, console, flags, models

SUMMARY = "Serve a model or an export over HTTP, with a page."
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of this command."""
  flags.checkpoint(parser)
  flags.search(parser)
  flags.modules(parser)
  parser.add_argument(
    "--host", default="127.0.0.1", help="default: this machine alone"
  )
  parser.add_argument("--port", type=int, default=8000, help="0: any free one")
  parser.add_argument(
    "--max_texts", type=int, metavar="N", help="texts of a request; default 64"
  )
  parser.add_argument(
    "--max_waiting", type=int, metavar="N", help="texts that wait; default 1024"
  )
  group = parser.add_argument_group("of an export for CTranslate2")
  group.add_argument(
    "--device", choices=("auto", "cpu", "cuda"), default="auto"
  )
  group.add_argument(
    "--threads", type=int, default=0, metavar="N", help="0: its own choice"
  )


def run(options: argparse.Namespace) -> None:
  """Serves until SIGTERM or Ctrl-C; what was asked before is answered."""
  try:
    from basemt_jax.serving import service
  except ImportError as error:
    raise configuration.UsageError(
      f"the service needs more packages ({error}): "
      "pip install 'basemt_jax[serve]'"
    ) from error
  from basemt_jax.commands import checks

  limits = service.Limits(
    **{
      name: value
      for name in ("texts", "waiting")
      if (value := getattr(options, f"max_{name}")) is not None
    }
  )
  try:
    checks.check_fields(limits)
  except ValueError as error:
    flag = str(error).replace("Limits.", "--max_")
    raise configuration.UsageError(flag) from error
  run = models.with_search(configuration.trained(options), options)
  with service.listen(options.host, options.port) as socket:
    model = models.load(
      run, options.checkpoint, options.device, options.threads
    )
    console.standard().message("translating a first sentence")
    service.warm_up(model)
    server = service.server(service.application(model, limits))
    host, port = socket.getsockname()[:2]
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    print(f"serving {run.model_dir} on http://{place}", flush=True)
    if options.host not in _LOOPBACK:
      print("anybody who reaches this address can use it", flush=True)
    # The server has its own way to end, and then raises the signal again.
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    server.run(sockets=[socket])
