#include "fields.h"

#include <cmath>
#include <cstring>

namespace lora_kernels::tensorrt {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

namespace {

// Where a field of this name is kept; one of the three.
struct Place {
  int32_t* integer = nullptr;
  float* number = nullptr;
  int64_t* bytes = nullptr;

  bool found() const { return integer || number || bytes; }
  PluginFieldType type() const {
    return integer ? PluginFieldType::kINT32 : number ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT64;
  }
  void* address() const {
    return integer ? static_cast<void*>(integer) : number ? static_cast<void*>(number) : static_cast<void*>(bytes);
  }
  size_t size() const { return bytes ? sizeof(int64_t) : sizeof(int32_t); }
};

Place place_of(const std::string& name, Fields* f) {
  Place place;
  if (name == "has_bias") place.integer = &f->has_bias;
  if (name == "has_lora") place.integer = &f->has_lora;
  if (name == "has_residual") place.integer = &f->has_residual;
  if (name == "has_x_scale") place.integer = &f->has_x_scale;
  if (name == "has_slots") place.integer = &f->has_slots;
  if (name == "in_place") place.integer = &f->in_place;
  if (name == "scale") place.number = &f->scale;
  if (name == "workspace") place.bytes = &f->workspace;
  return place;
}

// The fields of an operator's own, and the workspace that an engine remembers.
std::vector<FieldName> names_of(const Signature& signature) {
  std::vector<FieldName> names = signature.fields;
  names.push_back({"workspace", false});
  return names;
}

std::string listed(const std::vector<FieldName>& names) {
  std::string text;
  for (const FieldName& name : names) text += (text.empty() ? "" : ", ") + std::string(name.name);
  return text;
}

Status read_one(const PluginField& field, Fields* fields) {
  const Place place = place_of(field.name, fields);
  if (field.type != place.type() || field.length != 1 || !field.data)
    return Status::invalid(std::string(field.name) + ": expected one " +
                           (place.number ? "float32" : (place.bytes ? "int64" : "int32")) + ", got a field of type " +
                           std::to_string(static_cast<int>(field.type)) + " and length " +
                           std::to_string(field.length));
  std::memcpy(place.address(), field.data, place.size());
  if (place.integer && *place.integer != 0 && *place.integer != 1)
    return Status::invalid(std::string(field.name) + ": expected 0 or 1, got " + std::to_string(*place.integer));
  if (place.number && !std::isfinite(*place.number))
    return Status::invalid(std::string(field.name) + ": expected a finite number");
  if (place.bytes && *place.bytes < 0)
    return Status::invalid(std::string(field.name) + ": expected at least 0, got " + std::to_string(*place.bytes));
  return {};
}

}  // namespace

std::vector<PluginField> fields_to_serialize(const Signature& signature, const Fields& fields) {
  std::vector<PluginField> result;
  for (const FieldName& name : names_of(signature)) {
    const Place place = place_of(name.name, const_cast<Fields*>(&fields));
    result.emplace_back(name.name, place.address(), place.type(), 1);
  }
  return result;
}

Status read_fields(const Signature& signature, const nvinfer1::PluginFieldCollection* collection, Fields* fields) {
  const std::vector<FieldName> names = names_of(signature);
  std::vector<bool> seen(names.size());
  for (int32_t i = 0; collection && i < collection->nbFields; ++i) {
    const PluginField& field = collection->fields[i];
    const std::string name = field.name ? field.name : "";
    if (name == "plugin_version" || name == "plugin_namespace") continue;
    size_t known = 0;
    while (known < names.size() && name != names[known].name) ++known;
    if (known == names.size())
      return Status::invalid("'" + name + "' is no field of this plugin, which has " + listed(names) +
                             "; export the model with this version of lora_kernels");
    if (Status status = read_one(field, fields); !status.ok()) return status;
    seen[known] = true;
  }
  for (size_t i = 0; i < names.size(); ++i)
    if (names[i].required && !seen[i])
      return Status::invalid(std::string(names[i].name) + ": expected this field, got none; a node has all of " +
                             listed(signature.fields));
  return {};
}

}  // namespace lora_kernels::tensorrt
