// Attention over one key-value head, for one instruction set. There is no include guard: a source file includes this
// once per instruction set, with these defined:
//   BOA_NAMESPACE  where the functions go
//   BOA_TARGET     the attribute that lets the compiler use the instructions; empty for the baseline
//   BOA_LANES      floats in a vector register
//   BOA_COLUMNS    vector registers per row of a block of results
//
// The vectors are the compiler's own, so that one text serves AVX2, SSE and NEON. Every function carries the attribute:
// vectors are lowered before functions are inlined into one another.

namespace boa::BOA_NAMESPACE {

typedef float Lanes __attribute__((vector_size(BOA_LANES * sizeof(float))));
typedef std::int32_t Bits __attribute__((vector_size(BOA_LANES * sizeof(std::int32_t))));

BOA_TARGET inline Lanes load(const float* from) {
    Lanes out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

BOA_TARGET inline void store(float* to, Lanes value) { std::memcpy(to, &value, sizeof value); }

BOA_TARGET inline float sum(Lanes value) {
    typedef float Four __attribute__((vector_size(4 * sizeof(float))));
    Four four;
    std::memcpy(&four, &value, sizeof four);
#if BOA_LANES == 8
    Four upper;
    std::memcpy(&upper, reinterpret_cast<const char*>(&value) + sizeof four, sizeof upper);
    four += upper;
#endif
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// e^x for x <= 0 to about one unit in the last place; 0 below the smallest normal number.
BOA_TARGET inline Lanes exponential(Lanes x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    constexpr float kLeast = -87.0f;
    const Bits normal = x > kLeast;
    const Lanes clamped = (Lanes)(((Bits)x & normal) | ((Bits)(Lanes{} + kLeast) & ~normal));
    const Lanes shifted = clamped * 1.44269504f + kRound;
    const Lanes whole = shifted - kRound;
    Lanes r = clamped - whole * 0.693359375f;  // ln 2 in two parts, the first of few bits
    r = r + whole * 2.12194440e-4f;
    Lanes p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return (Lanes)(((Bits)p + ((Bits)shifted << 23)) & normal);
}

// c[R][C vectors] += a[R][depth] b[depth][C vectors]
template <int R, int C>
BOA_TARGET inline void block(const float* a, std::int64_t lda, const float* b, std::int64_t ldb, float* c,
                             std::int64_t ldc, std::int64_t depth) {
    Lanes sums[R][C];
    for (int r = 0; r < R; ++r) {
        for (int i = 0; i < C; ++i) sums[r][i] = load(c + r * ldc + i * BOA_LANES);
    }
    for (std::int64_t k = 0; k < depth; ++k) {
        Lanes row[C];
        for (int i = 0; i < C; ++i) row[i] = load(b + k * ldb + i * BOA_LANES);
        for (int r = 0; r < R; ++r) {
            const float factor = a[r * lda + k];
            for (int i = 0; i < C; ++i) sums[r][i] += factor * row[i];
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int i = 0; i < C; ++i) store(c + r * ldc + i * BOA_LANES, sums[r][i]);
    }
}

template <int R>
BOA_TARGET inline void rows(const float* a, std::int64_t lda, const float* b, std::int64_t ldb, float* c,
                            std::int64_t ldc, std::int64_t depth, std::int64_t columns) {
    constexpr int kWide = BOA_COLUMNS * BOA_LANES;
    std::int64_t at = 0;
    for (; at + kWide <= columns; at += kWide) block<R, BOA_COLUMNS>(a, lda, b + at, ldb, c + at, ldc, depth);
    for (; at + BOA_LANES <= columns; at += BOA_LANES) block<R, 1>(a, lda, b + at, ldb, c + at, ldc, depth);
    for (; at < columns; ++at) {
        for (int r = 0; r < R; ++r) {
            float total = c[r * ldc + at];
            for (std::int64_t k = 0; k < depth; ++k) total += a[r * lda + k] * b[k * ldb + at];
            c[r * ldc + at] = total;
        }
    }
}

// c[count][columns] += a[count][depth] b[depth][columns]
BOA_TARGET inline void multiply(const float* a, std::int64_t lda, const float* b, std::int64_t ldb, float* c,
                                std::int64_t ldc, std::int64_t count, std::int64_t depth, std::int64_t columns) {
    std::int64_t r = 0;
    for (; r + 4 <= count; r += 4) rows<4>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth, columns);
    a += r * lda;
    c += r * ldc;
    switch (count - r) {
        case 3: return rows<3>(a, lda, b, ldb, c, ldc, depth, columns);
        case 2: return rows<2>(a, lda, b, ldb, c, ldc, depth, columns);
        case 1: return rows<1>(a, lda, b, ldb, c, ldc, depth, columns);
        default: return;
    }
}

// scores[R][K] = queries[R][depth] keys[K][depth]^T
template <int R, int K>
BOA_TARGET inline void dots(const float* queries, const float* keys, std::int64_t ldk, float* scores,
                            std::int64_t depth) {
    Lanes sums[R][K];
    for (int r = 0; r < R; ++r) {
        for (int k = 0; k < K; ++k) sums[r][k] = Lanes{};
    }
    const std::int64_t whole = depth / BOA_LANES * BOA_LANES;
    for (std::int64_t d = 0; d < whole; d += BOA_LANES) {
        Lanes query[R];
        for (int r = 0; r < R; ++r) query[r] = load(queries + r * depth + d);
        for (int k = 0; k < K; ++k) {
            const Lanes key = load(keys + k * ldk + d);
            for (int r = 0; r < R; ++r) sums[r][k] += key * query[r];
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int k = 0; k < K; ++k) scores[r * kTile + k] = sum(sums[r][k]);
    }
    for (std::int64_t d = whole; d < depth; ++d) {
        for (int r = 0; r < R; ++r) {
            for (int k = 0; k < K; ++k) scores[r * kTile + k] += keys[k * ldk + d] * queries[r * depth + d];
        }
    }
}

// The keys come from main memory and each is used once, in steps too long for a CPU to foresee. So the next ones are
// asked for in time, and the values that will be wanted after the scores.
template <int K>
BOA_TARGET inline void prefetch(const float* keys, const float* values, std::int64_t stride, std::int64_t depth) {
    constexpr std::int64_t kAhead = 8;
    constexpr std::int64_t kLine = 16;
    for (std::int64_t k = 0; k < K; ++k) {
        for (std::int64_t d = 0; d < depth; d += kLine) {
            __builtin_prefetch(keys + (k + kAhead) * stride + d);
            __builtin_prefetch(values + k * stride + d);
        }
    }
}

template <int R, int K>
BOA_TARGET inline void score_rows(const float* queries, const float* keys, const float* values, std::int64_t ldk,
                                  float* scores, std::int64_t key_count, std::int64_t depth) {
    std::int64_t j = 0;
    for (; j + K <= key_count; j += K) {
        prefetch<K>(keys + j * ldk, values + j * ldk, ldk, depth);
        dots<R, K>(queries, keys + j * ldk, ldk, scores + j, depth);
    }
    for (; j < key_count; ++j) dots<R, 1>(queries, keys + j * ldk, ldk, scores + j, depth);
}

// Few rows: they stay in registers, as many as there are, while the keys go by.
BOA_TARGET inline void score_few(const float* queries, const float* keys, const float* values, std::int64_t ldk,
                                 float* scores, std::int64_t count, std::int64_t key_count, std::int64_t depth) {
    std::int64_t r = 0;
    for (; r + 4 <= count; r += 4) {
        score_rows<4, 2>(queries + r * depth, keys, values, ldk, scores + r * kTile, key_count, depth);
    }
    queries += r * depth;
    scores += r * kTile;
    switch (count - r) {
        case 3: return score_rows<3, 4>(queries, keys, values, ldk, scores, key_count, depth);
        case 2: return score_rows<2, 4>(queries, keys, values, ldk, scores, key_count, depth);
        case 1: return score_rows<1, 4>(queries, keys, values, ldk, scores, key_count, depth);
        default: return;
    }
}

// Many rows share a tile of keys, so transposing it first pays: the vectors then run over the keys.
BOA_TARGET inline void score_many(const float* queries, const float* keys, std::int64_t ldk, float* transposed,
                                  float* scores, std::int64_t count, std::int64_t key_count, std::int64_t depth,
                                  std::int64_t width) {
    for (std::int64_t j = 0; j < key_count; ++j) {
        for (std::int64_t d = 0; d < depth; ++d) transposed[d * width + j] = keys[j * ldk + d];
    }
    for (std::int64_t j = key_count; j < width; ++j) {
        for (std::int64_t d = 0; d < depth; ++d) transposed[d * width + j] = 0.0f;
    }
    std::fill(scores, scores + count * kTile, 0.0f);
    multiply(queries, depth, transposed, width, scores, kTile, count, depth, width);
}

// One row of a tile: scores become weights relative to the row's largest score so far. Gives the factor by which what
// was summed up before has to shrink.
BOA_TARGET inline float weigh(float* scores, std::int64_t key_count, float* largest, float* total) {
    const float none = -std::numeric_limits<float>::infinity();
    const std::int64_t padded = (key_count + BOA_LANES - 1) / BOA_LANES * BOA_LANES;
    for (std::int64_t j = key_count; j < padded; ++j) scores[j] = none;
    Lanes most = load(scores);
    for (std::int64_t j = BOA_LANES; j < padded; j += BOA_LANES) {
        const Lanes next = load(scores + j);
        const Bits larger = next > most;
        most = (Lanes)(((Bits)next & larger) | ((Bits)most & ~larger));
    }
    float now = *largest;
    for (int i = 0; i < BOA_LANES; ++i) now = most[i] > now ? most[i] : now;
    if (now == none) {  // nothing seen yet that may be attended to
        std::fill(scores, scores + padded, 0.0f);
        return 1.0f;
    }
    Lanes sums = {};
    for (std::int64_t j = 0; j < padded; j += BOA_LANES) {
        const Lanes weights = exponential(load(scores + j) - now);
        store(scores + j, weights);
        sums += weights;
    }
    const float shrink = *largest == none ? 0.0f : std::exp(*largest - now);
    *total = *total * shrink + sum(sums);
    *largest = now;
    return shrink;
}

// The rows are the query heads that share the key-value head, one after the other for each query.
BOA_TARGET inline void attend(const Attention& a, const Task& task, Scratch& scratch, Partial* partial) {
    const std::int64_t group = a.heads / a.kv_heads;
    const std::int64_t kv_head = task.kv_head;
    const std::int64_t first = task.first_query;
    const std::int64_t last = task.last_query;
    const std::int64_t count = (last - first) * group;
    const std::int64_t depth = a.head_size;
    const std::int64_t stride = a.kv_heads * depth;
    const std::int64_t key_count = std::min(task.last_key, a.causal ? a.start + last : a.keys);
    scratch.resize(count, depth);
    float* queries = scratch.queries.data();
    float* scores = scratch.scores.data();
    float* sums = scratch.sums.data();
    for (std::int64_t r = 0; r < count; ++r) {
        const float* query = a.query + ((first + r / group) * a.heads + kv_head * group + r % group) * depth;
        for (std::int64_t d = 0; d < depth; ++d) queries[r * depth + d] = query[d] * a.scale;
    }
    const std::int64_t width = tile_width(depth);
    for (std::int64_t tile = task.first_key; tile < key_count; tile += width) {
        const std::int64_t here = std::min(width, key_count - tile);
        const float* keys = a.key + tile * stride + kv_head * depth;
        const float* values = a.value + tile * stride + kv_head * depth;
        std::int64_t value_stride = stride;
        if (count < kManyRows) {
            score_few(queries, keys, values, stride, scores, count, here, depth);
        } else {
            score_many(queries, keys, stride, scratch.transposed.data(), scores, count, here, depth, width);
            // Rows that lie a power of two apart would push each other out of the cache.
            for (std::int64_t j = 0; j < here; ++j) {
                std::copy_n(values + j * stride, depth, scratch.values.data() + j * depth);
            }
            values = scratch.values.data();
            value_stride = depth;
        }
        for (std::int64_t r = 0; r < count; ++r) {
            const std::int64_t query = first + r / group;
            float* row = scores + r * kTile;
            if (a.mask != nullptr) {
                for (std::int64_t j = 0; j < here; ++j) row[j] += a.mask[query * a.keys + tile + j];
            }
            if (a.causal) {
                const std::int64_t seen = std::max<std::int64_t>(a.start + query + 1 - tile, 0);
                for (std::int64_t j = seen; j < here; ++j) row[j] = -std::numeric_limits<float>::infinity();
            }
            const float shrink = weigh(row, here, &scratch.largest[r], &scratch.totals[r]);
            if (shrink != 1.0f) {
                for (std::int64_t d = 0; d < depth; ++d) sums[r * depth + d] *= shrink;
            }
        }
        multiply(scores, kTile, values, value_stride, sums, depth, count, here, depth);
    }
    if (partial != nullptr) {
        std::copy_n(sums, count * depth, partial->sums);
        std::copy_n(scratch.largest.data(), count, partial->largest);
        std::copy_n(scratch.totals.data(), count, partial->totals);
        return;
    }
    for (std::int64_t r = 0; r < count; ++r) {
        float* out = a.out + ((first + r / group) * a.heads + kv_head * group + r % group) * depth;
        const float scale = scratch.totals[r] > 0 ? 1 / scratch.totals[r] : 0.0f;  // 0 where everything is masked
        for (std::int64_t d = 0; d < depth; ++d) out[d] = sums[r * depth + d] * scale;
    }
}

}  // namespace boa::BOA_NAMESPACE
