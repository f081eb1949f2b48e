// Speech to text without Python: an exported folder of torchscript or aoti, LibTorch, and our operators' library.
#include <ATen/Parallel.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "recognizer.h"
#include "wav.h"

namespace {

constexpr const char* kUsage = R"(usage: transcribe [options] FOLDER RECORDING.wav...

Prints what is said in recordings, by a model that
`lora-speech export --to torchscript` (or aoti) wrote.

  --adapter NAME   one of the adapters that lie in FOLDER/adapters; without it, the base alone
  --tokens         print token ids in place of text, a window a line
  --threads N      threads of the operators; by default one per core
  --library PATH   the operators, lora_kernels/_torch.so; by default $LORA_KERNELS_LIBRARY,
                   or where it was when this program was built
  --times          print to stderr what each recording took
  --help           this text

Exit status: 0 done, 1 something given cannot be used, 2 a wrong command line.
)";

struct CommandLineError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  std::string folder, library;
  std::vector<std::string> recordings;
  std::optional<std::string> adapter;
  int threads = 0;
  bool tokens = false, times = false, help = false;
};

Options parse(int count, char** arguments) {
  Options options;
  if (const char* library = std::getenv("LORA_KERNELS_LIBRARY")) options.library = library;
#ifdef LORA_KERNELS_LIBRARY
  if (options.library.empty()) options.library = LORA_KERNELS_LIBRARY;
#endif
  std::vector<std::string> places;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    const auto value = [&]() -> std::string {
      if (i + 1 == count) throw CommandLineError(argument + ": expected a value after it, got none");
      return arguments[++i];
    };
    if (argument == "--adapter") {
      options.adapter = value();
    } else if (argument == "--library") {
      options.library = value();
    } else if (argument == "--threads") {
      const std::string text = value();
      options.threads = std::atoi(text.c_str());
      if (options.threads < 1) throw CommandLineError("--threads: expected a number from 1 on, got '" + text + "'");
    } else if (argument == "--tokens") {
      options.tokens = true;
    } else if (argument == "--times") {
      options.times = true;
    } else if (argument == "--help") {
      options.help = true;
    } else if (argument.rfind("--", 0) == 0) {
      throw CommandLineError("expected a known option, got '" + argument + "'");
    } else {
      places.push_back(argument);
    }
  }
  if (!options.help && places.size() < 2)
    throw CommandLineError("expected a folder and a recording, got " + std::to_string(places.size()) + " of the two");
  if (!places.empty()) options.folder = places.front();
  if (places.size() > 1) options.recordings.assign(places.begin() + 1, places.end());
  return options;
}

// Registers the operators with torch's dispatcher.
void load_operators(const std::string& path) {
  if (path.empty())
    throw transcribe::InputError(
        "--library: expected lora_kernels/_torch.so, got none; name it, or set "
        "LORA_KERNELS_LIBRARY");
  if (!dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL))
    throw transcribe::InputError("--library: expected the operators of lora_kernels, got: " + std::string(dlerror()) +
                                 "; name lora_kernels/_torch.so of an installed package");
}

// TorchScript puts its own code before what an operator said.
std::string cause_of(const std::exception& error) {
  const std::string text = error.what(), mark = "RuntimeError: ";
  const size_t at = text.rfind(mark);
  return at == std::string::npos ? text : text.substr(at + mark.size());
}

void print_tokens(const std::vector<std::vector<int64_t>>& windows) {
  for (const std::vector<int64_t>& window : windows) {
    for (size_t i = 0; i < window.size(); ++i) std::printf("%s%lld", i ? " " : "", static_cast<long long>(window[i]));
    std::printf("\n");
  }
}

void run(const Options& options) {
  if (options.threads) at::set_num_threads(options.threads);
  load_operators(options.library);
  transcribe::Recognizer recognizer(options.folder, options.adapter);
  // All are read before any is transcribed, so that a bad one costs nothing.
  std::vector<std::vector<float>> recordings;
  for (const std::string& path : options.recordings)
    recordings.push_back(transcribe::read_wav(path, recognizer.sampling_rate()));
  for (size_t i = 0; i < recordings.size(); ++i) {
    transcribe::Times times;
    const auto windows = recognizer.tokens(recordings[i], &times);
    if (recordings.size() > 1) std::printf("%s: ", options.recordings[i].c_str());
    if (options.tokens)
      print_tokens(windows);
    else
      std::printf("%s\n", recognizer.text(windows).c_str());
    if (options.times)
      std::fprintf(stderr, "%s: features %.1f ms, encode %.1f ms, decode %.1f ms\n", options.recordings[i].c_str(),
                   times.features, times.encode, times.decode);
  }
}

}  // namespace

int main(int count, char** arguments) {
  try {
    const Options options = parse(count, arguments);
    if (options.help)
      std::fputs(kUsage, stdout);
    else
      run(options);
    return 0;
  } catch (const CommandLineError& error) {
    std::fprintf(stderr, "transcribe: %s\n\n%s", error.what(), kUsage);
    return 2;
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "transcribe: torch: %s\n", error.what_without_backtrace());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "transcribe: %s\n", cause_of(error).c_str());
  }
  return 1;
}
