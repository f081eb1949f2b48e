#include "common.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <sstream>
#include <stdexcept>

namespace lora_kernels {

std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << "]";
  return text.str();
}

// Thrown directly: STD_TORCH_CHECK would put this file's path before the text.
void raise_if_failed(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.text);
}

void refuse(const char* op, const char* argument, const std::string& text) {
  throw std::runtime_error(std::string(op) + ": " + argument + ": " + text);
}

namespace {

// Of the CallDevice that is alive on this thread; -1: the CPU.
thread_local int32_t expected_device = -1;

}  // namespace

void expect_same_device(const char* op, const char* argument, const Tensor& t) {
  if (expected_device >= 0) {
    if (!(t.is_cuda() && t.get_device_index() == expected_device))
      refuse(op, argument,
             "expected a tensor on CUDA device " + std::to_string(expected_device) +
                 ", as x is, got one on another device; move it with .to(x.device)");
    return;
  }
  if (!t.is_cpu())
    refuse(op, argument, "expected a CPU tensor, as x is, got one on another device; move it with .to('cpu')");
}

DType dtype_of(const char* op, const char* argument, const Tensor& t) {
  expect_same_device(op, argument, t);
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Char: return DType::kInt8;
    default:
      refuse(op, argument,
             "expected float32, float16, bfloat16 or int8, got scalar type " +
                 std::to_string(static_cast<int>(t.scalar_type())) + "; convert it with .to(torch.float32)");
      return DType::kFloat32;
  }
}

Activation activation_of(const char* op, const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "gelu") return Activation::kGelu;
  if (name != "silu") refuse(op, "activation", "expected 'none', 'gelu' or 'silu', got '" + name + "'");
  return Activation::kSilu;
}

void expect_tensor(const char* op, const char* argument, const Tensor& t, ScalarType type,
                   const std::vector<int64_t>& sizes) {
  expect_same_device(op, argument, t);
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = sizes[i] < 0 || t.size(i) == sizes[i];
  if (!same) {
    std::ostringstream text;
    text << "expected shape [";
    for (size_t i = 0; i < sizes.size(); ++i) {
      text << (i ? ", " : "");
      if (sizes[i] < 0)
        text << "any";
      else
        text << sizes[i];
    }
    text << "], got " << shape_of(t);
    refuse(op, argument, text.str());
  }
  if (t.scalar_type() == type) return;
  refuse(op, argument,
         std::string("expected ") +
             (type == ScalarType::Int    ? "int32"
              : type == ScalarType::Long ? "int64"
              : type == ScalarType::Byte ? "uint8"
              : type == ScalarType::Char ? "int8"
                                         : "float32") +
             ", got another dtype; convert it with .to(...)");
}

RowView rows_of(const char* op, const char* argument, const Tensor& t) {
  if (t.dim() < 1) refuse(op, argument, "expected at least one dimension, got a scalar");
  RowView view{t};
  const int64_t dims = t.dim();
  view.columns = t.size(dims - 1);
  view.rows = 1;
  for (int64_t i = 0; i + 1 < dims; ++i) view.rows *= t.size(i);
  if (dims == 2 && (t.stride(1) == 1 || view.columns == 1) && t.stride(0) >= 1 &&
      (size_of(dtype_of(op, argument, t)) != 2 || t.stride(0) % 2 == 0)) {
    view.stride = t.stride(0);
  } else {
    if (!t.is_contiguous()) view.tensor = torch::stable::contiguous(t);
    view.stride = view.columns;
  }
  view.data = view.tensor.data_ptr();
  return view;
}

