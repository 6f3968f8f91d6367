"""``pmf demo``: an interactive sampling page in the browser."""

import argparse
import webbrowser
from pathlib import Path

from pmf import checkpoint
from pmf.cli.arguments import Commands
from pmf.devices import find_device
from pmf.errors import UserError
from pmf.flow.sampler import PRECISIONS

_DESCRIPTION = """Serve a page whose images update at once when class, guidance, steps or seeds change.

  pmf demo digits
  pmf demo runs/00000-digits --port 8000 --open

The page needs Gradio (pip install 'gradio>=6') but no internet. Only this machine can open it, unless --host
says otherwise: with --host 0.0.0.0, anybody who can reach this machine can. Ctrl-C stops it.
"""
_ANYWHERE = ("0.0.0.0", "::", "")


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = commands.add_parser("demo", help="sample in the browser", description=_DESCRIPTION)
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="run or checkpoint folder, .safetensors, the authors' .pth, or digits, which is built in",
    )
    parser.add_argument("--ema", help="averaged weights to use: a half-life such as 500, or none")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="port; 0: any that is free (%(default)s)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="as for pmf sample")
    parser.add_argument("--device", default="cpu", help="torch device (%(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C."""
    from pmf.pages import demo

    device = find_device(arguments.device)
    with demo.listen(arguments.host, arguments.port) as listener:
        loaded = checkpoint.load_model(arguments.checkpoint, arguments.ema, v_head=False)
        try:
            studio = demo.Studio(loaded, device, arguments.precision)
        except RuntimeError as error:  # does not fit on the device
            raise UserError(str(error).splitlines()[0]) from error
        page = demo.build_page(studio, f"One-step samples of {arguments.checkpoint}")
        port = listener.getsockname()[1]
        host = "127.0.0.1" if arguments.host in _ANYWHERE else arguments.host
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        print(f"{loaded.path}: open {url} in a browser; Ctrl-C stops", flush=True)
        if arguments.open and not webbrowser.open(url):
            print(f"no browser could be started: open {url} yourself", flush=True)
        try:
            demo.serve(page, listener)
        except KeyboardInterrupt:  # the ordinary end
            pass
    return 0
