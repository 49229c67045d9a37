// Which instruction sets this build has, which this processor has, and the one in use.
#pragma once
#include <string>
#include <vector>

namespace urlfast {

// Ordered: a higher one is preferred. Kernels exist once per compiled set, each in its own namespace.
enum class Isa { baseline = 0, avx2 = 1, avx512 = 2, avx512vnni = 3 };

const char* isa_name(Isa isa);
std::vector<Isa> compiled_isas();
std::vector<Isa> available_isas();  // compiled, and this processor and operating system can run it
// The best available one, or the one URLFAST_ISA names. Throws std::invalid_argument, listing the available, for any
// other name.
Isa chosen_isa();

// Of kernels that are compiled for the first three: those of the chosen set, or of the one below it.
template <class Kernels>
const Kernels& pick(const Kernels& baseline, const Kernels& avx2, const Kernels& avx512) {
  const Isa isa = chosen_isa();
  return isa >= Isa::avx512 ? avx512 : isa == Isa::avx2 ? avx2 : baseline;
}
// Of the table `name` in each set's namespace.
#ifdef URLFAST_X86
#define URLFAST_PICK(name) ::urlfast::pick(baseline::name, avx2::name, avx512::name)
#else
#define URLFAST_PICK(name) (baseline::name)
#endif

}  // namespace urlfast
