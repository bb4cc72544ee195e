"""`longcat`, and `python -m longcat_model`: the command line, which can be interrupted from its first import on."""

from __future__ import annotations

import sys
import threading
from _thread import interrupt_main


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; see `cli.main`. Interrupted before that has begun, it gives 130 too."""
    plain = sys.unraisablehook

    def heard(dropped: sys.UnraisableHookArgs) -> None:
        """An interrupt within some `__del__` is dropped there, and importing libraries runs many: it comes again."""
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, interrupt_main).start()
        else:
            plain(dropped)

    sys.unraisablehook = heard
    try:
        from longcat_model import cli

        return cli.main(arguments)
    except KeyboardInterrupt:
        print("\nlongcat: interrupted", file=sys.stderr)
        return 130
    finally:
        sys.unraisablehook = plain


if __name__ == "__main__":
    sys.exit(main())
