// The parts of examples/cpp that need no torch: readers of JSON, WAV and safetensors, texts, windows.
#include <cmath>
#include <cstdio>
#include <fstream>
#include <functional>
#include <limits>

#include "check.h"
#include "json.h"
#include "safetensors.h"
#include "speech_windows.h"
#include "text.h"
#include "wav.h"

using namespace transcribe;

namespace {

const std::string kFile = "transcribe_test.tmp";

void write(const std::string& bytes) { std::ofstream(kFile, std::ios::binary) << bytes; }

// Whether a call is refused, by a text that holds `expected`.
void check_refused(const std::string& expected, const std::function<void()>& call) {
  try {
    call();
    check(false, "accepted, where expected: " + expected);
  } catch (const InputError& error) {
    check(std::string(error.what()).find(expected) != std::string::npos,
          "expected '" + expected + "', got '" + error.what() + "'");
  }
}

void test_json() {
  const Json json =
      Json::parse(R"( {"a": [1, -2.5e1, 3], "b": {"c": "x\"\\\n\u00e9\ud83d\ude00"}, "d": true, "e": []} )", "file");
  check(json.at("a").integers() == std::vector<int64_t>{1, -25, 3}, "numbers");
  check(json.at("b").at("c").string() == "x\"\\\n\xc3\xa9\xf0\x9f\x98\x80", "escapes");
  check(json.at("e").array().empty(), "an empty array");
  check_refused("file: a: expected a string", [&] { json.at("a").string(); });
  check_refused("file: expected a field 'z'", [&] { json.at("z"); });
  for (const char* text : {"", "{", "[1,", "[1 2]", "{\"a\" 1}", "\"open", "tru", "1 2", "\"\\x\"", "\"\\u12\"", "-"})
    check_refused("expected JSON", [&] { Json::parse(text, "file"); });
  check_refused("fewer values within values", [&] { Json::parse(std::string(100000, '['), "file"); });
}

std::string number(uint64_t value, int size) {
  std::string bytes;
  for (int i = 0; i < size; ++i) bytes += static_cast<char>(value >> 8 * i);
  return bytes;
}

std::string wav(int format, int channels, int rate, int bits, const std::string& data, uint64_t promised) {
  const std::string head =
      number(format, 2) + number(channels, 2) + number(rate, 4) + number(0, 4) + number(0, 2) + number(bits, 2);
  return "RIFF" + number(0, 4) + "WAVE" + "LIST" + number(3, 4) + "abc" + number(0, 1) + "fmt " + number(16, 4) + head +
         "data" + number(promised, 4) + data;
}

std::string floats(const std::vector<float>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)};
}

void test_wav() {
  const std::string four = number(16384, 2) + number(0, 2) + number(0xffff & -32768, 2) + number(0xffff & -32768, 2);
  write(wav(1, 2, 8000, 16, four, 8));
  check(read_wav(kFile, 8000) == std::vector<float>{0.25f, -1.0f}, "16-bit integers, two channels");
  check_refused("expected 16000 samples per second, as the model takes them, got 8000; convert it: ffmpeg",
                [] { read_wav(kFile, 16000); });
  write(wav(3, 1, 16000, 32, floats({0.5f, -0.25f, 1.0f}), 12));
  check(read_wav(kFile, 16000) == std::vector<float>{0.5f, -0.25f, 1.0f}, "32-bit floats");
  write(wav(1, 1, 16000, 16, four, 0xffffffff));
  check(read_wav(kFile, 16000).size() == 4, "of a pipe, whose size was unknown");
  write(wav(1, 1, 16000, 16, four, 100));
  check_refused("expected 100 bytes of samples, as its header says, got 8", [] { read_wav(kFile, 16000); });
  write(wav(1, 1, 16000, 16, "", 0));
  check_refused("got 0 samples", [] { read_wav(kFile, 16000); });
  write(wav(1, 1, 16000, 24, four, 8));
  check_refused("got format 1 of 24 bits", [] { read_wav(kFile, 16000); });
  write(wav(3, 1, 16000, 32, floats({std::numeric_limits<float>::quiet_NaN()}), 4));
  check_refused("expected finite samples", [] { read_wav(kFile, 16000); });
  const std::string whole = wav(1, 1, 16000, 16, four, 8);
  for (size_t size = 0; size + 8 < whole.size(); ++size) {  // cut anywhere before the samples
    write(whole.substr(0, size));
    check_refused(kFile + ": expected", [] { read_wav(kFile, 16000); });
  }
  check_refused("got nothing of that name", [] { read_wav("nowhere.wav", 16000); });
  check_refused("expected a file, got a folder", [] { read_wav(".", 16000); });
}

