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
constexpr std::int64_t kPart = 256;     // keys of a task of fewer rows than that

// Keys in a tile: a multiple of every vector's length, so that they or their values fill half of a first-level cache.
inline std::int64_t tile_width(std::int64_t head_size) {
    return std::clamp<std::int64_t>(4096 / head_size / 16 * 16, 16, kTile);
}

// A key-value head, the queries [first_query, last_query) and the keys [first_key, last_key).
struct Task {
    std::int64_t kv_head = 0;
    std::int64_t first_query = 0;
    std::int64_t last_query = 0;
    std::int64_t first_key = 0;
    std::int64_t last_key = 0;
};

// What a task makes of some of the keys, for each of its rows: to be joined with what others make of the rest.
struct Partial {
    float* sums = nullptr;     // [rows, head_size], weights times values
    float* largest = nullptr;  // [rows], the largest score
    float* totals = nullptr;   // [rows], the sum of the weights, which are relative to the largest score
};

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

// Without `partial`, the task has all keys of its queries and writes the results.
using Attend = void (*)(const Attention&, const Task&, Scratch&, Partial* partial);

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

// How attention falls into tasks, which may run in any order and at once; then `finish`. It depends on nothing but the
// shapes, so that results do not depend on the number of threads.
class Plan {
  public:
    explicit Plan(const Attention& a)
        : attention_(a),
          group_(a.heads / a.kv_heads),
          width_(std::max<std::int64_t>(1, kRows / group_)),
          blocks_((a.queries + width_ - 1) / width_),
          keys_(a.causal ? a.start + a.queries : a.keys),
          // Few rows have many keys each: without parts there would be no more tasks than key-value heads.
          parts_(a.queries * group_ < kManyRows ? std::max<std::int64_t>(1, (keys_ + kPart - 1) / kPart) : 1) {
        if (parts_ > 1) {
            const std::int64_t rows = a.queries * a.heads * parts_;
            partials_.resize(static_cast<std::size_t>(rows * (a.head_size + 2)));
        }
    }

    // Tasks that follow each other share what they read: one key-value head where there are many rows, one part of the
    // keys, whose heads lie beside each other in memory, where there are few.
    std::int64_t tasks() const { return attention_.kv_heads * blocks_ * parts_; }

    void run(Attend attend, std::int64_t index, Scratch& scratch) {
        Task task;
        if (parts_ == 1) {
            task.kv_head = index / blocks_;
            task.first_query = index % blocks_ * width_;
            task.last_query = std::min(task.first_query + width_, attention_.queries);
            task.last_key = keys_;
            return attend(attention_, task, scratch, nullptr);
        }
        task.kv_head = index % attention_.kv_heads;
        task.last_query = attention_.queries;
        task.first_key = index / attention_.kv_heads * kPart;
        task.last_key = std::min(task.first_key + kPart, keys_);
        Partial partial = at(task.kv_head, index / attention_.kv_heads);
        attend(attention_, task, scratch, &partial);
    }

    // Joins the parts, where there are several.
    void finish() {
        if (parts_ == 1) return;
        const std::int64_t depth = attention_.head_size;
        const std::int64_t rows = attention_.queries * group_;
        for (std::int64_t kv = 0; kv < attention_.kv_heads; ++kv) {
            for (std::int64_t r = 0; r < rows; ++r) {
                float largest = -std::numeric_limits<float>::infinity();
                for (std::int64_t p = 0; p < parts_; ++p) largest = std::max(largest, at(kv, p).largest[r]);
                float* out = attention_.out + (r / group_ * attention_.heads + kv * group_ + r % group_) * depth;
                std::fill_n(out, depth, 0.0f);
                float total = 0;
                for (std::int64_t p = 0; p < parts_; ++p) {
                    const Partial partial = at(kv, p);
                    if (partial.totals[r] == 0) continue;  // everything masked
                    const float weight = std::exp(partial.largest[r] - largest);
                    total += weight * partial.totals[r];
                    for (std::int64_t d = 0; d < depth; ++d) out[d] += weight * partial.sums[r * depth + d];
                }
                const float scale = total > 0 ? 1 / total : 0.0f;
                for (std::int64_t d = 0; d < depth; ++d) out[d] *= scale;
            }
        }
    }

  private:
    Partial at(std::int64_t kv_head, std::int64_t part) {
        const std::int64_t rows = attention_.queries * group_;
        float* base = partials_.data() + (kv_head * parts_ + part) * rows * (attention_.head_size + 2);
        return {base, base + rows * attention_.head_size, base + rows * (attention_.head_size + 1)};
    }

    const Attention& attention_;
    const std::int64_t group_, width_, blocks_, keys_, parts_;
    std::vector<float> partials_;
};

}  // namespace boa
