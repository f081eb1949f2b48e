// The tables of implementations, and the choice among their rows.
#pragma once

#include <atomic>
#include <string>

#include "lora_kernels/implementations.h"

namespace lora_kernels {

// Rows of one operator in order of preference, with how often each has run. Implementation has `name` and
// `required_isa`.
template <class Implementation>
struct Table {
  static constexpr int kMost = 8;
  const char* op;
  int count;
  const Implementation* rows[kMost];
  mutable std::atomic<int64_t> runs[kMost] = {};

  void count_run(const Implementation* row) const {
    for (int i = 0; i < count; ++i)
      if (rows[i] == row) runs[i].fetch_add(1, std::memory_order_relaxed);
  }
};

// Why `required` cannot run on `device`; empty: it can.
std::string missing_isa(uint32_t required, const DeviceInfo& device);

// The row that a forced name means in this table: an operator without integer products has no row "avx2_vnni", and
// means "avx2" by it; one that does not compute in tiles means "avx512" by "amx"; one whose CUDA kernels use mma.sync
// alone means "cuda" by "cuda_mma".
template <class Implementation>
std::string forced_row(const Table<Implementation>& table) {
  const std::string forced = forced_implementation();
  for (int i = 0; i < table.count; ++i)
    if (forced == table.rows[i]->name) return forced;
  if (forced == "avx2_vnni") return "avx2";
  if (forced == "amx") return "avx512";
  return forced == "cuda_mma" ? "cuda" : forced;
}

// Appends a reason for every row that is passed over. With a forced name only that row is considered.
template <class Implementation>
Status select(const Table<Implementation>& table, const DeviceInfo& device, const Implementation** chosen) {
  const std::string forced = forced_row(table);
  std::string reasons;
  for (int i = 0; i < table.count; ++i) {
    const Implementation* row = table.rows[i];
    const std::string missing = missing_isa(row->required_isa, device);
    if (!forced.empty() && forced != row->name) {
      reasons += std::string("; ") + row->name + ": not the forced one";
    } else if (!missing.empty()) {
      reasons += std::string("; ") + row->name + ": " + missing;
    } else {
      *chosen = row;
      return {};
    }
  }
  return Status::unsupported(std::string(table.op) + ": no implementation can run" +
                             (forced.empty() ? "" : " (LORA_KERNELS_FORCE or force_implementation: " + forced + ")") +
                             reasons + ". Force another implementation, or none.");
}

// What every plan() is: a valid problem, an implementation for it, and that implementation's own choices.
template <class Implementation, class Problem, class Plan>
Status make_plan(const Table<Implementation>& table, const Status& valid, const Problem& problem,
                 const DeviceInfo& device, void (*Implementation::*configure)(const DeviceInfo&, Plan*), Plan* plan) {
  if (!valid.ok()) return valid;
  Status status = select(table, device, &plan->implementation);
  if (!status.ok()) return status;
  plan->problem = problem;
  (plan->implementation->*configure)(device, plan);
  return {};
}

template <class Implementation>
void report(const Table<Implementation>& table, const DeviceInfo& device, std::vector<ImplementationReport>* out) {
  const Implementation* chosen = nullptr;
  select(table, device, &chosen);
  for (int i = 0; i < table.count; ++i) {
    ImplementationReport row;
    row.op = table.op;
    row.name = table.rows[i]->name;
    row.reason = missing_isa(table.rows[i]->required_isa, device);
    row.available = row.reason.empty();
    row.selected = table.rows[i] == chosen;
    row.runs = table.runs[i].load(std::memory_order_relaxed);
    out->push_back(row);
  }
}

// One per operator, each beside its table.
void report_lora_linear(const DeviceInfo& device, std::vector<ImplementationReport>* out);
void report_int8_lora_linear(const DeviceInfo& device, std::vector<ImplementationReport>* out);
void report_kv_attention_step(const DeviceInfo& device, std::vector<ImplementationReport>* out);
void report_kv_pack(const DeviceInfo& device, std::vector<ImplementationReport>* out);
void report_kv_relative_step(const DeviceInfo& device, std::vector<ImplementationReport>* out);

}  // namespace lora_kernels
