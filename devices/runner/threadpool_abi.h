// The part of ExecuTorch's thread pool that this program calls. Its library exports these functions, but the wheel
// carries no header that declares them.
#pragma once

#include <cstddef>
#include <cstdint>

#include <executorch/runtime/core/function_ref.h>

namespace executorch::extension::threadpool {

// Only ever seen through the pointer that get_threadpool gives.
class ThreadPool {
  public:
    ThreadPool() = delete;
    std::size_t get_thread_count() const;
    bool _unsafe_reset_threadpool(std::uint32_t threads);  // unsafe: nothing may run meanwhile
    // Calls `task` with every number below `count`, on all threads, the calling one among them; returns after the last.
    void run(runtime::FunctionRef<void(std::size_t)> task, std::size_t count);
};

ThreadPool* get_threadpool();

}  // namespace executorch::extension::threadpool
