"""`python -m megallm` is the same as `megallm`."""

import sys

from megallm.base.stopping import before_ranks


def main() -> int:
    """Run the command line; a signal to `megallm pretrain` is answered from here on, before
    anything is imported.
    """
    with before_ranks(sys.argv[1:2] == ["pretrain"]):
        from megallm.cli.main import main as run

        return run()


if __name__ == "__main__":
    sys.exit(main())
