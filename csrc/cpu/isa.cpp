// SPDX-License-Identifier: BSD-3-Clause
#include "cpu/isa.h"

#include "common/check.h"
#include "cpu/install.h"
#include "dispatch/registry.h"

namespace fa::cpu {
namespace {

struct Isa {
  const char* name;
  bool (*runs_here)();
  void (*install)(RegisteredKernel* kernels);
};

// Best first.
const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("fma");
     },
     avx512::install},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
     avx2::install},
#endif
    {"baseline", [] { return true; }, baseline::install},
};

void install(const Isa& isa) {
  isa.install(registry().kernels.data());
  registry().cpu_isa = isa.name;
}

bool install_best() {
#if defined(__x86_64__)
  __builtin_cpu_init();  // this runs before main, perhaps before the compiler's own set-up
#endif
  for (const Isa& isa : kIsas) {
    if (isa.runs_here()) {
      install(isa);
      return true;
    }
  }
  return false;
}

[[maybe_unused]] const bool installed = install_best();

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) {
    if (isa.runs_here()) {
      names.push_back(isa.name);
    }
  }
  return names;
}

void select_isa(const std::string& name) {
  for (const Isa& isa : kIsas) {
    if (name == isa.name && isa.runs_here()) {
      install(isa);
      return;
    }
  }
  throw Error(ErrorKind::kValue, concat("this machine has no CPU kernels for '", name, "'"));
}

}  // namespace fa::cpu
