#include "common/cpu.hpp"

#include <cstdlib>
#include <cstring>

#include "common/check.hpp"

namespace urlfast {

const char* isa_name(Isa isa) {
  constexpr const char* names[] = {"baseline", "avx2", "avx512", "avx512vnni"};
  return names[int(isa)];
}

std::vector<Isa> compiled_isas() {
#ifdef URLFAST_X86
  return {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512vnni};
#else
  return {Isa::baseline};
#endif
}

static bool runs_here(Isa isa) {
#ifdef URLFAST_X86       // the builtins also ask the operating system for the registers' state
  if (isa == Isa::avx2)  // what -march=x86-64-v3 lets the compiler use
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt");
  if (isa == Isa::avx512)  // -march=x86-64-v4
    return runs_here(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  if (isa == Isa::avx512vnni) return runs_here(Isa::avx512) && __builtin_cpu_supports("avx512vnni");
#endif
  return isa == Isa::baseline;
}

std::vector<Isa> available_isas() {
  std::vector<Isa> out;
  for (Isa isa : compiled_isas())
    if (runs_here(isa)) out.push_back(isa);
  return out;
}

static Isa choose() {
  const std::vector<Isa> available = available_isas();
  const char* wanted = std::getenv("URLFAST_ISA");
  if (!wanted || !*wanted) return available.back();
  std::string names;
  for (Isa isa : available) {
    if (!std::strcmp(wanted, isa_name(isa))) return isa;
    names += std::string(names.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::invalid_argument(text("URLFAST_ISA: must name one of ", names, " on this processor, got '", wanted, "'"));
}

Isa chosen_isa() {
  static const Isa isa = choose();  // an exception leaves it unset, so that the next call says it again
  return isa;
}

}  // namespace urlfast
