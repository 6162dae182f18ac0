"""Names of a package that are imported when first used, so that importing it stays light."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazily(package: str, public: Mapping[str, str]) -> Callable[[str], Any]:
    """The package's `__getattr__`. public: the module of each name."""

    def getattribute(name: str) -> Any:
        if name not in public:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(public[name]), name)

    return getattribute
