"""Which operators of the library are called, and with what."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class OperatorCalls(TorchDispatchMode):
    """Lists calls of our operators while it is entered: name, and arguments by theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Note the call, with defaults where an argument is left out, and make it."""
        kwargs = kwargs or {}
        if func.namespace == "lora_kernels":
            schema = func._schema.arguments
            given = {known.name: known.default_value for known in schema}
            given |= dict(zip(given, args, strict=False)) | kwargs
            self.seen.append((func._schema.name.partition("::")[2], given))
        return func(*args, **kwargs)

    def values(self, argument: str) -> list[tuple[str, Any]]:
        """Of every call that has such an argument, in order."""
        return [(name, given[argument]) for name, given in self.seen if argument in given]
