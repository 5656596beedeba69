"""`python -m megallm` is the same as `megallm`."""

import sys

from megallm.cli.main import main

sys.exit(main())
