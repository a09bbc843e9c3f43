"""Run the test Hub by hand: `python -m tests.hub_server tester/moonlet=examples/moonlet-7m`.

It prints what to export, and serves until Ctrl-C, when it tells what was asked; `--corrupt` and `--cut` make it misbehave.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import threading
from pathlib import Path

from tests.hub_server import HubServer, serve

TOKEN = "hf_" + "example" * 5
ALWAYS = 1_000_000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.hub_server", description=__doc__)
    parser.add_argument("repositories", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--xet", action="store_true", help="take uploads by xet")
    parser.add_argument("--corrupt", metavar="REGEX", help="change one byte of these files")
    parser.add_argument("--cut", metavar="REGEX=BYTES", help="hang after so many bytes, once")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as name, serve(Path(name), with_xet=asked.xet) as hub:
        hub.store.users[TOKEN] = "tester"
        for repository in asked.repositories:
            name, _, folder = repository.partition("=")
            hub.store.create(name).seed(Path(folder))
        misbehave(hub, asked)
        xet = f"HF_HUB_DISABLE_XET={not asked.xet:d}"
        sys.stdout.write(f"export HF_ENDPOINT={hub.url} HF_TOKEN={TOKEN} {xet}\n")
        sys.stdout.flush()
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            for request in hub.requests:
                sys.stdout.write(f"{request}\n")


def misbehave(hub: HubServer, asked: argparse.Namespace) -> None:
    if asked.corrupt:
        hub.fault(f"GET .*/resolve/.*{asked.corrupt}", times=ALWAYS, flip=1_000_000)
    if asked.cut:
        pattern, _, nbytes = asked.cut.rpartition("=")
        hub.fault(f"GET .*/resolve/.*{pattern}", cut=int(nbytes), hang=threading.Event())


if __name__ == "__main__":
    main()
