// An exported folder as a recognizer: features, greedy decoding over the graphs, text.
#pragma once

#include <c10/core/InferenceMode.h>

#include <chrono>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "graphs.h"
#include "json.h"
#include "log_mel.h"
#include "speech_windows.h"
#include "text.h"

namespace transcribe {

// What one recording took, in milliseconds.
struct Times {
  double features = 0, encode = 0, decode = 0;
};

class Recognizer {
 public:
  Recognizer(const std::string& folder, const std::optional<std::string>& adapter)
      : folder_(checked(folder)),
        decoding_(json("decoding.json")),
        interface_(json("graphs.json")),
        features_(folder + "/features.safetensors", field("n_fft"), field("hop_length"), field("window_samples")),
        tokens_(read_tokens(folder + "/tokens.txt")),
        suppressed_(decoding_.at("suppressed").integers()),
        suppressed_first_(decoding_.at("suppressed_first").integers()),
        cache_type_(type("cache_dtype")),
        adapter_type_(type("adapter_dtype")),
        graphs_(load_graphs(folder, interface_.at("runtime").string())) {
    for (const auto& [name, inputs] : interface_.at("inputs").object()) inputs_[name] = inputs.strings();
    bind(adapter);
  }

  int64_t sampling_rate() const { return field("sampling_rate"); }

  // Emitted tokens of each window of speech, without the prompt and the end.
  std::vector<std::vector<int64_t>> tokens(const std::vector<float>& samples, Times* times) {
    const c10::InferenceMode guard;
    std::vector<std::vector<int64_t>> found;
    for (const Window& window : cut_windows(samples, sampling_rate(), field("window_samples"))) {
      at::Tensor features;
      timed(&times->features, [&] { features = features_(samples.data() + window.begin, window.end - window.begin); });
      timed(&times->encode, [&] { encode(features); });
      timed(&times->decode, [&] { found.push_back(decode()); });
    }
    return found;
  }

  // The windows' texts, joined by spaces.
  std::string text(const std::vector<std::vector<int64_t>>& windows) const {
    std::string text;
    for (const std::vector<int64_t>& window : windows) {
      const std::string part = text_of(window, tokens_);
      if (!part.empty()) text += (text.empty() ? "" : " ") + part;
    }
    return text;
  }

 private:
  static const std::string& checked(const std::string& folder) {
    if (!is_folder(folder)) throw InputError(folder + ": expected an exported folder, got none; check the path");
    if (!is_file(folder + "/graphs.json"))
      throw InputError(folder + ": expected an exported model with graphs.json, got none; name a folder that " +
                       "lora-speech export --to torchscript (or aoti) wrote");
    return folder;
  }
  Json json(const std::string& name) const {
    const std::string path = folder_ + "/" + name;
    return Json::parse(read_file(path), path);
  }
  int64_t field(const std::string& name) const { return decoding_.at(name).integer(); }

  at::ScalarType type(const std::string& name) const {
    const std::string& type = interface_.at(name).string();
    if (type == "float32") return at::kFloat;
    if (type == "bfloat16") return at::kBFloat16;
    throw InputError(folder_ + ": expected " + name + " float32 or bfloat16, got " + type + "; export the model again");
  }

  template <class Call>
  static void timed(double* milliseconds, const Call& call) {
    const auto begin = std::chrono::steady_clock::now();
    call();
    *milliseconds += std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
  }

