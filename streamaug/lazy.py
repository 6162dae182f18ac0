"""Names of a package that are imported when first used, so that importing it stays light."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazily(package: str, public: Mapping[str, str]) -> Callable[[str], Any]:
    """The package's `__getattr__`. public: the module of each name, which may be the name's own."""

    def getattribute(name: str) -> Any:
        if name not in public:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(public[name])
        return module if public[name] == f"{package}.{name}" else getattr(module, name)

    return getattribute
