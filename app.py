"""Launch the app: `python app.py`, then open the address that it prints."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from lyra.config import LoadOptions


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
    load: LoadOptions = field(default_factory=LoadOptions)
    accept_licence: bool = False
    """Accept the licence of gated weights, which is printed; remembered with the date. Visitors of a page that others
    can open cannot."""


def main(arguments: Arguments) -> int:
    """Serve the app until it is stopped or, under torchrun, help the process that does; returns the exit code."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Gradio asks its own server whether it is up, which a proxy for other addresses must not answer.
    known = os.environ.get("NO_PROXY", os.environ.get("no_proxy", ""))
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(filter(None, [known, "127.0.0.1", "localhost"]))
    # Imported here, so that `--help` answers at once and the settings above come first.
    from lyra.cli import accept_licences
    from lyra.errors import UserError
    from lyra.models.context_parallel import context_parallel
    from lyra.pipeline import LyraPipeline
    from lyra.ui.app import LAUNCH, build_app

    name, load, worlds = arguments.model, arguments.load, arguments.worlds
    where: dict[str, Any] = {"server_name": arguments.host, "server_port": arguments.port, "share": arguments.share}
    try:
        if arguments.accept_licence:
            accept_licences(name)
        with context_parallel(load.device) as group:
            if group.is_worker:
                LyraPipeline.serve(name, group, device=load.device)
                return 0
            loader = partial(LyraPipeline.from_pretrained, name, group=group, **load.to_json())
            local_only = arguments.host in ("127.0.0.1", "localhost", "::1") and "SPACE_ID" not in os.environ
            own = local_only and not arguments.share
            app = build_app(loader, worlds, name, visitors_accept=own)
            try:
                _, local, shared = app.launch(quiet=True, prevent_thread_lock=True, **where, **LAUNCH)
            except OSError:
                at = f"Port {arguments.port} of {arguments.host}"
                raise UserError(f"{at} is taken or not allowed; choose another --port.") from None
            sys.stdout.write(f"Lyra is ready at {shared or local}\n")
            sys.stdout.flush()
            app.block_thread()
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    sys.exit(main(tyro.cli(Arguments, config=(tyro.conf.OmitArgPrefixes,))))
