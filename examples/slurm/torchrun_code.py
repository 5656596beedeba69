"""torchrun that leaves with the exit code of its first failed rank, so that 75 (queue me again) reaches the script."""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

try:
    main()
except ChildFailedError as error:
    print(error, file=sys.stderr)
    sys.exit(error.get_first_failure()[1].exitcode)
