// Devices that are not here and problems, as the tests of CUDA plans share them.
#pragma once

#include "check.h"
#include "lora_kernels/implementations.h"
#include "lora_kernels/int8_lora_linear.h"
#include "lora_kernels/lora_linear.h"

namespace lora_kernels {

inline CudaDevice device_of(int arch, int multiprocessors, double clock_ghz, double memory_gbs) {
  CudaDevice d;
  d.arch = arch;
  d.multiprocessors = multiprocessors;
  d.clock_hz = clock_ghz * 1e9;
  d.memory_bytes_per_second = memory_gbs * 1e9;
  d.shared_bytes = arch == 75 ? 64 << 10 : arch == 80 ? 163 << 10 : arch == 90 || arch == 100 ? 227 << 10 : 99 << 10;
  return d;
}

inline const CudaDevice kT4 = device_of(75, 40, 1.59, 320);
inline const CudaDevice kA100 = device_of(80, 108, 1.41, 1555);
inline const CudaDevice kA10 = device_of(86, 72, 1.7, 600);
inline const CudaDevice kL4 = device_of(89, 58, 2.04, 300);
inline const CudaDevice kH100 = device_of(90, 132, 1.755, 3350);
inline const CudaDevice kH200 = device_of(90, 132, 1.755, 4800);
inline const CudaDevice kB200 = device_of(100, 148, 1.85, 8000);
inline const CudaDevice k5090 = device_of(120, 170, 2.41, 1792);

inline LoraLinearProblem problem_of(int64_t rows, int64_t in, int64_t out, int64_t rank, int64_t adapters = 1) {
  LoraLinearProblem p;
  p.rows = rows;
  p.in_features = in;
  p.out_features = out;
  p.dtype = p.lora.dtype = DType::kFloat16;
  p.lora.adapters = rank > 0 ? adapters : 0;
  p.lora.max_rank = rank;
  p.lora.total_rank = rank * p.lora.adapters;
  if (adapters > 1) p.lora.groups = rows;
  return p;
}

inline Int8LoraLinearProblem int8_problem(int64_t rows, int64_t in, int64_t out, int64_t rank, int64_t adapters = 1) {
  Int8LoraLinearProblem p;
  const LoraLinearProblem same = problem_of(rows, in, out, rank, adapters);
  p.rows = rows;
  p.in_features = in;
  p.out_features = out;
  p.dtype = same.dtype;
  p.lora = same.lora;
  return p;
}

// As a library with machine code for sm_90a sees it.
inline CudaDevice with_wgmma(CudaDevice device) {
  device.wgmma = true;
  return device;
}
// And as one with machine code that was made for sm_90 or later does.
inline CudaDevice with_clusters(CudaDevice device) {
  device.clusters = true;
  return device;
}

}  // namespace lora_kernels

// Each in a file of its own.
void test_int8_plans();  // cuda_plan_int8.cpp
void test_kv_plans();    // cuda_plan_kv.cpp
