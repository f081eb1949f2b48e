#include "plugin.h"

#include <cstdio>
#include <exception>
#include <utility>

#include "fields.h"

namespace lora_kernels::tensorrt {

using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

namespace {

// Everything that TensorRT calls is noexcept: what is thrown (there is no memory) becomes a Status.
template <class Body>
Status guarded(const Body& body) noexcept {
  try {
    return body();
  } catch (const std::exception& error) {
    return Status::failed(error.what());
  } catch (...) {
    return Status::failed("an unknown exception");
  }
}

Status wrong_counts(int32_t inputs, int32_t outputs) {
  return Status::invalid("got " + std::to_string(inputs) + " inputs and " + std::to_string(outputs) +
                         " outputs, which is not what this node has; export the model again with this version");
}

enum class Extent { kLeast, kMost };

std::vector<PluginTensorDesc> at(const DynamicPluginTensorDesc* tensors, size_t count, Extent extent) {
  std::vector<PluginTensorDesc> descriptions(count);
  for (size_t i = 0; i < count; ++i) {
    descriptions[i] = tensors[i].desc;
    descriptions[i].dims = extent == Extent::kLeast ? tensors[i].min : tensors[i].max;
  }
  return descriptions;
}

}  // namespace

void log_error(const char* plugin, const std::string& text) {
  std::fprintf(stderr, "[lora_kernels] [E] %s: %s\n", plugin, text.c_str());
}

Plugin::Plugin(const char* name, std::unique_ptr<Operator> implementation, const Fields& fields)
    : name_(name), implementation_(std::move(implementation)), fields_(fields) {
  implementation_->set(fields_);
}

Plugin::Plugin(const Plugin& other)
    : nvinfer1::IPluginV3(),
      nvinfer1::IPluginV3OneCore(),
      nvinfer1::IPluginV3OneBuildV2(),
      nvinfer1::IPluginV3OneRuntime(),
      name_(other.name_),
      implementation_(other.implementation_->clone()),
      fields_(other.fields_) {}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept {
  Plugin* copy = nullptr;
  answer(guarded([&] {
    copy = new Plugin(*this);
    return Status{};
  }));
  return copy;
}

int32_t Plugin::answer(const Status& status) const {
  if (status.ok()) return 0;
  log_error(name_, status.text);
  if (errors_) errors_->reportError(nvinfer1::ErrorCode::kFAILED_EXECUTION, status.text.c_str());
  return -1;
}

bool Plugin::counts_fit(int32_t inputs, int32_t outputs) const {
  const Signature& signature = implementation_->signature();
  return inputs == static_cast<int32_t>(signature.inputs.size()) &&
         outputs == static_cast<int32_t>(signature.like.size());
}

Status Plugin::most_workspace(const DynamicPluginTensorDesc* in, int64_t* bytes) const {
  const size_t count = implementation_->signature().inputs.size();
  DeviceInfo device;
  Status status = operands_device(&device);
  if (!status.ok()) return status;
  return implementation_->workspace(at(in, count, Extent::kLeast).data(), at(in, count, Extent::kMost).data(), device,
                                    bytes);
}

// Called for every profile, while an engine is built: what cannot run here is refused now, with the reason.
int32_t Plugin::configurePlugin(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*,
                                int32_t outputs) noexcept {
  return answer(guarded([&] {
    if (!counts_fit(inputs, outputs)) return wrong_counts(inputs, outputs);
    int64_t bytes = 0;
    Status status = most_workspace(in, &bytes);
    if (status.ok() && bytes > fields_.workspace) fields_.workspace = bytes;
    return status;
  }));
}

int32_t Plugin::getOutputDataTypes(nvinfer1::DataType* types, int32_t outputs, const nvinfer1::DataType* in,
                                   int32_t inputs) const noexcept {
  if (!counts_fit(inputs, outputs)) return answer(wrong_counts(inputs, outputs));
  for (int32_t i = 0; i < outputs; ++i) types[i] = in[implementation_->signature().like[i]];
  return 0;
}

int32_t Plugin::getOutputShapes(const nvinfer1::DimsExprs* in, int32_t inputs, const nvinfer1::DimsExprs*, int32_t,
                                nvinfer1::DimsExprs* out, int32_t outputs, nvinfer1::IExprBuilder&) noexcept {
  if (!counts_fit(inputs, outputs)) return answer(wrong_counts(inputs, outputs));
  const Signature& signature = implementation_->signature();
  for (int32_t i = 0; i < outputs; ++i) {
    out[i] = in[signature.like[i]];
    if (i == 0 && signature.size_of_last >= 0 && out[i].nbDims > 0)
      out[i].d[out[i].nbDims - 1] = in[signature.size_of_last].d[0];
  }
  return 0;
}

bool Plugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t inputs,
                                       int32_t outputs) noexcept {
  if (!counts_fit(inputs, outputs) || position < 0 || position >= inputs + outputs) return false;
  if (tensors[position].desc.format != nvinfer1::TensorFormat::kLINEAR) return false;
  bool accepted = false;
  const Status status = guarded([&] {
    Types types(position + 1);
    for (int32_t i = 0; i <= position; ++i) types[i] = tensors[i].desc.type;
    accepted = implementation_->accepts(position, types);
    return Status{};
  });
  return status.ok() && accepted;
}

