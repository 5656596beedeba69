"""torchrun that leaves with the exit code of its first failed rank, so that 75 (queue me again)
reaches a batch script: `python -m megallm.launch.torchrun`, with torchrun's arguments.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(error.get_first_failure()[1].exitcode) from error
