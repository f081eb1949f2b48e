// What differs between the plugins: how tensors become a Problem and its Args. Everything that TensorRT asks besides is
// answered once, in plugin.cpp.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "lora_kernels/device.h"
#include "lora_kernels/executor.h"
#include "lora_kernels/status.h"
#include "lora_kernels/types.h"

namespace lora_kernels::tensorrt {

// The attributes of a node (lora_kernels/export/nodes.py); each operator reads those that it names.
struct Fields {
  int32_t has_bias = 1;
  int32_t has_lora = 1;
  int32_t has_residual = 1;
  int32_t has_x_scale = 0;
  int32_t has_slots = 1;
  int32_t in_place = 0;   // an appended cache is its own output: bind the same memory to both
  float scale = 1;        // of attention scores
  int64_t workspace = 0;  // bytes; what the engine was built with, kept in it
};

struct FieldName {
  const char* name;
  bool required;
};

// The names of an operator's tensors, in the order of the node.
struct Signature {
  std::vector<const char*> inputs;
  // For each output, the input whose type it has, and whose sizes but for the last one (size_of_last).
  std::vector<int> like;
  // The input whose first size is the last size of output 0; -1: that of its own input.
  int size_of_last = -1;
  std::vector<FieldName> fields;
};

// The types of all tensors of a node, inputs first.
using Types = std::vector<nvinfer1::DataType>;
using Tensors = const nvinfer1::PluginTensorDesc*;

class Operator {
 public:
  virtual ~Operator() = default;
  virtual std::unique_ptr<Operator> clone() const = 0;
  virtual const Signature& signature() const = 0;
  virtual void set(const Fields& fields) { fields_ = fields; }
  // Whether tensor `position` may have its type, given those before it.
  virtual bool accepts(int position, const Types& types) const = 0;
  // Makes the plan for these sizes. The outputs' follow from the inputs'.
  virtual Status plan(Tensors inputs, const DeviceInfo& device) = 0;
  // The most that a plan needs for sizes from `least` to `most`.
  virtual Status workspace(Tensors least, Tensors most, const DeviceInfo& device, int64_t* bytes) const = 0;
  virtual int64_t planned_workspace() const = 0;
  virtual Status run(const void* const* inputs, void* const* outputs, void* workspace, const Executor& executor) = 0;
  // The input whose memory an output shares; -1: none.
  virtual int aliased_input(int /*output*/) const { return -1; }

 protected:
  Fields fields_;
};

std::unique_ptr<Operator> make_lora_linear(Activation activation);
std::unique_ptr<Operator> make_int8_lora_linear(Activation activation);
std::unique_ptr<Operator> make_kv_attention_step(bool append, bool int8);

// ---- Translation that they share.
bool is_floating(nvinfer1::DataType type);
DType dtype_of(nvinfer1::DataType type);
const char* name_of(nvinfer1::DataType type);
int64_t volume(const nvinfer1::Dims& dims);
// "[3, 37]"
std::string text_of(const nvinfer1::Dims& dims);
Status expect_dims(const char* op, const char* tensor, const nvinfer1::Dims& got, const std::vector<int64_t>& expected);

// The device that enqueue runs on, and copies on its stream (device.cpp; tests put the host in its place).
Status operands_device(DeviceInfo* device);
Status copy_on_stream(void* to, const void* from, size_t bytes, void* stream);

}  // namespace lora_kernels::tensorrt