int32_t Plugin::getNbOutputs() const noexcept { return static_cast<int32_t>(implementation_->signature().like.size()); }

size_t Plugin::getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*,
                                int32_t outputs) const noexcept {
  int64_t bytes = 0;
  answer(guarded([&] {
    if (!counts_fit(inputs, outputs)) return wrong_counts(inputs, outputs);
    return most_workspace(in, &bytes);
  }));
  return static_cast<size_t>(bytes);
}

int32_t Plugin::getAliasedInput(int32_t output) noexcept { return implementation_->aliased_input(output); }

int32_t Plugin::onShapeChange(const PluginTensorDesc* in, int32_t inputs, const PluginTensorDesc*,
                              int32_t outputs) noexcept {
  return answer(guarded([&] {
    if (!counts_fit(inputs, outputs)) return wrong_counts(inputs, outputs);
    DeviceInfo device;
    Status status = operands_device(&device);
    if (status.ok()) status = implementation_->plan(in, device);
    const int64_t needed = status.ok() ? implementation_->planned_workspace() : 0;
    if (needed > fields_.workspace && fields_.workspace > 0)
      return Status::invalid("workspace: these sizes need " + std::to_string(needed) + " bytes and the engine has " +
                             std::to_string(fields_.workspace) + "; build it with a profile that covers them");
    return status;
  }));
}

int32_t Plugin::enqueue(const PluginTensorDesc*, const PluginTensorDesc*, const void* const* inputs,
                        void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  return answer(guarded([&] {
    Executor executor = serial_executor();
    executor.stream = stream;
    return implementation_->run(inputs, outputs, workspace, executor);
  }));
}

nvinfer1::IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext* context) noexcept {
  Plugin* attached = static_cast<Plugin*>(clone());
  if (attached && context) attached->errors_ = context->getErrorRecorder();
  return attached;
}

const nvinfer1::PluginFieldCollection* Plugin::getFieldsToSerialize() noexcept {
  const Status status = guarded([&] {
    serialized_ = fields_to_serialize(implementation_->signature(), fields_);
    return Status{};
  });
  if (answer(status) != 0) return nullptr;
  collection_.nbFields = static_cast<int32_t>(serialized_.size());
  collection_.fields = serialized_.data();
  return &collection_;
}

Creator::Creator(const char* name, Make make) : name_(name), make_(make) {
  static const Fields kNone;
  names_ = fields_to_serialize(make_()->signature(), kNone);
  names_.pop_back();  // the workspace, which is an engine's and no node's
  for (nvinfer1::PluginField& field : names_) field.data = nullptr;
  collection_.nbFields = static_cast<int32_t>(names_.size());
  collection_.fields = names_.data();
}

nvinfer1::IPluginV3* Creator::createPlugin(const char* layer, const nvinfer1::PluginFieldCollection* fields,
                                           nvinfer1::TensorRTPhase) noexcept {
  Plugin* plugin = nullptr;
  const Status status = guarded([&] {
    std::unique_ptr<Operator> implementation = make_();
    Fields read;
    Status valid = read_fields(implementation->signature(), fields, &read);
    if (valid.ok()) plugin = new Plugin(name_, std::move(implementation), read);
    return valid;
  });
  if (!status.ok()) log_error(name_, (layer ? "layer '" + std::string(layer) + "': " : std::string()) + status.text);
  return plugin;
}

}  // namespace lora_kernels::tensorrt
