// The two graphs of an exported model, whatever compiled them.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/csrc/jit/serialization/import.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "files.h"

namespace transcribe {

class Graphs {
 public:
  virtual ~Graphs() = default;
  // "encode" or "decode" over its inputs, in the order of graphs.json.
  virtual std::vector<at::Tensor> run(const std::string& graph, std::vector<at::Tensor> inputs) = 0;
};

// Of what torch says: a backtrace follows.
inline std::string first_line(const std::exception& error) {
  const std::string text = error.what();
  return text.substr(0, text.find('\n'));
}

// model.ts, with a method for each graph.
class TorchScriptGraphs : public Graphs {
 public:
  explicit TorchScriptGraphs(const std::string& folder) {
    // Our operators are most of the work: nothing is gained by profiling and compiling around them.
    torch::jit::setGraphExecutorOptimize(false);
    const std::string path = folder + "/model.ts";
    try {
      model_ = torch::jit::load(path, at::kCPU);
    } catch (const c10::Error& error) {
      throw InputError(path + ": expected TorchScript that this LibTorch reads, got: " + first_line(error) +
                       "; export the model again, with this release of torch");
    }
  }

  std::vector<at::Tensor> run(const std::string& graph, std::vector<at::Tensor> inputs) override {
    std::vector<c10::IValue> values(inputs.begin(), inputs.end());
    const c10::IValue found = model_.get_method(graph)(std::move(values));
    if (found.isTensor()) return {found.toTensor()};
    std::vector<at::Tensor> outputs;
    for (const c10::IValue& value : found.toTupleRef().elements()) outputs.push_back(value.toTensor());
    return outputs;
  }

 private:
  torch::jit::Module model_;
};

// encode.pt2 and decode.pt2, compiled by AOTInductor.
class AotiGraphs : public Graphs {
 public:
  explicit AotiGraphs(const std::string& folder) {
    for (const char* name : {"encode", "decode"}) {
      const std::string path = folder + "/" + name + ".pt2";
      try {
        packages_[name] = std::make_unique<torch::inductor::AOTIModelPackageLoader>(path);
      } catch (const std::exception& error) {
        throw InputError(path + ": expected a package that this LibTorch loads, got: " + first_line(error) +
                         "; export the model again, on this kind of machine and with this release of torch");
      }
    }
  }

  std::vector<at::Tensor> run(const std::string& graph, std::vector<at::Tensor> inputs) override {
    return packages_.at(graph)->boxed_run(std::move(inputs));
  }

 private:
  std::map<std::string, std::unique_ptr<torch::inductor::AOTIModelPackageLoader>> packages_;
};

inline std::unique_ptr<Graphs> load_graphs(const std::string& folder, const std::string& runtime) {
  if (runtime == "torchscript") return std::make_unique<TorchScriptGraphs>(folder);
  if (runtime == "aoti") return std::make_unique<AotiGraphs>(folder);
  throw InputError(folder + ": expected graphs of torchscript or aoti, got '" + runtime +
                   "'; export the model with one of these as --to");
}

}  // namespace transcribe
