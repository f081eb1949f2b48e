// What TensorRT looks for in a plugin library: loadLibrary(), or trtexec --dynamicPlugins.
#include "plugin.h"

namespace lora_kernels::tensorrt {
namespace {

template <Activation kActivation>
std::unique_ptr<Operator> lora_linear() {
  return make_lora_linear(kActivation);
}
template <Activation kActivation>
std::unique_ptr<Operator> int8_lora_linear() {
  return make_int8_lora_linear(kActivation);
}
template <bool kAppend, bool kInt8>
std::unique_ptr<Operator> kv_attention_step() {
  return make_kv_attention_step(kAppend, kInt8);
}

// The nodes of lora_kernels/export/nodes.py.
nvinfer1::IPluginCreatorInterface* const* creators(int32_t* count) {
  static Creator all[] = {
      {"LoraLinear", lora_linear<Activation::kNone>},
      {"LoraLinearGelu", lora_linear<Activation::kGelu>},
      {"LoraLinearSilu", lora_linear<Activation::kSilu>},
      {"Int8LoraLinear", int8_lora_linear<Activation::kNone>},
      {"Int8LoraLinearGelu", int8_lora_linear<Activation::kGelu>},
      {"Int8LoraLinearSilu", int8_lora_linear<Activation::kSilu>},
      {"KvAttentionStep", kv_attention_step<true, false>},
      {"KvAttentionStepInt8", kv_attention_step<true, true>},
      {"KvAttentionFixed", kv_attention_step<false, false>},
      {"KvAttentionFixedInt8", kv_attention_step<false, true>},
  };
  constexpr int32_t kCount = sizeof(all) / sizeof(all[0]);
  static nvinfer1::IPluginCreatorInterface* pointers[kCount];
  for (int32_t i = 0; i < kCount; ++i) pointers[i] = &all[i];
  *count = kCount;
  return pointers;
}

}  // namespace
}  // namespace lora_kernels::tensorrt

// TENSORRTAPI is empty outside of TensorRT's own build, and everything else here is hidden.
#define LORA_KERNELS_ENTRY extern "C" __attribute__((visibility("default")))

LORA_KERNELS_ENTRY nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  return lora_kernels::tensorrt::creators(&count);
}

// Looked for by loadLibrary(), and of no use here: a logger of 11 is not one of 10.
LORA_KERNELS_ENTRY void setLoggerFinder(nvinfer1::ILoggerFinder*) {}
