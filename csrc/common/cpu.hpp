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

}  // namespace urlfast
