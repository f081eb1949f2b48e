// Files whole, and what went wrong with them in words.
#pragma once

#include <sys/stat.h>

#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>

namespace transcribe {

// A fault of what was given; its text says what was expected, what came, and the fix.
struct InputError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline bool is_file(const std::string& path) {
  struct stat about;
  return stat(path.c_str(), &about) == 0 && S_ISREG(about.st_mode);
}

inline bool is_folder(const std::string& path) {
  struct stat about;
  return stat(path.c_str(), &about) == 0 && S_ISDIR(about.st_mode);
}

inline std::string read_file(const std::string& path) {
  if (is_folder(path)) throw InputError(path + ": expected a file, got a folder; name a file in it");
  std::ifstream file(path, std::ios::binary);
  if (!file) throw InputError(path + ": expected a file that can be read, got none; check the path and permissions");
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

}  // namespace transcribe
