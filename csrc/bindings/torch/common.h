// What the torch bindings share: tensors to plain arguments, Status to exceptions, torch's thread pool as an executor.
// Bindings translate only; every check of sizes and values that needs no Tensor is the core's.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "lora_kernels/device.h"
#include "lora_kernels/executor.h"
#include "lora_kernels/lora_bank.h"
#include "lora_kernels/status.h"
#include "lora_kernels/types.h"

namespace lora_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// "[3, 4]"
std::string shape_of(const Tensor& t);

void raise_if_failed(const Status& status);

// Throws "<op>: <argument>: <text>". Called behind an if, so that calls that are right make no texts.
[[noreturn]] void refuse(const char* op, const char* argument, const std::string& text);

// Refuses tensors that are not in the CPU's memory, or not on the device of the CallDevice that is alive; every operand
// passes here or through dtype_of or expect_tensor.
void expect_same_device(const char* op, const char* argument, const Tensor& t);

DType dtype_of(const char* op, const char* argument, const Tensor& t);
Activation activation_of(const char* op, const std::string& name);

// Expects a CPU tensor of this type and shape. A size of -1 is not checked.
void expect_tensor(const char* op, const char* argument, const Tensor& t, ScalarType type,
                   const std::vector<int64_t>& sizes);

// A tensor [..., columns] as rows of unit stride along the last dimension: a view where memory allows, else a copy.
struct RowView {
  Tensor tensor;  // keeps the memory alive
  const void* data = nullptr;
  int64_t rows = 0, columns = 0, stride = 0;  // stride in elements
};
RowView rows_of(const char* op, const char* argument, const Tensor& t);

// The LoRA operands of the linear operators, checked against K = in_features and N = out_features. max_rank as the
// schemas have it; 0: not known.
struct LoraOperands {
  LoraShape shape;
  LoraBank bank;
  std::vector<Tensor> keep;  // copies made on the way
};
LoraOperands lora_operands(const char* op, const OptionalTensor& lora_a, const OptionalTensor& lora_b,
                           const OptionalTensor& scales, const OptionalTensor& offsets,
                           const OptionalTensor& adapter_ids, int64_t max_rank, int64_t in_features,
                           int64_t out_features);

// Bias [N] and residual [..., N] of the linear operators, checked.
struct BiasAndResidual {
  const void* bias = nullptr;
  DType bias_dtype = DType::kFloat32;
  const void* residual = nullptr;
  std::vector<Tensor> keep;
};
BiasAndResidual bias_and_residual(const char* op, const OptionalTensor& bias, const OptionalTensor& residual,
                                  const Tensor& x, int64_t out_features);

// The sizes of x with the last one replaced.
std::vector<int64_t> output_sizes(const Tensor& x, int64_t out_features);

// An uninitialized contiguous tensor on the device of `like`, in its type or another. Through the C interface: torch's
// dispatcher, which torch::stable::new_empty goes through, costs as much again as all of the translation.
Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, std::optional<ScalarType> type = {});

// This machine, with torch's current number of threads.
DeviceInfo current_device();

// torch's own pool.
Executor torch_executor();

// Where one call runs: on the device of x, which all its operands must share. On CUDA that is torch's current device
// and stream for as long as this lives.
class CallDevice {
 public:
  explicit CallDevice(const char* op, const Tensor& x);
  ~CallDevice();
  CallDevice(const CallDevice&) = delete;
  CallDevice& operator=(const CallDevice&) = delete;

  bool is_cuda() const { return index_ >= 0; }
  DeviceInfo info() const;
  Executor executor() const;
  // workspace() of the CPU, or memory of torch's allocator on this device: it is kept until the call ends, and the
  // stream orders what comes after.
  void* workspace(int64_t bytes);

 private:
  int32_t index_ = -1;  // of the CUDA device
  Tensor like_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  OptionalTensor memory_;
};

// Whether products of fp32 may be rounded to tf32 on CUDA; false to begin with, as torch's own switch.
bool tf32_allowed();
void allow_tf32(bool allow);

// Memory of at least `bytes`, aligned to 64, valid until the next call on this thread. Kept and grown, so that a call
// costs no page faults.
void* workspace(int64_t bytes);

}  // namespace lora_kernels
