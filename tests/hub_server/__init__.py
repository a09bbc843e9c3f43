"""A Hugging Face Hub for tests: real HTTP on 127.0.0.1, used by the unmodified client.

    with serve(folder) as hub:
        hub.store.create("org/name").seed(checkpoint_folder)
        hub.fault("GET .*00002-of", cut=1_000_000)
        ...                                    # HF_ENDPOINT=hub.url
        assert hub.sent("00002-of") == ...

`store` holds repositories, `faults` what goes wrong, `http` the wire; the others are the routes.
"""

from tests.hub_server.http import HubServer, serve
from tests.hub_server.store import Repository, Store

__all__ = ["HubServer", "Repository", "Store", "serve"]
