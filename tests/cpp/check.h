// What the C++ tests need of a framework: a check that counts failures and says where, and buffers of exactly the size
// asked for, so that AddressSanitizer sees every access beyond their end.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>

#include "lora_kernels/types.h"

inline int failures = 0;

inline void check(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : count_(count) {
    data_.reset(static_cast<T*>(std::malloc(count ? static_cast<size_t>(count) * sizeof(T) : 1)));
  }
  // For workspace and packed weights, which are aligned to 64 bytes by contract.
  static Buffer aligned(int64_t count) {
    Buffer b(0);
    b.count_ = count;
    const size_t bytes = static_cast<size_t>(lora_kernels::round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    b.data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64)));
    return b;
  }
  T* get() { return data_.get(); }
  T& operator[](int64_t i) { return data_.get()[i]; }
  int64_t size() const { return count_; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  int64_t count_;
  std::unique_ptr<T, Free> data_;
};

inline std::mt19937& generator() {
  static std::mt19937 g(1);
  return g;
}

inline float normal() {
  static std::normal_distribution<float> distribution;
  return distribution(generator());
}

// bf16 by truncation and back: exact values for tests
inline uint16_t bf16_bits(float v) {
  uint32_t u;
  __builtin_memcpy(&u, &v, 4);
  return static_cast<uint16_t>(u >> 16);
}
inline float from_bf16_bits(uint16_t b) {
  const uint32_t u = static_cast<uint32_t>(b) << 16;
  float v;
  __builtin_memcpy(&v, &u, 4);
  return v;
}
