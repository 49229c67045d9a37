// One thread pool of our own: OpenMP's would be torch's too, and its settings with it.
#pragma once
#include <cstdint>
#include <type_traits>

namespace urlfast {

int num_threads();
void set_num_threads(int n);  // n >= 1; takes effect at the next parallel_for

namespace detail {
// Calls task(context, i) once for every i in [0, parts), on the pool's threads and the caller's.
void run_parts(int64_t parts, void (*task)(void*, int64_t), void* context);
}  // namespace detail

// body(begin, end) over [0, size) in at most num_threads() contiguous parts of at least `grain`. Where a part begins
// depends on size, grain and num_threads() alone. Runs inline when one part is enough, or when another caller is using
// the pool. body must not throw. Safe to call from any thread, and after fork.
template <class Body>
void parallel_for(int64_t size, int64_t grain, Body&& body) {
  if (size <= 0) return;
  int64_t parts = grain > 0 ? size / grain : size;
  if (parts > num_threads()) parts = num_threads();
  if (parts <= 1) return body(int64_t(0), size);
  struct Context {
    std::remove_reference_t<Body>* body;
    int64_t size, parts;
  } context{&body, size, parts};
  detail::run_parts(
      parts,
      [](void* p, int64_t i) {
        auto* c = static_cast<Context*>(p);
        (*c->body)(c->size* i / c->parts, c->size * (i + 1) / c->parts);
      },
      &context);
}

}  // namespace urlfast
