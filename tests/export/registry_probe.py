"""Loads the plugin library into a TensorRT registry, as an application would; run on its own.

    python registry_probe.py SITE LIBRARY

SITE is a folder with tensorrt_lean_bindings ("" for the environment's own). Prints JSON. A Runtime
is never created: it needs a GPU.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module

import numpy as np

site, library = sys.argv[1:]
if site:
    sys.path.insert(0, site)
trt = import_module("tensorrt_lean_bindings")

registry = trt.get_plugin_registry()
registry.load_library(library)


def field(name: str, value: object) -> object:
    if isinstance(value, float):
        return trt.PluginField(name, np.array([value], np.float32), trt.PluginFieldType.FLOAT32)
    return trt.PluginField(name, np.array([value], np.int32), trt.PluginFieldType.INT32)


def create(name: str, **fields: object) -> object:
    creator = registry.get_creator(name, "1", "lora_kernels")
    collection = trt.PluginFieldCollection([field(k, v) for k, v in fields.items()])
    return creator.create_plugin("layer", collection, trt.TensorRTPhase.BUILD)


ours = [c for c in registry.all_creators if c.plugin_namespace == "lora_kernels"]
FLAGS = {"has_bias": 1, "has_lora": 1, "has_residual": 0, "has_x_scale": 0, "has_slots": 1}
plugins = {}
for creator in ours:
    names = [f.name for f in creator.field_names]
    given = {name: value for name, value in (FLAGS | {"scale": 0.125}).items() if name in names}
    plugin = create(creator.name, **given)
    core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
    build = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
    plugins[creator.name] = {
        "fields": names,
        "core": [core.plugin_name, core.plugin_version, core.plugin_namespace],
        "outputs": build.num_outputs,
    }
try:
    refused = create("LoraLinear", has_bias=7, has_lora=1, has_residual=1) is None
except Exception:
    refused = True
print(json.dumps({"version": trt.__version__, "plugins": plugins, "refused": refused}))
