"""Parses a model with the plugin library loaded, and prints what TensorRT for RTX says of it.

    python parser_probe.py LIBRARY MODEL

A process of its own: RTX takes no plugins, and aborts after it has made one.
"""

from __future__ import annotations

import sys

import tensorrt_rtx_bindings as trt


class Logger(trt.ILogger):
    """Everything, at once: the process may end at any moment."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)

    def log(self, severity: object, message: str) -> None:
        """One line of TensorRT's."""
        print(message, flush=True)


library, model = sys.argv[1:]
logger = Logger()
builder = trt.Builder(logger)
builder.get_plugin_registry().load_library(library)
network = builder.create_network(0)  # the parser does not keep it alive
trt.OnnxParser(network, logger).parse_from_file(model)
