// ExecuTorch answers a failed call with a code and says why in its log. This turns both into one exception.
#pragma once

#include <unistd.h>

#include <cstdio>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include <executorch/runtime/core/error.h>
#include <executorch/runtime/core/result.h>
#include <executorch/runtime/platform/platform.h>

#include "events.h"

namespace boa {

namespace detail {

inline std::mutex log_mutex;
inline std::string first_error;  // the first is the cause, what follows reports its consequences

inline void keep(et_timestamp_t, et_pal_log_level_t level, const char*, const char*, std::size_t, const char* message,
                 std::size_t length) {
    if (level != kError && level != kFatal) return;
    const std::lock_guard<std::mutex> lock(log_mutex);
    if (first_error.empty()) first_error.assign(message, length);
}

// A check inside the runtime failed and it is about to abort the process.
[[noreturn]] inline void end_process() {
    std::string said;
    {
        const std::lock_guard<std::mutex> lock(log_mutex);
        said = first_error;
    }
    try {
        Event("error").add("message", "the runtime gave up: " + (said.empty() ? "no reason given" : said)).send();
    } catch (const std::exception&) {
        std::fprintf(stderr, "the runtime gave up: %s\n", said.c_str());
    }
    _exit(1);
}

}  // namespace detail

// From now on the runtime's messages come here. Call before the runtime is initialized.
inline void catch_messages() {
    executorch::runtime::register_pal(executorch::runtime::PalImpl::create(
        nullptr, detail::end_process, nullptr, nullptr, detail::keep, nullptr, nullptr, __FILE__));
}

// What the runtime has said since last asked.
inline std::string said() {
    const std::lock_guard<std::mutex> lock(detail::log_mutex);
    return std::exchange(detail::first_error, std::string());
}

inline void check(executorch::runtime::Error error, const std::string& what) {
    if (error == executorch::runtime::Error::Ok) return;
    const std::string reason = said();
    throw std::runtime_error(what + ": " + executorch::runtime::to_string(error) + (reason.empty() ? "" : ": " + reason));
}

template <typename T>
T take(executorch::runtime::Result<T> result, const std::string& what) {
    check(result.error(), what);
    return std::move(result.get());
}

}  // namespace boa
