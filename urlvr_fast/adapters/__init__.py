"""Our ops, rewards and monitor inside other trainers. Each adapter names the versions it was tested with and refuses any other: it holds on
to parts of a trainer that are nobody's interface, and a part that has moved must not go wrong in silence."""

from __future__ import annotations

import importlib.metadata

from urlvr_fast.errors import ExplainedError


class AdapterError(ExplainedError, RuntimeError):
    """The other trainer is not there, is not one this was tested with, or is asked for what the adapter cannot do in it."""


def require(package: str, tested: str) -> None:
    """Raises AdapterError unless `package` is installed in a version that begins with `tested`, as "1.16"."""
    fix = f"pip install '{package}=={tested}.*'"
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise AdapterError(f"this adapter needs {package}: {fix}") from None
    if found.split(".")[: tested.count(".") + 1] != tested.split("."):
        raise AdapterError(f"{package} is {found}, and this adapter was tested with {tested} alone: {fix}")
