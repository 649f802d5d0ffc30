"""Launch the app: `python app.py`, then open the address that it prints."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

if TYPE_CHECKING:
    from lyra.models.context_parallel import ContextParallelGroup


@dataclass(frozen=True)
class Arguments:
    """One photo in, a world to walk through out."""

    host: str = "0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 7860
    share: bool = False
    """Open a public link through Gradio's tunnel; anyone who has it can use this machine."""
    worlds: Path = Path("~/.cache/lyra/worlds")
    """Folder in which worlds are kept; those that nobody has used for a week are deleted."""
    model: str = "lyra-tiny"
    """A model name or a folder of weights."""


def main(arguments: Arguments) -> int:
    """Serve the app until it is stopped; returns the exit code."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Gradio asks its own server whether it is up, which a proxy for other addresses must not answer.
    known = os.environ.get("NO_PROXY", os.environ.get("no_proxy", ""))
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(filter(None, [known, "127.0.0.1", "localhost"]))
    # Imported here, so that `--help` answers at once and the settings above come first.
    from lyra.errors import UserError
    from lyra.models.context_parallel import context_parallel

    try:
        with context_parallel() as group:
            return serve(arguments, group)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2


def serve(arguments: Arguments, group: ContextParallelGroup) -> int:
    """Serve the app or, under torchrun, be one of the processes that help its model."""
    from lyra.pipeline import LyraPipeline
    from lyra.ui.app import LAUNCH, build_app

    name = arguments.model
    if group.is_worker:
        LyraPipeline.serve(name, group)
        return 0
    try:
        app = build_app(lambda: LyraPipeline.from_pretrained(name, group=group), arguments.worlds, name)
        _, local, shared = app.launch(
            server_name=arguments.host,
            server_port=arguments.port,
            share=arguments.share,
            quiet=True,
            prevent_thread_lock=True,
            **LAUNCH,
        )
    except OSError:
        sys.stderr.write(f"Port {arguments.port} of {arguments.host} is taken or not allowed; choose another --port.\n")
        return 2
    sys.stdout.write(f"Lyra is ready at {shared or local}\n")
    sys.stdout.flush()
    app.block_thread()
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    sys.exit(main(tyro.cli(Arguments)))
