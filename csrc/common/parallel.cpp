#include "common/parallel.hpp"

#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "common/cgroup.hpp"

namespace urlfast {
namespace {

// What the process's cgroups allow: quota over period, of the tightest; 0 where there is no limit.
int64_t cgroup_cpus() {
  double least = 0;
  for (const Cgroup& group : cgroups("cpu")) {
    double quota = -1, period = 0;
    if (group.unified) {
      std::ifstream in(group.folder + "cpu.max");  // both in one file
      std::string word;
      if (in >> word >> period && word != "max") quota = std::atof(word.c_str());
    } else {
      quota = cgroup_number(group.folder + "cpu.cfs_quota_us");
      period = cgroup_number(group.folder + "cpu.cfs_period_us");
    }
    if (quota > 0 && period > 0 && (least == 0 || quota / period < least)) least = quota / period;
  }
  return least > 0 ? std::max<int64_t>(1, int64_t(least + 0.5)) : 0;
}

int default_threads() {
  for (const char* name : {"URLFAST_NUM_THREADS", "OMP_NUM_THREADS"})
    if (const char* value = std::getenv(name))
      if (const int n = std::atoi(value); n > 0) return n;
  int64_t n = std::thread::hardware_concurrency();
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) n = CPU_COUNT(&set);
#endif
  if (const int64_t limit = cgroup_cpus()) n = std::min(n, limit);
  return int(std::max<int64_t>(1, n));
}

std::atomic<int> wanted{0};  // 0: not asked for yet

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  // False when another caller is inside: the pool serves one job at a time.
  bool run(int64_t parts, void (*task)(void*, int64_t), void* context) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy) return false;
    grow(num_threads() - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = task, context_ = context, parts_ = parts;
      next_.store(0, std::memory_order_relaxed);
      open_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work();
    {  // nothing is left: who has not begun by now need not, and on a busy machine is not waited for
      std::lock_guard<std::mutex> lock(mutex_);
      open_ = false;
    }
    for (int spins = 0; spins < kSpins && inside_.load(std::memory_order_acquire); ++spins) relax();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return inside_.load(std::memory_order_acquire) == 0; });
    return true;
  }

 private:
  static constexpr int kSpins = 2000;  // some ten microseconds: longer than a wake-up between two launches of one step

  void grow(int n) {
    while (int(workers_.size()) > n) {  // fewer asked for: end them all, the loop below starts what is wanted
      {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
        generation_.fetch_add(1, std::memory_order_release);
      }
      wake_.notify_all();
      for (std::thread& worker : workers_) worker.join();
      workers_.clear();
      stop_ = false;
    }
    try {
      while (int(workers_.size()) < n)
        workers_.emplace_back([this, seen = generation_.load()]() mutable { loop(seen); });
    } catch (const std::exception&) {  // the system gives no more of them, or no memory: those there are do the work
    }
  }

  void loop(uint64_t seen) {
    for (;;) {
      for (int spins = 0; spins < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spins) relax();
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
        seen = generation_.load(std::memory_order_acquire);
        if (stop_) return;
        if (!open_) continue;
        inside_.fetch_add(1, std::memory_order_relaxed);
      }
      work();
      std::lock_guard<std::mutex> lock(mutex_);
      if (inside_.fetch_sub(1, std::memory_order_acq_rel) == 1) done_.notify_one();
    }
  }

  void work() {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < parts_;) task_(context_, i);
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int> inside_{0};  // workers that take part in the job
  void (*task_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t parts_ = 0;
  bool open_ = false;  // the job may still be joined
  bool stop_ = false;
};

// Never destroyed: a thread of it may outlive main. After fork the child has none of the threads, so it starts a pool
// of its own.
std::atomic<Pool*> pool_pointer{nullptr};

Pool& pool() {
  if (Pool* existing = pool_pointer.load(std::memory_order_acquire)) return *existing;
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { pool_pointer.store(nullptr); }); });
  Pool* fresh = new Pool;
  Pool* expected = nullptr;
  if (pool_pointer.compare_exchange_strong(expected, fresh)) return *fresh;
  delete fresh;
  return *expected;
}

}  // namespace

int num_threads() {
  int n = wanted.load(std::memory_order_relaxed);
  if (n == 0) wanted.store(n = default_threads(), std::memory_order_relaxed);
  return n;
}

void set_num_threads(int n) { wanted.store(n, std::memory_order_relaxed); }

void detail::run_parts(int64_t parts, void (*task)(void*, int64_t), void* context) {
  if (!pool().run(parts, task, context))
    for (int64_t i = 0; i < parts; ++i) task(context, i);
}

}  // namespace urlfast
