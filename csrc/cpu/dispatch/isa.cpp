#include "cpu/dispatch/isa.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>
#include <vector>

namespace mi_kernels {
namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool supported;
};

// From the most to the least demanding one.
std::vector<Isa> compiled_sets() {
  std::vector<Isa> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
#if defined(MI_HAVE_ISA_avx512) || defined(MI_HAVE_ISA_avx512bf16)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
#if defined(MI_HAVE_ISA_avx512bf16)
  sets.push_back({"avx512bf16", &avx512bf16::kernels, avx512 && __builtin_cpu_supports("avx512bf16")});
#endif
#if defined(MI_HAVE_ISA_avx512)
  sets.push_back({"avx512", &avx512::kernels, avx512});
#endif
#if defined(MI_HAVE_ISA_avx2)
  sets.push_back({"avx2", &avx2::kernels,
                  __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")});
#endif
  sets.push_back({"generic", &generic::kernels, true});
  return sets;
}

std::string joined_names(bool supported_only) {
  std::string names;
  for (const Isa& isa : compiled_sets())
    if (isa.supported || !supported_only) (names += names.empty() ? "" : ",") += isa.name;
  return names;
}

Isa select() {
  const char* wanted = std::getenv("MI_KERNELS_CPU_ISA");
  for (const Isa& isa : compiled_sets()) {
    if (wanted == nullptr || *wanted == '\0') {
      if (isa.supported) return isa;
    } else if (isa.supported && std::string(wanted) == isa.name) {
      return isa;
    }
  }
  STD_TORCH_CHECK(false, "MI_KERNELS_CPU_ISA: expected one of ", joined_names(true),
                  " (the instruction sets compiled in and supported by this CPU), got '", wanted, "'");
}

const Isa& selected() {
  static const Isa isa = select();
  return isa;
}

}  // namespace

const Kernels& selected_kernels() { return *selected().kernels; }

const char* describe_isa() {
  static const std::string text = joined_names(false) + ";" + joined_names(true) + ";" + selected().name;
  return text.c_str();
}

}  // namespace mi_kernels
