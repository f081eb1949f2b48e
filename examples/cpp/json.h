// A reader of JSON (RFC 8259), as much of it as configuration files and safetensors headers need.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "files.h"

namespace transcribe {

class Json {
 public:
  enum class Kind { kNull, kBool, kNumber, kString, kArray, kObject };

  // `name` is what messages call the text.
  static Json parse(std::string_view text, const std::string& name);

  bool has(const std::string& key) const { return kind_ == Kind::kObject && members_.count(key) > 0; }
  const Json& at(const std::string& key) const {
    if (!has(key)) throw InputError(name() + ": expected a field '" + key + "', got none; export the model again");
    return members_.at(key);
  }
  int64_t integer() const { return expect(Kind::kNumber, "a number"), static_cast<int64_t>(number_); }
  const std::string& string() const { return expect(Kind::kString, "a string"), string_; }
  const std::vector<Json>& array() const { return expect(Kind::kArray, "an array"), elements_; }
  const std::map<std::string, Json>& object() const { return expect(Kind::kObject, "an object"), members_; }

  std::vector<int64_t> integers() const {
    std::vector<int64_t> found;
    for (const Json& element : array()) found.push_back(element.integer());
    return found;
  }
  std::vector<std::string> strings() const {
    std::vector<std::string> found;
    for (const Json& element : array()) found.push_back(element.string());
    return found;
  }

 private:
  friend class JsonReader;

  const std::string& name() const { return name_; }
  void expect(Kind kind, const char* what) const {
    if (kind_ != kind) throw InputError(name_ + ": expected " + what + ", got another value; export the model again");
  }

  std::string name_;  // the text's and the field's
  Kind kind_ = Kind::kNull;
  double number_ = 0;  // of a boolean too
  std::string string_;
  std::vector<Json> elements_;
  std::map<std::string, Json> members_;
};

class JsonReader {
 public:
  JsonReader(std::string_view text, const std::string& name) : text_(text), name_(name) {}

  Json document() {
    Json value = read(name_, 0);
    skip_space();
    if (at_ != text_.size()) fail("the end");
    return value;
  }

 private:
  static constexpr int kMostDepth = 64;  // deeper than any such file, and no stack overflows

  Json read(const std::string& name, int depth) {
    if (depth > kMostDepth) fail("fewer values within values");
    Json value;
    value.name_ = name;
    skip_space();
    const char first = peek();
    if (first == '{') {
      value.kind_ = Json::Kind::kObject;
      separated('}', [&] {
        skip_space();
        const std::string key = quoted();
        skip_space();
        take(':');
        value.members_[key] = read(name + ": " + key, depth + 1);
      });
    } else if (first == '[') {
      value.kind_ = Json::Kind::kArray;
      separated(']', [&] { value.elements_.push_back(read(name, depth + 1)); });
    } else if (first == '"') {
      value.kind_ = Json::Kind::kString;
      value.string_ = quoted();
    } else if (word("true") || word("false")) {
      value.kind_ = Json::Kind::kBool;
      value.number_ = first == 't';
    } else if (!word("null")) {
      value.kind_ = Json::Kind::kNumber;
      value.number_ = number();
    }
    return value;
  }

  template <class Element>
  void separated(char close, const Element& element) {
    ++at_;
    skip_space();
    if (peek() == close) {
      ++at_;
      return;
    }
    while (true) {
      element();
      skip_space();
      if (peek() == close) break;
      take(',');
    }
    ++at_;
  }

  double number() {
    const size_t end = text_.find_first_not_of("+-.0123456789eE", at_);
    const std::string digits(text_.substr(at_, end == std::string_view::npos ? end : end - at_));
    char* rest = nullptr;
    const double value = std::strtod(digits.c_str(), &rest);
    if (digits.empty() || *rest != '\0') fail("a value");
    at_ += digits.size();
    return value;
  }

  std::string quoted() {
    take('"');
    std::string found;
    while (peek() != '"') {
      const char c = text_[at_++];
      if (c != '\\') {
        found += c;
        continue;
      }
      const char escape = peek();
      ++at_;
      static constexpr char kFrom[] = "\"\\/bfnrt", kTo[] = "\"\\/\b\f\n\r\t";
      if (escape == 'u') {
        append_utf8(code_point(), &found);
      } else if (const char* place = std::strchr(kFrom, escape)) {
        found += kTo[place - kFrom];
      } else {
        fail("an escape");
      }
    }
    ++at_;
    return found;
  }

  uint32_t code_point() {
    const uint32_t high = four_digits();
    if (high < 0xd800 || high > 0xdbff) return high;
    if (!word("\\u")) fail("the second half of a surrogate pair");
    return 0x10000 + ((high - 0xd800) << 10) + (four_digits() - 0xdc00);
  }

  uint32_t four_digits() {
    const std::string digits(text_.substr(at_, 4));
    char* rest = nullptr;
    const uint32_t value = static_cast<uint32_t>(std::strtoul(digits.c_str(), &rest, 16));
    if (digits.size() != 4 || *rest != '\0') fail("four hexadecimal digits");
    at_ += 4;
    return value;
  }

  static void append_utf8(uint32_t c, std::string* text) {
    const auto tail = [&](int shift) { *text += static_cast<char>(0x80 | ((c >> shift) & 0x3f)); };
    if (c < 0x80) {
      *text += static_cast<char>(c);
    } else if (c < 0x800) {
      *text += static_cast<char>(0xc0 | (c >> 6));
      tail(0);
    } else if (c < 0x10000) {
      *text += static_cast<char>(0xe0 | (c >> 12));
      tail(6), tail(0);
    } else {
      *text += static_cast<char>(0xf0 | (c >> 18));
      tail(12), tail(6), tail(0);
    }
  }

  bool word(std::string_view expected) {
    if (text_.substr(at_, expected.size()) != expected) return false;
    at_ += expected.size();
    return true;
  }
  char peek() const {
    if (at_ >= text_.size()) fail("more");
    return text_[at_];
  }
  void take(char expected) {
    if (peek() != expected) fail(std::string(1, expected).c_str());
    ++at_;
  }
  void skip_space() {
    while (at_ < text_.size() && std::strchr(" \t\r\n", text_[at_])) ++at_;
  }
  [[noreturn]] void fail(const char* expected) const {
    throw InputError(name_ + ": expected JSON, with " + expected + " at byte " + std::to_string(at_) +
                     ", got something else; the file is damaged: export the model again");
  }

  std::string_view text_;
  std::string name_;
  size_t at_ = 0;
};

inline Json Json::parse(std::string_view text, const std::string& name) { return JsonReader(text, name).document(); }

}  // namespace transcribe
