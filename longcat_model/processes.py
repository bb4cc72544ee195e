"""Child processes that end when the process that they work for has ended, however it ended."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_main() -> None:
    """Called in a child of `multiprocessing`, ends it at once when the process that started it is gone.

    Nobody else would: a main process that is killed takes no child with it, and a worker's own parent may be the fork
    server, which lives as long as its children do.
    """
    main = multiprocessing.parent_process()
    assert main is not None, "end_with_main: this process must be a child"

    def watch() -> None:
        main.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