LoraOperands lora_operands(const char* op, const OptionalTensor& lora_a, const OptionalTensor& lora_b,
                           const OptionalTensor& scales, const OptionalTensor& offsets,
                           const OptionalTensor& adapter_ids, int64_t max_rank, int64_t in_features,
                           int64_t out_features) {
  LoraOperands out;
  if (max_rank < 0)
    refuse(op, "max_rank",
           "expected the largest rank of the bank, or 0 where it is not known, got " + std::to_string(max_rank) +
               "; leave it out");
  if (lora_a.has_value() != lora_b.has_value())
    refuse(op, lora_a ? "lora_b" : "lora_a", "expected both factors or none, got None for this one");
  if (!lora_a) {
    if (scales || offsets || adapter_ids)
      refuse(op, "lora_a", "expected the adapters that scales, offsets or adapter_ids speak of, got None");
    return out;
  }
  const Tensor &a = *lora_a, &b = *lora_b;
  if (!(a.dim() == 2 && a.size(1) == in_features))
    refuse(op, "lora_a",
           "expected [rank, " + std::to_string(in_features) + "], got " + shape_of(a) +
               "; is it the adapter of another layer or model?");
  const int64_t blocks = round_up(out_features, kLoraBlockColumns) / kLoraBlockColumns;
  const bool blocked = b.dim() == 3 && b.size(0) == blocks && b.size(1) == a.size(0) && b.size(2) == kLoraBlockColumns;
  if (!blocked && !(b.dim() == 2 && b.size(0) == a.size(0) && b.size(1) == out_features))
    refuse(op, "lora_b",
           "expected [" + std::to_string(a.size(0)) + ", " + std::to_string(out_features) +
               "] (by rank row; pass PEFT's B [out, rank] as B.t()), or its blocks [" + std::to_string(blocks) + ", " +
               std::to_string(a.size(0)) + ", 64], got " + shape_of(b));
  if (blocked && !(b.stride(2) == 1 && b.stride(1) == kLoraBlockColumns))
    refuse(op, "lora_b", "expected blocks that are contiguous each; call .contiguous()");
  out.shape.dtype = dtype_of(op, "lora_a", a);
  if (dtype_of(op, "lora_b", b) != out.shape.dtype) refuse(op, "lora_b", "expected the dtype of lora_a");
  out.shape.total_rank = a.size(0);
  out.shape.max_rank = a.size(0);
  out.shape.adapters = 1;

  const RowView rows = rows_of(op, "lora_a", a);
  out.keep.push_back(rows.tensor);
  out.bank.a = rows.data;
  out.bank.a_stride = rows.stride;
  out.bank.b = b.data_ptr();
  out.bank.b_stride_rank = blocked ? b.stride(1) : b.stride(0);
  out.bank.b_stride_out = blocked ? 1 : b.stride(1);
  out.bank.b_stride_block = blocked ? b.stride(0) : 0;
  if (offsets) {
    expect_tensor(op, "offsets", *offsets, ScalarType::Int, {-1});
    if (!(offsets->size(0) >= 2 && offsets->is_contiguous()))
      refuse(op, "offsets",
             "expected a contiguous tensor of one entry more than there are adapters, got " + shape_of(*offsets));
    out.bank.offsets = static_cast<const int32_t*>(offsets->data_ptr());
    out.shape.adapters = offsets->size(0) - 1;
    // Offsets on a CUDA device are not waited for. The kernels then cut ranks to what the caller knows (Routing::rank),
    // or to their sum.
    const bool readable = offsets->is_cpu();
    out.shape.max_rank = readable ? 0 : max_rank > 0 ? max_rank : out.shape.total_rank;
    for (int64_t i = 0; readable && i < out.shape.adapters; ++i) {
      const int64_t rank = out.bank.offsets[i + 1] - static_cast<int64_t>(out.bank.offsets[i]);
      if (rank > out.shape.max_rank) out.shape.max_rank = rank;
    }
    if (out.shape.max_rank > out.shape.total_rank) out.shape.max_rank = out.shape.total_rank;
  }
  if (max_rank > 0 && max_rank < out.shape.max_rank)
    refuse(op, "max_rank",
           "expected at least " + std::to_string(out.shape.max_rank) + ", the largest rank of " +
               (offsets ? "offsets" : "lora_a") + ", got " + std::to_string(max_rank) +
               "; pass the largest rank of the bank, or 0 where it is not known");
  if (scales) {
    expect_tensor(op, "scales", *scales, ScalarType::Float, {out.shape.adapters});
    if (!scales->is_contiguous()) refuse(op, "scales", "expected a contiguous tensor");
    out.bank.scales = static_cast<const float*>(scales->data_ptr());
  }
  if (adapter_ids) {
    expect_tensor(op, "adapter_ids", *adapter_ids, ScalarType::Int, {-1});
    if (!(adapter_ids->size(0) > 0 && adapter_ids->is_contiguous()))
      refuse(op, "adapter_ids", "expected a contiguous tensor of at least one id, got " + shape_of(*adapter_ids));
    out.bank.adapter_ids = static_cast<const int32_t*>(adapter_ids->data_ptr());
    out.shape.groups = adapter_ids->size(0);
  }
  return out;
}

