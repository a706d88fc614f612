// Scaled dot-product attention of new tokens over a key-value cache: softmax found tile by tile as the keys are read
// once, several query heads on one key-value head, single precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace boa {

// All tensors are dense, row after row.
struct Attention {
    const float* query = nullptr;  // [queries, heads, head_size]
    const float* key = nullptr;    // [keys, kv_heads, head_size]
    const float* value = nullptr;  // [keys, kv_heads, head_size]
    const float* mask = nullptr;   // [queries, keys], added to the scores; may be null
    float* out = nullptr;          // [queries, heads, head_size]
    std::int64_t queries = 0;
    std::int64_t keys = 0;
    std::int64_t heads = 0;
    std::int64_t kv_heads = 0;
    std::int64_t head_size = 0;
    std::int64_t start = 0;  // position of the first query among the keys
    bool causal = false;     // a query sees the keys up to its own position
    float scale = 1;
};

constexpr std::int64_t kTile = 64;      // keys in a tile at most
constexpr std::int64_t kRows = 96;      // rows that a task aims at: enough to use a tile of keys many times
constexpr std::int64_t kManyRows = 12;  // from here on a tile is copied: keys transposed, values side by side

// Keys in a tile: a multiple of every vector's length, so that they or their values fill half of a first-level cache.
inline std::int64_t tile_width(std::int64_t head_size) {
    return std::clamp<std::int64_t>(4096 / head_size / 16 * 16, 16, kTile);
}

// What one task needs, kept between tasks of a thread.
struct Scratch {
    std::vector<float> queries, scores, transposed, values, sums, largest, totals;

    void resize(std::int64_t rows, std::int64_t depth) {
        queries.resize(static_cast<std::size_t>(rows * depth));
        scores.resize(static_cast<std::size_t>(rows * kTile));
        transposed.resize(static_cast<std::size_t>(depth * kTile));
        values.resize(static_cast<std::size_t>(depth * kTile));
        sums.assign(static_cast<std::size_t>(rows * depth), 0.0f);
        largest.assign(static_cast<std::size_t>(rows), -std::numeric_limits<float>::infinity());
        totals.assign(static_cast<std::size_t>(rows), 0.0f);
    }
};

}  // namespace boa

#if defined(__x86_64__)
#define BOA_NAMESPACE avx2
#define BOA_TARGET __attribute__((target("avx2,fma")))
#define BOA_LANES 8
#define BOA_COLUMNS 2
#include "attention_kernel.h"
#undef BOA_NAMESPACE
#undef BOA_TARGET
#undef BOA_LANES
#undef BOA_COLUMNS
#endif

#define BOA_NAMESPACE baseline
#define BOA_TARGET
#define BOA_LANES 4
#if defined(__aarch64__)
#define BOA_COLUMNS 4  // 32 registers
#else
#define BOA_COLUMNS 2
#endif
#include "attention_kernel.h"
#undef BOA_NAMESPACE
#undef BOA_TARGET
#undef BOA_LANES
#undef BOA_COLUMNS

namespace boa {

using Attend = void (*)(const Attention&, std::int64_t kv_head, std::int64_t first, std::int64_t last, Scratch&);

struct AttentionKernel {
    const char* name;
    Attend attend;
};

// The fastest version that this CPU runs.
inline AttentionKernel choose_attention() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {"avx2", avx2::attend};
    return {"sse2", baseline::attend};
#elif defined(__aarch64__)
    return {"neon", baseline::attend};
#else
    return {"baseline", baseline::attend};
#endif
}

// Queries of a task. It depends on nothing but the shapes, so that results do not depend on the number of threads.
inline std::int64_t queries_per_task(const Attention& a) {
    return std::max<std::int64_t>(1, kRows / (a.heads / a.kv_heads));
}

}  // namespace boa
