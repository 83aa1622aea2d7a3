"""dear-batch: offline reranking of large candidate sets with DeAR rerankers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dear_batch.api import Reranker

__version__ = "0.1.0"
__all__ = ["Reranker", "__version__"]


def __getattr__(name: str) -> object:
    """Load `Reranker` only when it is asked for, so that the command line starts fast."""
    if name == "Reranker":
        from dear_batch.api import Reranker

        return Reranker
    raise AttributeError(f"module 'dear_batch' has no attribute {name!r}")
