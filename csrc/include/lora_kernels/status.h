// What every entry point of the core returns. The core never throws and never prints: a binding renders the Status.
#pragma once

#include <string>
#include <utility>

namespace lora_kernels {

enum class StatusCode {
  kOk,
  kInvalidArgument,  // an argument is wrong; the text names it, what was expected, what came, and the fix
  kUnsupported,      // no implementation can do this here; the text lists every reason
  kFailed,           // a launch failed; the text has the kernel, the plan, and CUDA's own error
};

struct Status {
  StatusCode code = StatusCode::kOk;
  std::string text;

  bool ok() const { return code == StatusCode::kOk; }
  static Status invalid(std::string text) { return {StatusCode::kInvalidArgument, std::move(text)}; }
  static Status failed(std::string text) { return {StatusCode::kFailed, std::move(text)}; }
  static Status unsupported(std::string text) { return {StatusCode::kUnsupported, std::move(text)}; }
};

}  // namespace lora_kernels
