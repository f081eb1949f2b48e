// A reader of WAV files: 16-bit integers or 32-bit floats, channels averaged.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "files.h"

namespace transcribe {

// Samples in about [-1, 1], at `rate` samples per second; a file of another rate is refused.
inline std::vector<float> read_wav(const std::string& path, int64_t rate) {
  const std::string convert = "ffmpeg -i INPUT -ar " + std::to_string(rate) + " -ac 1 -c:a pcm_s16le OUTPUT.wav";
  const auto refuse = [&](const std::string& expected, const std::string& got, const std::string& fix) {
    throw InputError(path + ": expected " + expected + ", got " + got + "; " + fix);
  };
  if (!is_file(path) && !is_folder(path)) refuse("a WAV file", "nothing of that name", "check the path");
  const std::string bytes = read_file(path);
  const auto number = [&](size_t at, int size) {
    uint64_t value = 0;
    for (int i = size - 1; i >= 0; --i) value = value << 8 | static_cast<unsigned char>(bytes[at + i]);
    return value;
  };
  if (bytes.size() < 12 || bytes.compare(0, 4, "RIFF") != 0 || bytes.compare(8, 4, "WAVE") != 0)
    refuse("a WAV file", bytes.empty() ? "an empty file" : "another format", "convert it: " + convert);

  uint64_t format = 0, channels = 0, found_rate = 0, bits = 0;
  size_t begin = 0, size = 0;
  for (size_t at = 12; at + 8 <= bytes.size() && begin == 0;) {
    const uint64_t length = number(at + 4, 4);
    const size_t body = at + 8, room = bytes.size() - body;
    if (bytes.compare(at, 4, "fmt ") == 0 && length >= 16 && length <= room) {
      format = number(body, 2);
      channels = number(body + 2, 2);
      found_rate = number(body + 4, 4);
      bits = number(body + 14, 2);
      if (format == 0xfffe && length >= 26) format = number(body + 24, 2);  // extensible: the format follows
    } else if (bytes.compare(at, 4, "data") == 0) {
      // A program that writes to a pipe cannot know the size and leaves the largest one there is.
      if (length > room && length < 0x7fffffff)
        refuse(std::to_string(length) + " bytes of samples, as its header says", std::to_string(room),
               "the file was cut short: copy or export it again");
      begin = body;
      size = length < room ? length : room;
    }
    at = body + length + (length & 1);
  }
  const bool integers = format == 1 && bits == 16, floats = format == 3 && bits == 32;
  if (!(integers || floats) || channels == 0)
    refuse("16-bit integers or 32-bit floats",
           "format " + std::to_string(format) + " of " + std::to_string(bits) + " bits", "convert it: " + convert);
  if (found_rate != static_cast<uint64_t>(rate))
    refuse(std::to_string(rate) + " samples per second, as the model takes them", std::to_string(found_rate),
           "convert it: " + convert + "  (or: sox INPUT -r " + std::to_string(rate) + " -c 1 OUTPUT.wav)");
  const size_t width = bits / 8, count = size / (width * channels);
  if (count == 0) refuse("speech", "0 samples", "record or export it again");

  std::vector<float> samples(count);
  for (size_t i = 0; i < count; ++i) {
    float sum = 0;
    for (size_t c = 0; c < channels; ++c) {
      const char* at = bytes.data() + begin + (i * channels + c) * width;
      if (integers) {
        int16_t value;
        std::memcpy(&value, at, sizeof value);
        sum += static_cast<float>(value) / 32768.0f;
      } else {
        float value;
        std::memcpy(&value, at, sizeof value);
        sum += value;
      }
    }
    samples[i] = sum / static_cast<float>(channels);
    if (!std::isfinite(samples[i])) refuse("finite samples", "NaN or infinity", "export it again as 16-bit integers");
  }
  return samples;
}

}  // namespace transcribe
