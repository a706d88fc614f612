// The part of ExecuTorch's thread pool that this program calls. Its library exports these functions, but the wheel
// carries no header that declares them.
#pragma once

#include <cstddef>
#include <cstdint>

#include <executorch/runtime/core/function_ref.h>

namespace executorch::extension {

namespace threadpool {

// Only ever seen through the pointer that get_threadpool gives.
class ThreadPool {
  public:
    ThreadPool() = delete;
    std::size_t get_thread_count() const;
    bool _unsafe_reset_threadpool(std::uint32_t threads);  // unsafe: nothing may run meanwhile
};

ThreadPool* get_threadpool();

}  // namespace threadpool

// Calls `task` for parts of [begin, end) on the threads of the pool, the calling one among them.
bool parallel_for(const std::int64_t begin, const std::int64_t end, const std::int64_t grain,
                  runtime::FunctionRef<void(std::int64_t, std::int64_t)> task);

}  // namespace executorch::extension
