// Tokens to text. A token is a few bytes, not always whole characters.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

#include "files.h"

namespace transcribe {

// tokens.txt: a line per token id with its bytes in hexadecimal, none for what is no text.
inline std::vector<std::string> read_tokens(const std::string& path) {
  std::istringstream lines(read_file(path));
  std::vector<std::string> tokens;
  for (std::string line; std::getline(lines, line);) {
    std::string bytes;
    for (size_t i = 0; i + 1 < line.size(); i += 2)
      bytes += static_cast<char>(std::strtoul(line.substr(i, 2).c_str(), nullptr, 16));
    tokens.push_back(bytes);
  }
  return tokens;
}

// Bytes as valid UTF-8: what begins no character, or breaks one off, becomes U+FFFD, once for its longest valid start
// (the Unicode Standard, section 3.9, "Substitution of Maximal Subparts").
inline std::string valid_utf8(const std::string& bytes) {
  std::string text;
  for (size_t at = 0; at < bytes.size();) {
    const auto byte = [&](size_t i) { return i < bytes.size() ? static_cast<unsigned char>(bytes[i]) : 0u; };
    const unsigned lead = byte(at);
    const size_t length = lead < 0x80 ? 1 : lead >= 0xc2 && lead < 0xe0 ? 2 : (lead & 0xf0) == 0xe0 ? 3 : 4;
    bool good = lead < 0x80 || (lead >= 0xc2 && lead <= 0xf4);
    size_t taken = 1;
    for (; good && taken < length; ++taken) {
      unsigned low = 0x80, high = 0xbf;  // the second byte excludes long forms, surrogates, and beyond U+10FFFF
      if (taken == 1 && lead == 0xe0) low = 0xa0;
      if (taken == 1 && lead == 0xed) high = 0x9f;
      if (taken == 1 && lead == 0xf0) low = 0x90;
      if (taken == 1 && lead == 0xf4) high = 0x8f;
      if (byte(at + taken) < low || byte(at + taken) > high) {
        good = false;
        break;
      }
    }
    text += good ? bytes.substr(at, length) : "\xef\xbf\xbd";
    at += taken;
  }
  return text;
}

inline std::string text_of(const std::vector<int64_t>& ids, const std::vector<std::string>& tokens) {
  std::string bytes;
  for (const int64_t id : ids)
    if (id < static_cast<int64_t>(tokens.size())) bytes += tokens[id];
  const std::string text = valid_utf8(bytes);
  const char* const space = " \t\n\v\f\r";
  const size_t begin = text.find_first_not_of(space);
  return begin == std::string::npos ? "" : text.substr(begin, text.find_last_not_of(space) + 1 - begin);
}

}  // namespace transcribe
