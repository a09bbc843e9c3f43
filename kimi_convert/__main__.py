"""Run the command line as `python -m kimi_convert`."""

from __future__ import annotations

import sys

from kimi_convert.cli import main

if __name__ == "__main__":
    sys.exit(main())