BiasAndResidual bias_and_residual(const char* op, const OptionalTensor& bias, const OptionalTensor& residual,
                                  const Tensor& x, int64_t out_features) {
  BiasAndResidual out;
  if (bias) {
    if (!(bias->dim() == 1 && bias->size(0) == out_features))
      refuse(op, "bias", "expected [" + std::to_string(out_features) + "], got " + shape_of(*bias));
    out.bias_dtype = dtype_of(op, "bias", *bias);
    if (!(out.bias_dtype == DType::kFloat32 || bias->scalar_type() == x.scalar_type()))
      refuse(op, "bias", std::string("expected float32 or the dtype of x, got ") + name_of(out.bias_dtype));
    out.keep.push_back(bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias));
    out.bias = out.keep.back().data_ptr();
  }
  if (residual) {
    expect_same_device(op, "residual", *residual);
    bool same = residual->dim() == x.dim() && residual->size(x.dim() - 1) == out_features;
    for (int64_t i = 0; same && i + 1 < x.dim(); ++i) same = residual->size(i) == x.size(i);
    if (!(same && residual->scalar_type() == x.scalar_type()))
      refuse(op, "residual",
             "expected the shape of the result (that of x with " + std::to_string(out_features) +
                 " columns) and the dtype of x, got " + shape_of(*residual));
    out.keep.push_back(residual->is_contiguous() ? *residual : torch::stable::contiguous(*residual));
    out.residual = out.keep.back().data_ptr();
  }
  return out;
}

std::vector<int64_t> output_sizes(const Tensor& x, int64_t out_features) {
  std::vector<int64_t> sizes(x.dim());
  for (int64_t i = 0; i < x.dim(); ++i) sizes[i] = x.size(i);
  sizes.back() = out_features;
  return sizes;
}

Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, std::optional<ScalarType> type) {
  int32_t dtype = 0, device = 0, index = 0;
  if (type)
    dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*type));
  else
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * (sizes[i] > 0 ? sizes[i] : 1);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  dtype, device, index, &handle));
  return Tensor(handle);
}

DeviceInfo current_device() {
  static const DeviceInfo host = host_device();
  DeviceInfo device = host;
  device.threads = static_cast<int>(torch::stable::get_num_threads());
  return device;
}

namespace {

std::atomic<bool>& tf32_switch() {
  static std::atomic<bool> allowed{false};
  return allowed;
}

// torch's current stream. Its CUDA library is not on the link line, so that this one also loads where there is none; it
// is found among the libraries that are loaded, once.
void* current_stream(const char* op, int32_t index) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch_cuda ? reinterpret_cast<Get>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  if (!get)
    refuse(op, "x",
           "expected a torch with CUDA for a tensor on a CUDA device, got a CPU build; install one of its own");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(index, &stream));
  return stream;
}

}  // namespace

bool tf32_allowed() { return tf32_switch(); }
void allow_tf32(bool allow) { tf32_switch() = allow; }

CallDevice::CallDevice(const char* op, const Tensor& x) : like_(x) {
  if (!x.is_cuda()) return;
  current_stream(op, x.get_device_index());  // refuses before anything is touched
  guard_.emplace(x.get_device_index());
  expected_device = index_ = x.get_device_index();
}

CallDevice::~CallDevice() {
  if (is_cuda()) expected_device = -1;
}

DeviceInfo CallDevice::info() const {
  if (!is_cuda()) return current_device();
  DeviceInfo device;
  raise_if_failed(cuda_device(index_, &device));
  return device;
}

Executor CallDevice::executor() const {
  if (!is_cuda()) return torch_executor();
  Executor executor;
  executor.stream = current_stream("executor", index_);
  return executor;
}

void* CallDevice::workspace(int64_t bytes) {
  if (!is_cuda()) return lora_kernels::workspace(bytes);
  if (bytes == 0) return nullptr;
  memory_ = new_tensor(like_, {bytes}, ScalarType::Byte);
  return memory_->data_ptr();
}

Executor torch_executor() {
  Executor executor;
  executor.parallel_for = [](void*, int64_t tasks, Executor::Task task, void* context) {
    torch::stable::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) task(context, i);
    });
  };
  return executor;
}

void* workspace(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = 0;
    memory.reset(std::aligned_alloc(64, static_cast<size_t>(round_up(bytes, 64))));
    STD_TORCH_CHECK(memory != nullptr, "out of memory: a workspace of ", bytes, " bytes could not be allocated");
    size = round_up(bytes, 64);
  }
  return memory.get();
}

}  // namespace lora_kernels
