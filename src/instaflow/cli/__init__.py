"""The command line: thin, every verb binds its work when it is called. `--help` loads no torch."""

from __future__ import annotations

import io
import os
import sys

from cyclopts import CycloptsError

from instaflow.cli import adapting, compressing, drawing, making, serving
from instaflow.cli.app import app
from instaflow.errors import InstaFlowError

__all__ = ["adapting", "app", "compressing", "drawing", "main", "making", "serving"]

DRAWING = {"torch", "diffusers", "transformers", "safetensors", "onnx_ir", "onnxscript"}
SERVING = {"fastapi", "uvicorn", "prometheus_client"}

GOES_ON = ("run", "train", "control", "pairs", "evaluate", "prune", "personalise")  # where they were broken off


def main() -> None:
    """Run the command line: 0 good, 2 the user's mistake in one line, 1 ours, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except InstaFlowError as error:
        _fail(str(error))
    except CycloptsError as error:
        _fail(f"{error} (instaflow --help)")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("instaflow"):
            raise
        package = (error.name or "").split(".")[0]
        extra = "torch" if package in DRAWING else "serve" if package in SERVING else "train,eval"
        _fail(f"this needs the package {error.name}: pip install 'instaflow[{extra}]'")
    except OSError as error:
        _fail(f"{error.strerror}: {error.filename}" if error.filename else str(error))
    except BrokenPipeError:  # whoever read our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        goes_on = sys.argv[1:2] and sys.argv[1] in GOES_ON
        print("instaflow: interrupted" + "; run the same line again to go on" * bool(goes_on), file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> None:
    print(f"instaflow: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
