"""megallm: a 3D-parallel trainer for large language models."""

from megallm.base.version import VERSION as __version__

__all__ = ["__version__"]