void test_safetensors() {
  const std::string header = R"({"__metadata__":{"a":"b"},"x":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}} )";
  const auto file = [](const std::string& header, size_t size) { return number(size, 8) + header; };
  const std::string data = floats({1.5f, -2.0f});
  std::string padded = header;
  while (padded.size() % 8) padded += ' ';
  write(file(padded, padded.size()) + data);
  {
    const Safetensors found(kFile);
    const Safetensors::Tensor& x = found.tensors().at("x");
    check(found.tensors().size() == 1 && x.shape == std::vector<int64_t>{2, 1}, "a shape");
    check(x.data[0] == 1.5f && x.data[1] == -2.0f, "values");
  }
  write(file(padded, padded.size()) + data.substr(0, 4));
  check_refused("x at a place that the file does not have", [] { Safetensors{kFile}; });
  write(file(padded, 1 << 20) + data);
  check_refused("a header longer than the file", [] { Safetensors{kFile}; });
  write("abc");
  check_refused("got 3 bytes", [] { Safetensors{kFile}; });
  std::string half = padded;
  half.replace(half.find("F32"), 3, "F16");
  write(file(half, half.size()) + data);
  check_refused("x of type F16, not F32", [] { Safetensors{kFile}; });
}

void test_text() {
  write("20e2\n82ac2041\n\nff\n");
  const std::vector<std::string> tokens = read_tokens(kFile);
  check(tokens.size() == 4 && tokens[2].empty(), "a line per token");
  check(text_of({0, 1, 2, 3}, tokens) == "\xe2\x82\xac A\xef\xbf\xbd", "a character of two tokens, and no character");
  check(text_of({9, 2}, tokens).empty(), "no text");
  const std::string bad = "\xef\xbf\xbd";
  check(valid_utf8("\xe2\x82") == bad, "a character broken off is one mark");
  check(valid_utf8("\xf0\x9f\x98 a") == bad + " a", "and what follows stays");
  check(valid_utf8("\xc0\xaf\x80") == bad + bad + bad, "bytes that begin nothing are one each");
  check(valid_utf8("\xed\xa0\x80") == bad + bad + bad, "surrogates are none");
}

void test_windows() {
  constexpr int64_t kRate = 1000;
  const auto speech = [&](std::vector<float>* samples, int64_t count, float level) {
    for (int64_t i = 0; i < count; ++i) samples->push_back(level * (i % 2 ? 1.0f : -1.0f));
  };
  check(cut_windows(std::vector<float>(500, 0.0f), kRate, 1000).empty(), "silence has no window");
  std::vector<float> samples;
  speech(&samples, 800, 0.5f);
  const auto one = cut_windows(samples, kRate, 1000);
  check(one.size() == 1 && one[0].begin == 0 && one[0].end == 800, "a short recording is one window");
  // A pause from 700 to 1200, and then silence to the end.
  samples.resize(700);
  samples.resize(1200, 0.0f);
  speech(&samples, 500, 0.5f);
  samples.resize(4000, 0.0f);
  const auto two = cut_windows(samples, kRate, 1000);
  check(two.size() == 2, "two windows, got " + std::to_string(two.size()));
  if (two.size() == 2) {
    check(two[0].begin == 0 && two[0].end > 700 && two[0].end <= 1000, "the first ends in the pause");
    check(two[1].begin >= two[0].end && two[1].begin <= 1200 && two[1].end >= 1700, "the second has the rest");
  }
}

}  // namespace

int main() {
  test_json();
  test_wav();
  test_safetensors();
  test_text();
  test_windows();
  std::remove(kFile.c_str());
  if (failures == 0) std::printf("all checks passed\n");
  return failures != 0;
}
