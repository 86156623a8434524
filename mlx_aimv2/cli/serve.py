"""The verb `serve`: a web page to search, explore and teach, and an API for programs."""

from __future__ import annotations

import argparse
import secrets
import socket
import threading
import webbrowser
from contextlib import ExitStack
from pathlib import Path

from mlx_aimv2.cli import flags
from mlx_aimv2.cli.output import begin, say, show

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

PORT = 8224

SECONDS_TO_STOP = 1


def add_serve(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(refuse=parser.error)
    add = parser.add_argument_group("what is served").add_argument
    add("index", type=Path, nargs="?", metavar="INDEX", help="index written by mlx-aimv2 embed")
    add("-m", "--model", metavar="MODEL", help=f"{flags.OF_INDEX}; without INDEX, the API only")
    flags.add_revision(add)
    flags.add_dtype(add, "the index's own, else auto")

    add = parser.add_argument_group("where").add_argument
    add("--port", type=int, default=PORT, metavar="N", help="port, 0 for a free one (default: %(default)s)")
    add("--host", default=LOOPBACK[0], metavar="NAME", help="where to listen (default: %(default)s, this machine only)")
    add("--token", metavar="TEXT", help="secret at the end of the address (default: a new one; --host needs your own)")
    add("--no-open", action="store_true", help="do not open the page in the browser")


def run_serve(arguments: argparse.Namespace) -> int:
    """Serves until it is stopped."""
    if arguments.index is None and arguments.model is None:
        arguments.refuse("one of the arguments INDEX -m/--model is required")
    try:
        import uvicorn
    except ImportError:
        raise ImportError("serve needs FastAPI and uvicorn: pip install 'mlx-aimv2[serve]'") from None
    from mlx_aimv2.embed.encode import Embedder, Settings
    from mlx_aimv2.embed.query import embedder_of
    from mlx_aimv2.index.reader import Index
    from mlx_aimv2.serve.access import Guard
    from mlx_aimv2.serve.app import Service, create_app
    from mlx_aimv2.serve.gallery import Gallery

    if not 0 <= arguments.port < 1 << 16:
        raise ValueError(f"--port must be a number from 0 to 65535, got {arguments.port}")
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    is_local = host in LOOPBACK
    if not is_local and not arguments.token:
        raise ValueError(f"--host {arguments.host} lets other machines in: choose the secret they need with --token")
    token = arguments.token or secrets.token_urlsafe(24)
    settings = Settings(arguments.model, arguments.revision, arguments.dtype)
    with ExitStack() as stack:
        listening = stack.enter_context(_listening(arguments.host, arguments.port))
        gallery = None
        begin("loading")
        if arguments.index is not None:
            index = stack.enter_context(Index.open(arguments.index))
            index.check_search()
            embedder = embedder_of(index, settings)
            gallery = Gallery(index)
        else:
            embedder = Embedder.load(settings)
        service = Service(embedder, gallery)
        stack.callback(service.engine.stop)
        port = listening.getsockname()[1]
        guard = Guard(create_app(service), token=token, hosts=LOOPBACK if is_local else None, port=port)
        address = f"http://{host}:{port}/?token={token}"
        show(address)
        say("Ctrl-C stops the server")
        if not arguments.no_open:
            threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()
        config = uvicorn.Config(
            guard,
            log_level="error",
            lifespan="off",
            timeout_keep_alive=5,
            timeout_graceful_shutdown=SECONDS_TO_STOP,
            ws="none",
            server_header=False,
            h11_max_incomplete_event_size=1 << 16,
        )
        uvicorn.Server(config).run(sockets=[listening])
    return 0


def _listening(host: str, port: int) -> socket.socket:
    """A socket that is already listening, so a browser can connect at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(f"port {port} of {host} is not available: {error.strerror}; --port 0 takes a free one") from None
