#include "lora_kernels/implementations.h"

#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#endif

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "core/select.h"

namespace lora_kernels {
namespace {

// Guards the forced name. Reading it costs an uncontended lock per plan, nothing beside a kernel.
std::mutex mutex;
std::string& forced_name() {
  static std::string name = [] {
    const char* value = std::getenv("LORA_KERNELS_FORCE");
    return std::string(value ? value : "");
  }();
  return name;
}

struct NamedIsa {
  uint32_t bit;
  const char* name;
};
constexpr NamedIsa kNames[] = {
    {kIsaAvx2, "avx2"},
    {kIsaAvx512, "avx512"},
    {kIsaAvx512Vnni, "avx512_vnni"},
    {kIsaAvx512Bf16, "avx512_bf16"},
    {kIsaAvxVnni, "avx_vnni"},
    {kIsaAmxInt8, "amx_int8"},
    {kIsaAmxBf16, "amx_bf16"},
    {kIsaCuda, "cuda"},
};

#if defined(__x86_64__)
// Tile registers are 8 KB of every thread's state, which Linux (5.16 and later) keeps for processes that ask. Returns
// 0, or errno.
int ask_for_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 0 : errno;
#else
  return ENOSYS;
#endif
}
#endif

}  // namespace

Status force_implementation(const std::string& name) {
  bool known = name.empty();
  std::string names;
  std::string others;  // of other devices than this process's CPU, after its own
  for (const ImplementationReport& row : implementations(DeviceInfo())) {
    known = known || row.name == name;
    std::string& list = row.name.rfind("cuda", 0) == 0 ? others : names;
    if (list.find("'" + row.name + "'") == std::string::npos) list += "'" + row.name + "', ";
  }
  names += others;
  if (!known)
    return Status::invalid("force_implementation: name is '" + name + "'; expected " + names +
                           "or '' for the best one");
  std::lock_guard<std::mutex> lock(mutex);
  forced_name() = name;
  return {};
}

std::string forced_implementation() {
  std::lock_guard<std::mutex> lock(mutex);
  return forced_name();
}

std::string isa_names(uint32_t isa) {
  std::string text;
  for (const NamedIsa& entry : kNames)
    if (isa & entry.bit) text += (text.empty() ? "" : " ") + std::string(entry.name);
  return text.empty() ? "none" : text;
}

std::string missing_isa(uint32_t required, const DeviceInfo& device) {
  if (device.cuda.arch && !(required & kIsaCuda)) return "it runs on a CPU, and the operands are on a CUDA device";
  if (!device.cuda.arch && (required & kIsaCuda)) return "it runs on a CUDA device, and the operands are on a CPU";
  const uint32_t missing = required & ~device.isa;
  if (missing) return "this CPU lacks " + isa_names(missing);
  if ((required & (kIsaAmxInt8 | kIsaAmxBf16)) && device.tile_refusal)
    return std::string("the operating system refuses this process AMX's tile registers (arch_prctl: ") +
           std::strerror(device.tile_refusal) + "); it takes Linux 5.16 and alternate signal stacks of at least 12 KB";
  return "";
}

DeviceInfo on_cuda(const CudaDevice& cuda) {
  DeviceInfo device;
  device.isa = kIsaCuda;
  device.cuda = cuda;
  return device;
}

DeviceInfo host_device() {
  DeviceInfo device;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const long l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (l2 > 0) device.l2_bytes = l2;
#endif
#if defined(__x86_64__)
  __builtin_cpu_init();
  const auto has = [&](bool present, uint32_t bit) {
    if (present) device.isa |= bit;
  };
  has(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"), kIsaAvx2);
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  has(avx512, kIsaAvx512);
  has(avx512 && __builtin_cpu_supports("avx512vnni"), kIsaAvx512Vnni);
  has(avx512 && __builtin_cpu_supports("avx512bf16"), kIsaAvx512Bf16);
  unsigned a = 0, b = 0, c = 0, d = 0;  // sets that __builtin_cpu_supports of older compilers does not know
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    has(d >> 22 & 1, kIsaAmxBf16);
    has(d >> 25 & 1, kIsaAmxInt8);
  }
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) has((device.isa & kIsaAvx2) && (a >> 4 & 1), kIsaAvxVnni);
  if (device.isa & (kIsaAmxInt8 | kIsaAmxBf16)) {
    static const int refusal = ask_for_tiles();
    device.tile_refusal = refusal;
  }
  device.fast_bf16_dot = (device.isa & kIsaAvx512Bf16) && __builtin_cpu_is("amd");
#endif
  return device;
}

std::vector<ImplementationReport> implementations(const DeviceInfo& device) {
  std::vector<ImplementationReport> rows;
  report_lora_linear(device, &rows);
  report_int8_lora_linear(device, &rows);
  report_kv_attention_step(device, &rows);
  report_kv_pack(device, &rows);
  report_kv_relative_step(device, &rows);
  return rows;
}

}  // namespace lora_kernels