  // The adapter's matrices as inputs of the graphs: a bank of this one, or of none.
  void bind(const std::optional<std::string>& adapter) {
    const std::vector<std::string> live = decoding_.at("live").strings();
    if (adapter) {
      std::string known;
      for (const std::string& name : live) known += (known.empty() ? "" : ", ") + name;
      if (std::find(live.begin(), live.end(), *adapter) == live.end())
        throw InputError("--adapter: expected " +
                         (known.empty() ? "none, as " + folder_ + " holds none" : "one of " + known) + ", got '" +
                         *adapter + "'; export it with lora-speech export --adapter NAME=FOLDER");
      adapter_ = std::make_unique<Safetensors>(folder_ + "/adapters/" + *adapter + ".safetensors");
    }
    named_["adapter_ids"] = at::full({1}, adapter ? 0 : -1, at::kInt);
    for (const auto& [linear, sizes] : interface_.at("adapted").object()) {
      const at::Tensor a = matrix(linear + ".lora_a", sizes.integers().at(0));
      const at::Tensor b = matrix(linear + ".lora_b", sizes.integers().at(1));
      if (a.size(0) != b.size(0)) throw InputError(linear + ": expected lora_a and lora_b of one rank, got two");
      named_[linear + ".lora_a"] = a.to(adapter_type_);
      named_[linear + ".lora_b"] = b.to(adapter_type_);
      named_[linear + ".offsets"] = at::tensor({0, static_cast<int>(a.size(0))}, at::kInt);
    }
  }
  // [rank, width]; one row of zeros where the adapter leaves the linear alone.
  at::Tensor matrix(const std::string& name, int64_t width) const {
    if (!adapter_ || !adapter_->tensors().count(name)) return at::zeros({1, width});
    const Safetensors::Tensor& found = adapter_->tensors().at(name);
    if (found.shape.size() != 2 || found.shape[1] != width)
      throw InputError(name + ": expected [rank, " + std::to_string(width) +
                       "], got another shape; export the adapter with this model");
    return tensor_of(found);
  }

  std::vector<at::Tensor> run(const std::string& graph) {
    std::vector<at::Tensor> inputs;
    for (const std::string& name : inputs_.at(graph)) inputs.push_back(named_.at(name));
    return graphs_->run(graph, std::move(inputs));
  }

  // Features to the keys and values of cross-attention, which the graph gives in the order that decode takes them.
  void encode(const at::Tensor& features) {
    named_["features"] = features;
    const std::vector<at::Tensor> found = run("encode");
    size_t at = 0;
    for (const std::string& name : inputs_.at("decode"))
      if (name.rfind("cross.", 0) == 0) named_[name] = found.at(at++);
  }

  // Greedy: the prompt first, then a token at a time; the caches are written where they are.
  std::vector<int64_t> decode() {
    for (const std::string& name : inputs_.at("decode"))
      if (name.rfind("past.", 0) == 0)
        named_[name] = at::zeros({1, field("heads"), field("positions"), field("head_size")}, cache_type_);
    std::vector<int64_t> chosen = decoding_.at("prompt").integers(), emitted;
    const int64_t end = field("end"), most = field("max_new_tokens");
    int32_t length = 0;
    while (static_cast<int64_t>(emitted.size()) < most) {
      const int64_t count = static_cast<int64_t>(chosen.size());
      named_["tokens"] = at::tensor(chosen, at::kLong).view({1, count});
      named_["lengths"] = at::full({1}, length, at::kInt);
      at::Tensor logits = run("decode").at(0).contiguous();
      length += static_cast<int32_t>(count);
      float* values = logits.mutable_data_ptr<float>();
      constexpr float kNever = -std::numeric_limits<float>::infinity();
      for (const int64_t token : suppressed_) values[token] = kNever;
      if (emitted.empty())
        for (const int64_t token : suppressed_first_) values[token] = kNever;
      const int64_t best = std::max_element(values, values + logits.numel()) - values;
      if (best == end) break;
      emitted.push_back(best);
      chosen = {best};
    }
    return emitted;
  }

  std::string folder_;
  Json decoding_, interface_;
  Features features_;
  std::vector<std::string> tokens_;
  std::vector<int64_t> suppressed_, suppressed_first_;
  at::ScalarType cache_type_, adapter_type_;
  std::unique_ptr<Graphs> graphs_;
  std::unique_ptr<Safetensors> adapter_;                    // memory of its tensors in named_
  std::map<std::string, std::vector<std::string>> inputs_;  // of each graph, in order
  std::map<std::string, at::Tensor> named_;                 // what is bound to them
};

}  // namespace transcribe
