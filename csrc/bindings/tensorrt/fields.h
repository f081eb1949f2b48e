// A node's attributes as TensorRT hands them over, and as an engine keeps them.
#pragma once

#include "operator.h"

namespace lora_kernels::tensorrt {

// Points into `fields`; the last one is the workspace.
std::vector<nvinfer1::PluginField> fields_to_serialize(const Signature& signature, const Fields& fields);

// An unknown name, a missing one, or a wrong type is an error that names it; plugin_version and plugin_namespace are
// the parser's own.
Status read_fields(const Signature& signature, const nvinfer1::PluginFieldCollection* collection, Fields* fields);

}  // namespace lora_kernels::tensorrt
