// A reader of safetensors files: 8 bytes of header size, a JSON header, and the tensors' bytes.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "files.h"
#include "json.h"

namespace transcribe {

class Safetensors {
 public:
  struct Tensor {
    std::vector<int64_t> shape;
    const float* data;  // row-major, valid as long as the file's object
  };

  // Every tensor has to be fp32, which is what exported folders hold.
  explicit Safetensors(const std::string& path) : bytes_(read_file(path)) {
    const auto damaged = [&](const std::string& what) {
      throw InputError(path + ": expected a safetensors file, got " + what + "; export the model again");
    };
    if (bytes_.size() < 8) damaged(std::to_string(bytes_.size()) + " bytes");
    uint64_t header = 0;
    for (int i = 7; i >= 0; --i) header = header << 8 | static_cast<unsigned char>(bytes_[i]);
    if (header > bytes_.size() - 8) damaged("a header longer than the file");
    const Json fields = Json::parse(std::string_view(bytes_).substr(8, header), path);
    const size_t begin = 8 + header, size = bytes_.size() - begin;
    for (const auto& [name, field] : fields.object()) {
      if (name == "__metadata__") continue;
      if (field.at("dtype").string() != "F32") damaged(name + " of type " + field.at("dtype").string() + ", not F32");
      Tensor tensor{field.at("shape").integers(), nullptr};
      uint64_t elements = 1;
      for (const int64_t length : tensor.shape) elements *= static_cast<uint64_t>(length);
      const std::vector<int64_t> range = field.at("data_offsets").integers();
      const bool fits = range.size() == 2 && range[0] >= 0 && range[0] <= range[1] &&
                        static_cast<uint64_t>(range[1]) <= size &&
                        static_cast<uint64_t>(range[1] - range[0]) == elements * sizeof(float) &&
                        (begin + range[0]) % sizeof(float) == 0;
      if (!fits) damaged(name + " at a place that the file does not have");
      tensor.data = reinterpret_cast<const float*>(bytes_.data() + begin + range[0]);
      tensors_[name] = tensor;
    }
  }
  Safetensors(const Safetensors&) = delete;
  Safetensors& operator=(const Safetensors&) = delete;

  const std::map<std::string, Tensor>& tensors() const { return tensors_; }

 private:
  std::string bytes_;
  std::map<std::string, Tensor> tensors_;
};

}  // namespace transcribe
