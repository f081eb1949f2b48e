// The activations of the epilogues against double precision: every value of fp16 and of bf16, and of fp32 one bit
// pattern in 1009 (a prime, so that all of a number's bits vary).
#include <cfloat>

#include "check.h"
#include "cuda/numbers.h"

using namespace lora_kernels;
using namespace lora_kernels::cuda;

namespace {

double exact_gelu(double x) { return 0.5 * x * std::erfc(-x * std::sqrt(0.5)); }
double exact_silu(double x) { return x * (x < 0 ? std::exp(x) : 1) / (1 + std::exp(-std::fabs(x))); }

struct Case {
  const char* name;
  float (*made)(float, Activation);
  Activation activation;
  double (*exact)(double);
  double relative;   // error of normal numbers
  double units;      // and below them, in the smallest number of fp32
  double vanishing;  // exact values up to this may be zero
};
const Case kCases[] = {
    {"gelu", activate<float>, Activation::kGelu, exact_gelu, 6.5e-7, 4, 0x1p-127},
    {"gelu of 16 bits", activate<__half>, Activation::kGelu, exact_gelu, 4e-5, 4e-5 * 0x1p23, 0x1p-127},
    {"silu", activate<float>, Activation::kSilu, exact_silu, 4e-7, 4, 0}};

struct Largest {
  double error = 0;
  float at = 0;
  void see(double e, float x) {
    if (e <= error || std::isnan(error)) return;  // NaN counts as the largest of all
    error = e;
    at = x;
  }
};

struct Errors {
  Largest relative, units;  // of normal numbers; below them, in units of the smallest number
};

void see(Errors& errors, const Case& c, float x) {
  if (!std::isfinite(x)) return;
  const double got = c.made(x, c.activation), want = c.exact(static_cast<double>(x)), off = std::fabs(got - want);
  if (std::fabs(want) >= FLT_MIN)
    errors.relative.see(off / std::fabs(want), x);
  else if (got != 0 || std::fabs(want) > c.vanishing)
    errors.units.see(off / 0x1p-149, x);
}

void expect(const Errors& errors, const Case& c, const char* values) {
  const auto text = [&](const char* what, const Largest& l) {
    return std::string(c.name) + ", " + values + ": " + what + " " + std::to_string(l.error * 1e9) + "e-9 at " +
           std::to_string(l.at);
  };
  check(errors.relative.error > 0 && errors.relative.error < c.relative, text("relative error", errors.relative));
  check(errors.units.error < c.units, text("units below the normal numbers", errors.units));
}

void test_special(const Case& c) {
  const auto of = [&](float x) { return c.made(x, c.activation); };
  const std::string name = c.name;
  check(std::isnan(of(NAN)) && std::isnan(of(-NAN)), name + " of NaN is NaN");
  check(of(INFINITY) == INFINITY && of(FLT_MAX) == FLT_MAX, name + " of what is large is that");
  check(of(-INFINITY) == 0.0f && of(-FLT_MAX) == 0.0f, name + " of what is far below zero is zero");
  check(of(0.0f) == 0.0f && of(-0.0f) == 0.0f, name + " of zero is zero");
}

}  // namespace

void test_activations() {
  for (const Case& c : kCases) {
    Errors f16, bf16, f32;
    for (uint32_t bits = 0; bits < 65536; ++bits) {
      see(f16, c, to_float(from_bits<__half>(bits)));
      see(bf16, c, __uint_as_float(bits << 16));
    }
    for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 1009)
      see(f32, c, __uint_as_float(static_cast<uint32_t>(bits)));
    expect(f16, c, "every fp16");
    expect(bf16, c, "every bf16");
    expect(f32, c, "fp32");
    test_special(c);
  }
  check(activate<float>(-3.5f, Activation::kNone) == -3.5f, "no activation changes nothing");
}
