#include "operator.h"

namespace lora_kernels::tensorrt {

using nvinfer1::DataType;
using nvinfer1::Dims;

bool is_floating(DataType type) {
  return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

DType dtype_of(DataType type) {
  return type == DataType::kHALF   ? DType::kFloat16
         : type == DataType::kBF16 ? DType::kBFloat16
         : type == DataType::kINT8 ? DType::kInt8
                                   : DType::kFloat32;
}

int64_t volume(const Dims& dims) {
  int64_t product = 1;
  for (int i = 0; i < dims.nbDims; ++i) product *= dims.d[i];
  return product;
}

std::string text_of(const Dims& dims) {
  std::string text = "[";
  for (int i = 0; i < dims.nbDims; ++i) text += (i ? ", " : "") + std::to_string(dims.d[i]);
  return text + "]";
}

Status expect_dims(const char* op, const char* tensor, const Dims& got, const std::vector<int64_t>& expected) {
  bool same = got.nbDims == static_cast<int>(expected.size());
  Dims wanted{};
  wanted.nbDims = static_cast<int>(expected.size());
  for (int i = 0; i < wanted.nbDims; ++i) {
    wanted.d[i] = expected[i];
    same = same && got.d[i] == expected[i];
  }
  if (same) return {};
  return Status::invalid(std::string(op) + ": " + tensor + ": expected " + text_of(wanted) + ", got " + text_of(got) +
                         "; bind a tensor of that shape, or build the engine for this one");
}

}  // namespace lora_kernels::tensorrt
